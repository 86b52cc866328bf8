// SPDX-License-Identifier: BSL-1.0
// A QEMU migrates to us over a socket and we migrate to a QEMU: TCP and unix, plain and by QEMU's tls-creds-x509 and
// tls-creds-psk; and each side refuses the other where the credentials don't fit.
#include "support/catch.hpp"
#include "support/certificates.hpp"
#include "support/counter.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/tls.hpp>

#include <chrono>
#include <future>
#include <string>
#include <vector>

using namespace vmstate::tests;
using namespace std::chrono_literals;
using vmstate::tls_credentials;
using vmstate::tls_endpoint;
using channel_pointer = std::unique_ptr<vmstate::duplex_channel>;

namespace {

constexpr std::size_t memory_size = 16 << 20;

/// Files for both sides of both kinds of TLS: x509/ has a server's and a client's certificate, psk/ has keys.psk.
struct credential_files {
    temporary_directory scratch;
    certificate_authority authority;
    std::filesystem::path x509 = subdirectory("x509");
    std::filesystem::path psk = subdirectory("psk");

    credential_files() {
        fill_x509(x509, authority);
        write_keys(psk, "qemu:5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e\n");
    }
    std::filesystem::path subdirectory(const std::string& name) const {
        const auto path = scratch / name;
        std::filesystem::create_directory(path);
        return path;
    }
    static void fill_x509(const std::filesystem::path& directory, certificate_authority& authority) {
        authority.write(directory);
        authority.issue({}).write(directory, "server");
        authority.issue({.name = "source", .alternative_names = {}, .purpose = "clientAuth"}).write(directory, "client");
    }
    std::filesystem::path of(const std::string& security) const { return scratch / security; }
};

std::string text_of(tls_endpoint endpoint) { return endpoint == tls_endpoint::client ? "client" : "server"; }

/// QEMU's -object for credentials called tls0.
std::vector<std::string> qemu_credentials(
    const std::string& security, const std::filesystem::path& directory, tls_endpoint endpoint) {
    if (security == "plain") return {};
    std::string object =
        "tls-creds-" + security + ",id=tls0,dir=" + directory.string() + ",endpoint=" + text_of(endpoint);
    if (security == "x509") object += ",verify-peer=on";
    if (security == "psk" && endpoint == tls_endpoint::client) object += ",username=qemu";
    return {"-object", object};
}
void use_credentials(qemu& machine, const std::string& security) {
    if (security == "plain") return;
    machine.execute("migrate-set-parameters", {{"tls-creds", "tls0"}, {"tls-hostname", "localhost"}});
}

vmstate::result<tls_credentials> our_credentials(
    const std::string& security, const std::filesystem::path& directory, tls_endpoint endpoint) {
    return security == "psk" ? tls_credentials::psk(directory, endpoint) : tls_credentials::x509(directory, endpoint);
}
/// Nothing here may wait for ever.
vmstate::result<channel_pointer> serve(
    vmstate::socket_listener& listener, const std::string& security, const std::filesystem::path& directory) {
    listener.set_timeout(60s);
    auto accepted = listener.accept();
    if (!accepted) return accepted;
    (*accepted)->set_timeout(60s);
    if (security == "plain") return accepted;
    const auto credentials = our_credentials(security, directory, tls_endpoint::server);
    if (!credentials) return credentials.error();
    return vmstate::tls_server(std::move(*accepted), *credentials);
}
vmstate::result<channel_pointer> reach(
    const std::string& uri, const std::string& security, const std::filesystem::path& directory) {
    auto connected = vmstate::connect(uri, {.timeout = 60s});
    if (!connected) return connected;
    (*connected)->set_timeout(60s);
    if (security == "plain") return connected;
    const auto credentials = our_credentials(security, directory, tls_endpoint::client);
    if (!credentials) return credentials.error();
    return vmstate::tls_client(std::move(*connected), *credentials, "localhost");
}

/// Declared behind the future of a thread that accepts: a test that fails doesn't wait for that thread.
struct cancel_at_end {
    vmstate::socket_listener& listener;
    ~cancel_at_end() { listener.cancel(); }
};

/// A URI to listen on, of either kind.
std::string listening_uri(const std::string& transport, const temporary_directory& directory, const char* name) {
    return transport == "unix" ? "unix:" + (directory / name).string() : "tcp:127.0.0.1:0";
}

/// A QEMU that listens: started with -incoming defer, since its credentials have to be told first. Gives the URI.
std::string listen_on(qemu& destination, const std::string& uri, const std::string& security) {
    use_credentials(destination, security);
    destination.execute("migrate-incoming", {{"uri", uri}});
    if (uri.starts_with("unix:")) return uri;
    const auto state = destination.execute("query-migrate").as_object();
    const auto& address = state.at("socket-address").as_array().at(0).as_object();
    return "tcp:" + std::string(address.at("host").as_string()) + ":" + std::string(address.at("port").as_string());
}

qemu_options with(qemu_options options, std::vector<std::string> arguments) {
    options.arguments.insert(options.arguments.end(), arguments.begin(), arguments.end());
    return options;
}

} // namespace

