// SPDX-License-Identifier: BSL-1.0
// The parts of postcopy that need no memory of a guest's: states, discards, requests, queue, bitmaps, statistics, and what
// each of them refuses.
#include <support/catch.hpp>

#include <vmstate/postcopy/discard.hpp>
#include <vmstate/postcopy/page_requests.hpp>
#include <vmstate/postcopy/received_bitmap.hpp>
#include <vmstate/postcopy/received_pages.hpp>
#include <vmstate/postcopy/request_queue.hpp>
#include <vmstate/postcopy/state.hpp>
#include <vmstate/postcopy/statistics.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate;
using namespace std::chrono_literals;
using vmstate::tests::contains;

namespace {

constexpr std::size_t page_size = 4096;
constexpr std::uint64_t huge = std::uint64_t{2} << 20;

/// Blocks whose memory nobody touches.
class blocks {
public:
    blocks() {
        add("pc.ram", 64 * page_size, page_size);
        add("huge", 4 * huge, huge);
        add("pc.rom", 2 * page_size, page_size);
    }
    ram_block& operator[](const char* name) const { return *ram.find(name); }

    ram_section ram;

private:
    void add(const char* name, std::uint64_t size, std::uint64_t host_page_size) {
        // An address alone: a span of it is never read.
        auto* const address = reinterpret_cast<std::byte*>(next_);
        next_ += 64 * huge;
        ram_options options;
        options.host_page_size = host_page_size;
        ram.insert(std::make_unique<ram_block>(
            ram_block{name, std::span<std::byte>(address, static_cast<std::size_t>(size)), size, options}));
    }
    std::uintptr_t next_ = std::uintptr_t{1} << 40;
};

std::vector<std::byte> bytes(const std::vector<unsigned>& values) {
    std::vector<std::byte> out;
    for (const unsigned value : values) out.push_back(static_cast<std::byte>(value));
    return out;
}
void put_u64(std::vector<std::byte>& out, std::uint64_t value) {
    for (int shift = 56; shift >= 0; shift -= 8) out.push_back(static_cast<std::byte>(value >> shift));
}
std::vector<std::byte> discard_payload(const std::string& name, const std::vector<ram_range>& ranges) {
    vector_writer out;
    out.put_u8(0);
    out.put_counted_string(name);
    out.put_u8(0);
    for (const ram_range& range : ranges) {
        out.put_be64(range.start);
        out.put_be64(range.length);
    }
    return out.take();
}
std::vector<std::byte> request_payload(std::uint64_t start, std::uint32_t length, const std::string& name = {}) {
    vector_writer out;
    out.put_be64(start);
    out.put_be32(length);
    if (!name.empty()) out.put_counted_string(name);
    return out.take();
}
template <class T>
std::string message_of(const result<T>& failed) {
    return failed ? "no error" : failed.error().message();
}

} // namespace

// ---- states

TEST_CASE("postcopy goes through its states in order and in no other") {
    using s = postcopy_state;
    constexpr std::array all{s::none, s::advise, s::discard, s::listen, s::running, s::end, s::paused, s::recover};
    const std::set<std::pair<s, s>> allowed{{s::none, s::advise}, {s::advise, s::discard}, {s::advise, s::listen},
        {s::discard, s::listen}, {s::listen, s::running}, {s::running, s::end}, {s::running, s::paused},
        {s::listen, s::paused}, {s::paused, s::recover}, {s::recover, s::listen}, {s::recover, s::running}, {s::recover, s::paused}};
    std::size_t found = 0;
    for (const s from : all)
        for (const s to : all) {
            INFO(to_string(from) << " -> " << to_string(to));
            CHECK(may_follow(from, to) == allowed.contains({from, to}));
            found += may_follow(from, to) ? 1 : 0;
        }
    CHECK(found == allowed.size());
}

