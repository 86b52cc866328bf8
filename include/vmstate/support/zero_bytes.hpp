// SPDX-License-Identifier: BSL-1.0
//
// Whether memory is all zero, as fast as it can be read: a kernel for AVX2 chosen at run time, one of 64-bit words
// elsewhere. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace vmstate {

namespace detail {

/// Any processor's kernel: eight words at a time, then words, then bytes.
inline bool are_zero_by_words(const std::byte* p, std::size_t size) noexcept {
    for (; size >= 64; p += 64, size -= 64) {
        std::uint64_t words[8];
        std::memcpy(words, p, sizeof words);
        if ((words[0] | words[1] | words[2] | words[3] | words[4] | words[5] | words[6] | words[7]) != 0)
            return false;
    }
    for (; size >= 8; p += 8, size -= 8) {
        std::uint64_t word;
        std::memcpy(&word, p, sizeof word);
        if (word != 0) return false;
    }
    for (; size != 0; ++p, --size)
        if (*p != std::byte{0}) return false;
    return true;
}

#if defined(__x86_64__)

// The compiler's vector extensions rather than <immintrin.h>, which costs more to compile than all else here.
using four_quads [[gnu::vector_size(32)]] = long long;

/// Eight vectors at a time: 256 bytes between two branches keep the loads ahead of them.
[[gnu::target("avx2")]] inline bool are_zero_avx2(const std::byte* p, std::size_t size) noexcept {
    for (; size >= 256; p += 256, size -= 256) {
        four_quads v[8];
        std::memcpy(&v[0], p, 32);
        std::memcpy(&v[1], p + 32, 32);
        std::memcpy(&v[2], p + 64, 32);
        std::memcpy(&v[3], p + 96, 32);
        std::memcpy(&v[4], p + 128, 32);
        std::memcpy(&v[5], p + 160, 32);
        std::memcpy(&v[6], p + 192, 32);
        std::memcpy(&v[7], p + 224, 32);
        const four_quads any = ((v[0] | v[1]) | (v[2] | v[3])) | ((v[4] | v[5]) | (v[6] | v[7]));
        if (!__builtin_ia32_ptestz256(any, any)) return false;
    }
    for (; size >= 32; p += 32, size -= 32) {
        four_quads v;
        std::memcpy(&v, p, 32);
        if (!__builtin_ia32_ptestz256(v, v)) return false;
    }
    return are_zero_by_words(p, size);
}

inline const bool zero_bytes_by_avx2 = __builtin_cpu_supports("avx2") != 0;

#endif

} // namespace detail

/// True when every one of `bytes` is zero; true of none.
inline bool are_zero(std::span<const std::byte> bytes) noexcept {
    const std::byte* const p = bytes.data();
    const std::size_t size = bytes.size();
    // Most memory that isn't zero shows it at its ends or in the middle.
    if (size != 0 &&
        (p[0] != std::byte{0} || p[size / 2] != std::byte{0} || p[size - 1] != std::byte{0}))
        return false;
#if defined(__x86_64__)
    if (detail::zero_bytes_by_avx2) return detail::are_zero_avx2(p, size);
#endif
    return detail::are_zero_by_words(p, size);
}

} // namespace vmstate
