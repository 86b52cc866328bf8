// SPDX-License-Identifier: BSL-1.0
//
// Which pages a destination has: a bit per target page of every block, kept from the first precopy page on, since a
// recovery asks for it and a fault on a page that came already needs no request. Depends on ram/page_bitmap.hpp and
// machine/.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/ram/page_bitmap.hpp>

namespace vmstate {

/// A place in a block.
struct ram_address {
    ram_block* block = nullptr;
    std::uint64_t offset = 0;

    friend bool operator==(const ram_address&, const ram_address&) = default;
};

/// Blocks are added before other threads are there; then any thread marks and asks. Offsets and sizes are in bytes, whole
/// target pages; of a block that was never added nothing is known, and nothing is received.
class received_pages {
public:
    /// `page_size` is the target's.
    explicit received_pages(std::size_t page_size) noexcept : page_size_(page_size) {}
    received_pages(const received_pages&) = delete;
    received_pages& operator=(const received_pages&) = delete;

    std::size_t page_size() const noexcept { return page_size_; }

    /// The block stays where it is while this lives. Twice is harmless.
    void add(ram_block& block) {
        if (find(block) == nullptr)
            blocks_.push_back(std::make_unique<entry>(
                entry{&block, page_bitmap((block.memory.size() + page_size_ - 1) / page_size_)}));
    }
    /// Calls `visit(ram_block&)` for each block.
    template <class Visit>
    void for_each_block(Visit visit) const {
        for (const std::unique_ptr<entry>& one : blocks_) visit(*one->block);
    }

    /// They came, in precopy or in postcopy: call it when they are in memory. Also for pages that are known to be right
    /// without having been sent (a block that the source knows to be zero here).
    void mark(const ram_block& block, std::uint64_t offset, std::uint64_t size) noexcept {
        if (entry* const one = find(block)) {
            const page_run run = pages_of(*one, offset, size);
            one->received.set_range_atomic(run.first, run.count);
        }
    }
    /// They were discarded.
    void clear(const ram_block& block, std::uint64_t offset, std::uint64_t size) noexcept {
        if (entry* const one = find(block)) {
            const page_run run = pages_of(*one, offset, size);
            one->received.clear_range_atomic(run.first, run.count);
        }
    }
    /// Whether all of them are there. Who sees it sees the pages.
    bool has(const ram_block& block, std::uint64_t offset, std::uint64_t size) const noexcept {
        const entry* const one = find(block);
        if (one == nullptr) return false;
        const page_run run = pages_of(*one, offset, size);
        return one->received.all_atomic(run.first, run.count);
    }
    /// The bitmap of the part that is in use, as RECV_BITMAP sends it.
    page_bitmap snapshot(const ram_block& block) const {
        const auto pages = static_cast<std::size_t>(block.used_length / page_size_);
        const entry* const one = find(block);
        return one != nullptr ? one->received.copy_atomic(pages) : page_bitmap(pages);
    }

    /// Where an address of this process lies.
    std::optional<ram_address> locate(std::uint64_t address) const noexcept {
        for (const std::unique_ptr<entry>& one : blocks_) {
            const std::uint64_t offset = address - reinterpret_cast<std::uintptr_t>(one->block->memory.data());
            if (offset < one->block->memory.size()) return ram_address{one->block, offset};
        }
        return std::nullopt;
    }

private:
    struct entry {
        ram_block* block;
        page_bitmap received;
    };

    // A machine has a dozen blocks, the largest first.
    entry* find(const ram_block& block) const noexcept {
        for (const std::unique_ptr<entry>& one : blocks_)
            if (one->block == &block) return one.get();
        return nullptr;
    }
    page_run pages_of(const entry& one, std::uint64_t offset, std::uint64_t size) const noexcept {
        const std::size_t count = one.received.size();
        const auto first = static_cast<std::size_t>(std::min<std::uint64_t>(offset / page_size_, count));
        const auto pages = static_cast<std::size_t>(std::min<std::uint64_t>(size / page_size_, count - first));
        return {first, pages};
    }

    std::size_t page_size_;
    std::vector<std::unique_ptr<entry>> blocks_;
};

} // namespace vmstate