TEST_CASE("a step out of order is refused by name and changes nothing") {
    postcopy_progress progress;
    REQUIRE(progress.enter(postcopy_state::advise));
    const result<void> run = progress.enter(postcopy_state::running);
    REQUIRE_FALSE(run);
    CHECK(run.error() == errc::bad_command);
    CHECK(run.error().expected() == "a step after advise: discard or listen");
    CHECK(run.error().found() == "running");
    CHECK(progress.now() == postcopy_state::advise);

    CHECK(progress.enter_or_stay(postcopy_state::discard).value() == postcopy_state::advise);
    CHECK(progress.enter_or_stay(postcopy_state::discard).value() == postcopy_state::discard);
    CHECK_FALSE(progress.enter(postcopy_state::discard));
    REQUIRE(progress.enter(postcopy_state::listen));
    CHECK_THAT(message_of(progress.enter_or_stay(postcopy_state::discard)),
        contains("expected a step after listen: running or paused, found discard"));
    REQUIRE(progress.enter(postcopy_state::running));
    REQUIRE(progress.enter(postcopy_state::paused));
    REQUIRE(progress.enter(postcopy_state::recover));
    REQUIRE(progress.enter(postcopy_state::paused));
    REQUIRE(progress.enter(postcopy_state::recover));
    REQUIRE(progress.enter(postcopy_state::running));
    REQUIRE(progress.enter(postcopy_state::end));
    CHECK_THAT(message_of(progress.enter(postcopy_state::paused)), contains("a step after end: nothing"));
}

// ---- discards

TEST_CASE("discard ranges are the dirty pages, rounded out to host pages") {
    const blocks machine;
    std::mt19937 random(GENERATE(1U, 2U, 3U, 4U));
    for (const char* name : {"pc.ram", "huge"}) {
        const ram_block& block = machine[name];
        const std::size_t pages = static_cast<std::size_t>(block.used_length / page_size);
        const std::size_t per_host = static_cast<std::size_t>(block.options.host_page_size / page_size);
        page_bitmap dirty(pages);
        for (int i = 0; i < 6; ++i) dirty.set(random() % pages);
        std::vector<bool> model(pages);
        for (std::size_t i = 0; i < pages; ++i)
            if (dirty.test(i)) std::fill_n(model.begin() + static_cast<std::ptrdiff_t>(i / per_host * per_host),
                static_cast<std::ptrdiff_t>(per_host), true);

        const std::vector<ram_range> ranges = discard_ranges(dirty, block, page_size);
        std::vector<bool> covered(pages);
        std::uint64_t end = 0;
        for (const ram_range& range : ranges) {
            CHECK((range.start > end || (range.start == 0 && end == 0)));
            end = range.start + range.length;
            for (std::uint64_t i = range.start; i < end; i += page_size) covered[static_cast<std::size_t>(i / page_size)] = true;
        }
        CHECK(covered == model);

        const std::size_t before = dirty.count();
        const std::uint64_t added = widen_to_host_pages(dirty, block, page_size);
        bool same = true;
        for (std::size_t i = 0; i < pages; ++i) same = same && dirty.test(i) == model[i];
        CHECK(same);
        CHECK(dirty.count() == before + added);
    }
}

TEST_CASE("a block without dirty pages is discarded nowhere, a whole one in one range") {
    const blocks machine;
    page_bitmap dirty(64);
    CHECK(discard_ranges(dirty, machine["pc.ram"], page_size).empty());
    dirty.set_range(0, 64);
    CHECK(discard_ranges(dirty, machine["pc.ram"], page_size) == std::vector<ram_range>{{0, 64 * page_size}});
}

TEST_CASE("discards travel as QEMU's do") {
    ram_section ram;
    ram.insert(std::make_unique<ram_block>(ram_block{"pc.ram", {}, std::uint64_t{16} << 20, {}}));
    // The beginning of a command of QEMU 7.2.22.
    std::vector<std::byte> payload = bytes({0, 6, 'p', 'c', '.', 'r', 'a', 'm', 0});
    for (const std::uint64_t value : {0x0U, 0x1000U, 0x6000U, 0x1000U, 0xe8000U, 0x2000U}) put_u64(payload, value);
    const std::vector<ram_range> ranges{{0, 0x1000}, {0x6000, 0x1000}, {0xe8000, 0x2000}};
    std::vector<std::vector<std::byte>> encoded;
    REQUIRE(encode_discards("pc.ram", ranges, [&](std::span<const std::byte> one) -> result<void> {
        encoded.emplace_back(one.begin(), one.end());
        return {};
    }));
    REQUIRE(encoded.size() == 1);
    CHECK(encoded[0] == payload);
    const result<discard_command> decoded = decode_discard(payload, ram);
    REQUIRE(decoded.has_value());
    CHECK(decoded->block == ram.find("pc.ram"));
    CHECK(decoded->ranges == ranges);
}

