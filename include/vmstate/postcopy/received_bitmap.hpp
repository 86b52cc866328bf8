// SPDX-License-Identifier: BSL-1.0
//
// The bitmap that follows a RECV_BITMAP message: which target pages of a block a destination has, so that a source goes
// on with the others after a recovery (QEMU: ramblock_recv_bitmap_send, ram_dirty_bitmap_reload). Depends on
// ram/page_bitmap.hpp and codec/.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// What ends a bitmap (RAMBLOCK_RECV_BITMAP_ENDING).
inline constexpr std::uint64_t received_bitmap_ending = 0x0123456789abcdef;

/// Bytes of a bitmap of so many pages: whole 64-bit words, whatever the host's are.
constexpr std::uint64_t received_bitmap_size(std::size_t pages) noexcept { return (std::uint64_t{pages} + 63) / 64 * 8; }

/// Its size, the bits in little-endian order (page n is bit n % 8 of byte n / 8), its ending.
inline void encode_received_bitmap(writer& out, const page_bitmap& received) {
    out.put_be64(received_bitmap_size(received.size()));
    for (const page_bitmap::word word : received.words())
        for (unsigned shift = 0; shift < 64; shift += 8) out.put_u8(static_cast<std::uint8_t>(word >> shift));
    out.put_be64(received_bitmap_ending);
}

/// Reads the bitmap of a block of so many pages. `errc::bad_command` where its size is another or its ending isn't there;
/// nothing is allocated that a stream asked for. Bits beyond the last page are left out.
inline result<page_bitmap> decode_received_bitmap(reader& in, std::size_t pages) {
    const auto refuse = [](std::string expected, std::string found, std::uint64_t where) {
        return std::move(
            error(errc::bad_command, std::move(expected), std::move(found)).within("RECV_BITMAP").at_offset(where));
    };
    const std::uint64_t begin = in.offset();
    const std::uint64_t size = in.get_be64();
    if (!in.failed() && size != received_bitmap_size(pages))
        return refuse(
            "a bitmap of " + std::to_string(received_bitmap_size(pages)) + " bytes", std::to_string(size), begin);
    page_bitmap received(pages);
    for (std::size_t first = 0; first < pages && !in.failed(); first += 64) {
        std::uint64_t word = 0;
        const std::byte* const bytes = in.need(8);
        if (bytes == nullptr) break;
        for (unsigned i = 0; i < 8; ++i) word |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
        in.seek(bytes + 8);
        for (; word != 0; word &= word - 1) {
            const std::size_t page = first + static_cast<std::size_t>(std::countr_zero(word));
            if (page < pages) received.set(page);
        }
    }
    const std::uint64_t end = in.offset();
    const std::uint64_t ending = in.get_be64();
    if (in.failed()) return std::move(error(in.failure()).within("RECV_BITMAP"));
    if (ending != received_bitmap_ending) return refuse("the bitmap's ending", std::to_string(ending), end);
    return received;
}

} // namespace vmstate
