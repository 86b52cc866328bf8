// SPDX-License-Identifier: BSL-1.0
//
// vmstate-park: takes a virtual machine from a QEMU that migrates live, keeps it in a file, and gives it to another QEMU.
// No device is described here: those that a stream has are carried as they are, by the description in a stream that the
// same QEMU wrote to a file before.
#include <vmstate/machine/carry.hpp>
#include <vmstate/machine/configuration.hpp>
#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/machine/stream_walk.hpp>
#include <vmstate/machine/vmdesc_parse.hpp>
#include <vmstate/migrate.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/multifd_zlib.hpp>
#include <vmstate/ram/multifd_zstd.hpp>
#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/tls.hpp>

#include <CLI/CLI.hpp>

#include "ending_signals.hpp"
#include "parked_file.hpp"
#include "reader_of_guest.hpp"

#include <array>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

constexpr int exit_failed = 1;
constexpr int exit_usage = 2;

/// What a stream in a file says of the machine that wrote it.
struct schema {
    vmstate::machine_options options;
    vmstate::vmdesc description;
    std::vector<vmstate::stream_ram_block> blocks; ///< of RAM, where they were asked for
};

class block_lister final : public vmstate::stream_visitor {
public:
    explicit block_lister(std::vector<vmstate::stream_ram_block>& blocks) : blocks_(blocks) {}
    void ram_block(const vmstate::stream_ram_block& block, std::size_t) override { blocks_.push_back(block); }

private:
    std::vector<vmstate::stream_ram_block>& blocks_;
};

/// The blocks take a look at the whole file, and may be left out.
vmstate::result<schema> read_schema(const std::string& path, bool with_blocks = false) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return vmstate::error(vmstate::errc::io, "a file that can be read", path);
    const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const std::span<const std::byte> bytes = std::as_bytes(std::span(text));

    schema found;
    vmstate::memory_reader in(bytes);
    if (in.get_be32() != vmstate::stream_magic || in.get_be32() != vmstate::stream_version || in.failed())
        return vmstate::error(vmstate::errc::not_a_stream, "a migration stream", path);
    if (in.peek(1) == 1 && *in.cursor() == static_cast<std::byte>(vmstate::section_type::configuration)) {
        in.skip(1);
        vmstate::result<vmstate::stream_configuration> configuration = vmstate::read_configuration(in);
        if (!configuration) return configuration.error();
        found.options.name = configuration->machine;
        found.options.target_page_bits = configuration->target_page_bits;
        found.options.capabilities = configuration->capabilities.value_or(std::vector<std::string>{});
        found.options.uuid = configuration->uuid;
    } else {
        found.options.send_configuration = false;
    }
    const vmstate::result<vmstate::vmdesc_location> location = vmstate::find_vmdesc(bytes);
    if (!location) return location.error();
    vmstate::result<vmstate::vmdesc> parsed = vmstate::parse_vmdesc(location->text_in(bytes), {}, location->offset);
    if (!parsed) return parsed.error();
    found.description = std::move(*parsed);
    if (found.description.page_size != 0) found.options.page_size = static_cast<std::size_t>(found.description.page_size);
    if (!with_blocks) return found;
    block_lister blocks(found.blocks);
    const vmstate::result<void> walked =
        vmstate::walk_stream(bytes, {.description = &found.description, .location = *location}, blocks);
    if (!walked) return walked.error();
    return found;
}

vmstate::load_options carried_by(const schema& known) {
    vmstate::load_options loading = vmstate::carry_unknown();
    loading.description = &known.description;
    return loading;
}

/// Where the certificates or keys for TLS are, in QEMU's files; no TLS without one.
struct tls_files {
    std::string x509;
    std::string psk;
    std::string hostname = "localhost";

    bool wanted() const { return !x509.empty() || !psk.empty(); }
    vmstate::result<vmstate::tls_credentials> credentials(vmstate::tls_endpoint endpoint) const {
        return x509.empty() ? vmstate::tls_credentials::psk(psk, endpoint) : vmstate::tls_credentials::x509(x509, endpoint);
    }
};

