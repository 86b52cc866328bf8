// SPDX-License-Identifier: BSL-1.0
// multifd without a peer: its packets to the byte, what compresses them, which channel is which, and a receiver that gets
// what no source sends.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <zlib.h>

#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/incoming_channels.hpp>
#include <vmstate/migration/multifd_receiver.hpp>
#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/ram/multifd_zlib.hpp>
#include <vmstate/ram/multifd_zstd.hpp>
#include <vmstate/stream/memory_channel.hpp>
#include <vmstate/stream/prefixed_channel.hpp>

#include "support/catch.hpp"
#include "support/outcome.hpp"

using namespace vmstate;
using vmstate::tests::message_of;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t page = 4096;
using bytes = std::vector<std::byte>;

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::uint32_t be32(std::span<const std::byte> from, std::size_t at) {
    return detail::load_big<std::uint32_t>(from.data() + at);
}
void put_be32(std::span<std::byte> into, std::size_t at, std::uint32_t value) { detail::store_big(into.data() + at, value); }

/// A packet with its data.
struct packet {
    std::uint32_t flags = 0;
    std::string block = "ram";
    std::vector<std::uint64_t> normal = {};
    std::vector<std::uint64_t> zero = {};
    bytes data = {};
    std::uint32_t size = 0; ///< where it is another than the data's

    bytes encode() const {
        multifd_packet_header header;
        header.flags = flags;
        header.next_packet_size = size != 0 ? size : static_cast<std::uint32_t>(data.size());
        header.packet_num = 7;
        header.block = block;
        header.normal = normal;
        header.zero = zero;
        bytes whole(multifd_packet_header::wire_size(page));
        header.encode(whole, page);
        whole.insert(whole.end(), data.begin(), data.end());
        return whole;
    }
};
bytes operator+(bytes a, const bytes& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
}
bytes filled(std::size_t pages, std::uint8_t first) {
    bytes all(pages * page);
    for (std::size_t i = 0; i != all.size(); ++i) all[i] = static_cast<std::byte>(first + i / page);
    return all;
}

} // namespace

TEST_CASE("a channel's first packet has 64 bytes") {
    multifd_initial_packet first;
    for (std::size_t i = 0; i != 16; ++i) first.uuid[i] = static_cast<std::uint8_t>(0xa0 + i);
    first.id = 3;
    const auto encoded = first.encode();
    CHECK(be32(encoded, 0) == 0x11223344);
    CHECK(be32(encoded, 4) == 1);
    CHECK(encoded[8] == std::byte{0xa0});
    CHECK(encoded[23] == std::byte{0xaf});
    CHECK(encoded[24] == std::byte{3});
    CHECK(std::all_of(encoded.begin() + 25, encoded.end(), [](std::byte b) { return b == std::byte{0}; }));
    const auto decoded = multifd_initial_packet::decode(encoded);
    REQUIRE(message_of(decoded) == "");
    CHECK(decoded->uuid == first.uuid);
    CHECK(decoded->id == 3);
    for (const std::size_t at : {std::size_t{0}, std::size_t{7}}) {
        auto wrong = encoded;
        wrong[at] ^= std::byte{1};
        CHECK(multifd_initial_packet::decode(wrong).error() == errc::not_a_stream);
    }
}

TEST_CASE("a packet's header is QEMU's, to the byte") {
    const packet sent{multifd_method::zlib, "pc.ram", {0x3000, 0x1000}, {0x8000}, bytes(5)};
    const bytes encoded = sent.encode();
    REQUIRE(multifd_packet_header::wire_size(page) == 1344);
    REQUIRE(encoded.size() == 1344 + 5);
    CHECK(be32(encoded, 0) == 0x11223344);
    CHECK(be32(encoded, 4) == 1);
    CHECK(be32(encoded, 8) == 2);
    CHECK(be32(encoded, 12) == 128);
    CHECK(be32(encoded, 16) == 2);
    CHECK(be32(encoded, 20) == 5);
    CHECK(be32(encoded, 28) == 7);
    CHECK(be32(encoded, 32) == 1);
    CHECK(std::memcmp(encoded.data() + 64, "pc.ram\0", 8) == 0);
    CHECK(be32(encoded, 320 + 4) == 0x3000);
    CHECK(be32(encoded, 328 + 4) == 0x1000);
    CHECK(be32(encoded, 336 + 4) == 0x8000);

    std::vector<std::uint64_t> offsets;
    REQUIRE(multifd_packet_header::check_kind(encoded));
    const auto decoded = multifd_packet_header::decode(std::span(encoded).first(1344), page, offsets);
    REQUIRE(message_of(decoded) == "");
    CHECK(decoded->block == "pc.ram");
    CHECK(std::vector(decoded->normal.begin(), decoded->normal.end()) == sent.normal);
    CHECK(std::vector(decoded->zero.begin(), decoded->zero.end()) == sent.zero);
    CHECK(decoded->next_packet_size == 5);
    CHECK(decoded->check_offsets(0x9000, page));
    CHECK(decoded->check_offsets(0x8fff, page).error() == errc::bad_ram);
    CHECK(decoded->check_offsets(0, page).error() == errc::bad_ram);
    // 64 KiB pages: 8 of them, as many offsets.
    CHECK(multifd_packet_header::wire_size(65536) == 320 + 64);
}