TEST_CASE("a guest goes from a QEMU over a socket to us, and over a socket to another QEMU") {
    VMSTATE_REQUIRE_QEMU();
    const std::string transport = GENERATE("tcp", "unix");
    const std::string security = GENERATE("plain", "x509", "psk");
    CAPTURE(transport, security);
    const credential_files files;
    const qemu_options options{.machine = "pc", .rom = guest_rom("counter")};

    qemu source(with(options, qemu_credentials(security, files.of(security), tls_endpoint::client)));
    source.wait_serial(lines(5), "5 lines");
    source.stop();
    const recorded_stream original = record(source); // says what there is to be carried
    replica ours(original);
    source.cont(); // or QEMU would say that it has migrated already
    source.wait_serial(lines(7), "7 lines");
    source.stop();
    const auto memory = source.memory(0, memory_size);
    const std::string before = source.serial();

    auto listener = vmstate::socket_listener::listen(listening_uri(transport, files.scratch, "to-us"));
    REQUIRE(message_of(listener) == "");
    auto loading = std::async(std::launch::async, [&]() -> std::string {
        auto in = serve(*listener, security, files.of(security));
        if (!in) return "connection: " + message_of(in);
        vmstate::load_options carrying = vmstate::carry_unknown();
        carrying.description = &original.description;
        if (const auto loaded = vmstate::load(ours.machine, **in, carrying); !loaded) return message_of(loaded);
        return message_of((*in)->close());
    });
    const cancel_at_end at_end{*listener};
    use_credentials(source, security);
    const auto outgoing = source.migrate(listener->uri());
    CHECK(loading.get() == "");
    CHECK(outgoing.error == "");
    REQUIRE(outgoing.completed);
    const auto& main_block = ours.memory.at("pc.ram");
    REQUIRE(main_block.size() == memory.size());
    // What a processor sees below 1 MiB is in part firmware and video.
    CHECK(difference(std::span(memory).first(0xa0000), std::span(main_block).first(0xa0000)) == "");
    CHECK(difference(std::span(memory).subspan(0x100000), std::span(main_block).subspan(0x100000)) == "");

    qemu destination(with(with(options, {"-incoming", "defer"}),
        qemu_credentials(security, files.of(security), tls_endpoint::server)));
    const std::string uri =
        listen_on(destination, listening_uri(transport, files.scratch, "to-qemu"), security);
    // A machine that has started says what QEMU's runs with.
    pc_devices::global_state_store(ours.devices.globalstate, pc_devices::run_state::paused);
    auto saving = std::async(std::launch::async, [&]() -> std::string {
        auto out = reach(uri, security, files.of(security));
        if (!out) return "connection: " + message_of(out);
        if (const auto saved = vmstate::save(ours.machine, **out); !saved) return message_of(saved);
        return message_of((*out)->close());
    });
    const auto incoming = destination.wait_incoming();
    CHECK(saving.get() == "");
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    CHECK(destination.status() == "paused");
    CHECK(difference(memory, destination.memory(0, memory_size)) == "");

    destination.cont();
    destination.wait_serial(lines(5), "5 more lines");
    destination.stop();
    const auto output = counter::parse_output(before + destination.serial()); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
    CHECK(counter::check_memory(destination.memory(0, memory_size)) == "");
}

TEST_CASE("a QEMU that has all of a cancelled migration says so, and has the guest") {
    VMSTATE_REQUIRE_QEMU();
    const std::string security = GENERATE("plain", "x509", "psk");
    CAPTURE(security);
    const credential_files files;
    const qemu_options options{.machine = "microvm", .rom = guest_rom("counter")};
    const recorded_stream original = [&] {
        qemu first(options);
        first.wait_serial(lines(3), "3 lines");
        return record(first);
    }();
    replica ours(original);
    REQUIRE(message_of(ours.load(original.bytes, &original.description)) == "");

    qemu destination(with(with(options, {"-incoming", "defer"}),
        qemu_credentials(security, files.of(security), tls_endpoint::server)));
    const std::string uri = listen_on(destination, "tcp:127.0.0.1:0", security);
    auto out = reach(uri, security, files.of(security));
    REQUIRE(message_of(out) == "");
    int starts = 0;
    vmstate::migration::guest guest{.stop = []() -> vmstate::result<void> { return {}; }, .start = [&]() -> vmstate::result<void> {
        ++starts;
        return {};
    }};
    vmstate::migration::source source(ours.machine, guest);
    // All has been sent: the output ends, and QEMU's last word is read all the same.
    source.observe([&](const vmstate::migration::status& at) {
        if (at.state == vmstate::migration::state::device && at.ram.downtime_bytes != 0) source.cancel();
    });
    REQUIRE(message_of(source.start(std::move(*out))) == "");
    CHECK(message_of(source.wait()) == "");
    CHECK(source.status().state == vmstate::migration::state::completed);
    CHECK(starts == 0);
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    if (destination.status() != "running") destination.cont();
    destination.wait_serial(lines(3), "3 more lines");
}