TEST_CASE("a command has twelve ranges at most, and the sender's error ends them") {
    std::vector<ram_range> ranges;
    for (std::uint64_t i = 0; i < 30; ++i) ranges.push_back({2 * i * page_size, page_size});
    std::vector<std::size_t> sizes;
    REQUIRE(encode_discards("pc.ram", ranges, [&](std::span<const std::byte> one) -> result<void> {
        sizes.push_back((one.size() - 9) / 16);
        return {};
    }));
    CHECK(sizes == std::vector<std::size_t>{12, 12, 6});
    int calls = 0;
    const result<void> failed = encode_discards("pc.ram", ranges, [&](std::span<const std::byte>) -> result<void> {
        ++calls;
        return error(errc::io, "a connection", "none");
    });
    CHECK_THAT(message_of(failed), contains("a connection"));
    CHECK(calls == 1);
}

TEST_CASE("malformed discards are refused by name") {
    const blocks machine;
    const auto refused = [&](const std::vector<std::byte>& payload) {
        return message_of(decode_discard(payload, machine.ram, 1000));
    };
    std::vector<std::byte> payload = discard_payload("pc.ram", {{0, page_size}});
    payload[0] = std::byte{1};
    CHECK_THAT(refused(payload), contains("expected payload version 0, found 1 (offset 1000)"));
    payload[0] = std::byte{0};
    payload[8] = std::byte{7};
    CHECK_THAT(refused(payload), contains("a zero byte behind the name, found 7 (offset 1008)"));
    payload[8] = std::byte{0};
    payload.pop_back();
    CHECK_THAT(refused(payload), contains("pairs of start and length, found 15 bytes"));
    CHECK_THAT(refused(discard_payload("pc.ram", {})), contains("pairs of start and length, found 0 bytes"));
    CHECK_THAT(refused(discard_payload("vga.vram", {{0, page_size}})), contains("found \"vga.vram\""));
    CHECK_THAT(refused(discard_payload("", {{0, page_size}})), contains("a block of this machine"));
    CHECK_THAT(refused(discard_payload("pc.ram", {{0, page_size}, {1, page_size}})),
        contains("pc.ram: bad RAM record: expected whole pages of 4096 bytes, found 1+4096 (offset 1025)"));
    CHECK_THAT(refused(discard_payload("pc.ram", {{0, 100}})), contains("whole pages"));
    CHECK_THAT(refused(discard_payload("huge", {{page_size, huge}})), contains("whole pages of 2097152 bytes"));
    CHECK_THAT(refused(discard_payload("pc.ram", {{0, 0}})), contains("a range that isn't empty"));
    CHECK_THAT(refused(discard_payload("pc.ram", {{63 * page_size, 2 * page_size}})), contains("a range within 262144 bytes"));
    CHECK_THAT(refused(discard_payload("pc.ram", {{~std::uint64_t{0xfff}, 2 * page_size}})), contains("a range within"));
    CHECK_THAT(refused(discard_payload("pc.ram", {{page_size, ~std::uint64_t{0xfff}}})), contains("a range within"));
    // Cut short anywhere.
    const std::vector<std::byte> whole = discard_payload("pc.ram", {{0, page_size}});
    for (std::size_t size = 0; size < whole.size(); ++size)
        CHECK_FALSE(decode_discard(std::span(whole).first(size), machine.ram).has_value());
}

// ---- what was received

TEST_CASE("received pages are marked, cleared, asked for and found by address") {
    const blocks machine;
    received_pages received(page_size);
    for (const auto& block : machine.ram.blocks()) received.add(*block);
    ram_block& big = machine["huge"];
    CHECK_FALSE(received.has(big, huge, huge));
    received.mark(big, huge, huge - page_size);
    CHECK_FALSE(received.has(big, huge, huge));
    received.mark(big, 2 * huge - page_size, page_size);
    CHECK(received.has(big, huge, huge));
    CHECK(received.snapshot(big).count() == 512);
    received.clear(big, huge + 5 * page_size, page_size);
    CHECK_FALSE(received.has(big, huge, huge));
    CHECK(received.has(big, huge, page_size));
    // Beyond the end there is nothing to mark.
    received.mark(machine["pc.rom"], page_size, 100 * page_size);
    CHECK(received.snapshot(machine["pc.rom"]).count() == 1);
    received.mark(machine["pc.rom"], 100 * page_size, page_size);
    CHECK(received.snapshot(machine["pc.rom"]).count() == 1);

    const auto address = reinterpret_cast<std::uintptr_t>(big.memory.data());
    CHECK(received.locate(address + 12345) == ram_address{&big, 12345});
    CHECK(received.locate(address + 4 * huge - 1) == ram_address{&big, 4 * huge - 1});
    CHECK_FALSE(received.locate(address + 4 * huge).has_value());
    CHECK_FALSE(received.locate(address - 1).has_value());
}