/// Each call waits for one more channel from the peer. Who has connected may take `handshake_timeout` for the handshake.
vmstate::channel_acceptor accept_tls(vmstate::socket_listener& listener, const vmstate::tls_credentials& credentials,
    std::chrono::milliseconds handshake_timeout) {
    return [=, &listener](const vmstate::opening_options& options) -> vmstate::result<std::unique_ptr<vmstate::input_channel>> {
        listener.set_timeout(options.timeout);
        const std::stop_callback end(options.stop, [&listener] { listener.cancel(); });
        vmstate::result<std::unique_ptr<vmstate::duplex_channel>> accepted = listener.accept();
        if (!accepted) return accepted.error();
        vmstate::result<std::unique_ptr<vmstate::duplex_channel>> secure = vmstate::tls_server(
            std::move(*accepted), credentials, {.timeout = handshake_timeout, .stop = options.stop});
        if (!secure) return secure.error();
        return std::unique_ptr<vmstate::input_channel>(std::move(*secure));
    };
}
vmstate::channel_connector connect_tls(const std::string& uri, const std::string& hostname, const vmstate::tls_credentials& credentials) {
    return [=](const vmstate::opening_options& options) -> vmstate::result<std::unique_ptr<vmstate::output_channel>> {
        vmstate::result<std::unique_ptr<vmstate::duplex_channel>> connected = vmstate::connect(uri, options);
        if (!connected) return connected.error();
        vmstate::result<std::unique_ptr<vmstate::duplex_channel>> secure =
            vmstate::tls_client(std::move(*connected), credentials, hostname, options);
        if (!secure) return secure.error();
        return std::unique_ptr<vmstate::output_channel>(std::move(*secure));
    };
}

/// multifd as the command line asks for it.
struct multifd_options {
    unsigned channels = 0;
    std::string compression = "none";

    void apply_to(vmstate::migration::parameters& parameters) const {
        parameters.multifd = channels != 0;
        parameters.multifd_channels = channels;
        if (compression == "zlib") parameters.multifd_compression = vmstate::multifd_zlib();
        if (compression == "zstd") parameters.multifd_compression = vmstate::multifd_zstd();
    }
};

/// As QEMU's -uuid takes it: 32 hexadecimal digits, with dashes or without.
std::optional<std::array<std::uint8_t, 16>> parse_uuid(const std::string& text) {
    std::array<std::uint8_t, 16> uuid{};
    std::size_t digits = 0;
    for (const char c : text) {
        if (c == '-') continue;
        const int value = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
        if (value < 0 || digits == 32) return std::nullopt;
        uuid[digits / 2] = static_cast<std::uint8_t>(uuid[digits / 2] << 4 | value);
        ++digits;
    }
    if (digits != 32) return std::nullopt;
    return uuid;
}

/// Machine types up to 8.0, whatever QEMU they run in, expect multifd's sync points where QEMU 8.0 had them. Of those whose
/// name has no version ("microvm") it isn't known; they are taken for new ones.
bool syncs_after_each_section(std::string_view machine_type) {
    const std::string_view version = machine_type.substr(machine_type.rfind('-') + 1);
    unsigned major = 0, minor = 0;
    const char* const end = version.data() + version.size();
    const auto [dot, wrong] = std::from_chars(version.data(), end, major);
    if (wrong != std::errc{} || dot == end || *dot != '.') return false;
    if (std::from_chars(dot + 1, end, minor).ec != std::errc{}) return false;
    return major < 8 || (major == 8 && minor == 0);
}

void say_where(const std::string& uri) {
    std::printf("waiting at %s\n", uri.c_str());
    std::fflush(stdout);
}

int complain(const std::string& what, const vmstate::error& failure) {
    std::fprintf(stderr, "vmstate-park: %s: %s\n", what.c_str(), failure.message().c_str());
    return exit_failed;
}

void say_what_moved(const vmstate::machine& machine, const vmstate::migration::status& last, std::chrono::milliseconds time) {
    std::size_t sections = 0;
    for (const auto& entry : machine.sections()) sections += entry->is_carried() ? 1u : 0u;
    std::printf("%s: %llu bytes, %zu device sections, in %lld ms\n", machine.options().name.c_str(),
        static_cast<unsigned long long>(last.ram.transferred), sections, static_cast<long long>(time.count()));
}

