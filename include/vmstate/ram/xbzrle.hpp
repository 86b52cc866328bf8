// SPDX-License-Identifier: BSL-1.0
//
// XBZRLE: pages that are sent again go as their difference from what was sent before, which a cache keeps. The decoder
// is machine/xbzrle.hpp. Depends on support/.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/support/result.hpp>
#include <vmstate/support/zero_bytes.hpp>

namespace vmstate {

namespace detail {

inline constexpr std::size_t max_run_length = (1U << 14) - 1;

/// The first place at or after `from` where the pages differ; their size if there is none.
inline std::size_t find_difference(
    std::span<const std::byte> a, std::span<const std::byte> b, std::size_t from) noexcept {
    for (; a.size() - from >= 8; from += 8) {
        std::uint64_t x;
        std::uint64_t y;
        std::memcpy(&x, a.data() + from, 8);
        std::memcpy(&y, b.data() + from, 8);
        if (x == y) continue;
        const int bits = std::endian::native == std::endian::little ? std::countr_zero(x ^ y) : std::countl_zero(x ^ y);
        return from + static_cast<std::size_t>(bits) / 8;
    }
    while (from < a.size() && a[from] == b[from]) ++from;
    return from;
}

/// The end of the changed run that begins at `from`: up to where more than two bytes in a row are equal, since fewer
/// cost no more inside the run than the two lengths that a new run begins with.
inline std::size_t find_end_of_change(
    std::span<const std::byte> a, std::span<const std::byte> b, std::size_t from) noexcept {
    std::size_t end = from;
    for (std::size_t i = from; i < a.size() && i - end <= 2;) {
        if (a.size() - i >= 8) {
            std::uint64_t x;
            std::uint64_t y;
            std::memcpy(&x, a.data() + i, 8);
            std::memcpy(&y, b.data() + i, 8);
            x ^= y;
            // No byte of x is 0.
            if (((x - 0x0101010101010101U) & ~x & 0x8080808080808080U) == 0) {
                i += 8;
                end = i;
                continue;
            }
        }
        if (a[i] != b[i]) end = i + 1;
        ++i;
    }
    return end;
}

inline std::size_t run_length_size(std::size_t length) noexcept { return length < 0x80 ? 1 : 2; }

inline std::byte* put_run_length(std::byte* p, std::size_t length) noexcept {
    if (length < 0x80) {
        *p++ = static_cast<std::byte>(length);
        return p;
    }
    *p++ = static_cast<std::byte>((length & 0x7f) | 0x80);
    *p++ = static_cast<std::byte>(length >> 7);
    return p;
}

} // namespace detail

/// Encodes `page` as its difference from `before`, of the same size. How many bytes of `into` that took: 0 where the
/// pages are equal; none where it takes more than `into` holds (overflow).
inline std::optional<std::size_t> xbzrle_encode(std::span<const std::byte> before, std::span<const std::byte> page,
    std::span<std::byte> into) noexcept {
    std::byte* out = into.data();
    std::size_t left = into.size();
    std::size_t position = 0;
    for (;;) {
        const std::size_t start = detail::find_difference(before, page, position);
        if (start == page.size()) break;
        const std::size_t end = detail::find_end_of_change(before, page, start);
        const std::size_t kept = start - position;
        const std::size_t changed = end - start;
        // A length has 14 bits: in pages above 16 KiB a run may be longer.
        if (kept > detail::max_run_length || changed > detail::max_run_length) return std::nullopt;
        const std::size_t size = detail::run_length_size(kept) + detail::run_length_size(changed) + changed;
        if (size > left) return std::nullopt;
        out = detail::put_run_length(out, kept);
        out = detail::put_run_length(out, changed);
        std::memcpy(out, page.data() + start, changed);
        out += changed;
        left -= size;
        position = end;
    }
    return into.size() - left;
}

/// What QEMU's query-migrate tells as `xbzrle-cache`.
struct xbzrle_counts {
    std::uint64_t pages = 0;      ///< that were in the cache
    std::uint64_t bytes = 0;      ///< that these took, without the records' words
    std::uint64_t cache_miss = 0; ///< pages that were not in the cache
    std::uint64_t overflow = 0;   ///< pages that the encoding didn't make smaller
    std::uint64_t cache_size = 0; ///< bytes
    // Between the last two passes over memory:
    double cache_miss_rate = 0; ///< how many of all pages that were sent weren't in the cache
    double encoding_rate = 0;   ///< by how much those in it became smaller: 8 is to an eighth
};

/// How a page has to be sent.
struct xbzrle_page {
    enum class kind {
        skip,    ///< what was sent last is what it holds: not at all
        plain,   ///< whole: `bytes`
        encoded, ///< as XBZRLE: `bytes`
    };
    kind how = kind::plain;
    /// Valid until the next call to the encoder; where it is the page's own memory (see `encode`), as long as that.
    std::span<const std::byte> bytes;
};

/// The encoder with its cache of pages as they were sent last. The cache has one place for each page, which it shares
/// with those a multiple of the cache's size away.
class xbzrle_encoder {
public:
    /// `cache_size` in bytes, QEMU's xbzrle-cache-size: a power of two of pages. The memory is taken page by page.
    static result<xbzrle_encoder> make(std::uint64_t cache_size, std::size_t page_size = 4096) {
        const std::uint64_t places = cache_size / page_size;
        if (!std::has_single_bit(places) || places > std::numeric_limits<std::uint32_t>::max())
            return error(errc::invalid_argument, "a cache of a power of two pages", std::to_string(cache_size) + " bytes");
        return xbzrle_encoder(static_cast<std::size_t>(places), page_size);
    }

