// SPDX-License-Identifier: BSL-1.0
//
// From a channel's records, one per target page, to host pages: they come back to back and ascending, and the page is
// placed when its last record is there. Depends on page_placer.hpp, ram/page_bitmap.hpp, machine/ram_records.hpp and
// codec/reader.hpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/postcopy/page_placer.hpp>
#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// One per channel, used by the thread that reads it.
///
/// After a recovery one host page at a time may come in parts, in any order and with others between them. A QEMU before
/// the requests' queue was changed keeps what was left of the request that it served when the connection broke: it sends
/// that rest of a huge page first, and the beginning when it comes to it. QEMU's own destination counts target pages
/// there.
class page_assembler {
public:
    /// `placer` has to outlive this. Up to `together` small pages that follow each other are placed by one call: each call
    /// costs as much as half a page. Those that came last may then wait for more: see `flush`.
    explicit page_assembler(page_placer& placer, std::size_t together = 1) noexcept
        : placer_(placer), page_size_(placer.received().page_size()), together_(together) {}

    /// Takes a page record of `block`, and its payload from `in`. Errors name the block and are `errc::bad_ram`, or the
    /// reader's.
    result<void> load(reader& in, const ram_record& record, ram_block& block) {
        result<void> done = take(in, record, block);
        if (!done) return std::move(done.error().within(block.name).at_offset(record.position));
        return {};
    }
    /// Places what waits for more pages. Whoever reads has to call it before waiting for the stream: somebody may be waiting
    /// for one of them.
    result<void> flush() {
        if (batch_.size == 0) return {};
        const std::size_t size = std::exchange(batch_.size, 0);
        result<void> done = placer_.place_run(*batch_.block, batch_.start, batch_.memory.span().first(size));
        if (!done) return std::move(done.error().within(batch_.block->name));
        return {};
    }
    /// Whether a host page has begun and isn't complete. Not at the end of a section: a source may turn to another
    /// channel's page in the middle of a huge one. At the end of the stream it is an error.
    bool has_part() const noexcept { return current_.block != nullptr || aside_.block != nullptr; }
    result<void> check_complete() const {
        if (!has_part()) return {};
        const part& left = current_.block != nullptr ? current_ : aside_;
        return std::move(error(errc::bad_ram, "the rest of the host page at " + std::to_string(left.start), "the end")
                             .within(left.block->name));
    }
    /// Forgets what isn't complete: the connection is gone, and a recovery follows.
    void drop() noexcept {
        current_.block = aside_.block = nullptr;
        may_put_aside_ = recovered_ = true;
    }

private:
    /// A host page that isn't complete.
    struct part {
        ram_block* block = nullptr; // none
        std::uint64_t start = 0;
        page_bitmap filled;    // target pages that came
        std::size_t count = 0; // of them: a host page may have a quarter of a million
        std::size_t end = 0;   // behind the last of them
        bool all_zero = true;  // so far; then `memory` holds nothing yet
        detail::scratch_memory memory;

        bool is_at(const ram_block& other, std::uint64_t offset) const noexcept { return block == &other && start == offset; }
    };

    /// Small pages that follow each other and haven't been placed.
    struct batch {
        ram_block* block = nullptr;
        std::uint64_t start = 0;
        std::size_t size = 0; // bytes; none
        detail::scratch_memory memory;
    };

    result<void> take(reader& in, const ram_record& record, ram_block& block) {
        if (record.kind != ram_record_kind::page && record.kind != ram_record_kind::zero)
            return error(errc::bad_ram, "PAGE or ZERO in postcopy", std::string(to_string(record.kind)));
        const std::uint64_t offset = record.value;
        if (block.used_length < page_size_ || offset > block.used_length - page_size_)
            return error(errc::bad_ram, "a page within " + std::to_string(block.used_length) + " bytes",
                "offset " + std::to_string(offset));
        const std::uint64_t start = offset - offset % block.options.host_page_size;
        if (!current_.is_at(block, start)) {
            if (result<void> turned = turn_to(block, start, offset); !turned) return turned;
        } else if (!recovered_ && offset != next()) {
            return out_of_order(offset);
        }
        const bool zero = record.kind == ram_record_kind::zero && record.fill == 0;
        if (block.options.host_page_size == page_size_) {
            if (zero) return placer_.place_zero(block, offset);
            if (record.kind == ram_record_kind::page && in.window() >= page_size_) {
                const std::byte* const payload = in.cursor();
                in.seek(payload + page_size_);
                if (together_ > 1) return append(block, offset, payload);
                return placer_.place(block, offset, payload);
            }
        }
        if (current_.block == nullptr)
            if (result<void> begun = begin(block, start); !begun) return begun;
        if (result<void> added = add(in, record, zero); !added) {
            current_.block = nullptr;
            return added;
        }
        if (current_.count != current_.filled.size()) return {};
        current_.block = nullptr;
        return current_.all_zero ? placer_.place_zero(block, start)
                                 : placer_.place(block, start, current_.memory.span().data());
    }

