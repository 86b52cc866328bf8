// SPDX-License-Identifier: BSL-1.0
// multifd with a real QEMU at the other end: from a QEMU whose guest runs to us, and from us to another QEMU, in which the
// guest goes on; plain and compressed, over unix sockets, TCP and TLS, with the return path and without.
#include "support/catch.hpp"
#include "support/counter.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"
#include "support/tls_channels.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/multifd_zlib.hpp>
#include <vmstate/ram/multifd_zstd.hpp>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate::tests;

namespace {

constexpr std::size_t memory_size = 16 << 20;

struct way {
    std::string machine;
    std::string compression;
    bool tcp = false;
    bool tls = false;
    bool return_path = true;
    unsigned channels = 2;
};

void configure(qemu& who, const way& how) {
    const auto capability = [](const char* name, bool on) { return boost::json::object{{"capability", name}, {"state", on}}; };
    who.execute("migrate-set-capabilities",
        {{"capabilities", boost::json::array{capability("multifd", true), capability("return-path", how.return_path)}}});
    boost::json::object parameters{{"multifd-channels", how.channels}, {"multifd-compression", how.compression}};
    if (how.tls) {
        parameters["tls-creds"] = "tls0";
        parameters["tls-hostname"] = "localhost";
    }
    who.execute("migrate-set-parameters", parameters);
}
vmstate::multifd_compression compression_by(const std::string& name) {
    return name == "zlib" ? vmstate::multifd_zlib() : name == "zstd" ? vmstate::multifd_zstd() : vmstate::multifd_compression{};
}

/// Where a QEMU listens, that was told to at any port.
std::string where(qemu& incoming) {
    const auto socket = incoming.execute("query-migrate").as_object().at("socket-address").as_array().at(0).as_object();
    if (socket.at("type").as_string() == "unix") return "unix:" + std::string(socket.at("path").as_string());
    return "tcp:127.0.0.1:" + std::string(socket.at("port").as_string());
}

} // namespace

TEST_CASE("a running QEMU migrates to us over several channels, and we to another QEMU, in which the guest goes on") {
    VMSTATE_REQUIRE_QEMU();
    const way how = GENERATE(way{"pc", "none", false, false, true, 2}, way{"microvm", "none", true, false, false, 3},
        way{"microvm", "zlib", true, false, true, 2}, way{"pc", "zstd", false, false, false, 2},
        way{"microvm", "zstd", true, true, true, 2}, way{"microvm", "none", true, true, false, 1});
    CAPTURE(how.machine, how.compression, how.tcp, how.tls, how.return_path, how.channels);
    const temporary_directory directory;
    const auto address = [&](const char* name) {
        return how.tcp ? std::string("tcp:127.0.0.1:0") : "unix:" + (directory / name).string();
    };
    if (how.tls) write_certificates(directory.path());
    qemu_options options{.machine = how.machine, .rom = guest_rom("counter")};
    const auto with_credentials = [&](const std::string& endpoint) {
        qemu_options more = options;
        if (how.tls)
            more.arguments = {"-object", "tls-creds-x509,id=tls0,verify-peer=on,dir=" + directory.path().string() + ",endpoint=" + endpoint};
        return more;
    };
    qemu first(with_credentials("client"));
    first.wait_serial(lines(3), "3 lines");
    const recorded_stream schema = record(first);
    first.cont();
    first.wait_serial(lines(6), "6 lines");
    configure(first, how);

    // QEMU up to 8.0 has its sync points after each section, and so does a newer one with its machine type; microvm has none.
    const bool each_section = first.version() <= 800 || schema.machine.ends_with("-7.2");
    const vmstate::migration::parameters settings{.return_path = how.return_path,
        .multifd = true,
        .multifd_channels = how.channels,
        .multifd_compression = compression_by(how.compression),
        .multifd_flush_after_each_section = each_section};

    replica ours(schema);
    {
        vmstate::result<void> arrived = vmstate::error(vmstate::errc::io);
        int starts = 0;
        vmstate::migration::guest guest{.stop = {}, .start = [&]() -> vmstate::result<void> {
            ++starts;
            return {};
        }};
        vmstate::load_options loading = vmstate::carry_unknown();
        loading.description = &schema.description;
        vmstate::migration::destination destination(ours.machine, guest, settings, loading);
        vmstate::result<vmstate::socket_listener> listener = vmstate::error(vmstate::errc::io);
        std::string to_us = address("to-us");
        vmstate::channel_acceptor accept;
        if (how.tls) {
            listener = vmstate::socket_listener::listen(to_us);
            REQUIRE(message_of(listener) == "");
            to_us = listener->uri();
            accept = tls_acceptor(*listener, credentials_in(directory.path(), vmstate::tls_endpoint::server));
        } else {
            REQUIRE(message_of(destination.listen(to_us)) == "");
            to_us = destination.uri();
        }
        std::thread receiving([&] { arrived = how.tls ? destination.run(accept) : destination.run(); });
        migration_outcome left;
        try {
            left = first.migrate(to_us);
        } catch (...) {
            destination.cancel();
            receiving.join();
            throw;
        }
        if (!left.completed) destination.cancel();
        receiving.join();
        REQUIRE(left.error == "");
        REQUIRE(message_of(arrived) == "");
        CHECK(starts == 1);
        CHECK(destination.status().ram.multifd_bytes > 0);
    }
    const std::string before = first.serial();
    // QEMU has stopped its guest: ours has the same memory.
    const auto memory = first.memory(0, memory_size);
    const auto& block = ours.memory.at(schema.blocks.front().name);
    CHECK(difference(std::span(memory).first(0xa0000), std::span<const std::byte>(block).first(0xa0000)) == "");
    CHECK(difference(std::span(memory).subspan(0x100000), std::span<const std::byte>(block).subspan(0x100000)) == "");

    qemu_options more = with_credentials("server");
    more.arguments.insert(more.arguments.end(), {"-incoming", "defer"});
    qemu second(more);
    configure(second, how);
    second.execute("migrate-incoming", {{"uri", address("to-qemu")}});
    const std::string to_qemu = where(second);
    vmstate::migration::guest guest{.stop = {}, .start = {}};
    vmstate::migration::source source(ours.machine, guest, settings);
    if (how.tls) {
        const auto credentials = credentials_in(directory.path(), vmstate::tls_endpoint::client);
        REQUIRE(message_of(source.start(tls_connector(to_qemu, credentials))) == "");
    } else {
        REQUIRE(message_of(source.start(to_qemu)) == "");
    }
    CHECK(message_of(source.wait()) == "");
    CHECK(source.status().ram.multifd_bytes > 0);
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const auto output = counter::output_of_two(before, second); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
    std::uint32_t round = 0;
    CHECK(counter::check_memory(second.memory(0, 0x60000), round) == "");
    CHECK(second.complaints() == "");
}

