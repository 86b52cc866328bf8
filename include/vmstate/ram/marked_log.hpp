// SPDX-License-Identifier: BSL-1.0
//
// The dirty log of an emulator that sees every write to guest memory and marks the page itself. Depends on
// dirty_log.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include <vmstate/ram/dirty_log.hpp>

namespace vmstate {

/// Pages are marked by any number of threads, without waiting for each other or for `collect`.
class marked_log {
public:
    /// For a block of `bytes`; `page_size` is the target's.
    explicit marked_log(std::uint64_t bytes, std::size_t page_size = 4096)
        : pages_(bytes, page_size), marks_(std::make_unique<page_bitmap>(pages_.count())) {}

    /// `length` bytes at `offset` of the block have been written. Call it after the write: called before it, a collect
    /// between the two would take the mark and read what was there before.
    void mark(std::uint64_t offset, std::uint64_t length) noexcept {
        // Always the read-modify-write, also where the bit is set already: a mere look could come before the write that
        // it follows has left this processor, and a collect in between would have the mark and not the write.
        const page_run run = pages_.touched_by(offset, length);
        marks_->set_range_atomic(run.first, run.count);
    }

    /// Forgets what was marked before.
    result<void> start() {
        if (started_) return detail::log_started();
        page_bitmap forgotten(pages_.count());
        forgotten.merge_and_clear(*marks_);
        started_ = true;
        return {};
    }
    result<std::uint64_t> collect(page_bitmap& into) {
        if (!started_) return detail::log_not_started();
        if (result<void> fits = pages_.check(into); !fits) return fits.error();
        return into.merge_and_clear(*marks_);
    }
    result<void> stop() {
        started_ = false;
        return {};
    }

private:
    detail::block_pages pages_;
    std::unique_ptr<page_bitmap> marks_;
    bool started_ = false;
};

} // namespace vmstate
