// SPDX-License-Identifier: BSL-1.0
//
// Whether a guest writes its memory too fast for the channel, and how much of its time is to be taken away (QEMU:
// migration_trigger_throttle). Depends on parameters.hpp.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>

#include <vmstate/migration/parameters.hpp>

namespace vmstate::migration {

class auto_converge {
public:
    using clock = std::chrono::steady_clock;
    /// A judgement is of no less time than this: a pass over little memory may be short.
    static constexpr std::chrono::milliseconds period{1000};

    /// The migration begins, with so many bytes on the channel.
    void start(std::uint64_t sent, clock::time_point now = clock::now()) {
        begin_period(sent, now);
        outrun_ = throttled_ = 0;
    }
    /// After each look at the dirty logs: `written` bytes of pages were found, `sent` have left in all. What the guest has to
    /// be slowed down to, in percent, where that changes: where it has written more than half of what was sent, for the
    /// second time since the last change. It need not be twice in a row.
    std::optional<unsigned> judge(
        std::uint64_t written, std::uint64_t sent, const parameters& settings, clock::time_point now = clock::now()) {
        written_ += written;
        if (now - period_begin_ <= period) return std::nullopt;
        const bool outruns = written_ > (sent - sent_before_) / 2;
        begin_period(sent, now);
        if (!outruns || ++outrun_ < 2) return std::nullopt;
        outrun_ = 0;
        const unsigned before = throttled_;
        throttled_ = before == 0 ? settings.cpu_throttle_initial
                                 : std::min(before + settings.cpu_throttle_increment, settings.max_cpu_throttle);
        return throttled_ != before ? std::optional<unsigned>(throttled_) : std::nullopt;
    }
    /// How much is taken away now.
    unsigned throttled() const noexcept { return throttled_; }

private:
    void begin_period(std::uint64_t sent, clock::time_point now) {
        period_begin_ = now;
        sent_before_ = sent;
        written_ = 0;
    }

    clock::time_point period_begin_{};
    std::uint64_t sent_before_ = 0;
    std::uint64_t written_ = 0; ///< in this period
    unsigned outrun_ = 0;       ///< periods, since the last change
    unsigned throttled_ = 0;
};

} // namespace vmstate::migration