// ---- requests

namespace {

/// A return path that keeps what was sent, or refuses it.
struct return_path {
    std::vector<std::pair<page_request_type, std::vector<std::byte>>> sent;
    bool broken = false;

    page_requests::send_function function() {
        return [this](const page_request_message& message) -> result<void> {
            if (broken) return error(errc::io, "a return path", "a broken one");
            sent.emplace_back(message.type(), std::vector<std::byte>(message.payload().begin(), message.payload().end()));
            return {};
        };
    }
};

} // namespace

TEST_CASE("a request names its block when it isn't the last one's, and is made once") {
    const blocks machine;
    received_pages received(page_size);
    for (const auto& block : machine.ram.blocks()) received.add(*block);
    page_requests requests(received);
    return_path path;
    REQUIRE(requests.connect(path.function()));
    ram_block& ram = machine["pc.ram"];
    ram_block& big = machine["huge"];

    CHECK(requests.request(ram, page_size).value() == page_request_outcome::asked);
    CHECK(requests.request(ram, page_size).value() == page_request_outcome::asked_before);
    CHECK(requests.request(ram, 3 * page_size).value() == page_request_outcome::asked);
    CHECK(requests.request(big, huge).value() == page_request_outcome::asked);
    CHECK(requests.request(ram, 0).value() == page_request_outcome::asked);
    REQUIRE(path.sent.size() == 4);
    CHECK(path.sent[0].first == page_request_type::req_pages_id);
    CHECK(path.sent[0].second == request_payload(page_size, page_size, "pc.ram"));
    CHECK(path.sent[1].first == page_request_type::req_pages);
    CHECK(path.sent[1].second == request_payload(3 * page_size, page_size));
    CHECK(path.sent[2].second == request_payload(huge, huge, "huge"));
    CHECK(path.sent[3].second == request_payload(0, page_size, "pc.ram"));
    CHECK(requests.waiting() == 4);

    received.mark(ram, page_size, page_size);
    // A fault that is seen between the mark and the word of it would wait for ever if it relied on the request before.
    CHECK(requests.request(ram, page_size).value() == page_request_outcome::already_received);
    requests.placed(ram, page_size);
    CHECK(requests.waiting() == 3);
    CHECK(requests.request(ram, page_size).value() == page_request_outcome::already_received);
    CHECK(requests.waiting() == 3);
    CHECK(requests.sent() == 4);
}

TEST_CASE("what is wanted survives a broken return path and is asked for again on the next") {
    const blocks machine;
    received_pages received(page_size);
    for (const auto& block : machine.ram.blocks()) received.add(*block);
    page_requests requests(received);
    ram_block& ram = machine["pc.ram"];
    CHECK(requests.request(ram, 0).value() == page_request_outcome::kept);

    return_path first;
    REQUIRE(requests.connect(first.function()));
    CHECK(first.sent.size() == 1);
    CHECK(requests.request(ram, page_size).value() == page_request_outcome::asked);
    first.broken = true;
    CHECK_THAT(message_of(requests.request(ram, 2 * page_size)), contains("a broken one"));
    CHECK(requests.request(ram, 2 * page_size).value() == page_request_outcome::asked_before);
    CHECK(requests.request(ram, 3 * page_size).value() == page_request_outcome::kept);
    received.mark(ram, page_size, page_size);
    requests.placed(ram, page_size);
    CHECK(requests.waiting() == 3);

    // The next one breaks at once.
    return_path second;
    second.broken = true;
    CHECK_FALSE(requests.connect(second.function()));
    CHECK(requests.waiting() == 3);

    return_path third;
    REQUIRE(requests.connect(third.function()));
    REQUIRE(third.sent.size() == 3);
    CHECK(third.sent[0].second == request_payload(0, page_size, "pc.ram"));
    CHECK(third.sent[1].second == request_payload(2 * page_size, page_size));
    CHECK(third.sent[2].second == request_payload(3 * page_size, page_size));
    // A connection taken away in order.
    requests.disconnect();
    CHECK(requests.request(ram, 4 * page_size).value() == page_request_outcome::kept);
    return_path fourth;
    REQUIRE(requests.connect(fourth.function()));
    CHECK(fourth.sent.size() == 4);
    CHECK(fourth.sent[0].first == page_request_type::req_pages_id);
}

