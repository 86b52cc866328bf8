// SPDX-License-Identifier: BSL-1.0
// Live migration with a real QEMU at the other end: from a QEMU whose guest runs to a destination of ours, and from a
// source of ours to another QEMU, in which the guest goes on. The devices that have no description of ours are carried, by
// the description in a stream that the same QEMU wrote to a file before.
#include "support/catch.hpp"
#include "support/counter.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

using namespace vmstate::tests;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t memory_size = 16 << 20;

void set_capability(qemu& who, std::string_view name, bool on) {
    who.execute("migrate-set-capabilities", {{"capabilities", boost::json::array{boost::json::object{
        {"capability", boost::json::string_view(name.data(), name.size())}, {"state", on}}}}});
}
void set_return_path(qemu& who, bool on) { set_capability(who, "return-path", on); }
bool knows_capability(qemu& who, std::string_view name) {
    const boost::json::value known = who.execute("query-migrate-capabilities");
    for (const boost::json::value& one : known.as_array())
        if (one.at("capability").as_string() == boost::json::string_view(name.data(), name.size())) return true;
    return false;
}

/// What a destination of ours got of a QEMU that migrates to it.
struct received {
    vmstate::result<void> outcome = vmstate::error(vmstate::errc::io);
    migration_outcome source;
    int starts = 0;
};
received receive(qemu& from, replica& into, const vmstate::vmdesc& description, const std::string& uri,
    const vmstate::migration::parameters& parameters = {}) {
    received got;
    vmstate::migration::guest guest{.stop = {}, .start = [&]() -> vmstate::result<void> {
        ++got.starts;
        return {};
    }};
    vmstate::load_options loading = vmstate::carry_unknown();
    loading.description = &description;
    vmstate::migration::destination destination(into.machine, guest, parameters, loading);
    REQUIRE(message_of(destination.listen(uri)) == "");
    std::thread receiving([&] { got.outcome = destination.run(); });
    got.source = from.migrate(destination.uri());
    if (!got.source.completed) destination.cancel();
    receiving.join();
    return got;
}

} // namespace

TEST_CASE("a running QEMU migrates to us, and we migrate to another QEMU, in which the guest goes on") {
    VMSTATE_REQUIRE_QEMU();
    const bool return_path = GENERATE(true, false);
    const std::string machine = GENERATE("pc", "microvm");
    const bool tcp = GENERATE(false, true);
    CAPTURE(return_path, machine, tcp);
    const temporary_directory directory;
    const auto address = [&](const char* name) {
        return tcp ? std::string("tcp:127.0.0.1:0") : "unix:" + (directory / name).string();
    };

    const qemu_options options{.machine = machine, .rom = guest_rom("counter")};
    qemu first(options);
    first.wait_serial(lines(3), "3 lines");
    const recorded_stream schema = record(first);
    first.cont();
    first.wait_serial(lines(6), "6 lines");
    set_return_path(first, return_path);
    replica ours(schema);
    const received got = receive(first, ours, schema.description, address("to-us"));
    REQUIRE(got.source.error == "");
    REQUIRE(message_of(got.outcome) == "");
    CHECK(got.starts == 1);
    const std::string before = first.serial();
    // QEMU has stopped its guest: ours has the same memory.
    const auto memory = first.memory(0, memory_size);
    const auto& block = ours.memory.at(schema.blocks.front().name);
    CHECK(difference(std::span(memory).first(0xa0000), std::span<const std::byte>(block).first(0xa0000)) == "");
    CHECK(difference(std::span(memory).subspan(0x100000), std::span<const std::byte>(block).subspan(0x100000)) == "");

    qemu_options more = options;
    more.incoming = address("to-qemu");
    qemu second(more);
    std::string where = more.incoming;
    if (tcp) {
        const auto socket = second.execute("query-migrate").as_object().at("socket-address").as_array().at(0).as_object();
        where = "tcp:127.0.0.1:" + std::string(socket.at("port").as_string());
    }
    vmstate::migration::guest guest{.stop = {}, .start = {}};
    vmstate::migration::source source(ours.machine, guest, {.return_path = return_path});
    REQUIRE(message_of(source.start(where)) == "");
    CHECK(message_of(source.wait()) == "");
    CHECK(source.status().state == vmstate::migration::state::completed);
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const auto output = counter::output_of_two(before, second); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
    std::uint32_t round = 0;
    CHECK(counter::check_memory(second.memory(0, 0x60000), round) == "");
    CHECK(second.complaints() == "");
}

TEST_CASE("a QEMU with another machine is refused, and its guest runs on") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const qemu_options options{.machine = "microvm", .rom = guest_rom("counter")};
    qemu first(options);
    first.wait_serial(lines(3), "3 lines");
    vmstate::machine other{{.name = "pc-i440fx-7.2"}};
    vmstate::migration::guest guest{.stop = {}, .start = {}};
    vmstate::migration::destination destination(other, guest);
    REQUIRE(message_of(destination.listen("unix:" + (directory / "to-us").string())) == "");
    vmstate::result<void> outcome;
    std::thread receiving([&] { outcome = destination.run(); });
    set_return_path(first, true);
    const migration_outcome there = first.migrate(destination.uri());
    receiving.join();
    CHECK_FALSE(there.completed);
    CHECK(outcome.error() == vmstate::errc::bad_configuration);
    CHECK(first.status() == "running");
    const std::string before = first.serial();
    first.wait_serial(lines(std::count(before.begin(), before.end(), '\n') + 3), "3 more lines");
    counter::parse_output(first.serial());
}

TEST_CASE("neither side stops its guest before the other has said that it is ready") {
    VMSTATE_REQUIRE_QEMU();
    const temporary_directory directory;
    const qemu_options options{.machine = "microvm", .rom = guest_rom("counter")};
    qemu first(options);
    if (!knows_capability(first, "switchover-ack")) return skip("this QEMU has no switchover-ack (8.1 has)");
    first.wait_serial(lines(3), "3 lines");
    const recorded_stream schema = record(first);
    first.cont();
    set_return_path(first, true);
    set_capability(first, "switchover-ack", true);
    replica ours(schema);
    const received got =
        receive(first, ours, schema.description, "unix:" + (directory / "to-us").string(), {.switchover_ack = true});
    REQUIRE(got.source.error == "");
    REQUIRE(message_of(got.outcome) == "");

    qemu_options more = options;
    more.arguments = {"-incoming", "defer"};
    qemu second(more);
    set_return_path(second, true);
    set_capability(second, "switchover-ack", true);
    const std::string where = "unix:" + (directory / "to-qemu").string();
    second.execute("migrate-incoming", {{"uri", where}});
    vmstate::migration::guest guest{.stop = {}, .start = {}};
    vmstate::migration::source source(ours.machine, guest, {.switchover_ack = true});
    REQUIRE(message_of(source.start(where)) == "");
    CHECK(message_of(source.wait()) == "");
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
}