void say_who_waited(const park::reader_of_guest& readers, const vmstate::postcopy_fault_status& faults) {
    const std::uint64_t waits = std::accumulate(faults.latencies.begin(), faults.latencies.end(), std::uint64_t{0});
    const auto microseconds = [](std::chrono::nanoseconds time) { return static_cast<double>(time.count()) / 1000; };
    std::printf("postcopy: %u threads read %zu pages each, in random order, while they came, and each was whole;\n"
                "          they waited %llu times, %.0f us on average, at most %.1f ms\n",
        park::reader_of_guest::threads, readers.pages(), static_cast<unsigned long long>(waits),
        waits != 0 ? microseconds(faults.latency_total) / static_cast<double>(waits) : 0.0, microseconds(faults.latency_max) / 1000);
}

int receive(const std::string& uri, const std::string& file, const std::string& schema_file,
    const vmstate::migration::parameters& parameters, const tls_files& tls) {
    const vmstate::result<schema> known = read_schema(schema_file, parameters.postcopy_ram);
    if (!known) return complain(schema_file, known.error());

    // Postcopy takes memory that is there before the stream is.
    std::deque<vmstate::ram_memory> memory;
    vmstate::machine machine(known->options);
    std::vector<std::span<const std::byte>> blocks;
    for (const vmstate::stream_ram_block& block : known->blocks) {
        vmstate::result<vmstate::ram_memory> mapped = vmstate::ram_memory::anonymous(block.used_length);
        if (!mapped) return complain(block.name, mapped.error());
        blocks.push_back(memory.emplace_back(std::move(*mapped)).span());
        if (const auto added = machine.add_ram(block.name, memory.back()); !added) return complain(block.name, added.error());
    }
    if (parameters.postcopy_ram && machine.ram() != nullptr)
        if (const vmstate::result<void> can = vmstate::check_postcopy_support(*machine.ram()); !can)
            return complain("postcopy", can.error());

    // From here on there is something to clear away, and nothing keeps a signal from ending this before it is.
    const park::ending_signals signals;
    // What can't be kept has to be known before it is taken: first that the file can be made, and at the end that it is whole.
    vmstate::result<park::parked_file> kept = park::parked_file::create(file);
    if (!kept) return complain(file, kept.error());

    // A parked machine doesn't run: nothing to start. In postcopy somebody is to wait for its pages, as a guest would.
    park::reader_of_guest readers(blocks);
    vmstate::migration::guest nobody;
    nobody.accept = [&] { return kept->keep(machine); };
    std::atomic<bool> is_postcopy = false;
    nobody.start = [&]() -> vmstate::result<void> {
        if (parameters.postcopy_ram) readers.start();
        return {};
    };
    vmstate::migration::destination destination(machine, nobody, parameters, carried_by(*known));
    std::atomic<bool> is_interrupted = false;
    destination.observe([&](const vmstate::migration::status& at) {
        if (at.state == vmstate::migration::state::setup && is_interrupted.load()) return destination.cancel();
        if (at.state == vmstate::migration::state::setup && !destination.uri().empty()) say_where(destination.uri());
        if (at.state == vmstate::migration::state::postcopy_active) is_postcopy.store(true);
        // Half a machine is of no use to keep.
        if (at.state == vmstate::migration::state::postcopy_paused) destination.give_up();
    });
    const park::signal_watch watch(signals, [&] {
        if (!vmstate::migration::is_postcopy(destination.status().state)) {
            is_interrupted.store(true); // of a run that hasn't begun, too
            destination.cancel();
        } else if (is_interrupted.exchange(true)) {
            destination.give_up();
        } else {
            std::fprintf(stderr, "vmstate-park: the machine is here, and can't go back; a second signal loses it\n");
        }
    });
    const vmstate::result<void> arrived = [&]() -> vmstate::result<void> {
        if (!tls.wanted()) return destination.run(uri);
        vmstate::result<vmstate::tls_credentials> credentials = tls.credentials(vmstate::tls_endpoint::server);
        if (!credentials) return credentials.error();
        vmstate::result<vmstate::socket_listener> listener = vmstate::socket_listener::listen(uri);
        if (!listener) return listener.error();
        say_where(listener->uri());
        return destination.run(accept_tls(*listener, *credentials, parameters.peer_timeout));
    }();
    readers.join();
    if (!arrived) {
        kept->discard(); // its guest runs where it was
        return complain(uri, arrived.error());
    }
    if (is_postcopy.load()) {
        if (const std::size_t changed = readers.count_changed(); changed != 0)
            return complain(uri, vmstate::error(vmstate::errc::bad_ram, "pages that were whole when they were read",
                std::to_string(changed) + " that changed afterwards"));
        say_who_waited(readers, destination.status().postcopy.faults);
    }
    // Not while nobody had come.
    const vmstate::migration::status last = destination.status();
    say_what_moved(machine, last, last.total_time - last.setup_time);
    // The rest of its memory came after the machine was ours.
    if (is_postcopy.load())
        if (const vmstate::result<void> written = kept->keep(machine); !written) return complain(file, written.error());
    std::printf("parked in %s\n", file.c_str());
    if (!last.has_return_path) std::printf("the QEMU had no return-path on, and didn't wait for the file to be written\n");
    return EXIT_SUCCESS;
}