TEST_CASE("what a destination asks for a source understands") {
    const blocks machine;
    received_pages received(page_size);
    for (const auto& block : machine.ram.blocks()) received.add(*block);
    page_requests requests(received);
    return_path path;
    REQUIRE(requests.connect(path.function()));
    const std::vector<std::pair<const char*, std::uint64_t>> wanted{
        {"pc.ram", 0}, {"pc.ram", 5 * page_size}, {"huge", 3 * huge}, {"pc.rom", page_size}, {"pc.rom", 0}};
    for (const auto& [name, offset] : wanted) REQUIRE(requests.request(machine[name], offset).has_value());
    page_request_decoder decoder(machine.ram);
    for (std::size_t i = 0; i < wanted.size(); ++i) {
        const result<page_request> request = decoder.decode(path.sent.at(i).first, path.sent.at(i).second);
        REQUIRE(request.has_value());
        CHECK(request->block == &machine[wanted[i].first]);
        CHECK(request->start == wanted[i].second);
        CHECK(request->length == request->block->options.host_page_size);
    }
}

TEST_CASE("malformed requests are refused by name") {
    const blocks machine;
    page_request_decoder decoder(machine.ram);
    const auto id = page_request_type::req_pages_id;
    const auto same = page_request_type::req_pages;
    const auto refused = [&](page_request_type type, const std::vector<std::byte>& payload) {
        return message_of(decoder.decode(type, payload));
    };
    CHECK_THAT(refused(same, request_payload(0, page_size)), contains("a block's name in the first request"));
    CHECK_THAT(refused(id, request_payload(0, page_size, "vga.vram")), contains("found \"vga.vram\""));
    CHECK_THAT(refused(same, request_payload(0, page_size)), contains("a block's name in the first request"));
    REQUIRE(decoder.decode(id, request_payload(0, page_size, "pc.ram")).has_value());
    CHECK_THAT(refused(same, request_payload(1, page_size)),
        contains("REQ_PAGES/pc.ram: bad RAM record: expected whole pages of 4096 bytes, found 1+4096"));
    CHECK_THAT(refused(same, request_payload(0, 4095)), contains("whole pages"));
    CHECK_THAT(refused(same, request_payload(0, 0)), contains("a request for something"));
    CHECK_THAT(refused(same, request_payload(64 * page_size, page_size)), contains("a request within 262144 bytes"));
    CHECK_THAT(refused(same, request_payload(0, 65 * page_size)), contains("a request within"));
    CHECK_THAT(refused(same, request_payload(~std::uint64_t{0xfff}, 2 * page_size)), contains("a request within"));
    CHECK_THAT(refused(id, request_payload(page_size, page_size, "huge")),
        contains("REQ_PAGES_ID/huge: bad RAM record: expected whole pages of 2097152 bytes"));
    CHECK_THAT(refused(same, request_payload(0, page_size, "pc.ram")), contains("nothing behind the request, found 7 bytes"));
    std::vector<std::byte> short_name = request_payload(0, page_size, "pc.ram");
    short_name.pop_back();
    CHECK_THAT(refused(id, short_name), contains("REQ_PAGES_ID: bad command"));
    for (std::size_t size = 0; size < 12; ++size)
        CHECK_FALSE(decoder.decode(same, std::span(short_name).first(size)).has_value());
    decoder.forget_block();
    CHECK_THAT(refused(same, request_payload(0, page_size)), contains("a block's name in the first request"));
}

// ---- the source's queue

