// SPDX-License-Identifier: BSL-1.0
// TLS over sockets, between two of ours: who is let in, who is refused and with what words, and that both directions work
// at the same time. With QEMU at the other end: tests/interop/sockets_test.cpp.
#include <support/bytes.hpp>
#include <support/catch.hpp>
#include <support/certificates.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/tls.hpp>

#include <sys/socket.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <future>
#include <optional>
#include <set>
#include <stop_token>
#include <string>
#include <thread>
#include <vector>

using namespace vmstate;
using namespace std::chrono_literals;
using namespace vmstate::tests;
using channel_pointer = std::unique_ptr<duplex_channel>;

namespace {

/// A channel that counts the bytes which were written to it, and keeps the timeout that it was given last.
class counting_channel final : public duplex_channel {
public:
    explicit counting_channel(channel_pointer inner, std::shared_ptr<std::atomic<std::size_t>> written,
        std::chrono::milliseconds* timeout = nullptr)
        : inner_(std::move(inner)), written_(std::move(written)), timeout_(timeout) {}
    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        for (const auto part : parts) *written_ += part.size();
        return inner_->writev(parts);
    }
    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        return inner_->read_some(parts);
    }
    result<void> close() override { return inner_->close(); }
    void shutdown() noexcept override { inner_->shutdown(); }
    result<channel_pointer> get_return_path() override { return inner_->get_return_path(); }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override {
        if (timeout_ != nullptr) *timeout_ = timeout;
        return inner_->set_timeout(timeout);
    }

private:
    channel_pointer inner_;
    std::shared_ptr<std::atomic<std::size_t>> written_;
    std::chrono::milliseconds* timeout_;
};

std::pair<channel_pointer, channel_pointer> socket_pair() {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    std::pair<channel_pointer, channel_pointer> both{
        std::make_unique<socket_channel>(unique_fd(ends[0])), std::make_unique<socket_channel>(unique_fd(ends[1]))};
    // Nobody here takes a minute; a test that would wait for ever is to fail instead.
    both.first->set_timeout(60s);
    both.second->set_timeout(60s);
    return both;
}

/// What the two sides of a handshake came to.
struct meeting {
    result<channel_pointer> client = error(errc::io);
    result<channel_pointer> server = error(errc::io);
};
meeting meet(const tls_credentials& client, const tls_credentials& server, const std::string& hostname = "localhost") {
    auto [near, far] = socket_pair();
    auto accepting = std::async(
        std::launch::async, [&server, &accepted = far] { return tls_server(std::move(accepted), server); });
    meeting outcome;
    outcome.client = tls_client(std::move(near), client, hostname);
    outcome.server = accepting.get();
    return outcome;
}

/// What the client hears of its refusal: in TLS 1.3 that is only at its first read or write.
std::string refusal_of(result<channel_pointer>& client) {
    if (!client) return client.error().message();
    std::byte one[1];
    return message_of(get_some(**client, one));
}

/// Good credentials of both sides.
struct x509_kit {
    temporary_directory scratch;
    certificate_authority authority;
    std::filesystem::path client_directory = scratch.subdirectory("client");
    std::filesystem::path server_directory = scratch.subdirectory("server");

    x509_kit() {
        authority.write(client_directory);
        authority.write(server_directory);
        authority.issue({}).write(server_directory, "server");
        authority.issue({.alternative_names = {}, .purpose = "clientAuth"}).write(client_directory, "client");
    }
    tls_credentials client(bool verify_peer = true) const {
        return tls_credentials::x509(client_directory, tls_endpoint::client, verify_peer).value();
    }
    tls_credentials server(bool verify_peer = true) const {
        return tls_credentials::x509(server_directory, tls_endpoint::server, verify_peer).value();
    }
};

struct psk_kit {
    temporary_directory scratch;
    std::filesystem::path client_directory = scratch.subdirectory("client");
    std::filesystem::path server_directory = scratch.subdirectory("server");

