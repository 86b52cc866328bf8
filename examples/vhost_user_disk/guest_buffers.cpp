// SPDX-License-Identifier: BSL-1.0
#include "guest_buffers.hpp"

#include <algorithm>
#include <cstring>
#include <limits>

namespace disk {

using vmstate::vhost_user::memory_access;

namespace {

/// Most descriptors of a table, a queue's or an indirect one: virtio's own bound.
constexpr std::size_t most_descriptors = 32768;

/// A descriptor is read once and then judged, so that it can't change in between.
descriptor read_descriptor(std::span<const std::byte> table, std::size_t index) {
    descriptor copy;
    std::memcpy(&copy, table.data() + index * sizeof copy, sizeof copy);
    return copy;
}

complaint append(request_buffers& found, const descriptor& one) {
    if (one.address > std::numeric_limits<std::uint64_t>::max() - one.length) return "a buffer beyond 64 bits";
    const bool writable = (one.flags & descriptor_write) != 0;
    if (!writable && found.writable.size() != 0) return "a readable buffer behind a writable one";
    (writable ? found.writable : found.readable).append({one.address, one.length});
    return nullptr;
}

/// Follows a chain within one table. `indirect` is where a descriptor says that the rest is elsewhere, and null in a table
/// that was itself found so.
complaint follow(std::span<const std::byte> table, std::size_t index, request_buffers& found, descriptor* indirect) {
    const std::size_t count = table.size() / sizeof(descriptor);
    // A chain longer than its table is a loop.
    for (std::size_t left = count; left > 0; --left) {
        if (index >= count) return "a descriptor outside its table";
        const descriptor one = read_descriptor(table, index);
        if ((one.flags & descriptor_indirect) != 0) {
            if (indirect == nullptr) return "an indirect table in an indirect table";
            if ((one.flags & descriptor_next) != 0) return "a descriptor behind an indirect table";
            *indirect = one;
            return nullptr;
        }
        if (const complaint wrong = append(found, one)) return wrong;
        if ((one.flags & descriptor_next) == 0) return nullptr;
        index = one.next;
    }
    return "a chain of descriptors that is a loop";
}

} // namespace

std::uint64_t guest_bytes::size() const noexcept {
    std::uint64_t sum = 0;
    for (const piece& one : pieces_) sum += one.length;
    return sum;
}

std::optional<std::uint64_t> guest_bytes::take_last() {
    while (!pieces_.empty() && pieces_.back().length == 0) pieces_.pop_back();
    if (pieces_.empty()) return std::nullopt;
    piece& last = pieces_.back();
    return last.address + --last.length;
}

template <class Copy>
bool guest_bytes::each_part(const memory_access& memory, std::size_t size, Copy copy) {
    while (size > 0) {
        if (current_ == pieces_.size()) return false;
        const piece& one = pieces_[current_];
        if (done_ == one.length) {
            ++current_;
            done_ = 0;
            continue;
        }
        const std::uint64_t address = one.address + done_;
        // Shorter where a region of memory ends; the next one may begin right there.
        const std::span<std::byte> part = memory.table().at_guest(address, std::min<std::uint64_t>(one.length - done_, size));
        if (part.empty()) return false;
        copy(address, part);
        size -= part.size();
        done_ += static_cast<std::uint32_t>(part.size());
    }
    return true;
}

bool guest_bytes::read(const memory_access& memory, std::span<std::byte> into) {
    return each_part(memory, into.size(), [&](std::uint64_t, std::span<std::byte> part) {
        std::memcpy(into.data(), part.data(), part.size()); // may have to wait for a page
        into = into.subspan(part.size());
    });
}

bool guest_bytes::write(const memory_access& memory, std::span<const std::byte> from) {
    return each_part(memory, from.size(), [&](std::uint64_t address, std::span<std::byte> part) {
        std::memcpy(part.data(), from.data(), part.size()); // likewise
        memory.mark_dirty(address, part.size());
        from = from.subspan(part.size());
    });
}

bool read_guest(const memory_access& memory, std::uint64_t address, std::span<std::byte> into) {
    guest_bytes bytes;
    bytes.append({address, static_cast<std::uint32_t>(into.size())});
    return bytes.read(memory, into);
}

complaint find_buffers(
    const memory_access& memory, std::span<const std::byte> table, std::uint16_t head, request_buffers& found) {
    descriptor indirect{};
    if (const complaint wrong = follow(table, head, found, &indirect)) return wrong;
    if ((indirect.flags & descriptor_indirect) == 0) return nullptr;
    if (indirect.length == 0 || indirect.length % sizeof(descriptor) != 0
        || indirect.length / sizeof(descriptor) > most_descriptors)
        return "an indirect table of an impossible length";
    std::vector<std::byte> copy(indirect.length);
    if (!read_guest(memory, indirect.address, copy)) return "an indirect table outside guest memory";
    return follow(copy, 0, found, nullptr);
}

} // namespace disk