TEST_CASE("the queue gives each host page once, in the order of the requests") {
    const blocks machine;
    ram_block& ram = machine["pc.ram"];
    ram_block& big = machine["huge"];
    page_request_queue queue;
    CHECK(queue.push({&ram, 4 * page_size, page_size}) == 1);
    CHECK(queue.push({&big, huge, huge}) == 1);
    CHECK(queue.push({&ram, 4 * page_size, page_size}) == 0);
    CHECK(queue.push({&ram, 2 * page_size, 4 * page_size}) == 3);
    CHECK(queue.push({&ram, 0, 64 * page_size}) == 60);
    CHECK(queue.requests() == 5);
    std::vector<std::pair<ram_block*, std::uint64_t>> popped;
    while (const auto entry = queue.try_pop()) popped.emplace_back(entry->block, entry->offset);
    REQUIRE(popped.size() == 65);
    const std::vector<std::pair<ram_block*, std::uint64_t>> begin{{&ram, 4 * page_size}, {&big, huge},
        {&ram, 2 * page_size}, {&ram, 3 * page_size}, {&ram, 5 * page_size}, {&ram, 0}, {&ram, page_size}, {&ram, 6 * page_size}};
    CHECK(std::equal(begin.begin(), begin.end(), popped.begin()));
    CHECK(std::set<std::pair<ram_block*, std::uint64_t>>(popped.begin(), popped.end()).size() == 65);
    // Once taken, a page may be asked for again.
    CHECK(queue.push({&ram, 4 * page_size, page_size}) == 1);
    queue.reset();
    CHECK(queue.empty());
    CHECK(queue.push({&ram, 4 * page_size, page_size}) == 1);
}

TEST_CASE("who waits at the queue is woken by a request and by its end") {
    const blocks machine;
    ram_block& ram = machine["pc.ram"];
    page_request_queue queue;
    CHECK_FALSE(queue.pop_until(std::chrono::steady_clock::now()).has_value());
    CHECK_FALSE(queue.wait_until(std::chrono::steady_clock::now()));
    const auto far = std::chrono::steady_clock::now() + 1h;
    std::vector<std::uint64_t> popped;
    std::thread taker([&] {
        while (const auto entry = queue.pop_until(far)) popped.push_back(entry->offset);
    });
    for (std::uint64_t i = 0; i < 64; ++i) queue.push({&ram, i * page_size, page_size});
    queue.close();
    taker.join();
    CHECK(popped.size() == 64);
    CHECK(std::is_sorted(popped.begin(), popped.end()));
    CHECK_FALSE(queue.wait_until(far));
    queue.push({&ram, 0, page_size});
    CHECK(queue.wait_until(far));
}

// ---- the bitmap of a recovery

TEST_CASE("a received bitmap travels as QEMU's does") {
    page_bitmap received(70);
    received.set(0);
    received.set(9);
    received.set(63);
    received.set(69);
    vector_writer out;
    encode_received_bitmap(out, received);
    const std::vector<std::byte> blob = out.take();
    CHECK(blob == bytes({0, 0, 0, 0, 0, 0, 0, 16, 1, 2, 0, 0, 0, 0, 0, 0x80, 0x20, 0, 0, 0, 0, 0, 0, 0, //
                      0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef}));
    memory_reader in(blob);
    const result<page_bitmap> decoded = decode_received_bitmap(in, 70);
    REQUIRE(decoded.has_value());
    CHECK(*decoded == received);
    CHECK(in.remaining() == 0);
    // Whatever stands behind the last page is no page.
    std::vector<std::byte> more = blob;
    more[16] = std::byte{0xff};
    more[23] = std::byte{0xff};
    memory_reader in_more(more);
    const result<page_bitmap> masked = decode_received_bitmap(in_more, 70);
    REQUIRE(masked.has_value());
    CHECK(masked->count() == 3 + 6);
}

TEST_CASE("bitmaps of every size come back as they went") {
    std::mt19937_64 random(7);
    for (const std::size_t pages : {1U, 8U, 63U, 64U, 65U, 4096U, 100001U}) {
        page_bitmap received(pages);
        for (std::size_t i = 0; i < pages; ++i)
            if (random() % 3 == 0) received.set(i);
        vector_writer out;
        encode_received_bitmap(out, received);
        const std::vector<std::byte> blob = out.take();
        CHECK(blob.size() == 16 + received_bitmap_size(pages));
        memory_reader in(blob);
        const result<page_bitmap> decoded = decode_received_bitmap(in, pages);
        REQUIRE(decoded.has_value());
        CHECK(*decoded == received);
    }
}

