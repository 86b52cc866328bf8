// SPDX-License-Identifier: BSL-1.0
// Page records on their way out: the bytes that a reader expects, by reference, in large calls, in order with all else.
#include <support/catch.hpp>

#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/ram/page_writer.hpp>
#include <vmstate/stream/memory_channel.hpp>

#include <algorithm>
#include <cstddef>
#include <random>
#include <string>
#include <vector>

using namespace vmstate;

namespace {

constexpr std::size_t page_size = 4096;

/// Keeps what is written, and where each part of each call came from.
class recording_channel final : public output_channel {
public:
    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        if (calls.size() == fail_at) return error(errc::io, {}, "the link is down");
        calls.emplace_back(parts.begin(), parts.end());
        for (const std::span<const std::byte> part : parts) bytes.insert(bytes.end(), part.begin(), part.end());
        return {};
    }

    std::vector<std::vector<std::span<const std::byte>>> calls;
    std::vector<std::byte> bytes;
    std::size_t fail_at = ~std::size_t{0};
};

struct memory {
    explicit memory(const char* name, std::size_t pages, unsigned seed)
        : content(pages * page_size), block{name, content, content.size(), {}} {
        std::mt19937 random(seed);
        for (std::byte& one : content) one = static_cast<std::byte>(random());
    }
    std::span<const std::byte> page(std::size_t index) const {
        return std::span<const std::byte>(content).subspan(index * page_size, page_size);
    }
    std::vector<std::byte> content;
    ram_block block;
};

std::vector<std::byte> bytes_of(std::string_view text) {
    const auto bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

} // namespace

TEST_CASE("page records are those of QEMU") {
    const memory ram("pc.ram", 3, 1);
    const memory rom("pc.bios", 1, 2);
    recording_channel channel;
    buffered_writer out(channel);
    page_writer pages(out, page_size);
    pages.put_page(ram.block, 0x1000, ram.page(1));
    pages.put_zero(ram.block, 0x2000);
    pages.put_page_copy(rom.block, 0, rom.page(0));
    pages.put_end();
    const std::vector<std::byte> encoded = bytes_of("abc");
    pages.put_xbzrle(ram.block, 0, encoded); // another section: the block is remembered
    pages.put_zero(ram.block, 0x1000);
    pages.forget_block();
    pages.put_zero(ram.block, 0x1000);
    pages.put_end();
    REQUIRE(out.flush());

    std::vector<std::byte> expected;
    const auto put = [&](const std::vector<std::byte>& bytes) { expected.insert(expected.end(), bytes.begin(), bytes.end()); };
    const auto text = [&](const std::string& bytes) { put(bytes_of(bytes)); };
    const auto page = [&](std::span<const std::byte> bytes) { expected.insert(expected.end(), bytes.begin(), bytes.end()); };
    using namespace std::string_literals;
    text("\0\0\0\0\0\0\x10\x08\6pc.ram"s);
    page(ram.page(1));
    text("\0\0\0\0\0\0\x20\x22\0"s);
    text("\0\0\0\0\0\0\0\x08\7pc.bios"s);
    page(rom.page(0));
    text("\0\0\0\0\0\0\0\x10"s);
    text("\0\0\0\0\0\0\0\x40\6pc.ram\1\0\3abc"s);
    text("\0\0\0\0\0\0\x10\x22\0"s);
    text("\0\0\0\0\0\0\x10\x02\6pc.ram\0"s);
    text("\0\0\0\0\0\0\0\x10"s);
    CHECK(channel.bytes == expected);
    CHECK(out.offset() == expected.size());

    CHECK(pages.counts().normal == 2);
    CHECK(pages.counts().normal_bytes == 2 * page_size);
    CHECK(pages.counts().duplicate == 3);
    CHECK(pages.counts().xbzrle == 1);
    CHECK(pages.counts().transferred == expected.size());
}

TEST_CASE("pages leave from where they are, many in one call") {
    const memory ram("pc.ram", 1000, 3);
    recording_channel channel;
    buffered_writer out(channel);
    page_writer pages(out, page_size);
    for (std::size_t i = 0; i < 1000; ++i) pages.put_page(ram.block, i * page_size, ram.page(i));
    REQUIRE(out.flush());
    REQUIRE(channel.bytes.size() == 1000 * (page_size + 8) + 7);
    CHECK(channel.calls.size() <= 1000 / 64 + 1);
    std::size_t from_memory = 0;
    std::size_t copied = 0;
    for (const auto& call : channel.calls)
        for (const std::span<const std::byte> part : call) {
            const bool inside = part.data() >= ram.content.data() && part.data() < ram.content.data() + ram.content.size();
            (inside ? from_memory : copied) += part.size();
        }
    CHECK(from_memory == ram.content.size());
    CHECK(copied == 1000 * 8 + 7);
}

TEST_CASE("what a page holds when it leaves is what is sent") {
    memory ram("pc.ram", 1, 4);
    recording_channel channel;
    buffered_writer out(channel);
    page_writer pages(out, page_size);
    pages.put_page(ram.block, 0, ram.page(0));
    pages.put_page_copy(ram.block, 0, ram.page(0));
    const std::byte before = ram.content[5];
    ram.content[5] ^= std::byte{0xff};
    REQUIRE(out.flush());
    CHECK(channel.bytes[15 + 5] == ram.content[5]);
    CHECK(channel.bytes[15 + page_size + 8 + 5] == before);
}

TEST_CASE("references, small things and large blocks keep their order whatever the window") {
    std::mt19937 random(GENERATE(1U, 2U, 3U, 4U, 5U));
    const std::size_t window = GENERATE(std::size_t{4096}, std::size_t{5000}, std::size_t{65536});
    std::vector<std::byte> source(1 << 20);
    for (std::byte& one : source) one = static_cast<std::byte>(random());
    recording_channel channel;
    buffered_writer out(channel, window);
    std::vector<std::byte> expected;
    bool counted = true;
    for (int i = 0; i < 5000; ++i) {
        const std::size_t size = random() % 4 == 0 ? random() % 9000 : random() % 100;
        const std::span<const std::byte> piece =
            std::span<const std::byte>(source).subspan(random() % (source.size() - size), size);
        switch (random() % 4) {
        case 0:
            out.put_be64(static_cast<std::uint64_t>(i));
            for (int shift = 56; shift >= 0; shift -= 8)
                expected.push_back(static_cast<std::byte>(static_cast<std::uint64_t>(i) >> shift));
            break;
        case 1:
            out.write(piece);
            expected.insert(expected.end(), piece.begin(), piece.end());
            break;
        default:
            out.write_reference(piece);
            expected.insert(expected.end(), piece.begin(), piece.end());
            break;
        }
        counted = counted && out.offset() == expected.size();
        if (random() % 500 == 0) counted = counted && out.flush() && channel.bytes == expected;
    }
    REQUIRE(out.flush());
    CHECK(counted);
    CHECK(channel.bytes == expected);
    CHECK(std::all_of(channel.calls.begin(), channel.calls.end(), [](const auto& parts) {
        return std::none_of(parts.begin(), parts.end(), [](const auto& part) { return part.empty(); });
    }));
}

TEST_CASE("after a failure of the channel nothing more is written and the error stays") {
    const memory ram("pc.ram", 1, 5);
    recording_channel channel;
    channel.fail_at = 2;
    buffered_writer out(channel);
    page_writer pages(out, page_size);
    for (int i = 0; i < 1000; ++i) pages.put_page(ram.block, 0, ram.page(0));
    CHECK(out.failed());
    CHECK(out.flush().error() == errc::io);
    CHECK(channel.calls.size() == 2);
}