int send(const std::string& file, const std::string& uri, vmstate::migration::parameters parameters, const tls_files& tls,
    const std::string& multifd_sync) {
    const vmstate::result<schema> known = read_schema(file);
    if (!known) return complain(file, known.error());

    vmstate::machine machine(known->options);
    if (const vmstate::result<void> loaded = vmstate::load(machine, vmstate::open_input("file:" + file), carried_by(*known)); !loaded)
        return complain(file, loaded.error());
    vmstate::migration::guest nobody;
    parameters.multifd_flush_after_each_section =
        multifd_sync == "section" || (multifd_sync == "auto" && syncs_after_each_section(known->options.name));
    vmstate::migration::source source(machine, nobody, parameters);
    source.observe([&](const vmstate::migration::status& at) {
        if (at.state == vmstate::migration::state::postcopy_paused) static_cast<void>(source.give_up());
    });
    const vmstate::result<void> started = [&]() -> vmstate::result<void> {
        if (!tls.wanted()) return source.start(uri);
        vmstate::result<vmstate::tls_credentials> credentials = tls.credentials(vmstate::tls_endpoint::client);
        if (!credentials) return credentials.error();
        return source.start(connect_tls(uri, tls.hostname, *credentials));
    }();
    if (!started) return complain(uri, started.error());
    // Nobody writes its memory: there is nothing that precopy would be good for.
    if (parameters.postcopy_ram) static_cast<void>(source.start_postcopy());
    if (const vmstate::result<void> sent = source.wait(); !sent) return complain(uri, sent.error());
    const vmstate::migration::status last = source.status();
    say_what_moved(machine, last, last.total_time);
    return EXIT_SUCCESS;
}

} // namespace

