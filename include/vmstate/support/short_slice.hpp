// SPDX-License-Identifier: BSL-1.0
//
// For a thread that somebody waits for, on processors that are busy. Depends on Linux.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace vmstate::detail {

/// Asks that the calling thread, when it wakes, needn't wait until a busy one has used its slice up: with a slice of its own,
/// a short one, it goes first (Linux 6.12, sched_setattr(2): sched_runtime of SCHED_OTHER). It gets no more of the processor
/// than before, and where this can't be had it runs as ever.
inline void prefer_short_slice() noexcept {
    struct { // sched_attr, of which the C library may have one or not
        std::uint32_t size, policy;
        std::uint64_t flags;
        std::int32_t nice;
        std::uint32_t priority;
        std::uint64_t runtime, deadline, period;
    } attributes{};
    static_assert(sizeof attributes == 48);
    constexpr std::uint64_t shortest = 100'000; // ns, of those that Linux grants
    if (::syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
    if (attributes.policy != 0) return; // SCHED_OTHER; what somebody else has chosen stays
    attributes.runtime = shortest;
    static_cast<void>(::syscall(SYS_sched_setattr, 0, &attributes, 0));
}

} // namespace vmstate::detail
