// SPDX-License-Identifier: BSL-1.0
//
// The buffers of one request of a split virtqueue: found from its descriptors, which the guest wrote and may change at any
// time, and read and written piece by piece. Nothing of what the guest says is believed. Depends on vmstate/vhost_user.
#pragma once

#include <vmstate/vhost_user/guest_memory.hpp>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace disk {

/// What went wrong in the guest's part of a queue is one of these words; nothing where nothing did.
using complaint = const char*;

/// A descriptor as it lies in guest memory (virtio 1.2, 2.7.5); little-endian, as this program's machine.
struct descriptor {
    std::uint64_t address;
    std::uint32_t length;
    std::uint16_t flags;
    std::uint16_t next;
};
static_assert(sizeof(descriptor) == 16);
inline constexpr std::uint16_t descriptor_next = 1;     // `next` is part of the chain
inline constexpr std::uint16_t descriptor_write = 2;    // by the device
inline constexpr std::uint16_t descriptor_indirect = 4; // it is a table of further ones

/// Part of a request's buffers, in guest-physical addresses.
struct piece {
    std::uint64_t address;
    std::uint32_t length;
};

/// Bytes in guest memory, one after the other, from the first on.
class guest_bytes {
public:
    void append(piece more) { pieces_.push_back(more); }
    std::uint64_t size() const noexcept;
    /// Cuts the last byte off, and says where it is; nothing where there is no byte.
    std::optional<std::uint64_t> take_last();

    /// The next bytes. False where some of them aren't in guest memory, or there are fewer.
    bool read(const vmstate::vhost_user::memory_access& memory, std::span<std::byte> into);
    bool write(const vmstate::vhost_user::memory_access& memory, std::span<const std::byte> from);

private:
    template <class Copy>
    bool each_part(const vmstate::vhost_user::memory_access& memory, std::size_t size, Copy copy);

    std::vector<piece> pieces_;
    std::size_t current_ = 0;  // the piece
    std::uint32_t done_ = 0;   // of it
};

struct request_buffers {
    guest_bytes readable; ///< by the device: these come first
    guest_bytes writable;
};

/// Copies from one guest-physical address, across regions. False where it isn't all in guest memory.
bool read_guest(const vmstate::vhost_user::memory_access& memory, std::uint64_t address, std::span<std::byte> into);

/// Follows the chain that begins with descriptor `head` of `table`.
complaint find_buffers(const vmstate::vhost_user::memory_access& memory, std::span<const std::byte> table,
    std::uint16_t head, request_buffers& found);

} // namespace disk