int main(int argc, char** argv) {
    std::string uri;
    std::string file;
    std::string schema_file;
    vmstate::migration::parameters parameters;

    CLI::App app{"Takes a virtual machine from a QEMU that migrates live, keeps it in a file, and gives it to another QEMU.",
        "vmstate-park"};
    app.require_subcommand(1);
    CLI::App* const receiving = app.add_subcommand("receive", "Wait for a QEMU to migrate here, and keep what it sends");
    receiving->add_option("URI", uri, "Where to listen: unix:PATH or tcp:HOST:PORT; or to read: exec:COMMAND, fd:N, file:PATH")
        ->required();
    receiving->add_option("FILE", file, "Where to keep it")->required();
    receiving->add_option("--schema", schema_file,
                 "A stream that the same QEMU, with the same machine and devices, wrote to a file: it describes them")
        ->required();
    CLI::App* const sending = app.add_subcommand("send", "Migrate a kept machine to a QEMU that waits with -incoming");
    sending->add_option("FILE", file, "What was kept; or any stream that a QEMU wrote to a file")->required();
    sending->add_option("URI", uri, "Where that QEMU waits: unix:PATH, tcp:HOST:PORT")->required();
    sending->add_flag("--no-return-path", [&parameters](std::int64_t) { parameters.return_path = false; },
        "Don't ask it whether all was loaded");
    sending->add_option("--max-bandwidth", parameters.max_bandwidth, "Bytes per second, 0 for no limit");
    sending->add_option("--max-postcopy-bandwidth", parameters.max_postcopy_bandwidth,
        "The same in postcopy, of the pages that the guest doesn't wait for");
    std::string uuid;
    sending->add_option("--uuid", uuid, "With --multifd: the uuid that the QEMU was started with (-uuid), if it was")
        ->check([](const std::string& text) { return parse_uuid(text) ? std::string() : "32 hexadecimal digits, not " + text; }, "UUID");
    std::string multifd_sync = "auto";
    sending->add_option("--multifd-sync", multifd_sync,
               "When the QEMU expects the channels to be in step: after each section (as machine types up to 8.0 do), or once "
               "per round over the memory; auto goes by the machine type's version")
        ->check(CLI::IsMember({"auto", "section", "round"}));
    tls_files tls;
    multifd_options multifd;
    for (CLI::App* const either : {receiving, sending}) {
        CLI::Option* const x509 = either->add_option("--tls-x509", tls.x509,
            "TLS with the certificates in this directory, under QEMU's names: ca-cert.pem, server-cert.pem, ...");
        either->add_option("--tls-psk", tls.psk, "TLS with the pre-shared key in this directory's keys.psk")->excludes(x509);
        CLI::Option* const channels = either->add_option("--multifd", multifd.channels,
            "Memory goes over so many channels of its own, as the QEMU's multifd-channels says")->check(CLI::Range(1, 255));
        either->add_option("--multifd-compression", multifd.compression, "As the QEMU's multifd-compression")
            ->check(CLI::IsMember({"none", "zlib", "zstd"}))
            ->needs(channels);
        CLI::Option* const postcopy = either->add_flag("--postcopy", parameters.postcopy_ram,
            either == receiving
                ? "The QEMU, whose capability postcopy-ram is on, may go on in postcopy; two threads read the memory "
                  "while it comes, in random order"
                : "The guest runs in the QEMU, whose capability postcopy-ram is on, at once, and its memory comes after it")
            ->excludes(channels);
        either->add_flag("--postcopy-preempt", parameters.postcopy_preempt,
            "Pages that somebody waits for have a channel of their own, as the QEMU's capability says")->needs(postcopy);
    }
    unsigned timeout = 60;
    for (CLI::App* const either : {receiving, sending})
        either->add_option("--timeout", timeout,
                  "Seconds after which a QEMU that is connected, and neither sends nor takes anything, counts as gone; 0 for "
                  "never")
            ->check(CLI::Range(0, 1'000'000))
            ->capture_default_str();
    sending->add_option("--tls-hostname", tls.hostname, "Whom the server's certificate has to name");
    app.footer("Exit status: 0 when all went over; 1 when not, with the reason; 2 for a wrong command line.\n"
               "\n"
               "Example:  vmstate-park receive unix:/tmp/park.sock vm.parked --schema vm.state &\n"
               "          echo 'migrate unix:/tmp/park.sock' | socat - unix:/tmp/monitor.sock\n"
               "          vmstate-park send vm.parked tcp:host:4444\n"
               "\n"
               "The QEMU hears that the machine is kept when FILE is whole and on the disk; until then it is in FILE.partial, and a\n"
        "failure leaves the guest to the QEMU, whose capability return-path has to be on for that.\n"
        "In postcopy it can't be so: the machine is here before its memory is, and FILE is written at the end. A connection\n"
        "that breaks, or a FILE that can't be written then, loses the machine.");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& failure) {
        return app.exit(failure) == 0 ? EXIT_SUCCESS : exit_usage;
    }
    multifd.apply_to(parameters);
    if (!uuid.empty()) parameters.multifd_uuid = parse_uuid(uuid);
    parameters.peer_timeout = std::chrono::seconds(timeout);
    try {
        return receiving->parsed() ? receive(uri, file, schema_file, parameters, tls)
                                   : send(file, uri, parameters, tls, multifd_sync);
    } catch (const std::exception& failure) { // out of memory: a stream says how large the machine is
        std::fprintf(stderr, "vmstate-park: %s\n", failure.what());
        return exit_failed;
    }
}
