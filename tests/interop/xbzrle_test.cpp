// SPDX-License-Identifier: BSL-1.0
// Pages of which only the changes were sent: a stream of a QEMU with the capability xbzrle, whose memory changed faster
// than its pages could be sent, loads into the memory that it had at the end; and what a source of ours sends that way, a
// QEMU takes.
#include "support/catch.hpp"
#include "support/counter.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"
#include "support/qtest.hpp"
#include "support/recorded_stream.hpp"

#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>

using namespace vmstate::tests;
namespace json = boost::json;

TEST_CASE("a stream with XBZRLE records gives the memory that the machine had") {
    VMSTATE_REQUIRE_QEMU();
    constexpr std::size_t memory_size = 16 << 20;
    constexpr std::uint64_t first = 0x200000;
    constexpr std::uint64_t pages = 512;
    const std::string machine = GENERATE("pc", "microvm");
    CAPTURE(machine);

    // It is we who write to its memory, from outside: QEMU 7.2 doesn't notice all that a guest writes that it emulates.
    qtest bus;
    qemu source({.machine = machine, .stopped = true, .arguments = bus.arguments()});
    bus.accept();
    const auto fill = [&](std::uint64_t at, std::uint64_t size, std::uint64_t value) {
        bus.command(
            "memset " + std::to_string(at) + ' ' + std::to_string(size) + ' ' + std::to_string(value & 0xff));
    };
    for (std::uint64_t page = 0; page < pages; ++page)
        fill(first + page * 4096, 4096, page + 1);
    source.execute("migrate-set-capabilities",
        {{"capabilities", json::array{json::object{{"capability", "xbzrle"}, {"state", true}}}}});
    // With no time to stop in, and so slow that much is new when it has sent what was new before: it goes on, round after
    // round.
    source.execute("migrate-set-parameters",
        {{"max-bandwidth", 4 << 20}, {"downtime-limit", 1}, {"xbzrle-cache-size", 4 << 20}});

    const auto file = source.directory() / "xbzrle.state";
    source.execute("migrate", {{"uri", "exec:cat > " + file.string()}});
    std::int64_t encoded = 0;
    std::uint64_t value = 0;
    while (encoded < 200) {
        // A quarter of each page changes, and a few bytes of some; one page changes whole, and is zero at times.
        ++value;
        for (std::uint64_t page = 0; page < pages; ++page) {
            fill(first + page * 4096 + (value * 40 + page * 8) % 3072, 1024, value * 3 + page);
            if (page % 16 == 5) bus.writeq(first + page * 4096 + 4088, value * 0x9e3779b97f4a7c15);
        }
        fill(first + 7 * 4096, 4096, value % 3 * 0x55);
        const json::object state = source.execute("query-migrate").as_object();
        REQUIRE(state.at("status").as_string() != "completed");
        REQUIRE(state.at("status").as_string() != "failed");
        if (const auto* cache = state.if_contains("xbzrle-cache"))
            encoded = cache->as_object().at("pages").to_number<std::int64_t>();
    }
    source.execute("migrate-set-parameters", {{"max-bandwidth", std::int64_t{1} << 30}});
    for (std::string status; status != "completed";) {
        status = source.execute("query-migrate").as_object().at("status").as_string();
        REQUIRE(status != "failed");
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const auto memory = source.memory(0, memory_size);

    const recorded_stream stream(read_file(file));
    REQUIRE(stream.pages.count(vmstate::ram_record_kind::xbzrle) == 1);
    CHECK(stream.pages.at(vmstate::ram_record_kind::xbzrle) >= 200);
    CHECK(stream.pages.at(vmstate::ram_record_kind::page) >=
          pages - 1); // whole once before its changes are sent
    replica ours(stream);
    const auto loaded = ours.load(stream.bytes);
    REQUIRE(message_of(loaded) == "");
    const std::span<const std::byte> block(ours.memory.at(stream.blocks.front().name));
    CHECK(difference(std::span(memory).first(0xa0000), block.first(0xa0000)) == "");
    CHECK(difference(std::span(memory).subspan(0x100000), block.subspan(0x100000)) == "");

    // Written again, in plain pages, it is the same machine to QEMU.
    const auto saved = ours.save();
    REQUIRE(message_of(saved) == "");
    const auto plain = source.directory() / "plain.state";
    write_file(plain, *saved);
    qemu destination({.machine = machine, .incoming_file = plain, .stopped = true});
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    CHECK(difference(memory, destination.memory(0, memory_size)) == "");
}

namespace {

/// A guest that writes before each look at its dirty log, so that every pass has something: to most pages a few bytes,
/// one is new as a whole and zero at times, and one goes from nothing to something and back.
struct writing_log {
    std::span<std::byte> memory;
    std::uint64_t first;
    std::uint64_t pages;
    std::atomic<bool>& runs;
    vmstate::marked_log log{memory.size()};
    std::uint64_t value = 0;

    vmstate::result<void> start() { return log.start(); }
    vmstate::result<std::uint64_t> collect(vmstate::page_bitmap& into) {
        if (runs) write();
        return log.collect(into);
    }
    vmstate::result<void> stop() { return log.stop(); }

private:
    void write() {
        ++value;
        for (std::uint64_t page = 0; page != pages; ++page) {
            const std::uint64_t at = first + page * 4096;
            const std::span<std::byte> bytes = memory.subspan(at, 4096);
            if (page == 7) fill(bytes, value % 3 * 0x55);
            else if (page == 8) fill(bytes.first(8), value % 2);
            else fill(bytes.subspan((value * 40 + page * 8) % 4080, 16), value + page);
            log.mark(at, 4096);
        }
    }
    static void fill(std::span<std::byte> bytes, std::uint64_t with) {
        std::fill(bytes.begin(), bytes.end(), static_cast<std::byte>(with));
    }
};

} // namespace

TEST_CASE("a QEMU takes the changes that a source of ours sends instead of pages, and its guest goes on") {
    VMSTATE_REQUIRE_QEMU();
    constexpr std::size_t memory_size = 16 << 20;
    constexpr std::uint64_t first = 0x200000;
    constexpr std::uint64_t pages = 512;
    const std::string machine = GENERATE("pc", "microvm");
    CAPTURE(machine);
    const qemu_options options{.machine = machine, .rom = guest_rom("counter")};
    qemu original(options);
    original.wait_serial(lines(3), "3 lines");
    const recorded_stream stream = record(original);
    replica ours(stream);
    const auto loaded = ours.load(stream.bytes);
    REQUIRE(message_of(loaded) == "");

    qemu_options more = options;
    const temporary_directory directory;
    more.stopped = true;
    more.incoming = "unix:" + (directory / "socket").string();
    more.capabilities = {"xbzrle"};
    qemu destination(more);

    // Full of something first, in which a few bytes change.
    const std::string name = stream.blocks.front().name;
    const std::span<std::byte> memory(ours.memory.at(name));
    for (std::uint64_t i = 0; i != pages * 4096; ++i) memory[first + i] = static_cast<std::byte>(i * 7 + (i >> 12));
    std::fill(memory.begin() + first + 8 * 4096, memory.begin() + first + 9 * 4096, std::byte{0});
    std::atomic<bool> runs = true;
    writing_log log{memory, first, pages, runs};
    vmstate::migration::guest guest{.stop = [&]() -> vmstate::result<void> {
        runs = false;
        return {};
    }, .start = {}};
    guest.dirty_logs.emplace(name, log);
    // With no time to stop in it goes on, pass after pass.
    vmstate::migration::source source(
        ours.machine, guest, {.downtime_limit = std::chrono::milliseconds(0), .xbzrle = true});
    const auto started = source.start(more.incoming);
    REQUIRE(message_of(started) == "");
    while (source.status().xbzrle_cache.pages < 1000 && !is_final(source.status().state))
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    source.set_parameters({.downtime_limit = std::chrono::seconds(10)});
    const auto left = source.wait();
    CHECK(message_of(left) == "");
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const vmstate::migration::status last = source.status();
    CHECK(last.ram.dirty_sync_count >= 4);
    CHECK(last.xbzrle_cache.pages >= 1000);
    CHECK(last.xbzrle_cache.bytes < last.xbzrle_cache.pages * 1024);

    const auto theirs = destination.memory(0, memory_size);
    CHECK(difference(std::span<const std::byte>(memory).first(0xa0000), std::span(theirs).first(0xa0000)) == "");
    CHECK(difference(std::span<const std::byte>(memory).subspan(0x100000), std::span(theirs).subspan(0x100000)) == "");
    destination.cont();
    destination.wait_serial(lines(3), "3 more lines");
    const auto output = counter::parse_output(original.serial() + destination.serial()); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
    CHECK(destination.complaints() == "");
}