    psk_kit() {
        write_keys(server_directory, "alice:00112233445566778899aabbccddeeff\nqemu:0123456789ABCDEF0123456789abcdef\n");
        write_keys(client_directory, "# ours\r\nqemu:0123456789abcdef0123456789abcdef\r\n");
    }
    tls_credentials client(const std::string& username = {}) const {
        return tls_credentials::psk(client_directory, tls_endpoint::client, username).value();
    }
    tls_credentials server() const {
        return tls_credentials::psk(server_directory, tls_endpoint::server).value();
    }
};

void check_both_ways(meeting& both) {
    REQUIRE(message_of(both.client) == "");
    REQUIRE(message_of(both.server) == "");
    // Parts of all sizes, so that records are gathered, whole and cut.
    const std::vector<std::byte> all = pattern(500'000);
    std::vector<std::span<const std::byte>> parts;
    std::size_t cut = 0;
    for (const std::size_t size : std::array<std::size_t, 8>{1, 0, 8, 4096, 16'384, 16'385, 100'000, 3})
        parts.push_back(std::span(all).subspan(std::exchange(cut, cut + size), size));
    parts.push_back(std::span(all).subspan(cut));
    auto reading = std::async(std::launch::async, [&] { return get(**both.server, all.size()); });
    CHECK(message_of((*both.client)->writev(parts)) == "");
    CHECK(reading.get().value() == all);
    CHECK(message_of(put(**both.server, std::span(all).first(999))) == "");
    CHECK(get(**both.client, 999).value() == std::vector(all.begin(), all.begin() + 999));

    // The end is announced, and is an end.
    std::byte one[1];
    CHECK((*both.client)->close());
    CHECK(get_some(**both.server, one).value() == 0);
    CHECK((*both.server)->close());
    CHECK(message_of(put(**both.server, one)) == "input/output error: channel is closed");
}

} // namespace

TEST_CASE("two who trust each other talk both ways") {
    const x509_kit kit;
    meeting both = meet(kit.client(), kit.server(), GENERATE("localhost", "127.0.0.1", "::1"));
    check_both_ways(both);
}

TEST_CASE("two who share a key talk both ways") {
    const psk_kit kit;
    meeting both = meet(kit.client(), kit.server(), "");
    check_both_ways(both);
}

TEST_CASE("credentials serve any number of connections, over TCP as well, and leave no descriptor behind") {
    const auto count = [] {
        return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), std::filesystem::directory_iterator());
    };
    const x509_kit kit;
    const tls_credentials client = kit.client();
    const tls_credentials server = kit.server();
    const auto before = count();
    {
        auto listener = socket_listener::listen("tcp:127.0.0.1:0");
        REQUIRE(message_of(listener) == "");
        for (int i = 0; i < 3; ++i) {
            auto serving = std::async(std::launch::async, [&]() -> std::string {
                auto accepted = listener->accept();
                if (!accepted) return message_of(accepted);
                auto secured = tls_server(std::move(*accepted), server);
                if (!secured) return message_of(secured);
                const auto got = get(**secured, 100'000);
                return got && *got == pattern(100'000) ? message_of((*secured)->close()) : "lost: " + message_of(got);
            });
            auto connected = connect(listener->uri());
            REQUIRE(message_of(connected) == "");
            auto secured = tls_client(std::move(*connected), client, "127.0.0.1");
            REQUIRE(message_of(secured) == "");
            CHECK(message_of(put(**secured, pattern(100'000))) == "");
            CHECK(message_of((*secured)->close()) == "");
            CHECK(serving.get() == "");
        }
    }
    CHECK(count() == before);
}

TEST_CASE("a server that isn't who it should be is refused, with the reason, before anything is sent to it") {
    x509_kit kit;
    certificate_authority stranger("somebody else");
    const auto directory = kit.scratch.subdirectory("bad");
    kit.authority.write(directory);
    std::string hostname = "localhost";
    std::string reason;
    SECTION("of another authority") {
        stranger.issue({}).write(directory, "server");
        reason = "unable to get local issuer certificate";
    }
    SECTION("expired") {
        kit.authority.issue({.begin = -7200, .end = -3600}).write(directory, "server");
        reason = "certificate has expired";
    }
    SECTION("not valid yet") {
        kit.authority.issue({.begin = 3600, .end = 7200}).write(directory, "server");
        reason = "certificate is not yet valid";
    }
    SECTION("of another host") {
        kit.authority.issue({.alternative_names = "DNS:elsewhere.example"}).write(directory, "server");
        reason = "hostname mismatch";
    }
    SECTION("of another address") {
        kit.authority.issue({.alternative_names = "IP:192.0.2.1"}).write(directory, "server");
        hostname = "127.0.0.1";
        reason = "IP address mismatch";
    }
    SECTION("of a client") {
        kit.authority.issue({.purpose = "clientAuth"}).write(directory, "server");
        reason = "certificate purpose"; // "unsupported" in OpenSSL 3.0, "unsuitable" later
    }
    const auto server = tls_credentials::x509(directory, tls_endpoint::server);
    REQUIRE(message_of(server) == "");
    meeting both = meet(kit.client(), *server, hostname);
    REQUIRE(both.client.has_error());
    CHECK(both.client.error() == errc::io);
    CHECK_THAT(both.client.error().message(),
        contains("TLS handshake: the peer's certificate is refused: ") && contains(reason));
    // The server hears of it at once or, in TLS 1.3, at the latest when it reads.
    CHECK_THAT(refusal_of(both.server), contains("alert") || contains("closed"));
}

TEST_CASE("a client that isn't who it should be is refused, with the reason, and hears it") {
    x509_kit kit;
    const auto directory = kit.scratch.subdirectory("bad");
    kit.authority.write(directory);
    std::string here;
    std::string there;
    SECTION("of another authority") {
        certificate_authority("somebody else").issue({.purpose = "clientAuth"}).write(directory, "client");
        here = "the peer's certificate is refused: unable to get local issuer certificate";
        there = "unknown ca";
    }
    SECTION("expired") {
        kit.authority.issue({.purpose = "clientAuth", .begin = -7200, .end = -3600}).write(directory, "client");
        here = "the peer's certificate is refused: certificate has expired";
        there = "certificate expired";
    }
    SECTION("absent") {
        here = "peer did not return a certificate";
        there = "certificate required";
    }
    SECTION("of a server") {
        kit.authority.issue({}).write(directory, "client");
        here = "certificate purpose";
        there = "unsupported certificate";
    }
    SECTION("revoked") {
        const certificate revoked = kit.authority.issue({.purpose = "clientAuth"});
        revoked.write(directory, "client");
        kit.authority.write_revocation_list(kit.server_directory, &revoked);
        here = "the peer's certificate is refused: certificate revoked";
        there = "certificate revoked";
    }
    const auto client = tls_credentials::x509(directory, tls_endpoint::client);
    REQUIRE(message_of(client) == "");
    meeting both = meet(*client, kit.server());
    REQUIRE(both.server.has_error());
    CHECK(both.server.error() == errc::io);
    CHECK_THAT(both.server.error().message(), contains("TLS handshake: ") && contains(here));
    CHECK_THAT(refusal_of(both.client), contains(there));
}

TEST_CASE("a client that only writes hears why it was refused, too") {
    x509_kit kit;
    const auto directory = kit.scratch.subdirectory("bad");
    kit.authority.write(directory);
    const auto client = tls_credentials::x509(directory, tls_endpoint::client);
    REQUIRE(message_of(client) == "");
    meeting both = meet(*client, kit.server());
    CHECK_FALSE(both.server);
    REQUIRE(message_of(both.client) == "");
    const std::vector<std::byte> block = pattern(100'000);
    std::string refusal;
    for (int i = 0; i < 1000 && refusal.empty(); ++i) refusal = message_of(put(**both.client, block));
    CHECK_THAT(refusal, contains("certificate required"));
    CHECK_FALSE(put(**both.client, block));
}

TEST_CASE("a revocation list that doesn't name the client lets it in") {
    x509_kit kit;
    kit.authority.write_revocation_list(kit.server_directory, nullptr);
    meeting both = meet(kit.client(), kit.server());
    check_both_ways(both);
}

TEST_CASE("without verify_peer whoever comes is let in, if he takes us") {
    x509_kit kit;
    const auto directory = kit.scratch.subdirectory("nobody");
    kit.authority.write(directory);
    const auto nobody = tls_credentials::x509(directory, tls_endpoint::client);
    REQUIRE(message_of(nobody) == "");
    meeting one = meet(*nobody, kit.server(false));
    check_both_ways(one);
    certificate_authority("somebody else").write(kit.client_directory);
    CHECK_THAT(message_of(meet(kit.client(true), kit.server(false)).client), contains("certificate is refused"));
    meeting another = meet(kit.client(false), kit.server(false), "not.its.name");
    check_both_ways(another);
}

TEST_CASE("a client says whom it expects") {
    const x509_kit kit;
    auto [near, far] = socket_pair();
    const auto outcome = tls_client(std::move(near), kit.client(), "");
    REQUIRE(outcome.has_error());
    CHECK(outcome.error() == errc::invalid_argument);
    CHECK_THAT(outcome.error().message(), contains("host's name"));
}

TEST_CASE("a wrong key, a user nobody knows, and a peer with certificates are refused") {
    psk_kit kit;
    x509_kit certificates;
    SECTION("wrong key") {
        write_keys(kit.client_directory, "qemu:ffffffffffffffffffffffffffffffff\n");
        meeting both = meet(kit.client(), kit.server());
        REQUIRE(both.server.has_error());
        CHECK_THAT(both.server.error().message(),
            contains("TLS handshake: the peer's key for the user qemu is another one: ") && contains("binder"));
        CHECK_THAT(refusal_of(both.client), contains("the peer refuses us, and knows why: ") && contains("alert"));
    }
    SECTION("the key of another user") {
        write_keys(kit.client_directory, "alice:0123456789abcdef0123456789abcdef\n");
        meeting both = meet(kit.client("alice"), kit.server());
        REQUIRE(both.server.has_error());
        CHECK_THAT(both.server.error().message(), contains("the peer's key for the user alice is another one"));
        CHECK_THAT(refusal_of(both.client), contains("the peer refuses us, and knows why: ") && contains("alert"));
    }
    SECTION("a user nobody knows") {
        write_keys(kit.client_directory, "mallory:0123456789abcdef0123456789abcdef\n");
        meeting both = meet(kit.client("mallory"), kit.server());
        REQUIRE(both.server.has_error());
        CHECK_THAT(both.server.error().message(), contains("no key for the user mallory"));
        CHECK_THAT(refusal_of(both.client), contains("the peer refuses us, and knows why: ") && contains("alert"));
    }
    SECTION("a server with a certificate and no key") {
        meeting both = meet(kit.client(), certificates.server(false));
        REQUIRE(both.client.has_error());
        CHECK_THAT(both.client.error().message(), contains("TLS handshake: the peer's certificate is refused"));
    }
    SECTION("a client with a certificate and no key") {
        meeting both = meet(certificates.client(), kit.server());
        CHECK(both.server.has_error());
        CHECK(both.client.has_error());
    }
}

TEST_CASE("a peer without TLS is told by that name, at either side") {
    const x509_kit kit;
    const psk_kit keys;
    const bool pre_shared = GENERATE(false, true);
    CAPTURE(pre_shared);
    // The beginning of a migration stream.
    constexpr std::array<char, 12> text{'Q', 'E', 'V', 'M', 0, 0, 0, 3, 7, 0, 0, 0};
    const auto plain = std::as_bytes(std::span(text));
    std::string said;
    SECTION("a server's") {
        auto [near, far] = socket_pair();
        REQUIRE(message_of(put(*near, plain)) == "");
        said = message_of(tls_server(std::move(far), pre_shared ? keys.server() : kit.server()));
    }
    SECTION("a client's") {
        auto [near, far] = socket_pair();
        REQUIRE(message_of(put(*far, plain)) == "");
        said = message_of(tls_client(std::move(near), pre_shared ? keys.client() : kit.client(), "localhost"));
    }
    CHECK_THAT(said, contains("TLS handshake: the peer doesn't speak TLS: ") && contains("wrong version number"));
}

TEST_CASE("credentials that can't be used are refused by name") {
    x509_kit kit;
    const auto x509 = [&](tls_endpoint endpoint = tls_endpoint::server) {
        return message_of(tls_credentials::x509(kit.server_directory, endpoint));
    };
    const auto psk = [&](const std::string& username = {}) {
        return message_of(tls_credentials::psk(
            kit.server_directory, username.empty() ? tls_endpoint::server : tls_endpoint::client, username));
    };
    SECTION("no directory") {
        const auto none = tls_credentials::x509(kit.scratch / "none", tls_endpoint::client);
        CHECK_THAT(message_of(none), contains("none/ca-cert.pem: No such file or directory"));
    }
    SECTION("no key") {
        std::filesystem::remove(kit.server_directory / "server-key.pem");
        CHECK_THAT(x509(), contains("server-key.pem: No such file or directory"));
    }
    SECTION("a client's certificate without its key") {
        std::filesystem::copy_file(
            kit.client_directory / "client-cert.pem", kit.server_directory / "client-cert.pem");
        CHECK_THAT(x509(tls_endpoint::client), contains("client-key.pem: No such file or directory"));
    }
    SECTION("the key of another certificate") {
        std::filesystem::copy_file(kit.client_directory / "client-key.pem", kit.server_directory / "server-key.pem",
            std::filesystem::copy_options::overwrite_existing);
        CHECK_THAT(x509(), contains("server-key.pem: ") && contains("mismatch"));
    }
    SECTION("no certificate, but something else") {
        std::ofstream(kit.server_directory / "ca-cert.pem") << "hello";
        CHECK_THAT(x509(), contains("ca-cert.pem: "));
    }
    SECTION("no list, but something else") {
        std::ofstream(kit.server_directory / "ca-crl.pem") << "hello";
        CHECK_THAT(x509(), contains("ca-crl.pem: no certificate revocation list"));
    }
    SECTION("no file of keys") { CHECK_THAT(psk(), contains("keys.psk: No such file or directory")); }
    SECTION("lines that are none") {
        for (const char* line : {"qemu", "qemu:", "qemu:0", "qemu:0x12", ":1234", "qemu:12 34"}) {
            CAPTURE(line);
            write_keys(kit.server_directory, std::string("good:1234\n") + line + "\n");
            CHECK_THAT(psk(), contains("username:key in hexadecimal") && contains("line 2"));
        }
    }
    SECTION("a user without a key") {
        write_keys(kit.server_directory, "good:1234\n");
        CHECK(psk("good") == "");
        CHECK_THAT(psk("bad"), contains("a key of bad"));
    }
    SECTION("a server's username") {
        write_keys(kit.server_directory, "good:1234\n");
        const auto named = tls_credentials::psk(kit.server_directory, tls_endpoint::server, "good");
        CHECK_THAT(message_of(named), contains("no username on a server"));
    }
    SECTION("those of the other side") {
        auto [near, far] = socket_pair();
        CHECK_THAT(message_of(tls_client(std::move(near), kit.server(), "localhost")),
            contains("the credentials of a TLS client, found those of a server"));
        CHECK_THAT(message_of(tls_server(std::move(far), kit.client())), contains("of a TLS server"));
    }
}

TEST_CASE("TLS needs a channel with a way back") {
    class one_way final : public duplex_channel {
        result<void> writev(std::span<const std::span<const std::byte>>) override { return {}; }
        result<std::size_t> read_some(std::span<const std::span<std::byte>>) override { return std::size_t{0}; }
    };
    const x509_kit kit;
    CHECK(tls_server(std::make_unique<one_way>(), kit.server()).error() == errc::unsupported);
}

TEST_CASE("the return path is used while 64 MiB go forward through TLS") {
    const bool pre_shared = GENERATE(false, true);
    const x509_kit certificates;
    const psk_kit keys;
    meeting both = pre_shared ? meet(keys.client(), keys.server()) : meet(certificates.client(), certificates.server());
    REQUIRE(message_of(both.client) == "");
    REQUIRE(message_of(both.server) == "");
    auto source_return = (*both.client)->get_return_path();
    auto destination_return = (*both.server)->get_return_path();
    REQUIRE(message_of(source_return) == "");
    REQUIRE(message_of(destination_return) == "");

    constexpr std::size_t mebibyte = 1 << 20;
    const std::vector<std::byte> block = pattern(mebibyte);
    std::atomic<bool> arrived = false;
    auto receiver = std::async(std::launch::async, [&]() -> std::string {
        for (int i = 0; i < 64; ++i) {
            const auto got = get(**both.server, mebibyte);
            if (!got || *got != block) return "forward: " + message_of(got);
        }
        arrived = true;
        return "";
    });
    // Back go small messages all the while, by a thread of its own.
    auto sender = std::async(std::launch::async, [&]() -> std::string {
        const std::vector<std::byte> message = pattern(100);
        std::size_t count = 0;
        for (; count < 100 || !arrived; ++count)
            if (auto sent = put(**destination_return, message); !sent) return message_of(sent);
        return std::to_string(count);
    });
    std::atomic<std::size_t> heard = 0;
    auto listening = std::async(std::launch::async, [&]() -> std::string {
        const std::vector<std::byte> message = pattern(100);
        for (;;) {
            const auto got = get(**source_return, 100);
            if (!got) return message_of(got);
            if (got->empty()) return "";
            if (*got != message) return "damaged";
            ++heard;
        }
    });
    std::string sent;
    for (int i = 0; i < 64 && sent.empty(); ++i) sent = message_of(put(**both.client, block));
    CHECK(sent == "");
    CHECK(receiver.get() == "");
    const std::string messages = sender.get();
    CHECK((*both.server)->close());
    CHECK((*destination_return)->close()); // the last says goodbye
    CHECK(listening.get() == "");
    CHECK(std::to_string(heard) == messages);
}

TEST_CASE("shutdown from another thread ends a TLS read and a TLS write that wait") {
    const bool by_return_path = GENERATE(false, true);
    const x509_kit kit;
    meeting both = meet(kit.client(), kit.server());
    REQUIRE(message_of(both.client) == "");
    REQUIRE(message_of(both.server) == "");
    auto back = (*both.client)->get_return_path();
    REQUIRE(message_of(back) == "");
    auto writing = std::async(std::launch::async, [&] { return message_of(put(**both.client, pattern(16 << 20))); });
    auto reading = std::async(std::launch::async, [&] {
        std::byte one[1];
        return message_of(get_some(**back, one));
    });
    writing.wait_for(20ms);
    (by_return_path ? *back : *both.client)->shutdown();
    CHECK_THAT(writing.get(), contains("channel was shut down"));
    CHECK_THAT(reading.get(), contains("channel was shut down"));
    CHECK_THAT(message_of(put(**both.client, pattern(1))), contains("channel was shut down"));
}

TEST_CASE("a peer that is silent is not waited for longer than the timeout") {
    const x509_kit kit;
    SECTION("in the handshake") {
        auto [near, far] = socket_pair();
        near->set_timeout(30ms);
        CHECK_THAT(message_of(tls_client(std::move(near), kit.client(), "localhost")),
            contains("TLS handshake: read: timed out after 30 ms"));
    }
    SECTION("later") {
        meeting both = meet(kit.client(), kit.server());
        REQUIRE(message_of(both.client) == "");
        REQUIRE(message_of(both.server) == "");
        CHECK((*both.client)->set_timeout(30ms));
        std::byte one[1];
        CHECK_THAT(message_of(get_some(**both.client, one)), contains("read: timed out after 30 ms"));
        CHECK_THAT(message_of(put(**both.client, pattern(16 << 20))), contains("write: timed out after 30 ms"));
        // Half a record is out: nothing may follow it.
        CHECK_THAT(message_of(put(**both.client, one)), contains("an earlier write has failed"));
    }
}

TEST_CASE("a handshake ends when it is told to, and is bounded as a whole") {
    const x509_kit kit;
    const bool client = GENERATE(true, false);
    CAPTURE(client);
    auto [near, far] = socket_pair();
    const tls_credentials credentials = client ? kit.client() : kit.server();
    const auto shake = [&, &mine = near](const opening_options& how) {
        return client ? tls_client(std::move(mine), credentials, "localhost", how) : tls_server(std::move(mine), credentials, how);
    };
    SECTION("told to while it waits") {
        std::stop_source giving_up;
        auto shaking = std::async(std::launch::async, [&] { return message_of(shake({.stop = giving_up.get_token()})); });
        shaking.wait_for(20ms);
        giving_up.request_stop();
        CHECK_THAT(shaking.get(), contains("TLS handshake: cancelled"));
    }
    SECTION("told to before") {
        std::stop_source giving_up;
        giving_up.request_stop();
        CHECK_THAT(message_of(shake({.stop = giving_up.get_token()})), contains("TLS handshake: cancelled"));
    }
    SECTION("a peer that says a little all the time") {
        // A record of which there is always more to come.
        auto dripping = std::async(std::launch::async, [&, &peer = far] {
            const std::array<std::byte, 5> header{std::byte{0x16}, std::byte{3}, std::byte{3}, std::byte{0x3f}, std::byte{0xff}};
            if (!put(*peer, header)) return;
            for (const std::array<std::byte, 1> more{std::byte{2}}; put(*peer, more);) std::this_thread::sleep_for(5ms);
        });
        CHECK_THAT(message_of(shake({.timeout = 100ms})), contains("TLS handshake: ") && contains("timed out"));
        dripping.get();
    }
}

TEST_CASE("the bound of a handshake is not the channel's afterwards") {
    const x509_kit kit;
    auto [near, far] = socket_pair();
    std::chrono::milliseconds bound{-1};
    auto counted = std::make_unique<counting_channel>(std::move(near), std::make_shared<std::atomic<std::size_t>>(0), &bound);
    const tls_credentials server = kit.server();
    auto accepting = std::async(
        std::launch::async, [&server, &accepted = far] { return tls_server(std::move(accepted), server); });
    auto client = tls_client(std::move(counted), kit.client(), "localhost", {.timeout = 60s});
    CHECK(message_of(accepting.get()) == "");
    CHECK(message_of(client) == "");
    CHECK(bound == 0ms);
}

TEST_CASE("an end of the output over TLS is heard, and what the peer still says, too") {
    const x509_kit certificates;
    const psk_kit keys;
    const bool pre_shared = GENERATE(false, true);
    meeting both = pre_shared ? meet(keys.client(), keys.server()) : meet(certificates.client(), certificates.server());
    REQUIRE(message_of(both.client) == "");
    REQUIRE(message_of(both.server) == "");
    auto back = (*both.client)->get_return_path();
    REQUIRE(message_of(back) == "");
    REQUIRE(put(**both.client, pattern(10)));
    CHECK_FALSE((*both.server)->is_ended());
    (*both.client)->end_output();
    CHECK_THAT(message_of(put(**both.client, pattern(1))), contains("after the output's end"));
    CHECK((*both.server)->is_ended());
    CHECK(get(**both.server, 10).value() == pattern(10));
    CHECK(get(**both.server, 1).value().empty());
    REQUIRE(put(**both.server, pattern(100)));
    CHECK(get(**back, 100).value() == pattern(100));
    CHECK((*both.server)->close());
    CHECK(get(**back, 1).value().empty());
}

TEST_CASE("a connection that ends without a word of TLS is cut off, not at its end") {
    const x509_kit kit;
    meeting both = meet(kit.client(), kit.server());
    REQUIRE(message_of(both.client) == "");
    REQUIRE(message_of(both.server) == "");
    REQUIRE(put(**both.client, pattern(10)));
    both.client->reset(); // not closed
    CHECK(get(**both.server, 10).value() == pattern(10));
    std::byte one[1];
    const auto end = get_some(**both.server, one);
    REQUIRE(end.has_error());
    CHECK(end.error() == errc::truncated);
}

TEST_CASE("who doesn't speak TLS, or damages it, gets an error") {
    const x509_kit kit;
    SECTION("not TLS") {
        auto [near, far] = socket_pair();
        REQUIRE(put(*near, pattern(1000)));
        CHECK_THAT(message_of(tls_server(std::move(far), kit.server())), contains("TLS handshake: "));
    }
    SECTION("nothing") {
        auto [near, far] = socket_pair();
        near.reset();
        CHECK_THAT(message_of(tls_server(std::move(far), kit.server())), contains("the peer closed the connection"));
    }
    SECTION("plain bytes in the middle") {
        auto [near, far] = socket_pair();
        auto raw = near->get_return_path();
        REQUIRE(message_of(raw) == "");
        const tls_credentials server = kit.server();
        auto accepting = std::async(
            std::launch::async, [&server, &accepted = far] { return tls_server(std::move(accepted), server); });
        auto client = tls_client(std::move(near), kit.client(), "localhost");
        auto secured = accepting.get();
        REQUIRE(message_of(client) == "");
        REQUIRE(message_of(secured) == "");
        REQUIRE(put(**client, pattern(10)));
        REQUIRE(put(**raw, pattern(1000)));
        CHECK(get(**secured, 10).value() == pattern(10));
        std::byte one[1];
        CHECK_THAT(message_of(get_some(**secured, one)), contains("TLS read: "));
        CHECK_FALSE(get_some(**secured, one));
        CHECK_FALSE(put(**secured, one));
    }
}

TEST_CASE("small parts share records: what goes over the wire is little more than what was written") {
    const x509_kit kit;
    auto [near, far] = socket_pair();
    auto written = std::make_shared<std::atomic<std::size_t>>(0);
    auto counted = std::make_unique<counting_channel>(std::move(near), written);
    const tls_credentials server = kit.server();
    auto accepting = std::async(
        std::launch::async, [&server, &accepted = far] { return tls_server(std::move(accepted), server); });
    auto client = tls_client(std::move(counted), kit.client(), "localhost");
    auto secured = accepting.get();
    REQUIRE(message_of(client) == "");
    REQUIRE(message_of(secured) == "");
    const std::vector<std::byte> all = pattern(1'000'000);
    std::vector<std::span<const std::byte>> parts;
    for (std::size_t i = 0; i < all.size(); i += 8) parts.push_back(std::span(all).subspan(i, 8));
    const std::size_t before = *written;
    auto reading = std::async(std::launch::async, [&] { return get(**secured, all.size()); });
    REQUIRE(message_of((*client)->writev(parts)) == "");
    CHECK(reading.get().value() == all);
    CHECK(*written - before < all.size() + all.size() / 100);
}