TEST_CASE("a QEMU whose credentials don't fit is refused, and its guest is still there") {
    VMSTATE_REQUIRE_QEMU();
    credential_files files;
    const auto theirs = files.subdirectory("theirs");
    std::string security = "x509";
    std::string reason;
    SECTION("a certificate of another authority") {
        certificate_authority stranger("somebody else");
        credential_files::fill_x509(theirs, stranger);
        files.authority.write(theirs); // so that it trusts us
        reason = "the peer's certificate is refused";
    }
    SECTION("no certificate") {
        files.authority.write(theirs);
        reason = "peer did not return a certificate";
    }
    SECTION("another key") {
        security = "psk";
        write_keys(theirs, "qemu:ffffffffffffffffffffffffffffffff\n");
        reason = "the peer's key for the user qemu is another one: ";
    }
    SECTION("another name") {
        security = "psk";
        write_keys(theirs, "qemu:5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e\n");
        write_keys(files.psk, "somebody:5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e\n");
        reason = "no key for the user qemu";
    }
    SECTION("none at all") {
        security = "plain";
        reason = "TLS handshake: the peer doesn't speak TLS: ";
    }
    auto credentials = qemu_credentials(security, theirs, tls_endpoint::client);
    // QEMU checks its own certificates first, and would not even start.
    if (security == "x509") credentials.back() += ",sanity-check=off";
    qemu source(with({.machine = "pc", .stopped = true}, credentials));
    use_credentials(source, security);
    // Without a return path a QEMU takes what fits into the socket's buffers for delivered.
    source.execute("migrate-set-capabilities",
        {{"capabilities", {{{"capability", "return-path"}, {"state", true}}}}});
    auto listener = vmstate::socket_listener::listen("tcp:127.0.0.1:0");
    REQUIRE(message_of(listener) == "");
    const std::string ours = security == "plain" ? "x509" : security;
    auto serving = std::async(
        std::launch::async, [&] { return message_of(serve(*listener, ours, files.of(ours))); });
    const cancel_at_end at_end{*listener};
    const auto outgoing = source.migrate(listener->uri());
    CHECK_THAT(serving.get(), contains(reason));
    CHECK_FALSE(outgoing.completed);
    source.cont();
    CHECK(source.status() == "running");
}

TEST_CASE("a QEMU that isn't who it should be is sent nothing, and one that refuses us is heard") {
    VMSTATE_REQUIRE_QEMU();
    credential_files files;
    const auto theirs = files.subdirectory("theirs");
    std::string security = "x509";
    std::string reason;
    bool refuses_us = false;
    SECTION("a certificate of another authority") {
        certificate_authority stranger("somebody else");
        credential_files::fill_x509(theirs, stranger);
        reason = "the peer's certificate is refused: ";
    }
    SECTION("an expired certificate") {
        credential_files::fill_x509(theirs, files.authority);
        files.authority.issue({.begin = -7200, .end = -3600}).write(theirs, "server");
        reason = "the peer's certificate is refused: certificate has expired";
    }
    SECTION("the certificate of another host") {
        credential_files::fill_x509(theirs, files.authority);
        files.authority.issue({.alternative_names = "DNS:elsewhere.example"}).write(theirs, "server");
        reason = "the peer's certificate is refused: hostname mismatch";
    }
    SECTION("another key") {
        security = "psk";
        write_keys(theirs, "qemu:ffffffffffffffffffffffffffffffff\n");
        reason = "the peer closed the connection"; // GnuTLS's servers say no more
    }
    SECTION("we have no certificate") {
        credential_files::fill_x509(theirs, files.authority);
        std::filesystem::remove(files.x509 / "client-cert.pem");
        std::filesystem::remove(files.x509 / "client-key.pem");
        refuses_us = true;
    }
    auto credentials = qemu_credentials(security, theirs, tls_endpoint::server);
    if (security == "x509") credentials.back() += ",sanity-check=off";
    qemu destination(with({.machine = "pc", .stopped = true, .arguments = {"-incoming", "defer"}}, credentials));
    const std::string uri = listen_on(destination, "tcp:127.0.0.1:0", security);
    auto out = reach(uri, security, files.of(security));
    if (!refuses_us) {
        REQUIRE(out.has_error());
        CHECK_THAT(out.error().message(), contains("TLS handshake: ") && contains(reason));
    } else {
        // QEMU looks at our certificate when the handshake is over, and hangs up without a word.
        std::byte one[1];
        const std::span<std::byte> room(one);
        const bool ended = out.has_error() || (*out)->read_some({&room, 1}).has_error();
        CHECK(ended);
    }
}
