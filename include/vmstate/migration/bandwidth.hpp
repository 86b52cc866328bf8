// SPDX-License-Identifier: BSL-1.0
//
// How fast bytes leave, and how fast they may: measured and allowed in windows of 100 ms, as in QEMU
// (migration/migration.c, BUFFER_DELAY). Depends on the standard library alone.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace vmstate::migration {

class bandwidth_meter {
public:
    using clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds window{100};

    void start(std::uint64_t bytes, clock::time_point now = clock::now()) {
        begin_window(bytes, now);
        charged_bytes_ = bytes;
        paid_until_ = now;
    }
    /// Whether what has left takes all of this window's time at `per_second`; never with 0. What was more than a window
    /// allows, as a large page may be, is paid for in the next ones; what was less is lost.
    bool is_spent(std::uint64_t bytes, std::uint64_t per_second) {
        charge(bytes, per_second);
        return per_second != 0 && paid_until_ >= window_end();
    }
    /// How many bytes the window has left; all there are with 0. Where `is_spent` it is none.
    std::uint64_t left(std::uint64_t bytes, std::uint64_t per_second) {
        if (per_second == 0) return std::numeric_limits<std::uint64_t>::max();
        charge(bytes, per_second);
        const std::chrono::duration<double> time = window_end() - paid_until_;
        return static_cast<std::uint64_t>(std::max(0.0, time.count()) * static_cast<double>(per_second));
    }
    /// When the window ends.
    clock::time_point window_end() const { return window_begin_ + window; }
    /// Ends the window if it is time. `bytes` is what has left in all.
    bool update(std::uint64_t bytes, clock::time_point now = clock::now()) {
        if (now < window_end()) return false;
        rate_ = rate_since_begin(bytes, now);
        begin_window(bytes, now);
        return true;
    }

    /// Bytes per second in the last window; in the first one, so far. The little that left at once may be no further than
    /// a socket's buffer: ten milliseconds are taken to have passed in any case.
    double rate(std::uint64_t bytes, clock::time_point now = clock::now()) const {
        return rate_ != 0 ? rate_ : rate_since_begin(bytes, now);
    }
    double rate() const { return rate_; }

private:
    void begin_window(std::uint64_t bytes, clock::time_point now) {
        window_begin_ = now;
        window_bytes_ = bytes;
    }
    /// What has left since the last time takes its time, at the rate of now.
    void charge(std::uint64_t bytes, std::uint64_t per_second) {
        const std::uint64_t fresh = bytes - charged_bytes_;
        charged_bytes_ = bytes;
        paid_until_ = std::max(paid_until_, window_begin_);
        if (per_second == 0) paid_until_ = window_begin_;
        else paid_until_ += std::chrono::duration_cast<clock::duration>(std::min(std::chrono::duration<double>(
            static_cast<double>(fresh) / static_cast<double>(per_second)), longest_debt));
    }

    /// Of one batch of pages; so that no number overflows.
    static constexpr std::chrono::duration<double> longest_debt{3600};

    double rate_since_begin(std::uint64_t bytes, clock::time_point now) const {
        const std::chrono::duration<double> time = std::max<clock::duration>(now - window_begin_, std::chrono::milliseconds(10));
        return static_cast<double>(bytes - window_bytes_) / time.count();
    }

    clock::time_point window_begin_{};
    std::uint64_t window_bytes_ = 0;
    std::uint64_t charged_bytes_ = 0;
    clock::time_point paid_until_{}; ///< by then what has left would have left at the rate that is allowed
    double rate_ = 0;
};

} // namespace vmstate::migration
