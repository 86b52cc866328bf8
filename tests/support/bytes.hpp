// SPDX-License-Identifier: BSL-1.0
// Bytes to send through a channel, and in what pieces. Depends on stream/channel.hpp.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <vmstate/stream/channel.hpp>

namespace vmstate::tests {

/// Bytes of which each tells its place: the next 251 differ.
inline std::byte pattern_at(std::size_t i) { return static_cast<std::byte>((i * 7 + i / 251) & 0xff); }
inline std::vector<std::byte> pattern(std::size_t count) {
    std::vector<std::byte> bytes(count);
    for (std::size_t i = 0; i < count; ++i) bytes[i] = pattern_at(i);
    return bytes;
}

inline result<void> put(output_channel& out, std::span<const std::byte> bytes) { return out.writev({&bytes, 1}); }
inline result<std::size_t> get_some(input_channel& in, std::span<std::byte> bytes) { return in.read_some({&bytes, 1}); }
/// Up to `count` bytes, fewer where the stream ends before.
inline result<std::vector<std::byte>> get(input_channel& in, std::size_t count) {
    std::vector<std::byte> bytes(count);
    std::size_t done = 0;
    while (done < count) {
        const result<std::size_t> got = get_some(in, std::span(bytes).subspan(done));
        if (!got) return got.error();
        if (*got == 0) break;
        done += *got;
    }
    bytes.resize(done);
    return bytes;
}

} // namespace vmstate::tests
