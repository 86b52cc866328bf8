// SPDX-License-Identifier: BSL-1.0
//
// Rows of integers between memory and the big-endian wire, as fast as memory goes: a kernel for AVX2 chosen at run time,
// one for what every x86-64 has, a loop elsewhere. Depends on Boost.Endian.
#pragma once

#include <boost/endian/conversion.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vmstate::detail {

/// An integer in big-endian order at `p`; the byte after it.
template <class Integer>
[[gnu::always_inline]] inline std::byte* store_big(std::byte* p, Integer value) noexcept {
    boost::endian::endian_store<Integer, sizeof(Integer), boost::endian::order::big>(reinterpret_cast<unsigned char*>(p),
                                                                                     value);
    return p + sizeof(Integer);
}
template <class Integer>
[[gnu::always_inline]] inline Integer load_big(const std::byte* p) noexcept {
    return boost::endian::endian_load<Integer, sizeof(Integer), boost::endian::order::big>(
        reinterpret_cast<const unsigned char*>(p));
}

/// Reverses the bytes of `count` units of `Width`, from `source` to `target`; they don't overlap.
template <std::size_t Width>
inline void swap_units_by_loop(std::byte* target, const std::byte* source, std::size_t count) noexcept {
    using integer = std::conditional_t<Width == 2, std::uint16_t, std::conditional_t<Width == 4, std::uint32_t, std::uint64_t>>;
    for (const std::byte* end = source + count * Width; source != end; source += Width, target += Width) {
        integer unit;
        std::memcpy(&unit, source, Width);
        unit = boost::endian::endian_reverse(unit);
        std::memcpy(target, &unit, Width);
    }
}

#if defined(__x86_64__)

// Vector extensions of the compiler rather than <immintrin.h>: that header costs more than all others here together.
using bytes_32 [[gnu::vector_size(32)]] = unsigned char;

template <std::size_t Width>
[[gnu::target("avx2"), gnu::noinline]] inline void swap_units_avx2(std::byte* target, const std::byte* source,
                                                                   std::size_t count) noexcept {
    std::size_t bytes = count * Width;
    for (; bytes >= 32; bytes -= 32, source += 32, target += 32) {
        bytes_32 v;
        std::memcpy(&v, source, 32);
        if constexpr (Width == 2)
            v = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14, 17, 16, 19, 18, 21, 20,
                                        23, 22, 25, 24, 27, 26, 29, 28, 31, 30);
        else if constexpr (Width == 4)
            v = __builtin_shufflevector(v, v, 3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12, 19, 18, 17, 16, 23, 22,
                                        21, 20, 27, 26, 25, 24, 31, 30, 29, 28);
        else
            v = __builtin_shufflevector(v, v, 7, 6, 5, 4, 3, 2, 1, 0, 15, 14, 13, 12, 11, 10, 9, 8, 23, 22, 21, 20, 19, 18,
                                        17, 16, 31, 30, 29, 28, 27, 26, 25, 24);
        std::memcpy(target, &v, 32);
    }
    swap_units_by_loop<Width>(target, source, bytes / Width);
}

/// With what every x86-64 has.
template <std::size_t Width>
inline void swap_units_baseline(std::byte* target, const std::byte* source, std::size_t count) noexcept {
    using integer = std::conditional_t<Width == 2, std::uint16_t, std::conditional_t<Width == 4, std::uint32_t, std::uint64_t>>;
    using halves [[gnu::vector_size(16)]] = unsigned short;
    using units [[gnu::vector_size(16)]] = integer;
    std::size_t bytes = count * Width;
    for (; bytes >= 16; bytes -= 16, source += 16, target += 16) {
        halves v;
        std::memcpy(&v, source, 16);
        v = (v << 8) | (v >> 8);
        if constexpr (Width == 4) {
            units u;
            std::memcpy(&u, &v, 16);
            u = (u << 16) | (u >> 16);
            std::memcpy(target, &u, 16);
        } else if constexpr (Width == 8) {
            v = __builtin_shufflevector(v, v, 3, 2, 1, 0, 7, 6, 5, 4);
            std::memcpy(target, &v, 16);
        } else std::memcpy(target, &v, 16);
    }
    swap_units_by_loop<Width>(target, source, bytes / Width);
}

inline const bool have_avx2 = __builtin_cpu_supports("avx2") != 0;

#endif

/// Copies `count` units of `Width` bytes, swapped where the host isn't big-endian.
template <std::size_t Width>
inline void copy_units(std::byte* target, const std::byte* source, std::size_t count) noexcept {
    if constexpr (Width == 1 || std::endian::native == std::endian::big) {
        if (count != 0) std::memcpy(target, source, count * Width);
    } else {
#if defined(__x86_64__)
        if (have_avx2) swap_units_avx2<Width>(target, source, count);
        else swap_units_baseline<Width>(target, source, count);
#else
        swap_units_by_loop<Width>(target, source, count);
#endif
    }
}

/// The same for a count that the compiler knows: short rows stay in line.
template <std::size_t Width, std::size_t Count>
[[gnu::always_inline]] inline void copy_units(std::byte* target, const std::byte* source) noexcept {
    if constexpr (Width == 1 || std::endian::native == std::endian::big) std::memcpy(target, source, Count * Width);
    else if constexpr (Count * Width <= 64) {
        // Not the loop above: its count would be a variable again, about which g++ -O3 draws wrong conclusions.
        using integer = std::conditional_t<Width == 2, std::uint16_t, std::conditional_t<Width == 4, std::uint32_t, std::uint64_t>>;
        integer units[Count];
        std::memcpy(units, source, sizeof units);
        for (integer& unit : units) unit = boost::endian::endian_reverse(unit);
        std::memcpy(target, units, sizeof units);
    }
    else copy_units<Width>(target, source, Count);
}

} // namespace vmstate::detail
