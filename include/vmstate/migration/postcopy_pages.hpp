// SPDX-License-Identifier: BSL-1.0
//
// What a source has still to send in postcopy, and who sends it: each host page goes once, whether the destination asked
// for it or its turn has come. The guest stands still here, so that nothing becomes dirty any more. Depends on postcopy/,
// machine/ and ram/.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/postcopy/discard.hpp>
#include <vmstate/ram/page_bitmap.hpp>

namespace vmstate::migration {

/// What of a block has not gone yet, a bit per target page.
struct unsent_pages {
    ram_block* block = nullptr;
    page_bitmap dirty;  ///< have to go
    page_bitmap absent; ///< of these: nobody has touched them, so they are zero and need not be read
};

/// Whether this machine's memory can go in postcopy; `errc::invalid_argument` names the block that can't.
inline result<void> check_postcopy_memory(const machine& of) {
    const ram_section* const ram = of.ram();
    if (ram == nullptr) return {};
    const std::uint64_t page_size = of.options().guest_page_size();
    for (const std::unique_ptr<ram_block>& block : ram->blocks()) {
        const std::uint64_t unit = block->options.host_page_size;
        const auto refuse = [&](std::string expected, std::uint64_t found) {
            return error(errc::invalid_argument, std::move(expected), std::to_string(found)).within(block->name);
        };
        if (unit == 0 || (unit & (unit - 1)) != 0) return refuse("a host page of a power of two for postcopy", unit);
        if (unit % page_size != 0)
            return refuse("a host page of whole target pages of " + std::to_string(page_size) + " bytes for postcopy", unit);
        if (block->used_length % unit != 0)
            return refuse("whole host pages of " + std::to_string(unit) + " bytes for postcopy", block->used_length);
    }
    return {};
}

/// Target pages that whoever has them sends, and nobody else: whole host pages, of one block.
struct page_claim {
    std::size_t number = 0; ///< the block's
    page_run pages;
};

/// Any thread may call anything, but for what is said to be the migration thread's.
class postcopy_pages {
public:
    postcopy_pages(std::vector<unsent_pages> unsent, std::size_t page_size)
        : page_size_(page_size), blocks_(std::move(unsent)) {
        for (unsent_pages& one : blocks_) {
            widen_to_host_pages(one.dirty, *one.block, page_size_);
            released_.emplace_back(one.dirty.size());
        }
        count();
    }

    std::size_t page_size() const noexcept { return page_size_; }
    std::size_t block_count() const noexcept { return blocks_.size(); }
    ram_block& block(std::size_t number) const noexcept { return *blocks_[number].block; }
    /// The number of a block that is sent; none of another one.
    std::optional<std::size_t> find(const ram_block& block) const noexcept {
        for (std::size_t number = 0; number != blocks_.size(); ++number)
            if (blocks_[number].block == &block) return number;
        return std::nullopt;
    }
    std::size_t pages_of(std::size_t number) const noexcept { return blocks_[number].dirty.size(); }
    /// It is zero, and reading it could make memory of it.
    bool is_absent(std::size_t number, std::size_t page) const noexcept { return blocks_[number].absent.test(page); }

    /// POSTCOPY_RAM_DISCARD for all that comes; the migration thread's, before the first claim.
    result<void> put_discards(stream_saver& saver) const {
        for (const unsent_pages& one : blocks_) {
            const std::vector<ram_range> ranges = discard_ranges(one.dirty, *one.block, page_size_);
            const auto put = [&](std::span<const std::byte> payload) -> result<void> {
                saver.put_command(command::postcopy_ram_discard, payload);
                return {};
            };
            if (result<void> done = encode_discards(one.block->name, ranges, put); !done) return done.error().within(one.block->name);
        }
        return {};
    }

    /// The host page at `offset`, for who sends it at once; none where it has gone or is about to. What nobody waits for
    /// goes on behind it.
    std::optional<page_claim> claim(std::size_t number, std::uint64_t offset) {
        const std::size_t unit = unit_of(number);
        const page_run pages{static_cast<std::size_t>(offset / page_size_) / unit * unit, unit};
        const std::lock_guard lock(dirty_mutex_);
        at_block_ = number;
        at_page_ = pages.first + pages.count;
        if (!blocks_[number].dirty.test(pages.first)) return std::nullopt;
        take(number, pages);
        return page_claim{number, pages};
    }
    /// What comes next of what nobody waits for: host pages that follow each other, about `bytes` of them; none at the end.
    std::optional<page_claim> claim_next(std::uint64_t bytes) {
        const std::lock_guard lock(dirty_mutex_);
        if (remaining_ == 0) return std::nullopt;
        for (;;) {
            if (at_block_ >= blocks_.size()) at_block_ = at_page_ = 0;
            page_run pages = blocks_[at_block_].dirty.find_next_run(at_page_);
            if (pages.count != 0) {
                const std::size_t unit = unit_of(at_block_);
                const std::size_t wanted = std::max<std::size_t>(1, static_cast<std::size_t>(bytes / page_size_) / unit) * unit;
                pages.count = std::min(pages.count, wanted);
                take(at_block_, pages);
                at_page_ = pages.first + pages.count;
                return page_claim{at_block_, pages};
            }
            ++at_block_;
            at_page_ = 0;
        }
    }
    /// Bytes.
    std::uint64_t remaining() const {
        const std::lock_guard lock(dirty_mutex_);
        return remaining_ * page_size_;
    }

    /// The destination has these pages of the block, and no others; the migration thread's, while nobody claims any.
    /// `errc::bad_ram` where the destination lacks what was given back here.
    result<void> set_received(std::size_t number, const page_bitmap& received) {
        const std::lock_guard lock(dirty_mutex_);
        unsent_pages& one = blocks_[number];
        page_bitmap lost = released_[number];
        lost.subtract(received);
        if (const std::size_t count = lost.count(); count != 0)
            return error(errc::bad_ram, "a destination that has what it said it had",
                std::to_string(count) + " pages fewer").within(one.block->name);
        one.dirty.set_range(0, one.dirty.size());
        one.dirty.subtract(received);
        widen_to_host_pages(one.dirty, *one.block, page_size_);
        count();
        return {};
    }
    /// The destination has them, and here they are given back to the system; the migration thread's.
    void set_released(const page_claim& claim) {
        const std::lock_guard lock(dirty_mutex_);
        released_[claim.number].set_range(claim.pages.first, claim.pages.count);
    }

private:
    /// Target pages of a host page.
    std::size_t unit_of(std::size_t number) const noexcept {
        return std::max<std::size_t>(1, static_cast<std::size_t>(blocks_[number].block->options.host_page_size / page_size_));
    }
    void take(std::size_t number, page_run pages) {
        blocks_[number].dirty.clear_range(pages.first, pages.count);
        remaining_ -= pages.count;
    }
    void count() {
        remaining_ = 0;
        for (const unsent_pages& one : blocks_) remaining_ += one.dirty.count();
    }

    const std::size_t page_size_;
    mutable std::mutex dirty_mutex_; ///< the blocks' `dirty`, and what follows them
    std::vector<unsent_pages> blocks_;
    std::vector<page_bitmap> released_; ///< by the blocks' numbers
    std::uint64_t remaining_ = 0;       ///< bits in `dirty`
    std::size_t at_block_ = 0;          ///< where what nobody waits for goes on
    std::size_t at_page_ = 0;
};

} // namespace vmstate::migration