TEST_CASE("malformed bitmaps are refused by name") {
    vector_writer out;
    encode_received_bitmap(out, page_bitmap(64));
    const std::vector<std::byte> blob = out.take();
    const auto refused = [](const std::vector<std::byte>& bytes_of, std::size_t pages) {
        memory_reader in(bytes_of);
        return message_of(decode_received_bitmap(in, pages));
    };
    CHECK_THAT(refused(blob, 65), contains("RECV_BITMAP: bad command: expected a bitmap of 16 bytes, found 8"));
    std::vector<std::byte> wrong = blob;
    wrong[0] = std::byte{0xff};
    CHECK_THAT(refused(wrong, 64), contains("a bitmap of 8 bytes"));
    wrong = blob;
    wrong.back() = std::byte{0};
    CHECK_THAT(refused(wrong, 64), contains("the bitmap's ending"));
    for (std::size_t size = 0; size < blob.size(); ++size)
        CHECK_THAT(refused({blob.begin(), blob.begin() + static_cast<std::ptrdiff_t>(size)}, 64),
            contains("RECV_BITMAP: stream ends too early"));
}

// ---- statistics

TEST_CASE("blocked time is each thread's own, and the machine's while all its vCPUs stand still") {
    const blocks machine;
    const ram_block& ram = machine["pc.ram"];
    const postcopy_statistics::clock::time_point zero{};
    postcopy_statistics statistics;
    statistics.set_vcpu_threads({101, 102});
    statistics.fault(101, ram, 0, zero);
    statistics.fault(7, ram, page_size, zero + 1us); // no vCPU
    statistics.fault(102, ram, page_size, zero + 10us);
    statistics.fault(102, ram, page_size, zero + 15us); // again, after a signal
    CHECK(statistics.snapshot(zero + 20us).blocktime == 10us);
    statistics.placed(ram, page_size, zero + 30us); // lets 7 and 102 go on
    statistics.placed(ram, page_size, zero + 35us); // a second time: nobody waits
    statistics.fault(102, ram, 0, zero + 40us);
    statistics.placed(ram, 0, zero + 140us);
    statistics.fault(0, ram, 0, zero + 150us);
    statistics.already_received(ram, 0, zero + 151us);

    const postcopy_fault_status status = statistics.snapshot(zero + 1s);
    CHECK(status.blocktime == 20us + 100us);
    CHECK(status.faults == 5);
    CHECK(status.already_received == 1);
    CHECK(status.latency_total == 29us + 20us + 140us + 100us);
    CHECK(status.latency_max == 140us);
    CHECK(status.latencies[5] == 2); // 29 and 20 us: 16 up to 32
    CHECK(status.latencies[7] == 1); // 100 us
    CHECK(status.latencies[8] == 1); // 140 us
    REQUIRE(status.threads.size() == 3);
    CHECK(status.threads[0].thread_id == 7);
    CHECK_FALSE(status.threads[0].is_vcpu);
    CHECK(status.threads[0].blocked == 29us);
    CHECK(status.threads[1].is_vcpu);
    CHECK(status.threads[1].faults == 1);
    CHECK(status.threads[1].blocked == 140us);
    CHECK(status.threads[2].faults == 2);
    CHECK(status.threads[2].blocked == 20us + 100us);
}

TEST_CASE("latencies fall into buckets of powers of two, the longest into the last") {
    const blocks machine;
    const ram_block& ram = machine["pc.ram"];
    const postcopy_statistics::clock::time_point zero{};
    postcopy_statistics statistics;
    const std::vector<std::pair<std::chrono::nanoseconds, std::size_t>> cases{
        {0ns, 0}, {999ns, 0}, {1us, 1}, {2us, 2}, {3us, 2}, {4us, 3}, {1024us, 11}, {24h, 31}};
    for (const auto& [latency, bucket] : cases) {
        const std::uint64_t before = statistics.snapshot().latencies[bucket];
        statistics.fault(0, ram, 0, zero);
        statistics.placed(ram, 0, zero + latency);
        CHECK(statistics.snapshot().latencies[bucket] == before + 1);
    }
    CHECK(statistics.snapshot().threads.empty());
}
