// SPDX-License-Identifier: BSL-1.0
//
// How fast bytes leave, and how fast they may: measured and allowed in windows of 100 ms, as in QEMU
// (migration/migration.c, BUFFER_DELAY). Depends on the standard library alone.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>

namespace vmstate::migration {

class bandwidth_meter {
public:
    using clock = std::chrono::steady_clock;
    static constexpr std::chrono::milliseconds window{100};

    void start(std::uint64_t bytes, clock::time_point now = clock::now()) {
        window_begin_ = now;
        window_bytes_ = bytes;
    }
    /// Whether as much has left since the window's begin as `per_second` allows in one; never with 0.
    bool is_spent(std::uint64_t bytes, std::uint64_t per_second) const {
        return per_second != 0 && bytes - window_bytes_ >= allowance(per_second);
    }
    /// When the window ends.
    clock::time_point window_end() const { return window_begin_ + window; }
    /// Ends the window if it is time. `bytes` is what has left in all.
    bool update(std::uint64_t bytes, clock::time_point now = clock::now()) {
        if (now < window_end()) return false;
        rate_ = rate_since_begin(bytes, now);
        start(bytes, now);
        return true;
    }

    /// Bytes per second in the last window; in the first one, so far. The little that left at once may be no further than
    /// a socket's buffer: ten milliseconds are taken to have passed in any case.
    double rate(std::uint64_t bytes, clock::time_point now = clock::now()) const {
        return rate_ != 0 ? rate_ : rate_since_begin(bytes, now);
    }
    double rate() const { return rate_; }

private:
    static std::uint64_t allowance(std::uint64_t per_second) {
        return std::max<std::uint64_t>(1, per_second / static_cast<std::uint64_t>(std::chrono::seconds(1) / window));
    }

    double rate_since_begin(std::uint64_t bytes, clock::time_point now) const {
        const std::chrono::duration<double> time = std::max<clock::duration>(now - window_begin_, std::chrono::milliseconds(10));
        return static_cast<double>(bytes - window_bytes_) / time.count();
    }

    clock::time_point window_begin_{};
    std::uint64_t window_bytes_ = 0;
    double rate_ = 0;
};

} // namespace vmstate::migration