TEST_CASE("a header that can't be right is refused, whatever it says") {
    std::vector<std::uint64_t> offsets;
    bytes header = packet{0, "ram", {0}, {}, {}, 4096}.encode();
    const auto decode = [&] { return message_of(multifd_packet_header::decode(header, page, offsets)); };
    const auto kind = [&] { return message_of(multifd_packet_header::check_kind(header)); };
    REQUIRE(kind() == "");
    REQUIRE(decode() == "");
    SECTION("magic and version") {
        put_be32(header, 0, 0x11223345);
        CHECK(has(kind(), "a packet's magic number"));
        put_be32(header, 0, multifd_magic);
        put_be32(header, 4, 2);
        CHECK(has(kind(), "multifd version 1, found 2"));
    }
    SECTION("flags") {
        put_be32(header, 8, multifd_flag::device_state);
        CHECK(kind() == "unsupported: DEVICE_STATE packet");
        put_be32(header, 8, 0x80);
        CHECK(has(kind(), "flags of a packet of pages, found 128"));
    }
    SECTION("room for more pages than ours") {
        put_be32(header, 12, 129);
        CHECK(has(decode(), "room for at most 128 pages, found 129"));
    }
    SECTION("more pages than room") {
        put_be32(header, 16, 129);
        CHECK(has(decode(), "at most 128 pages, found 129 and 0 zero pages"));
        put_be32(header, 16, 100);
        put_be32(header, 32, 29);
        CHECK(has(decode(), "found 100 and 29 zero pages"));
        put_be32(header, 16, 2); // 2 + 0xffffffff is 1
        put_be32(header, 32, 0xffffffff);
        CHECK(has(decode(), "at most 128 pages"));
    }
    SECTION("a name without an end") {
        std::fill(header.begin() + 64, header.begin() + 320, std::byte{'x'});
        CHECK(has(decode(), "a block's name that ends"));
        header[319] = std::byte{0};
        CHECK(decode() == "");
    }
    SECTION("pages beside the block, or across its pages") {
        for (const std::uint64_t offset : {std::uint64_t{0x10000}, std::uint64_t{0xf001}, ~std::uint64_t{0}, ~std::uint64_t{0xfff}, std::uint64_t{1}}) {
            detail::store_big(header.data() + 320, offset);
            const auto decoded = multifd_packet_header::decode(header, page, offsets);
            REQUIRE(message_of(decoded) == "");
            CHECK(decoded->check_offsets(0x10000, page).error() == errc::bad_ram);
        }
    }
    SECTION("the size that a packet without pages has left over") {
        put_be32(header, 16, 0);
        put_be32(header, 8, multifd_flag::sync);
        const auto decoded = multifd_packet_header::decode(header, page, offsets);
        REQUIRE(message_of(decoded) == "");
        CHECK(decoded->is_sync());
        CHECK(decoded->next_packet_size == 0);
        CHECK(decoded->normal.empty());
    }
}

