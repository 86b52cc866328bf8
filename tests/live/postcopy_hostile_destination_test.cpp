// SPDX-License-Identifier: BSL-1.0
// A source of ours in postcopy and a destination that asks for what can't be, answers what nobody asked, or goes away: the
// source ends, or pauses, by name, and no thread is left behind. And the claims that see to it that each page goes once.
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/migration/postcopy_pages.hpp>
#include <vmstate/migration/source.hpp>

#include "footprint.hpp"
#include "small_machine.hpp"

using namespace vmstate;
using namespace vmstate::tests;
using migration::state;

namespace {

using bytes = std::vector<std::uint8_t>;

void put(bytes& to, std::uint64_t value, unsigned size) {
    for (unsigned i = size; i != 0; --i) to.push_back(static_cast<std::uint8_t>(value >> 8 * (i - 1)));
}
bytes message(unsigned type, const bytes& payload) {
    bytes all;
    put(all, type, 2);
    put(all, payload.size(), 2);
    all.insert(all.end(), payload.begin(), payload.end());
    return all;
}
bytes request(std::uint64_t start, std::uint32_t length, std::string_view block) {
    bytes payload;
    put(payload, start, 8);
    put(payload, length, 4);
    if (block.empty()) return message(4, payload);
    put(payload, block.size(), 1);
    payload.insert(payload.end(), block.begin(), block.end());
    return message(3, payload);
}
bytes bitmap_message(std::string_view block, std::uint64_t size, std::uint64_t ending = 0x0123456789abcdef) {
    bytes name;
    put(name, block.size(), 1);
    name.insert(name.end(), block.begin(), block.end());
    bytes all = message(5, name);
    put(all, size, 8);
    all.resize(all.size() + size, 0);
    put(all, ending, 8);
    return all;
}
bytes joined(bytes one, const bytes& other) {
    one.insert(one.end(), other.begin(), other.end());
    return one;
}

constexpr std::uint32_t loaded = 3; // the PING behind the devices

/// Reads all, answers PINGs, and has something to say at certain bytes of the stream.
class scripted_destination {
public:
    struct line {
        bytes at;     // what the stream has then
        bytes answer; // empty: closes
    };
    struct manners {
        bool waits_for_run = false; // says so, as one of ours does
        bool says_loaded = true;
        bool asks_by_preempt = false; // as one of ours may
    };
    scripted_destination(std::unique_ptr<duplex_channel> channel, std::vector<line> script, manners has)
        : channel_(std::move(channel)), script_(std::move(script)), manners_(has), thread_([this] { run(); }) {}
    scripted_destination(std::unique_ptr<duplex_channel> channel, std::vector<line> script)
        : scripted_destination(std::move(channel), std::move(script), manners()) {}
    ~scripted_destination() {
        channel_->shutdown();
        thread_.join();
    }

    /// Whether the line of that number was to be said.
    bool heard(std::size_t number) const { return (heard_.load() >> number & 1u) != 0; }

private:
    void run() {
        std::vector<std::byte> room(64 * 1024);
        std::string seen; // the last of the stream
        for (;;) {
            const std::span<std::byte> part(room);
            const result<std::size_t> got = channel_->read_some({&part, 1});
            if (!got || *got == 0) return;
            const std::size_t before = seen.size();
            seen.append(reinterpret_cast<const char*>(room.data()), *got);
            constexpr std::string_view ping("\x08\x00\x02\x00\x04", 5);
            for (std::size_t at = seen.find(ping, before < 16 ? 0 : before - 16); at != std::string::npos; at = seen.find(ping, at + 1))
                if (at + 9 <= seen.size() && at + 9 > before) {
                    bytes value(seen.begin() + static_cast<std::ptrdiff_t>(at) + 5, seen.begin() + static_cast<std::ptrdiff_t>(at) + 9);
                    answer(value);
                }
            for (std::size_t number = 0; number != script_.size(); ++number) {
                const line& one = script_[number];
                const std::string_view mark(reinterpret_cast<const char*>(one.at.data()), one.at.size());
                const std::size_t at = seen.find(mark, before < 64 ? 0 : before - 64);
                if (at == std::string::npos || at + mark.size() <= before) continue;
                heard_ |= 1u << number;
                if (one.answer.empty()) channel_->shutdown();
                else say(one.answer);
            }
            if (seen.size() > 1024) seen.erase(0, seen.size() - 512);
        }
    }
    void answer(const bytes& ping) {
        bytes own, end;
        put(own, migration::ping_setup, 4);
        put(end, loaded, 4);
        const auto pong = [&](std::uint32_t value) {
            bytes payload;
            put(payload, value, 4);
            say(message(2, payload));
        };
        if (ping == own && manners_.waits_for_run) pong(migration::pong_waits_for_run);
        if (ping == own && manners_.asks_by_preempt) pong(migration::pong_preempt_requests);
        if (ping != end || manners_.says_loaded) say(message(2, ping));
    }
    void say(const bytes& what) {
        const std::span<const std::byte> whole = std::as_bytes(std::span(what));
        (void)channel_->writev({&whole, 1});
    }