    /// How to send `page`, which other threads may write meanwhile. `address` is the page's own among all blocks, a
    /// multiple of the page size: its offset in the block and a start that the caller gives to each block. `pass` counts
    /// the passes over memory: a page that was used in this one or the last isn't displaced. What is to be sent is a copy
    /// in the cache, or the page itself where the cache has no place for it.
    xbzrle_page encode(std::uint64_t address, std::span<const std::byte> page, std::uint64_t pass) {
        place& here = place_of(address);
        if (here.address != address) {
            ++counts_.cache_miss;
            return {xbzrle_page::kind::plain, take(here, address, page, pass) ? here.content() : page};
        }
        here.used_in = pass;
        ++counts_.pages;
        // A copy: what is encoded, what the cache keeps and what is sent have to be the same bytes.
        std::memcpy(current_.data(), page.data(), page_size_);
        const std::optional<std::size_t> size = xbzrle_encode(here.content(), current_, encoded_);
        if (size == std::size_t{0}) return {xbzrle_page::kind::skip, {}};
        std::memcpy(here.bytes.get(), current_.data(), page_size_);
        if (!size) {
            ++counts_.overflow;
            counts_.bytes += page_size_;
            return {xbzrle_page::kind::plain, here.content()};
        }
        counts_.bytes += *size + 3; // the encoding's number and length go before it
        return {xbzrle_page::kind::encoded, std::span<const std::byte>(encoded_).first(*size)};
    }
    /// The page was sent as a zero page.
    void sent_zero(std::uint64_t address, std::uint64_t pass) {
        place& here = place_of(address);
        if (here.address == address) {
            std::memset(here.bytes.get(), 0, page_size_);
            here.used_in = pass;
        }
    }
    /// The page was sent in another way: what is in the cache isn't what the destination has.
    void forget(std::uint64_t address) noexcept {
        place& here = place_of(address);
        if (here.address == address) here.address = nowhere;
    }

    /// A pass over memory ends, in which so many pages were sent in any way: what the counts say of a pass. Nothing
    /// happens where none were.
    void end_pass(std::uint64_t pages_sent) noexcept {
        if (pages_sent == 0) return;
        counts_.cache_miss_rate =
            static_cast<double>(counts_.cache_miss - before_.cache_miss) / static_cast<double>(pages_sent);
        const std::uint64_t bytes = counts_.bytes - before_.bytes;
        counts_.encoding_rate =
            bytes == 0 ? 0 : static_cast<double>((counts_.pages - before_.pages) * page_size_) / static_cast<double>(bytes);
        before_ = counts_;
    }

    const xbzrle_counts& counts() const noexcept { return counts_; }
    std::size_t page_size() const noexcept { return page_size_; }

private:
    static constexpr std::uint64_t nowhere = std::numeric_limits<std::uint64_t>::max();
    /// A page that was used keeps its place for so many passes.
    static constexpr std::uint64_t lifetime = 2;

    struct place {
        std::uint64_t address = nowhere;
        std::uint64_t used_in = 0;
        std::size_t size = 0;
        std::unique_ptr<std::byte[]> bytes;

        std::span<const std::byte> content() const noexcept { return {bytes.get(), size}; }
    };

    xbzrle_encoder(std::size_t places, std::size_t page_size)
        : page_size_(page_size), places_(places), current_(page_size), encoded_(page_size - 1) {
        counts_.cache_size = std::uint64_t{places} * page_size;
    }

    place& place_of(std::uint64_t address) noexcept {
        return places_[static_cast<std::size_t>(address / page_size_ & (places_.size() - 1))];
    }
    bool take(place& here, std::uint64_t address, std::span<const std::byte> page, std::uint64_t pass) {
        if (here.address != nowhere && here.used_in + lifetime > pass) return false;
        if (!here.bytes) here.bytes = std::make_unique_for_overwrite<std::byte[]>(page_size_);
        here.size = page_size_;
        std::memcpy(here.bytes.get(), page.data(), page_size_);
        here.address = address;
        here.used_in = pass;
        return true;
    }

    std::size_t page_size_;
    std::vector<place> places_;
    std::vector<std::byte> current_;
    std::vector<std::byte> encoded_; // a byte less than a page: as large as the page it would be of no use
    xbzrle_counts counts_;
    xbzrle_counts before_; ///< when the last pass ended
};

} // namespace vmstate
