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

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
    for (std::size_t i = 0; i != count; ++i) {
        integer unit;
        std::memcpy(&unit, source + i * Width, Width);
        unit = boost::endian::endian_reverse(unit);
        std::memcpy(target + i * Width, &unit, Width);
    }
}

#if defined(__x86_64__)

/// Which byte of its own unit each byte of 16 comes from.
template <std::size_t Width>
struct reversed_units {
    alignas(32) unsigned char from[32];
    constexpr reversed_units() : from() {
        for (std::size_t i = 0; i != 32; ++i) from[i] = static_cast<unsigned char>(i % 16 / Width * Width + (Width - 1 - i % Width));
    }
};
template <std::size_t Width>
inline constexpr reversed_units<Width> reversed{};

template <std::size_t Width>
[[gnu::target("avx2"), gnu::noinline]] inline void swap_units_avx2(std::byte* target, const std::byte* source,
                                                                   std::size_t count) noexcept {
    const __m256i order = _mm256_load_si256(reinterpret_cast<const __m256i*>(reversed<Width>.from));
    std::size_t bytes = count * Width;
    for (; bytes >= 64; bytes -= 64, source += 64, target += 64) {
        const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
        const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + 32));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_shuffle_epi8(a, order));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 32), _mm256_shuffle_epi8(b, order));
    }
    for (; bytes >= 16; bytes -= 16, source += 16, target += 16) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm_shuffle_epi8(a, _mm256_castsi256_si128(order)));
    }
    swap_units_by_loop<Width>(target, source, bytes / Width);
}

/// SSE2, which every x86-64 has: swap the bytes of 16-bit halves, then the halves.
template <std::size_t Width>
inline void swap_units_sse2(std::byte* target, const std::byte* source, std::size_t count) noexcept {
    std::size_t bytes = count * Width;
    for (; bytes >= 16; bytes -= 16, source += 16, target += 16) {
        __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        v = _mm_or_si128(_mm_slli_epi16(v, 8), _mm_srli_epi16(v, 8));
        if constexpr (Width == 4) {
            v = _mm_shufflelo_epi16(v, _MM_SHUFFLE(2, 3, 0, 1));
            v = _mm_shufflehi_epi16(v, _MM_SHUFFLE(2, 3, 0, 1));
        } else if constexpr (Width == 8) {
            v = _mm_shufflelo_epi16(v, _MM_SHUFFLE(0, 1, 2, 3));
            v = _mm_shufflehi_epi16(v, _MM_SHUFFLE(0, 1, 2, 3));
        }
        _mm_storeu_si128(reinterpret_cast<__m128i*>(target), v);
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
        else swap_units_sse2<Width>(target, source, count);
#else
        swap_units_by_loop<Width>(target, source, count);
#endif
    }
}

/// The same for a count that the compiler knows: short rows stay in line.
template <std::size_t Width, std::size_t Count>
[[gnu::always_inline]] inline void copy_units(std::byte* target, const std::byte* source) noexcept {
    if constexpr (Width == 1 || std::endian::native == std::endian::big) std::memcpy(target, source, Count * Width);
    else if constexpr (Count * Width <= 64) swap_units_by_loop<Width>(target, source, Count);
    else copy_units<Width>(target, source, Count);
}

} // namespace vmstate::detail