TEST_CASE("what one side of a channel compresses, the other has again, packet after packet") {
    const int method = GENERATE(0, 1, 2, 3);
    const multifd_compression how = method == 0 ? multifd_zlib() : method == 1 ? multifd_zlib(9) : method == 2 ? multifd_zstd() : multifd_zstd(6);
    CAPTURE(how.name, method);
    auto compressor = how.make_compressor();
    auto decompressor = how.make_decompressor();
    REQUIRE(message_of(compressor) == "");
    REQUIRE(message_of(decompressor) == "");
    std::mt19937_64 random(42);
    for (std::size_t pages : {std::size_t{1}, std::size_t{128}, std::size_t{2}, std::size_t{127}, std::size_t{1}}) {
        bytes sent(pages * page);
        for (std::size_t i = 0; i != sent.size(); ++i)
            // Random, all the same, and in between: incompressible pages, too.
            sent[i] = static_cast<std::byte>((i / page) % 3 == 0 ? random() : (i / page) % 3 == 1 ? 5 : i % 7);
        const auto packed = (*compressor)->compress(sent);
        REQUIRE(message_of(packed) == "");
        CHECK(packed->size() < sent.size() + 4096);
        bytes got(sent.size());
        // In pieces as a packet's pages lie in memory: one, three, the rest.
        std::vector<std::span<std::byte>> parts;
        for (std::size_t at = 0, count = 1; at != pages; at += count, count = std::min<std::size_t>(pages - at, count * 3))
            parts.push_back(std::span(got).subspan(at * page, count * page));
        REQUIRE(message_of((*decompressor)->decompress(*packed, parts)) == "");
        CHECK(got == sent);
    }
}

TEST_CASE("a zlib stream that was flushed only at a packet's end is read") {
    // As QEMU does: page by page, and the flush with the last.
    z_stream stream{};
    REQUIRE(::deflateInit(&stream, 1) == Z_OK);
    auto decompressor = multifd_zlib().make_decompressor();
    REQUIRE(message_of(decompressor) == "");
    for (int round = 0; round != 3; ++round) {
        bytes sent = filled(5, static_cast<std::uint8_t>(round)), packed(64 * 1024), got(sent.size());
        stream.next_out = reinterpret_cast<Bytef*>(packed.data());
        stream.avail_out = static_cast<uInt>(packed.size());
        for (std::size_t i = 0; i != 5; ++i) {
            stream.next_in = reinterpret_cast<Bytef*>(sent.data() + i * page);
            stream.avail_in = page;
            REQUIRE(::deflate(&stream, i == 4 ? Z_SYNC_FLUSH : Z_NO_FLUSH) == Z_OK);
        }
        packed.resize(packed.size() - stream.avail_out);
        const std::span<std::byte> whole(got);
        REQUIRE(message_of((*decompressor)->decompress(packed, {&whole, 1})) == "");
        CHECK(got == sent);
    }
    ::deflateEnd(&stream);
}

TEST_CASE("compressed data that is broken, too short or too long is an error") {
    const multifd_compression how = GENERATE(false, true) ? multifd_zlib() : multifd_zstd();
    CAPTURE(how.name);
    auto compressor = how.make_compressor();
    REQUIRE(message_of(compressor) == "");
    const bytes sent = filled(4, 1);
    const auto view = (*compressor)->compress(sent);
    REQUIRE(message_of(view) == "");
    const bytes packed(view->begin(), view->end());
    const auto decompress = [&](std::span<const std::byte> packet, std::size_t pages) {
        auto fresh = how.make_decompressor();
        bytes got(pages * page);
        const std::span<std::byte> whole(got);
        return message_of((*fresh)->decompress(packet, {&whole, 1}));
    };
    REQUIRE(decompress(packed, 4) == "");
    CHECK(has(decompress(packed, 5), "compressed data for all pages of the packet, found less"));
    CHECK(has(decompress(packed, 3), "found more"));
    CHECK(has(decompress({}, 1), "found less"));
    bytes garbage = packed;
    std::fill(garbage.begin(), garbage.begin() + 2, std::byte{0xff});
    CHECK(has(decompress(garbage, 4), how.name == "zlib" ? "inflate: " : "ZSTD_decompressStream: "));
    // Every prefix, and every byte inverted: an error or other pages, and never a byte outside them (sanitizers look).
    for (std::size_t size = 0; size + 16 < packed.size(); ++size) CHECK(decompress(std::span(packed).first(size), 4) != "");
    for (std::size_t at = 0; at != packed.size(); ++at) {
        bytes damaged = packed;
        damaged[at] ^= std::byte{0xff};
        decompress(damaged, 4);
    }
}

