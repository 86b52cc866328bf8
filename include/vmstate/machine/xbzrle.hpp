// SPDX-License-Identifier: BSL-1.0
//
// Decoding of XBZRLE: a page as its difference from what it was before. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>

namespace vmstate {

namespace detail {

/// A run length: 7 bits, or 14 bits in two bytes of which the second has its top bit clear.
inline std::optional<std::size_t> take_run_length(std::span<const std::byte>& rest) noexcept {
    if (rest.empty()) return std::nullopt;
    const auto first = std::to_integer<std::size_t>(rest[0]);
    if ((first & 0x80) == 0) {
        rest = rest.subspan(1);
        return first;
    }
    if (rest.size() < 2) return std::nullopt;
    const auto second = std::to_integer<std::size_t>(rest[1]);
    if ((second & 0x80) != 0) return std::nullopt;
    rest = rest.subspan(2);
    return (first & 0x7f) | second << 7;
}

} // namespace detail

/// Applies `encoded` to `page`: pairs of a run left as it is and a run replaced by the bytes that follow. False where
/// the encoding is broken or leaves the page; the page may then be partly changed. What is refused is what QEMU refuses:
/// a run of nothing anywhere but at the page's start, and a pair without its second half.
inline bool xbzrle_decode(std::span<const std::byte> encoded, std::span<std::byte> page) noexcept {
    std::size_t position = 0;
    for (bool first = true; !encoded.empty(); first = false) {
        const std::optional<std::size_t> kept = detail::take_run_length(encoded);
        if (!kept || (*kept == 0 && !first) || *kept > page.size() - position) return false;
        position += *kept;
        const std::optional<std::size_t> changed = detail::take_run_length(encoded);
        if (!changed || *changed == 0 || *changed > page.size() - position || *changed > encoded.size())
            return false;
        std::memcpy(page.data() + position, encoded.data(), *changed);
        position += *changed;
        encoded = encoded.subspan(*changed);
    }
    return true;
}

} // namespace vmstate
