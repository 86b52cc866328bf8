// SPDX-License-Identifier: BSL-1.0
//
// How the pages of a multifd packet are compressed: what multifd_zlib.hpp and multifd_zstd.hpp are, and what a method of
// one's own would be. Whoever doesn't include those pays for none. Depends on multifd_packet.hpp and support/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// The sender's side of one channel, used by its thread alone. It may keep what it has seen from packet to packet.
class multifd_compressor {
public:
    multifd_compressor() = default;
    multifd_compressor(const multifd_compressor&) = delete;
    multifd_compressor& operator=(const multifd_compressor&) = delete;
    virtual ~multifd_compressor() = default;

    /// All of `pages`, which together are at most `multifd_packet_memory` and hold still, in a form that can be read
    /// without the next packet. What it returns is valid until the next call.
    virtual result<std::span<const std::byte>> compress(std::span<const std::byte> pages) = 0;
};

/// The receiver's side of one channel.
class multifd_decompressor {
public:
    multifd_decompressor() = default;
    multifd_decompressor(const multifd_decompressor&) = delete;
    multifd_decompressor& operator=(const multifd_decompressor&) = delete;
    virtual ~multifd_decompressor() = default;

    /// Fills `pages`, one after the other, from `packet`: no byte more, and none left over.
    virtual result<void> decompress(std::span<const std::byte> packet, std::span<const std::span<std::byte>> pages) = 0;
};

/// A method, by QEMU's name of it (`multifd-compression`). The default is none: pages go as they are.
struct multifd_compression {
    std::string_view name = "none";
    std::uint32_t method = multifd_method::none; ///< in a packet's flags
    std::function<result<std::unique_ptr<multifd_compressor>>()> make_compressor = {};
    std::function<result<std::unique_ptr<multifd_decompressor>>()> make_decompressor = {};

    bool is_none() const noexcept { return method == multifd_method::none; }
};

/// The most compressed data that a packet may have: as in QEMU twice what the pages are.
inline constexpr std::size_t multifd_max_compressed = 2 * multifd_packet_memory;

} // namespace vmstate