namespace {

std::shared_ptr<input_channel> channel_of(const bytes& content) { return std::make_shared<memory_input_channel>(content); }

bytes main_stream() { return {std::byte{0x51}, std::byte{0x45}, std::byte{0x56}, std::byte{0x4d}, std::byte{9}}; }
bytes first_packet(std::uint8_t id, std::uint8_t uuid = 0) {
    multifd_initial_packet first;
    first.id = id;
    first.uuid.fill(uuid);
    const auto encoded = first.encode();
    return {encoded.begin(), encoded.end()};
}

} // namespace

TEST_CASE("channels are told apart by what they begin with, in any order") {
    bytes main = main_stream(), zero = first_packet(0), one = first_packet(1) + bytes{std::byte{77}};
    std::vector<const bytes*> order{&main, &zero, &one};
    std::sort(order.begin(), order.end());
    do {
        std::vector<std::shared_ptr<input_channel>> arrived;
        for (const bytes* const content : order) arrived.push_back(channel_of(*content));
        const auto found = migration::tell_apart(arrived, std::nullopt);
        REQUIRE(message_of(found) == "");
        // The main channel's first bytes come again, and with what follows them.
        bytes again(5);
        CHECK(read_exactly(*found->main, again));
        CHECK(again == main);
        REQUIRE(found->multifd.size() == 2);
        bytes next(1);
        CHECK(read_exactly(*found->multifd[1], next));
        CHECK(next.front() == std::byte{77});
        CHECK(read_exactly(*found->multifd[0], next).error() == errc::truncated);
    } while (std::next_permutation(order.begin(), order.end()));
}

TEST_CASE("channels that don't make a migration are refused by name") {
    const auto refused = [](std::vector<bytes> contents, std::optional<std::array<std::uint8_t, 16>> uuid = {}) {
        std::vector<std::shared_ptr<input_channel>> arrived;
        for (const bytes& content : contents) arrived.push_back(channel_of(content));
        return message_of(migration::tell_apart(arrived, uuid));
    };
    CHECK(has(refused({main_stream(), main_stream()}), "one main channel, found a second one"));
    CHECK(has(refused({main_stream(), first_packet(0), first_packet(0)}), "multifd channel 0: not a migration stream: expected each multifd channel once"));
    CHECK(has(refused({main_stream(), first_packet(0), first_packet(2)}), "multifd channels 0 to 1, found 2"));
    CHECK(has(refused({first_packet(0), first_packet(1)}), "multifd channels 0 to 0, found 1"));
    CHECK(has(refused({main_stream(), bytes(64, std::byte{1})}), "a main channel (\"QEVM\") or a multifd channel, found 16843009"));
    CHECK(has(refused({main_stream(), bytes(3)}), "channel's first bytes: stream ends too early: expected 4 bytes, found 3"));
    bytes cut = first_packet(0);
    cut.resize(63);
    CHECK(has(refused({main_stream(), cut}), "multifd channel's first packet: stream ends too early"));
    std::array<std::uint8_t, 16> ours;
    ours.fill(5);
    CHECK(has(refused({main_stream(), first_packet(0)}, ours), "multifd channel 0: machine configured differently: expected this machine's uuid"));
    CHECK(refused({main_stream(), first_packet(0, 5)}, ours) == "");
}

namespace {

/// A machine with one block of memory between two others that nobody may touch, and a receiver with one channel.
class reception {
public:
    static constexpr std::size_t pages = 16;

    explicit reception(bytes channel, multifd_compression how = {}, std::chrono::milliseconds patience = 5s)
        : content_(std::move(channel)), receiver_(machine_, std::move(how), patience, [this] { failed_ = true; }, {}) {
        machine_.add_ram("ram", memory());
        std::vector<std::shared_ptr<input_channel>> channels{channel_of(content_)};
        REQUIRE(receiver_.start(std::move(channels)));
    }
    std::span<std::byte> memory() { return std::span(all_).subspan(pages * page, pages * page); }
    /// START with its list, and sync points as QEMU 7.2 has them.
    std::string start() {
        bytes room(256);
        memory_writer out(room);
        machine_.ram()->begin_load(machine_.options());
        machine_.ram()->save_setup(out, machine_.options());
        return load(std::span(room).first(static_cast<std::size_t>(out.offset())));
    }
    std::string part() {
        bytes eos(8);
        eos[7] = std::byte{0x10};
        return load(eos);
    }
    std::string finish(bool loaded = true) { return message_of(loaded ? receiver_.complete() : receiver_.finish()); }
    /// Both points, and the end: the first that fails.
    std::string all() {
        for (std::string said : {start(), part()})
            if (!said.empty()) {
                const std::string reason = finish(false);
                return reason.empty() ? said : reason;
            }
        return finish();
    }
    bool neighbours_are_untouched() const {
        return are_zero(std::span(all_).first(pages * page)) && are_zero(std::span(all_).last(pages * page));
    }
    std::uint64_t bytes_received() const { return receiver_.bytes(); }

private:
    std::string load(std::span<const std::byte> body) {
        memory_reader in(body);
        return message_of(machine_.ram()->load(in, {.sync = &receiver_}));
    }

