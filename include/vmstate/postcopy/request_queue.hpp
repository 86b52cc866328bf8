// SPDX-License-Identifier: BSL-1.0
//
// A source's queue of the pages that its destination waits for, between the thread that reads the return path and the one
// that sends. Depends on page_request.hpp and ram/page_bitmap.hpp.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/postcopy/page_request.hpp>
#include <vmstate/ram/page_bitmap.hpp>

namespace vmstate {

/// In order, each host page once for as long as it is in the queue. Any thread may call anything. However much a
/// destination asks for, the queue has at most an entry per host page.
class page_request_queue {
public:
    /// A host page to be sent.
    struct entry {
        ram_block* block = nullptr;
        std::uint64_t offset = 0;
    };

    /// `request` was checked: whole host pages inside the block. How many pages are new.
    std::size_t push(const page_request& request) {
        const std::uint64_t unit = request.block->options.host_page_size;
        const auto first = static_cast<std::size_t>(request.start / unit);
        const auto end = first + static_cast<std::size_t>(request.length / unit);
        std::size_t added = 0;
        {
            const std::lock_guard lock(queue_mutex_);
            page_bitmap& queued = queued_of(*request.block);
            for (std::size_t page = first; page < end;) {
                if (queued.test(page)) {
                    ++page;
                    continue;
                }
                std::size_t count = 1;
                while (page + count < end && !queued.test(page + count)) ++count;
                queued.set_range(page, count);
                runs_.push_back({request.block, {page, count}});
                added += count;
                page += count;
            }
            ++requests_;
        }
        if (added != 0) changed_.notify_all();
        return added;
    }

    /// The page that waits longest; none where the queue is empty.
    std::optional<entry> try_pop() {
        const std::lock_guard lock(queue_mutex_);
        return pop_locked();
    }
    /// The same, and waits for one; none when the time has come, or the queue was closed and is empty.
    template <class Clock, class Duration>
    std::optional<entry> pop_until(std::chrono::time_point<Clock, Duration> when) {
        std::unique_lock lock(queue_mutex_);
        changed_.wait_until(lock, when, [&] { return closed_ || !runs_.empty(); });
        return pop_locked();
    }
    /// Waits until there is a page, and leaves it there. False when the time has come, or the queue was closed and is empty.
    template <class Clock, class Duration>
    bool wait_until(std::chrono::time_point<Clock, Duration> when) {
        std::unique_lock lock(queue_mutex_);
        changed_.wait_until(lock, when, [&] { return closed_ || !runs_.empty(); });
        return !runs_.empty();
    }
    /// Nobody waits any longer; what is in it can be taken.
    void close() {
        {
            const std::lock_guard lock(queue_mutex_);
            closed_ = true;
        }
        changed_.notify_all();
    }
    /// For a new connection: empty and open. A destination asks again for what it waits for.
    void reset() {
        const std::lock_guard lock(queue_mutex_);
        closed_ = false;
        runs_.clear();
        queued_.clear();
    }

    bool empty() const {
        const std::lock_guard lock(queue_mutex_);
        return runs_.empty();
    }
    /// Requests that came, new or not (QEMU: postcopy_requests).
    std::uint64_t requests() const {
        const std::lock_guard lock(queue_mutex_);
        return requests_;
    }

private:
    struct run {
        ram_block* block;
        page_run pages; // host pages
    };

    page_bitmap& queued_of(const ram_block& block) {
        const auto pages = static_cast<std::size_t>(block.memory.size() / block.options.host_page_size) + 1;
        return queued_.try_emplace(&block, pages).first->second;
    }
    std::optional<entry> pop_locked() {
        if (runs_.empty()) return std::nullopt;
        run& first = runs_.front();
        const std::size_t page = first.pages.first++;
        ram_block* const block = first.block;
        queued_of(*block).clear(page);
        if (--first.pages.count == 0) runs_.pop_front();
        return entry{block, page * block->options.host_page_size};
    }

    mutable std::mutex queue_mutex_; // all below
    std::condition_variable changed_;
    bool closed_ = false;
    std::deque<run> runs_;
    std::map<const ram_block*, page_bitmap> queued_; // which host pages are in `runs_`
    std::uint64_t requests_ = 0;
};

} // namespace vmstate
