// SPDX-License-Identifier: BSL-1.0
// The XBZRLE encoder: vectors worked out by hand, and against the decoder.
#include <support/catch.hpp>

#include <vmstate/machine/xbzrle.hpp>
#include <vmstate/ram/xbzrle.hpp>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <map>
#include <random>
#include <vector>

using namespace vmstate;

namespace {

using bytes = std::vector<std::byte>;

bytes make(std::initializer_list<int> values) {
    bytes made;
    for (const int value : values) made.push_back(static_cast<std::byte>(value));
    return made;
}
/// The encoding with as much room as `room`.
std::optional<bytes> encode(const bytes& before, const bytes& page, std::size_t room) {
    bytes into(room);
    const std::optional<std::size_t> size = xbzrle_encode(before, page, into);
    if (!size) return std::nullopt;
    into.resize(*size);
    return into;
}
/// `page` with other bytes at some places.
bytes changed(bytes page, std::initializer_list<std::size_t> places) {
    for (const std::size_t place : places) page[place] ^= std::byte{0x5a};
    return page;
}

} // namespace

TEST_CASE("encodings worked out by hand") {
    const bytes zero(4096);
    CHECK(encode(zero, zero, 4095) == bytes{});
    // The first byte: nothing kept, one changed.
    CHECK(encode(zero, changed(zero, {0}), 4095) == make({0, 1, 0x5a}));
    // The last byte: 4095 kept = 0x7f + 0x80, and 31 times 128.
    CHECK(encode(zero, changed(zero, {4095}), 4095) == make({0xff, 0x1f, 1, 0x5a}));
    // 127 is the longest run of one byte of length, 128 the first of two.
    CHECK(encode(zero, changed(zero, {127}), 4095) == make({127, 1, 0x5a}));
    CHECK(encode(zero, changed(zero, {128}), 4095) == make({0x80, 0x01, 1, 0x5a}));
    // Two equal bytes between two changed ones are cheaper sent than told; of three there is a new run.
    CHECK(encode(zero, changed(zero, {10, 13}), 4095) == make({10, 4, 0x5a, 0, 0, 0x5a}));
    CHECK(encode(zero, changed(zero, {10, 14}), 4095) == make({10, 1, 0x5a, 3, 1, 0x5a}));
    // A page that changed up to its last byte but two: what is equal at the end isn't told.
    CHECK(encode(make({1, 2, 3, 4}), make({9, 9, 3, 4}), 4) == make({0, 2, 9, 9}));
    // A run of 300 changed bytes: 300 = 0x2c + 2 * 128.
    bytes many(4096);
    std::fill(many.begin() + 8, many.begin() + 308, std::byte{7});
    bytes expected = make({8, 0xac, 0x02});
    expected.insert(expected.end(), 300, std::byte{7});
    CHECK(encode(zero, many, 4095) == expected);
}

TEST_CASE("what doesn't fit overflows, to the byte") {
    const bytes zero(4096);
    CHECK(encode(zero, changed(zero, {0}), 3));
    CHECK_FALSE(encode(zero, changed(zero, {0}), 2));
    CHECK(encode(zero, changed(zero, {10, 14}), 6));
    CHECK_FALSE(encode(zero, changed(zero, {10, 14}), 5));
    CHECK(encode(zero, zero, 0) == bytes{});
    CHECK_FALSE(encode(zero, bytes(4096, std::byte{1}), 4096));
    // A run of 16 KiB has no length: 14 bits.
    const bytes large(65536);
    CHECK(encode(large, changed(large, {16383}), 65535) == make({0xff, 0x7f, 1, 0x5a}));
    CHECK_FALSE(encode(large, changed(large, {16384}), 65535));
}

TEST_CASE("random edits come back from the decoder") {
    std::mt19937 random(GENERATE(1U, 2U, 3U, 4U));
    const std::size_t page_size = GENERATE(std::size_t{1024}, std::size_t{4096}, std::size_t{16384});
    bytes before(page_size);
    for (std::byte& one : before) one = static_cast<std::byte>(random() % 4);
    std::size_t wrong = 0;
    std::size_t overflowed = 0;
    for (int round = 0; round < 500; ++round) {
        bytes page = before;
        // From a byte to the whole page, in a few places or many.
        const std::size_t edits = std::size_t{1} << (random() % 9);
        for (std::size_t i = 0; i < edits; ++i) {
            const std::size_t first = random() % page_size;
            const std::size_t count = std::min(page_size - first, std::size_t{1} << (random() % 11));
            for (std::size_t k = first; k < first + count; ++k) page[k] = static_cast<std::byte>(random() % 4);
        }
        const std::optional<bytes> encoded = encode(before, page, page_size - 1);
        if (!encoded) {
            ++overflowed;
            continue;
        }
        bytes decoded = before;
        if (!xbzrle_decode(*encoded, decoded) || decoded != page) ++wrong;
        if (encoded->empty() != (before == page)) ++wrong;
    }
    CHECK(wrong == 0);
    CHECK(overflowed < 250);
}