TEST_CASE("a QEMU whose multifd threads still have an empty packet to send when we have all completes all the same") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const std::filesystem::path log = directory / "late";
    // Before there is another thread.
    ::setenv("LD_PRELOAD", LATE_PACKETS, 1);
    ::setenv("VMSTATE_LATE_PACKETS", log.c_str(), 1);
    std::optional<qemu> first;
    try {
        first.emplace(qemu_options{.machine = "pc", .rom = guest_rom("counter")});
    } catch (...) {
        ::unsetenv("LD_PRELOAD");
        throw;
    }
    ::unsetenv("LD_PRELOAD");
    ::unsetenv("VMSTATE_LATE_PACKETS");
    // QEMU 9.0 has no such packets any more.
    if (first->version() >= 900) return skip("a QEMU before 9.0");
    first->wait_serial(lines(3), "3 lines");
    const recorded_stream schema = record(*first);
    const way how{.machine = "pc", .compression = "none"};
    configure(*first, how);

    const auto late = [&] { return std::filesystem::exists(log) ? std::filesystem::file_size(log) : 0; };
    // Whether there is one, and behind which SYNC, depends on who of two threads is quicker.
    constexpr int tries = 4;
    for (int i = 0; i != tries; ++i) {
        first->cont();
        replica ours(schema);
        vmstate::result<void> arrived = vmstate::error(vmstate::errc::io);
        vmstate::migration::guest guest;
        // It waits for our word while we keep what we have.
        guest.accept = []() -> vmstate::result<void> {
            std::this_thread::sleep_for(std::chrono::seconds(1));
            return {};
        };
        vmstate::load_options loading = vmstate::carry_unknown();
        loading.description = &schema.description;
        vmstate::migration::destination destination(ours.machine, guest, {.multifd = true, .multifd_channels = how.channels}, loading);
        REQUIRE(message_of(destination.listen("unix:" + (directory / "to-us").string())) == "");
        std::thread receiving([&] { arrived = destination.run(); });
        const migration_outcome left = first->migrate(destination.uri());
        if (!left.completed) destination.cancel();
        receiving.join();
        REQUIRE(left.error == "");
        REQUIRE(message_of(arrived) == "");
    }
    if (late() == 0) skip("a late packet, in " + std::to_string(tries) + " tries");
}
