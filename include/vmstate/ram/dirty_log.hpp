// SPDX-License-Identifier: BSL-1.0
//
// Dirty logs: which pages of a RAM block were written since one last asked. The concept that migration works with, and
// a log of any kind in one type. Depends on page_bitmap.hpp and support/.
#pragma once

#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// A log of the writes to one block of memory.
///
/// - `start()` begins: what is written afterwards is logged. A log can be started again after `stop()`.
/// - `collect(into)` sets in `into`, a bit per target page of the block, the pages that were written since the last
///   collect (the first time: since `start()`), logs them anew, and says how many bits became set. Bits that are set
///   already stay. A page that is written at any time after `start()` is in the collect that returns next or in a later
///   one, never in none; who reads a page after the collect that had it sees that write. A page may come that was not
///   written. After an error `into` has what was found until then, and the pages that are missing come later or every
///   later collect fails, too.
/// - `stop()` ends it and gives back what the log took. Stopping twice is harmless.
///
/// One thread at a time calls these; the memory is written by any number of threads meanwhile. Discarding memory
/// (MADV_DONTNEED and the like) is no write: who discards a page that was sent has to say so.
template <class Log>
concept dirty_log = requires(Log& log, page_bitmap& into) {
    { log.start() } -> std::same_as<result<void>>;
    { log.collect(into) } -> std::same_as<result<std::uint64_t>>;
    { log.stop() } -> std::same_as<result<void>>;
};

/// Any dirty log: a copy of a temporary, or the object itself, which has to outlive this one, otherwise.
class any_dirty_log {
public:
    template <class Log>
        requires(!std::same_as<std::remove_cvref_t<Log>, any_dirty_log> && dirty_log<std::remove_cvref_t<Log>>)
    any_dirty_log(Log&& log) : held_(std::make_unique<holder<Log>>(std::forward<Log>(log))) {}

    result<void> start() { return held_->start(); }
    result<std::uint64_t> collect(page_bitmap& into) { return held_->collect(into); }
    result<void> stop() { return held_->stop(); }

private:
    struct base {
        base() = default;
        base(const base&) = delete;
        base& operator=(const base&) = delete;
        virtual ~base() = default;
        virtual result<void> start() = 0;
        virtual result<std::uint64_t> collect(page_bitmap& into) = 0;
        virtual result<void> stop() = 0;
    };
    /// `Log` is a value or a reference.
    template <class Log>
    struct holder final : base {
        explicit holder(Log&& log) : log_(std::forward<Log>(log)) {}
        result<void> start() override { return log_.start(); }
        result<std::uint64_t> collect(page_bitmap& into) override { return log_.collect(into); }
        result<void> stop() override { return log_.stop(); }
        Log log_;
    };

    std::unique_ptr<base> held_;
};

namespace detail {

/// How the bytes of a block fall into target pages; what every log has to check before it sets bits.
class block_pages {
public:
    /// `page_size` is a power of two.
    block_pages(std::uint64_t bytes, std::size_t page_size) noexcept
        : bits_(static_cast<unsigned>(std::countr_zero(page_size)))
        , count_(static_cast<std::size_t>((bytes + page_size - 1) >> bits_)) {}

    std::size_t count() const noexcept { return count_; }

    /// The pages that `length` bytes from `offset` touch; what lies beyond the block's end isn't there.
    page_run touched_by(std::uint64_t offset, std::uint64_t length) const noexcept {
        if (length == 0) return {};
        const std::uint64_t first = offset >> bits_;
        if (first >= count_) return {};
        const std::uint64_t last = length - 1 > ~offset ? count_ - 1 : (offset + length - 1) >> bits_;
        const std::uint64_t end = last >= count_ ? count_ : last + 1;
        return {static_cast<std::size_t>(first), static_cast<std::size_t>(end - first)};
    }
    /// Sets them; how many were clear before.
    std::uint64_t mark(page_bitmap& into, std::uint64_t offset, std::uint64_t length) const noexcept {
        const page_run run = touched_by(offset, length);
        return into.set_range(run.first, run.count);
    }
    result<void> check(const page_bitmap& into) const {
        if (into.size() == count_) return {};
        return error(errc::invalid_argument, "a bitmap of " + std::to_string(count_) + " pages",
            std::to_string(into.size()));
    }

private:
    unsigned bits_;
    std::size_t count_;
};

inline error log_not_started() { return error(errc::invalid_argument, "a dirty log that was started"); }
inline error log_started() { return error(errc::invalid_argument, "a dirty log that isn't started yet"); }

} // namespace detail

} // namespace vmstate