TEST_CASE("a destination that follows the encoder has what the source has") {
    // 40 pages share 16 places; each pass changes some of them and sends all.
    constexpr std::size_t page_size = 4096;
    constexpr std::size_t page_count = 40;
    xbzrle_encoder encoder = xbzrle_encoder::make(16 * page_size, page_size).value();
    std::mt19937 random(11);
    std::vector<bytes> source(page_count, bytes(page_size));
    std::vector<bytes> destination = source;
    std::map<xbzrle_page::kind, int> kinds;
    std::size_t differing = 0;
    bool decoded = true;
    for (std::uint64_t pass = 1; pass <= 40; ++pass)
        for (std::size_t i = 0; i < page_count; ++i) {
            bytes& page = source[i];
            if (random() % 8 == 0) {
                std::fill(page.begin(), page.end(), std::byte{0});
                std::fill(destination[i].begin(), destination[i].end(), std::byte{0});
                encoder.sent_zero(i * page_size, pass);
                continue;
            }
            if (random() % 16 == 0)
                for (std::byte& one : page) one = static_cast<std::byte>(random());
            for (std::size_t k = random() % 20; k != 0; --k)
                page[random() % page_size] = static_cast<std::byte>(random());
            const xbzrle_page out = encoder.encode(i * page_size, page, pass);
            ++kinds[out.how];
            if (out.how == xbzrle_page::kind::plain)
                destination[i].assign(out.bytes.begin(), out.bytes.end());
            else if (out.how == xbzrle_page::kind::encoded)
                decoded = decoded && out.bytes.size() < page_size && xbzrle_decode(out.bytes, destination[i]);
            differing += destination[i] != page ? 1U : 0U;
        }
    CHECK(decoded);
    CHECK(differing == 0);
    // All ways were gone.
    CHECK(kinds[xbzrle_page::kind::skip] > 0);
    CHECK(kinds[xbzrle_page::kind::plain] > 0);
    CHECK(kinds[xbzrle_page::kind::encoded] > 100);
    const xbzrle_counts& counts = encoder.counts();
    CHECK(counts.overflow > 0);
    CHECK(counts.cache_miss + counts.overflow == static_cast<std::uint64_t>(kinds[xbzrle_page::kind::plain]));
    CHECK(counts.pages == static_cast<std::uint64_t>(kinds[xbzrle_page::kind::skip] +
                                                     kinds[xbzrle_page::kind::encoded]) +
                              counts.overflow);
}

TEST_CASE("a page in use keeps its place in the cache for two passes") {
    constexpr std::size_t page_size = 4096;
    xbzrle_encoder encoder = xbzrle_encoder::make(2 * page_size, page_size).value();
    const bytes page(page_size, std::byte{1});
    const std::uint64_t a = 0;
    const std::uint64_t b = 2 * page_size; // the same place
    const auto kind = [&](std::uint64_t address, std::uint64_t pass) { return encoder.encode(address, page, pass).how; };
    CHECK(kind(a, 1) == xbzrle_page::kind::plain);
    CHECK(kind(b, 1) == xbzrle_page::kind::plain);
    CHECK(kind(a, 2) == xbzrle_page::kind::skip);
    CHECK(kind(b, 3) == xbzrle_page::kind::plain); // not yet
    CHECK(kind(a, 3) == xbzrle_page::kind::skip);
    CHECK(kind(b, 5) == xbzrle_page::kind::plain); // now it has the place
    CHECK(kind(b, 6) == xbzrle_page::kind::skip);
    encoder.forget(b);
    CHECK(kind(b, 6) == xbzrle_page::kind::plain);
}

TEST_CASE("the rates are those of the last pass") {
    constexpr std::size_t page_size = 4096;
    xbzrle_encoder encoder = xbzrle_encoder::make(4 * page_size, page_size).value();
    CHECK(encoder.counts().cache_size == 4 * page_size);
    bytes page(page_size, std::byte{1});
    for (std::uint64_t i = 0; i != 4; ++i) encoder.encode(i * page_size, page, 1);
    encoder.end_pass(8); // four of them zero pages, or such
    CHECK(encoder.counts().cache_miss_rate == 0.5);
    CHECK(encoder.counts().encoding_rate == 0);
    for (std::uint64_t i = 0; i != 4; ++i) {
        page[7] = static_cast<std::byte>(100 + i);
        encoder.encode(i * page_size, page, 2);
    }
    // Two lengths and a byte, and what goes before them.
    REQUIRE(encoder.counts().bytes == 4 * (3 + 3));
    encoder.end_pass(4);
    CHECK(encoder.counts().cache_miss_rate == 0);
    CHECK(encoder.counts().encoding_rate == 4096.0 / 6);
    encoder.end_pass(0);
    CHECK(encoder.counts().encoding_rate == 4096.0 / 6);
    encoder.end_pass(1);
    CHECK(encoder.counts().encoding_rate == 0);
}

TEST_CASE("a cache is a power of two of pages") {
    CHECK(xbzrle_encoder::make(3 * 4096).error() == errc::invalid_argument);
    CHECK(xbzrle_encoder::make(4095).error() == errc::invalid_argument);
    CHECK(xbzrle_encoder::make(64 << 20).has_value());
}