    result<void> append(ram_block& block, std::uint64_t offset, const std::byte* page) {
        const std::size_t room = together_ * page_size_;
        if (batch_.memory.span().empty()) {
            result<detail::scratch_memory> memory = detail::scratch_memory::map(room);
            if (!memory) return memory.error();
            batch_.memory = std::move(*memory);
        }
        if (batch_.size != 0 && (batch_.block != &block || batch_.start + batch_.size != offset))
            if (result<void> placed = flush(); !placed) return placed;
        if (batch_.size == 0) {
            batch_.block = &block;
            batch_.start = offset;
        }
        std::memcpy(batch_.memory.span().data() + batch_.size, page, page_size_);
        batch_.size += page_size_;
        return batch_.size == room ? flush() : result<void>();
    }

    /// From the host page that has begun, if there is one, to another.
    result<void> turn_to(const ram_block& block, std::uint64_t start, std::uint64_t offset) {
        if (current_.block != nullptr) {
            if (!may_put_aside_ && !aside_.is_at(block, start)) return out_of_order(offset);
            may_put_aside_ = false;
            std::swap(current_, aside_);
            if (current_.is_at(block, start)) return {};
        } else if (aside_.is_at(block, start)) {
            std::swap(current_, aside_);
            return {};
        }
        if (offset == start || recovered_) return {};
        return error(errc::bad_ram,
            "the first page of a host page of " + std::to_string(block.options.host_page_size) + " bytes",
            "the one at " + std::to_string(offset));
    }
    error out_of_order(std::uint64_t offset) const {
        return error(errc::bad_ram,
            "the page at " + std::to_string(next()) + " of " + current_.block->name + ", whose host page isn't complete",
            "the one at " + std::to_string(offset));
    }
    /// The target page that follows those that came.
    std::uint64_t next() const noexcept {
        return current_.start + current_.end * std::uint64_t{page_size_};
    }

    result<void> begin(ram_block& block, std::uint64_t start) {
        const auto size = static_cast<std::size_t>(block.options.host_page_size);
        if (current_.memory.span().size() < size) {
            result<detail::scratch_memory> larger = detail::scratch_memory::map(size);
            if (!larger) return larger.error();
            if (size > page_size_) (void)::madvise(larger->span().data(), size, MADV_HUGEPAGE);
            current_.memory = std::move(*larger);
        }
        const std::size_t pages = size / page_size_;
        if (current_.filled.size() == pages) current_.filled.clear_all();
        else current_.filled = page_bitmap(pages);
        current_.count = current_.end = 0;
        current_.block = &block;
        current_.start = start;
        current_.all_zero = true;
        return {};
    }
    result<void> add(reader& in, const ram_record& record, bool zero) {
        const std::uint64_t within = record.value - current_.start;
        const auto page = static_cast<std::size_t>(within / page_size_);
        std::byte* const memory = current_.memory.span().data();
        std::byte* const to = memory + within;
        if (!zero && current_.all_zero) {
            // As long as there was nothing else the memory was left alone.
            current_.all_zero = false;
            for (page_run run = current_.filled.find_next_run(0); run.count != 0;
                 run = current_.filled.find_next_run(run.first + run.count))
                std::memset(memory + run.first * page_size_, 0, run.count * page_size_);
        }
        if (!current_.filled.test(page)) ++current_.count;
        current_.filled.set(page);
        current_.end = std::max(current_.end, page + 1);
        if (record.kind == ram_record_kind::page) return in.read(to, page_size_) ? result<void>() : in.failure();
        if (!current_.all_zero) std::memset(to, record.fill, page_size_);
        return {};
    }

    page_placer& placer_;
    std::size_t page_size_;
    std::size_t together_;
    batch batch_;
    part current_;
    part aside_;                 // the one that comes in parts
    bool recovered_ = false;     // a source may have the rest of a request left
    bool may_put_aside_ = false; // and it wasn't seen yet
};

} // namespace vmstate
