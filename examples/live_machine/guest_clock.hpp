// SPDX-License-Identifier: BSL-1.0
//
// The machine's time: microseconds in which it runs. A guest that stands still, because it is being migrated for one,
// sees no time pass. Depends on describe.hpp.
#pragma once

#include <chrono>
#include <cstdint>

#include <vmstate/describe.hpp>

namespace live {

class guest_clock {
public:
    using clock = std::chrono::steady_clock;
    struct vm;

    /// The machine runs from now on, or stands still. Called by the thread that runs it.
    void start() { started_ = clock::now() - std::chrono::microseconds(time_); }
    void stop() { time_ = now(); }

    /// While the machine runs.
    std::uint64_t now() const {
        return static_cast<std::uint64_t>(
            std::chrono::duration_cast<std::chrono::microseconds>(clock::now() - started_).count());
    }
    /// When it will be so late; an hour from now, where that is later.
    clock::time_point when(std::uint64_t time) const {
        const std::uint64_t at = now();
        constexpr std::uint64_t hour = 3'600'000'000;
        const std::uint64_t left = time > at ? time - at : 0;
        return clock::now() + std::chrono::microseconds(left < hour ? left : hour);
    }

private:
    static constexpr std::uint64_t longest = std::uint64_t{1} << 52; ///< what a stream may claim: 142 years

    std::uint64_t time_ = 0; ///< when it stood still last
    clock::time_point started_{}; ///< when it was 0
};

struct guest_clock::vm {
    static constexpr auto description = vmstate::describe<guest_clock>(
        {.name = "guest-clock"}, vmstate::field<&guest_clock::time_, vmstate::between<0, longest>>);
};

} // namespace live
