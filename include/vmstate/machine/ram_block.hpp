// SPDX-License-Identifier: BSL-1.0
//
// A named piece of guest memory. Depends on ram_memory.hpp and support/.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <span>
#include <string>

#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/support/zero_bytes.hpp>

namespace vmstate {

/// How a block of guest memory is registered.
struct ram_options {
    /// How much of the memory is in use; empty for all of it. Bytes, a multiple of the guest's page size.
    std::optional<std::uint64_t> used_length = {};
    /// A stream may bring another used length, up to the memory's size. QEMU's ROM blobs are of this kind.
    bool resizable = false;
    /// Called after a stream has changed the used length.
    std::function<void(std::uint64_t used_length)> on_resize = {};
    /// The size of the pages that back the memory: 4096, 2 MiB, 1 GiB.
    std::uint64_t host_page_size = 4096;
    /// Where the guest sees the block; in the stream with the capability x-ignore-shared alone.
    std::uint64_t guest_address = 0;
    /// Where the memory comes from, if it is a shared mapping: by that it is known which of its pages are there at all.
    ram_file file = {};
    /// Both sides see the same memory: with x-ignore-shared its pages stay out of the stream.
    bool shared = false;
};

/// A registered block.
struct ram_block {
    std::string name;
    std::span<std::byte> memory;
    std::uint64_t used_length;
    ram_options options;
    std::optional<ram_memory> owned = {}; ///< of a block that came with a stream and that nobody registered

    std::span<std::byte> used() const noexcept { return memory.first(static_cast<std::size_t>(used_length)); }
    std::span<std::byte> page(std::uint64_t offset, std::size_t page_size) const noexcept {
        return memory.subspan(static_cast<std::size_t>(offset), page_size);
    }
};

/// True when all bytes of `page` are zero.
inline bool is_zero_page(std::span<const std::byte> page) noexcept { return are_zero(page); }

/// Makes `page` zero, at `offset` in a block whose memory comes from `file`, if from any. One that is zero already stays
/// untouched, and so without memory behind it where it never had any: of anonymous memory reading doesn't change that, of
/// a file's it would.
inline void make_zero(std::span<std::byte> page, const ram_file& file, std::uint64_t offset) noexcept {
    if (file.fd >= 0 && is_hole(file, offset, page.size())) return;
    if (!is_zero_page(page)) std::memset(page.data(), 0, page.size());
}

} // namespace vmstate