    std::unique_ptr<duplex_channel> channel_;
    std::vector<line> script_;
    const manners manners_;
    std::atomic<unsigned> heard_ = 0;
    std::thread thread_;
};

const bytes run_command{8, 0, 5, 0, 0};
const bytes resume_command{8, 0, 9, 0, 0};
const bytes bitmap_command{8, 0, 10, 0, 4, 3, 'r', 'a', 'm'};

template <class Done>
bool wait_for(Done done) {
    const auto deadline = std::chrono::steady_clock::now() + 60s;
    while (!done() && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(1ms);
    return done();
}

constexpr std::size_t page_count = 2048;
constexpr std::size_t bitmap_size = page_count / 8;

/// The source's channels, one after the other.
template <class... Channels>
channel_connector connector_of(Channels... channels) {
    struct ends {
        std::unique_ptr<duplex_channel> channels[sizeof...(Channels)];
        std::size_t next = 0;
    };
    auto held = std::make_shared<ends>(ends{{std::move(channels)...}});
    return [held](const opening_options&) -> result<std::unique_ptr<output_channel>> {
        if (held->next == sizeof...(Channels)) return error(errc::io, {}, "nobody there");
        return std::unique_ptr<output_channel>(std::move(held->channels[held->next++]));
    };
}

struct outcome {
    error why;
    bool paused = false;
};
/// In postcopy with a destination that says this to RUN; where that pauses it, the recovery's says the rest.
outcome postcopy_to(std::vector<scripted_destination::line> script, std::vector<scripted_destination::line> again = {}) {
    small_machine from(page_count);
    fill(from);
    from.start();
    auto [ours, theirs] = make_pair();
    auto [ours_again, theirs_again] = make_pair();
    scripted_destination destination(std::move(theirs), std::move(script));
    scripted_destination second(std::move(theirs_again), again);
    migration::source source(from.state, from.control, {.postcopy_ram = true, .max_postcopy_bandwidth = 1 << 20, .peer_timeout = 10s});
    REQUIRE(source.start(std::move(ours)));
    REQUIRE(source.start_postcopy());
    outcome ended;
    const auto has_stopped = [&] { return is_final(source.status().state) || source.status().state == state::postcopy_paused; };
    REQUIRE(wait_for(has_stopped));
    if (source.status().state == state::postcopy_paused && !again.empty()) {
        REQUIRE(source.recover(connector_of(std::move(ours_again))));
        REQUIRE(wait_for([&] { return has_stopped(); }));
    }
    ended.paused = source.status().state == state::postcopy_paused;
    ended.why = source.status().error_desc;
    if (ended.paused) {
        CHECK(source.give_up());
        CHECK_FALSE(source.wait());
    }
    CHECK(source.status().state == state::failed);
    CHECK(from.stops == 1);
    CHECK(from.starts == 0);
    return ended;
}

} // namespace

TEST_CASE("a destination that asks for what can't be, or answers what nobody asked, ends a postcopy by name") {
    struct deed {
        const char* name;
        bytes says;
        errc code;
        const char* text;
    };
    const deed deeds[] = {
        {"outside", request(page_count * page, page, "ram"), errc::bad_ram, "REQ_PAGES_ID/ram"},
        {"across the end", request((page_count - 1) * page, 2 * page, "ram"), errc::bad_ram, "REQ_PAGES_ID/ram"},
        {"unaligned", request(12, page, "ram"), errc::bad_ram, "whole pages"},
        {"half a page", request(0, page / 2, "ram"), errc::bad_ram, "whole pages"},
        {"nothing", request(0, 0, "ram"), errc::bad_ram, "something"},
        {"unknown block", request(0, page, "rom"), errc::bad_ram, "\"rom\""},
        {"no block", request(0, page, ""), errc::bad_command, "first request"},
        {"outside, later", joined(request(0, page, "ram"), request(~std::uint64_t{4095}, page, "")), errc::bad_ram, "REQ_PAGES/ram"},
        {"a bitmap", bitmap_message("ram", bitmap_size), errc::bad_command, "asked for"},
        {"another bitmap", bitmap_message("rom", bitmap_size), errc::bad_command, "a block of the stream"},
        {"RESUME_ACK", message(6, {0, 0, 0, 1}), errc::bad_command, "RESUME_ACK"},
        {"failed", message(1, {0, 0, 0, 1}), errc::io, "could not load"},
        {"done", message(1, {0, 0, 0, 0}), errc::bad_command, "SHUT"},
        {"another type", message(99, {}), errc::bad_command, "99"},
    };
    postcopy_to({{run_command, deeds[0].says}});
    const leak_check leaks;
    for (const deed& one : deeds) {
        CAPTURE(one.name);
        const outcome ended = postcopy_to({{run_command, one.says}});
        CHECK_FALSE(ended.paused);
        CHECK(ended.why == one.code);
        CHECK_THAT(ended.why.message(), contains("postcopy-active/return path") && contains(one.text));
    }
    leaks.check(16 * std::size(deeds)); // with four threads each time, of which a sanitizer remembers something
}

TEST_CASE("what a destination asks for over the preempt channel comes there, and what can't be asked there is said by name") {
    struct deed {
        const char* name;
        bytes says; // and closes, where it is cut
        errc code;
        const char* text;
        bool paused;
    };
    const deed deeds[] = {
        {"outside", request(page_count * page, page, "ram"), errc::bad_ram, "REQ_PAGES_ID/ram", false},
        {"unknown block", request(0, page, "rom"), errc::bad_ram, "\"rom\"", false},
        {"SHUT", message(1, {0, 0, 0, 0}), errc::bad_command, "a request for pages, found message 1", false},
        {"another type", message(99, {}), errc::bad_command, "99", false},
        {"the end", {}, errc::truncated, "stream ends too early", true},
        {"half a message", {0, 3, 0, 16, 0}, errc::truncated, "stream ends too early", true},
    };
    for (const deed& one : deeds) {
        CAPTURE(one.name);
        small_machine from(page_count);
        fill(from);
        from.start();
        auto [ours, theirs] = make_pair();
        auto [urgent, urgent_there] = make_pair();
        scripted_destination destination(std::move(theirs), {}, {.asks_by_preempt = true});
        migration::source source(from.state, from.control,
            {.postcopy_ram = true, .postcopy_preempt = true, .max_postcopy_bandwidth = 1 << 20, .peer_timeout = 10s});
        REQUIRE(source.start(connector_of(std::move(ours), std::move(urgent))));
        REQUIRE(source.start_postcopy());
        REQUIRE(wait_for([&] { return source.status().state == state::postcopy_active; }));
        const auto say = [&, &there = *urgent_there](const bytes& what) {
            const std::span<const std::byte> whole = std::as_bytes(std::span(what));
            CHECK(there.writev({&whole, 1}));
        };
        // The last page is what nobody has sent yet.
        say(request((page_count - 1) * page, page, "ram"));
        std::vector<std::byte> record(8 + 1 + 3 + page);
        for (std::span<std::byte> rest(record); !rest.empty();) {
            const result<std::size_t> got = urgent_there->read_some({&rest, 1});
            REQUIRE(got);
            REQUIRE(*got != 0);
            rest = rest.subspan(*got);
            // All of it is zero: nine bytes more than the name.
            if (record[7] == std::byte{2} && record.size() - rest.size() == 13) break;
        }
        CHECK((vmstate::detail::load_big<std::uint64_t>(record.data()) & ~std::uint64_t{page - 1}) == (page_count - 1) * page);
        if (!one.says.empty()) say(one.says);
        if (one.code == errc::truncated) urgent_there->shutdown();
        REQUIRE(wait_for([&] { return is_final(source.status().state) || source.status().state == state::postcopy_paused; }));
        CHECK((source.status().state == state::postcopy_paused) == one.paused);
        CHECK(source.status().error_desc == one.code);
        CHECK_THAT(source.status().error_desc.message(), contains("postcopy-active/preempt channel") && contains(one.text));
        CHECK(source.give_up().has_value() == one.paused);
        CHECK_FALSE(source.wait());
        CHECK(from.starts == 0);
    }
}

TEST_CASE("an answer about the preempt channel by a destination that was told of none is no harm") {
    small_machine from(page_count);
    auto [ours, theirs] = make_pair();
    scripted_destination destination(std::move(theirs), {{run_command, {}}}, {.asks_by_preempt = true});
    migration::source source(from.state, from.control, {.postcopy_ram = true, .peer_timeout = 10s});
    REQUIRE(source.start(std::move(ours)));
    REQUIRE(source.start_postcopy());
    CHECK(wait_for([&] { return source.status().state == state::postcopy_paused; }));
    CHECK(destination.heard(0));
}

TEST_CASE("a destination that goes away before RUN: one of ours needs nobody, of a QEMU it has to be known that it is gone") {
    struct deed {
        const char* name;
        scripted_destination::manners manners;
        bytes at; // goes
        bool paused;
        bool goes_on; // the guest, here
    };
    const bytes loaded_ping{8, 0, 2, 0, 4, 0, 0, 0, loaded};
    const deed deeds[] = {
        {"a QEMU that may have run it", {false, false}, run_command, true, true},
        {"a QEMU that has said that it is about to", {false, true}, run_command, true, false},
        {"one of ours while it loads", {true, false}, loaded_ping, false, true},
        {"one of ours that is told to run it", {true, true}, run_command, true, false},
    };
    for (const deed& one : deeds) {
        CAPTURE(one.name);
        small_machine from(page_count);
        fill(from);
        from.start();
        auto [ours, theirs] = make_pair();
        scripted_destination destination(std::move(theirs), {{one.at, {}}}, one.manners);
        migration::source source(from.state, from.control, {.postcopy_ram = true, .max_postcopy_bandwidth = 1 << 20, .peer_timeout = 10s});
        REQUIRE(source.start(std::move(ours)));
        REQUIRE(source.start_postcopy());
        CHECK(wait_for([&] { return is_final(source.status().state) || source.status().state == state::postcopy_paused; }));
        CHECK((source.status().state == state::postcopy_paused) == one.paused);
        CHECK(source.give_up().has_value() == one.paused);
        CHECK_FALSE(source.wait());
        CHECK(source.status().state == state::failed);
        CHECK(from.starts == (one.goes_on ? 1 : 0));
    }
}

TEST_CASE("a recovery tells a destination of ours to run the guest, which it may not have heard before, and nobody else") {
    const bool waits_for_run = GENERATE(false, true);
    CAPTURE(waits_for_run);
    small_machine from(page_count);
    fill(from);
    from.start();
    auto [ours, theirs] = make_pair();
    auto [ours_again, theirs_again] = make_pair();
    scripted_destination destination(std::move(theirs), {{run_command, {}}}, {waits_for_run, true});
    const bytes said = message(2, {0, 0, 0, 0}); // to no PING
    scripted_destination second(std::move(theirs_again), {{bitmap_command, bitmap_message("ram", bitmap_size)},
        {resume_command, message(6, {0, 0, 0, 1})}, {joined(resume_command, run_command), said}, {run_command, said}, {{0x7e, 0, 0, 0}, {}}});
    migration::source source(from.state, from.control, {.postcopy_ram = true, .peer_timeout = 10s});
    REQUIRE(source.start(std::move(ours)));
    REQUIRE(source.start_postcopy());
    CHECK(wait_for([&] { return source.status().state == state::postcopy_paused; }));
    REQUIRE(source.recover(connector_of(std::move(ours_again))));
    // Until the first pages have come.
    CHECK(wait_for([&] { return second.heard(4); }));
    CHECK(second.heard(2) == waits_for_run);
    CHECK(second.heard(3) == waits_for_run);
    CHECK(from.starts == 0);
}

TEST_CASE("a postcopy whose destination goes away pauses, and a recovery that fails leaves it so") {
    struct deed {
        const char* name;
        std::vector<scripted_destination::line> again;
        errc code;
        const char* text;
    };
    const bytes good = bitmap_message("ram", bitmap_size);
    const deed deeds[] = {
        {"none", {}, errc::io, "postcopy-active"},
        {"wrong size", {{bitmap_command, bitmap_message("ram", bitmap_size + 8)}}, errc::bad_command, "bitmap of 256 bytes"},
        {"huge size", {{bitmap_command, joined(message(5, {3, 'r', 'a', 'm'}), bytes(8, 0xff))}}, errc::bad_command, "bitmap of 256 bytes"},
        {"no ending", {{bitmap_command, bitmap_message("ram", bitmap_size, 1)}}, errc::bad_command, "ending"},
        {"another block", {{bitmap_command, bitmap_message("rom", bitmap_size)}}, errc::bad_command, "a block of the stream"},
        {"twice", {{bitmap_command, joined(good, good)}}, errc::bad_command, "asked for"},
        {"too early", {{bitmap_command, message(6, {0, 0, 0, 1})}}, errc::bad_command, "RESUME_ACK"},
        {"not resumed", {{bitmap_command, good}, {resume_command, message(6, {0, 0, 0, 2})}}, errc::bad_command, "1 in RESUME_ACK"},
        {"closes", {{bitmap_command, {}}}, errc::io, "postcopy-recover"},
        {"closes later", {{bitmap_command, good}, {resume_command, {}}}, errc::io, "postcopy-recover"},
        {"closes when all is well", {{bitmap_command, good}, {resume_command, joined(message(6, {0, 0, 0, 1}), {})}, {{0x7e, 0, 0, 0}, {}}}, errc::io,
            "postcopy-"},
    };
    const leak_check leaks;
    for (const deed& one : deeds) {
        CAPTURE(one.name);
        const outcome ended = postcopy_to({{run_command, {}}}, one.again);
        CHECK(ended.paused);
        INFO(ended.why.message());
        CHECK((ended.why == one.code || (one.code == errc::io && ended.why == errc::truncated)));
        CHECK_THAT(ended.why.message(), contains(one.text));
    }
    leaks.check(16 * std::size(deeds)); // with four threads each time, of which a sanitizer remembers something
}

TEST_CASE("a guest isn't stopped for postcopy either before the destination's SWITCHOVER_ACK, which isn't awaited for ever") {
    const bool acknowledged = GENERATE(false, true);
    CAPTURE(acknowledged);
    small_machine from(page_count);
    fill(from);
    from.start();
    auto [ours, theirs] = make_pair();
    std::vector<scripted_destination::line> script{{run_command, {}}};
    if (acknowledged) script.push_back({{8, 0, 1, 0, 0}, message(7, {})}); // to OPEN_RETURN_PATH
    scripted_destination destination(std::move(theirs), std::move(script));
    migration::source source(from.state, from.control, {.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .switchover_ack = true,
        .postcopy_ram = true, .peer_timeout = 500ms});
    REQUIRE(source.start(std::move(ours)));
    REQUIRE(source.start_postcopy());
    CHECK(wait_for([&] { return is_final(source.status().state) || source.status().state == state::postcopy_paused; }));
    CHECK(source.status().state == (acknowledged ? state::postcopy_paused : state::failed));
    CHECK(from.stops == (acknowledged ? 1 : 0));
    static_cast<void>(source.give_up());
    const result<void> left = source.wait();
    REQUIRE_FALSE(left);
    if (!acknowledged) CHECK_THAT(left.error().message(), contains("no SWITCHOVER_ACK from the destination"));
}

TEST_CASE("what can't go in postcopy is refused before anything is sent") {
    small_machine from(64);
    const auto refusal = [&](const migration::parameters& settings) {
        auto [ours, theirs] = make_pair();
        migration::source source(from.state, from.control, settings);
        const result<void> started = source.start(std::move(ours));
        return started ? std::string() : started.error().message();
    };
    CHECK_THAT(refusal({.return_path = false, .postcopy_ram = true}), contains("return_path"));
    CHECK_THAT(refusal({.multifd = true, .postcopy_ram = true}), contains("multifd"));
    CHECK_THAT(refusal({.postcopy_preempt = true}), contains("postcopy_ram"));
    CHECK_THAT(refusal({.postcopy_ram = true, .postcopy_preempt = true}), contains("postcopy_preempt"));
    std::vector<std::byte> more(3 * page);
    from.state.add_ram("odd", more, {.host_page_size = 2 * page});
    CHECK_THAT(refusal({.postcopy_ram = true}), contains("odd") && contains("whole host pages"));
    small_machine ignoring(64, {.machine = {.name = "small", .capabilities = {"x-ignore-shared"}}});
    auto [ours, theirs] = make_pair();
    migration::source source(ignoring.state, ignoring.control, {.postcopy_ram = true});
    const result<void> started = source.start(std::move(ours));
    REQUIRE(started.has_error());
    CHECK_THAT(started.error().message(), contains("expected postcopy_ram or x-ignore-shared, found both"));
}

TEST_CASE("each host page is claimed once, by whoever comes first, and what nobody waits for goes on behind the last request") {
    std::vector<std::byte> memory(64 * page);
    ram_block block{"ram", memory, memory.size(), {.host_page_size = 4 * page}};
    migration::unsent_pages unsent{&block, page_bitmap(64), page_bitmap(64)};
    unsent.dirty.set(5);
    unsent.dirty.set_range(32, 32);
    migration::postcopy_pages pages({unsent}, page);
    CHECK(pages.remaining() == 36 * page); // page 5's neighbours come, too
    REQUIRE(pages.find(block) == std::size_t{0});
    CHECK_FALSE(pages.claim(0, 0));
    const auto first = pages.claim(0, 40 * page);
    REQUIRE(first);
    CHECK(first->pages == page_run{40, 4});
    CHECK_FALSE(pages.claim(0, 40 * page));
    const auto next = pages.claim_next(1); // a host page at least
    REQUIRE(next);
    CHECK(next->pages == page_run{44, 4});
    CHECK(pages.claim_next(6 * page)->pages == page_run{48, 4});
    CHECK(pages.claim_next(1 << 20)->pages == page_run{52, 12});
    CHECK(pages.claim_next(1 << 20)->pages == page_run{4, 4}); // around the end
    CHECK(pages.claim_next(1 << 20)->pages == page_run{32, 8});
    CHECK_FALSE(pages.claim_next(1 << 20));
    CHECK(pages.remaining() == 0);

    // A new connection: what was received is not sent again, what was given back here must have been.
    page_bitmap received(64);
    received.set_range(0, 32);
    REQUIRE(pages.set_received(0, received));
    CHECK(pages.remaining() == 32 * page);
    pages.set_released({0, {4, 4}});
    REQUIRE(pages.set_received(0, received));
    received.clear(4);
    CHECK(pages.set_received(0, received).error() == errc::bad_ram);

    // Two threads get every page, and none twice.
    REQUIRE(pages.set_received(0, [] { page_bitmap some(64); some.set_range(4, 4); return some; }()));
    std::atomic<std::size_t> claimed = 0;
    std::thread other([&] {
        for (std::size_t at = 0; at != 64; at += 4)
            if (const auto one = pages.claim(0, at * page)) claimed += one->pages.count;
    });
    while (const auto one = pages.claim_next(1)) claimed += one->pages.count;
    other.join();
    CHECK(claimed == 60);
}