    bytes all_ = bytes(3 * pages * page);
    bytes content_;
    machine machine_{{.name = "small"}};
    std::atomic<bool> failed_ = false;
    migration::multifd_receiver receiver_;
};

const bytes sync_packet = packet{multifd_flag::sync, ""}.encode();

} // namespace

TEST_CASE("a receiver puts pages where they belong") {
    SECTION("plain, in any order, beside each other or not") {
        const bytes data = filled(4, 1);
        reception here(sync_packet + packet{0, "ram", {0x5000, 0x6000, 0x1000, 0xf000}, {}, data}.encode() + sync_packet);
        REQUIRE(here.all() == "");
        CHECK(here.memory()[0x5000] == std::byte{1});
        CHECK(here.memory()[0x6fff] == std::byte{2});
        CHECK(here.memory()[0x1000] == std::byte{3});
        CHECK(here.memory()[0xffff] == std::byte{4});
        CHECK(are_zero(here.memory().first(0x1000)));
        CHECK(here.neighbours_are_untouched());
        CHECK(here.bytes_received() == 3 * 1344 + 4 * page);
    }
    SECTION("zero pages of a QEMU 9") {
        reception here(sync_packet + packet{0, "ram", {0x2000}, {0x3000, 0x4000}, filled(1, 9)}.encode() + sync_packet);
        std::memset(here.memory().data(), 0x55, here.memory().size());
        REQUIRE(here.all() == "");
        CHECK(here.memory()[0x2000] == std::byte{9});
        CHECK(are_zero(here.memory().subspan(0x3000, 0x2000)));
        CHECK(here.memory()[0x5000] == std::byte{0x55});
    }
    SECTION("pages in a SYNC packet, a packet with nothing, and a size that is left over, as QEMU 7.2 sends them") {
        packet last{multifd_flag::sync, "ram", {0x1000}, {}, filled(1, 3)};
        packet stale{multifd_flag::sync, ""};
        stale.size = 4096;
        reception here(stale.encode() + packet{}.encode() + last.encode());
        REQUIRE(here.all() == "");
        CHECK(here.memory()[0x1000] == std::byte{3});
    }
    SECTION("compressed") {
        const multifd_compression how = GENERATE(false, true) ? multifd_zlib() : multifd_zstd();
        auto compressor = how.make_compressor();
        const auto packed = (*compressor)->compress(filled(2, 7));
        reception here(sync_packet + packet{how.method, "ram", {0xe000, 0x1000}, {}, bytes(packed->begin(), packed->end())}.encode() + sync_packet, how);
        REQUIRE(here.all() == "");
        CHECK(here.memory()[0xe000] == std::byte{7});
        CHECK(here.memory()[0x1fff] == std::byte{8});
    }
}

