// SPDX-License-Identifier: BSL-1.0
//
// From a channel's records, one per target page, to host pages: they come back to back and ascending, and the page is
// placed when its last record is there. Depends on page_placer.hpp, machine/ram_records.hpp and codec/reader.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <utility>

#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/postcopy/page_placer.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// One per channel, used by the thread that reads it.
class page_assembler {
public:
    /// `placer` has to outlive this.
    explicit page_assembler(page_placer& placer) noexcept
        : placer_(placer), page_size_(placer.received().page_size()) {}

    /// Takes a page record of `block`, and its payload from `in`. Errors name the block and are `errc::bad_ram`, or the
    /// reader's.
    result<void> load(reader& in, const ram_record& record, ram_block& block) {
        result<void> done = take(in, record, block);
        if (!done) return std::move(done.error().within(block.name).at_offset(record.position));
        return {};
    }
    /// Whether a host page has begun and isn't complete. Not at the end of a section: a source may turn to another
    /// channel's page in the middle of a huge one. At the end of the stream it is an error.
    bool has_part() const noexcept { return block_ != nullptr; }
    result<void> check_complete() const {
        if (!has_part()) return {};
        return std::move(error(errc::bad_ram, "the rest of the host page at " + std::to_string(start_), "the end")
                             .within(block_->name));
    }
    /// Forgets a page that isn't complete: the connection is gone.
    void drop() noexcept { block_ = nullptr; }

private:
    result<void> take(reader& in, const ram_record& record, ram_block& block) {
        if (record.kind != ram_record_kind::page && record.kind != ram_record_kind::zero)
            return error(errc::bad_ram, "PAGE or ZERO in postcopy", std::string(to_string(record.kind)));
        const std::uint64_t offset = record.value;
        if (block.used_length < page_size_ || offset > block.used_length - page_size_)
            return error(errc::bad_ram, "a page within " + std::to_string(block.used_length) + " bytes",
                "offset " + std::to_string(offset));
        if (result<void> fits = has_part() ? continues(block, offset) : begins(block, offset); !fits) return fits;

        const bool zero = record.kind == ram_record_kind::zero && record.fill == 0;
        const bool whole = block.options.host_page_size == page_size_;
        if (whole && zero) return placer_.place_zero(block, offset);
        if (whole && record.kind == ram_record_kind::page && in.window() >= page_size_) {
            const std::byte* const payload = in.cursor();
            in.seek(payload + page_size_);
            return placer_.place(block, offset, payload);
        }
        if (result<void> room = make_room(block); !room) return room;
        if (result<void> added = add(in, record, block, zero); !added) return drop_after(added);
        if (offset + page_size_ < start_ + block.options.host_page_size) return {};
        block_ = nullptr;
        return all_zero_ ? placer_.place_zero(block, start_) : placer_.place(block, start_, part_.span().data());
    }

    result<void> continues(const ram_block& block, std::uint64_t offset) const {
        if (&block == block_ && offset == next_) return {};
        return error(errc::bad_ram,
            "the page at " + std::to_string(next_) + " of " + block_->name + ", whose host page isn't complete",
            "the one at " + std::to_string(offset));
    }
    static result<void> begins(const ram_block& block, std::uint64_t offset) {
        if (offset % block.options.host_page_size == 0) return {};
        return error(errc::bad_ram,
            "the first page of a host page of " + std::to_string(block.options.host_page_size) + " bytes",
            "the one at " + std::to_string(offset));
    }
    result<void> make_room(const ram_block& block) {
        const auto size = static_cast<std::size_t>(block.options.host_page_size);
        if (part_.span().size() >= size) return {};
        result<detail::scratch_memory> larger = detail::scratch_memory::map(size);
        if (!larger) return larger.error();
        if (size > page_size_) (void)::madvise(larger->span().data(), size, MADV_HUGEPAGE);
        part_ = std::move(*larger);
        return {};
    }
    result<void> add(reader& in, const ram_record& record, ram_block& block, bool zero) {
        if (!has_part()) {
            block_ = &block;
            start_ = record.value;
            all_zero_ = true;
        }
        next_ = record.value + page_size_;
        const auto within = static_cast<std::size_t>(record.value - start_);
        std::byte* const to = part_.span().data() + within;
        if (zero) {
            // As long as there is nothing else the memory is left alone.
            if (!all_zero_) std::memset(to, 0, page_size_);
            return {};
        }
        if (all_zero_) std::memset(part_.span().data(), 0, within);
        all_zero_ = false;
        if (record.kind == ram_record_kind::zero) std::memset(to, record.fill, page_size_);
        else if (!in.read(to, page_size_)) return in.failure();
        return {};
    }
    result<void> drop_after(result<void>& failed) noexcept {
        drop();
        return std::move(failed);
    }

    page_placer& placer_;
    std::size_t page_size_;
    detail::scratch_memory part_;
    ram_block* block_ = nullptr; // whose host page has begun
    std::uint64_t start_ = 0;    // of the host page
    std::uint64_t next_ = 0;     // the record that comes next
    bool all_zero_ = true;       // so far; then `part_` holds nothing yet
};

} // namespace vmstate
