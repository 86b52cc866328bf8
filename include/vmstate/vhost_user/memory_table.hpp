// SPDX-License-Identifier: BSL-1.0
//
// The regions of guest memory that two processes share: checked as a whole, and looked up by guest-physical address, by
// the sender's address, or by our own. A table refuses what can't be meant; it owns no mapping. Depends on message.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/message.hpp>

namespace vmstate::vhost_user {

/// What `memory_table` holds, each region with where this process has it. No two regions overlap, neither in guest-physical
/// addresses nor in the sender's; none is empty or wraps around.
class memory_table {
public:
    /// The most regions of a table unless told otherwise: Linux' own vhost has a few hundred slots, others have 32.
    static constexpr std::size_t default_most = 32;

    struct entry {
        memory_region region;
        std::span<std::byte> own; ///< the region in this process, as long as the region; empty where it has none
    };
    /// A region of the table, by its index, and an offset in it.
    struct place {
        std::size_t index;
        std::uint64_t offset;
    };

    explicit memory_table(std::size_t most = default_most) : most_(most) {}

    /// A table from what SET_MEM_TABLE has, with as many descriptors as came with it (an answer has none, and then none is
    /// asked for). An empty one is refused.
    static result<memory_table> from(
        std::span<const memory_region> regions, std::optional<std::size_t> descriptors, std::size_t most = default_most) {
        if (regions.empty()) return refused("a memory table of at least one region", "an empty one");
        if (descriptors && *descriptors != regions.size())
            return refused("a descriptor for each of " + std::to_string(regions.size()) + " memory regions",
                std::to_string(*descriptors));
        memory_table table(most);
        for (const memory_region& region : regions)
            if (result<void> added = table.add(region); !added) return added.error();
        return table;
    }

    /// `errc::bad_message` where the region is empty, wraps around, overlaps another one, or is one too many.
    result<void> check(const memory_region& region) const {
        if (region.size == 0) return refused("a memory region that isn't empty", describe(region));
        const auto wraps = [&](std::uint64_t first) {
            return first > std::numeric_limits<std::uint64_t>::max() - region.size;
        };
        if (wraps(region.guest_address) || wraps(region.user_address) || wraps(region.mmap_offset))
            return refused("a memory region within 64 bits", describe(region));
        if (entries_.size() >= most_)
            return refused("at most " + std::to_string(most_) + " memory regions", std::to_string(entries_.size() + 1));
        for (const entry& other : entries_)
            if (overlap(other.region.guest_address, region.guest_address, other.region.size, region.size)
                || overlap(other.region.user_address, region.user_address, other.region.size, region.size))
                return refused("memory regions that don't overlap", describe(other.region) + " and " + describe(region));
        return {};
    }
    /// `own` is empty, or as long as the region.
    result<void> add(const memory_region& region, std::span<std::byte> own = {}) {
        if (!own.empty() && own.size() != region.size)
            return error(errc::invalid_argument, "memory as long as its region", std::to_string(own.size()));
        if (result<void> fits = check(region); !fits) return fits;
        entries_.push_back({region, own});
        return {};
    }
    /// Where the region stands that REM_MEM_REG names: by guest address, user address and size.
    result<std::size_t> find(const memory_region& region) const {
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            const memory_region& here = entries_[i].region;
            if (here.guest_address == region.guest_address && here.user_address == region.user_address
                && here.size == region.size)
                return i;
        }
        return refused("a memory region of the table", describe(region));
    }
    /// Those behind it move up.
    void remove(std::size_t index) { entries_.erase(entries_.begin() + static_cast<std::ptrdiff_t>(index)); }
    void clear() noexcept { entries_.clear(); }

    std::span<const entry> entries() const noexcept { return entries_; }
    bool empty() const noexcept { return entries_.empty(); }

    std::optional<place> find_guest(std::uint64_t address) const noexcept {
        return find_where(address, [](const entry& e) { return e.region.guest_address; });
    }
    /// By the address that the table's sender gave the region: a fault's, in the table that a client answered with.
    std::optional<place> find_user(std::uint64_t address) const noexcept {
        return find_where(address, [](const entry& e) { return e.region.user_address; });
    }
    std::optional<place> find_own(const std::byte* address) const noexcept {
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            const auto first = reinterpret_cast<std::uintptr_t>(entries_[i].own.data());
            const std::uintptr_t offset = reinterpret_cast<std::uintptr_t>(address) - first;
            if (offset < entries_[i].own.size()) return place{i, offset};
        }
        return std::nullopt;
    }

    /// Our own memory behind a guest-physical address, at most `size` bytes: shorter where the region ends (the next one
    /// may go on elsewhere), empty where there is none.
    std::span<std::byte> at_guest(std::uint64_t address, std::uint64_t size) const noexcept {
        return own_at(find_guest(address), size);
    }
    /// The same behind an address of the sender's: vhost-user names the rings so.
    std::span<std::byte> at_user(std::uint64_t address, std::uint64_t size) const noexcept {
        return own_at(find_user(address), size);
    }

    /// For errors: "0x40000000+0x200000 at 0x7f12...".
    static std::string describe(const memory_region& region) {
        return hex(region.guest_address) + "+" + hex(region.size) + " at " + hex(region.user_address) + ", offset "
             + hex(region.mmap_offset);
    }

private:
    static error refused(std::string expected, std::string found) {
        return error(errc::bad_message, std::move(expected), std::move(found));
    }
    static std::string hex(std::uint64_t value) {
        std::string digits;
        do {
            digits.insert(digits.begin(), "0123456789abcdef"[value % 16]);
            value /= 16;
        } while (value != 0);
        return "0x" + digits;
    }
    /// Neither wraps around: `check` has seen to it.
    static bool overlap(std::uint64_t a, std::uint64_t b, std::uint64_t size_of_a, std::uint64_t size_of_b) noexcept {
        return a < b + size_of_b && b < a + size_of_a;
    }
    template <class First>
    std::optional<place> find_where(std::uint64_t address, First first) const noexcept {
        for (std::size_t i = 0; i < entries_.size(); ++i)
            if (const std::uint64_t offset = address - first(entries_[i]); offset < entries_[i].region.size)
                return place{i, offset};
        return std::nullopt;
    }
    std::span<std::byte> own_at(std::optional<place> found, std::uint64_t size) const noexcept {
        if (!found || entries_[found->index].own.empty()) return {};
        const std::span<std::byte> rest = entries_[found->index].own.subspan(found->offset);
        return rest.first(size < rest.size() ? static_cast<std::size_t>(size) : rest.size());
    }

    std::size_t most_;
    std::vector<entry> entries_;
};

} // namespace vmstate::vhost_user