TEST_CASE("what a receiver can't take is an error that names the channel") {
    const auto said = [](const bytes& channel, multifd_compression how = {}) {
        reception here(channel, std::move(how), 200ms);
        const std::string message = here.all();
        CHECK(here.neighbours_are_untouched());
        return message;
    };
    const packet good{0, "ram", {0x1000}, {}, filled(1, 1)};
    REQUIRE(said(sync_packet + good.encode() + sync_packet) == "");
    CHECK(has(said(good.encode() + sync_packet), "multifd channel 0: bad RAM record: expected a block of the stream's list, found ram"));
    packet wrong = good;
    wrong.block = "rom";
    CHECK(has(said(sync_packet + wrong.encode() + sync_packet), "a block of the stream's list, found rom"));
    wrong = good;
    wrong.normal = {0x10000};
    CHECK(has(said(sync_packet + wrong.encode() + sync_packet), "multifd channel 0/ram: bad RAM record: expected a page within 65536 bytes, found offset 65536"));
    wrong = good;
    wrong.normal = {};
    wrong.zero = {0x10000};
    CHECK(has(said(sync_packet + wrong.encode() + sync_packet), "found offset 65536"));
    wrong = good;
    wrong.data.resize(100);
    CHECK(has(said(sync_packet + wrong.encode() + sync_packet), "4096 bytes of pages, found 100"));
    wrong = good;
    wrong.flags = multifd_method::zlib;
    CHECK(has(said(sync_packet + wrong.encode() + sync_packet), "pages compressed by none, found zlib"));
    CHECK(has(said(sync_packet + good.encode() + sync_packet, multifd_zstd()), "pages compressed by zstd, found none"));
    wrong.data.clear();
    wrong.size = multifd_max_compressed + 1;
    CHECK(has(said(sync_packet + wrong.encode() + sync_packet, multifd_zlib()), "at most 1048576 bytes of compressed pages, found 1048577"));
    wrong = good;
    wrong.flags = multifd_flag::device_state;
    CHECK(has(said(sync_packet + wrong.encode()), "unsupported: DEVICE_STATE packet"));
    // It ends: before a sync point, within a header, within pages.
    CHECK(has(said(sync_packet + good.encode()), "multifd channel 0: stream ends too early: expected a packet"));
    bytes cut = sync_packet + good.encode();
    cut.resize(1344 + 700);
    CHECK(has(said(cut), "expected a packet"));
    cut = sync_packet + good.encode();
    cut.resize(2 * 1344 + 100);
    CHECK(has(said(cut), "4096 bytes of pages, found 100"));
    // The main stream has no sync point at all.
    reception alone(sync_packet);
    CHECK(has(alone.finish(), "multifd channel 0: bad RAM record: expected a sync point in the main stream"));
}

TEST_CASE("a receiver bounds its wait for a sync point") {
    /// Has nothing to say, and doesn't end either.
    struct silent final : input_channel {
        result<std::size_t> read_some(std::span<const std::span<std::byte>>) override {
            while (!over.load()) std::this_thread::sleep_for(1ms);
            return error(errc::io, {}, "channel was shut down");
        }
        void shutdown() noexcept override { over = true; }
        std::atomic<bool> over = false;
    };
    machine here{{.name = "small"}};
    migration::multifd_receiver receiver(here, {}, 50ms, {}, {});
    REQUIRE(receiver.start({std::make_shared<silent>(), std::make_shared<silent>()}));
    CHECK(message_of(receiver.multifd_flush()) == "multifd channel 0: input/output error: no SYNC for 50 ms");
    CHECK(receiver.finish());
}

TEST_CASE("whatever is changed in a channel's bytes, nothing outside the block is written") {
    const bool compressed = GENERATE(false, true);
    const multifd_compression how = compressed ? multifd_zstd() : multifd_compression{};
    bytes data = filled(3, 1);
    if (compressed) {
        auto compressor = how.make_compressor();
        const auto packed = (*compressor)->compress(data);
        data.assign(packed->begin(), packed->end());
    }
    const bytes good = sync_packet + packet{how.method, "ram", {0x1000, 0x2000, 0xf000}, {0}, data}.encode() + sync_packet;
    std::mt19937 random(7);
    // The header's numbers, the name and the offsets in use; of the rest a few.
    std::vector<std::size_t> places;
    for (std::size_t at = 1344; at != 1344 + 80; ++at) places.push_back(at);
    for (std::size_t at = 1344 + 320; at != 1344 + 320 + 40; ++at) places.push_back(at);
    for (int i = 0; i != 60; ++i) places.push_back(random() % good.size());
    std::size_t refused = 0;
    for (const std::size_t at : places) {
        for (const std::byte mask : {std::byte{0xff}, std::byte{0x01}, std::byte{0x80}}) {
            bytes damaged = good;
            damaged[at] ^= mask;
            reception here(damaged, how, 50ms);
            refused += !here.all().empty();
            REQUIRE(here.neighbours_are_untouched());
        }
    }
    CHECK(refused > places.size());
}
