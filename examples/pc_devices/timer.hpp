// SPDX-License-Identifier: BSL-1.0
// timer: the machine's clocks, and with -icount the bookkeeping that ties them to instructions. Its table is in
// QEMU's softmmu/cpu-timers.c. Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

/// How instructions drive the virtual clock: QEMU's -icount off, shift=N, shift=auto.
enum class icount_mode : std::uint8_t { off = 0, fixed = 1, adaptive = 2 };

struct TimersState {
    std::int64_t cpu_ticks_offset = 0;
    std::int64_t cpu_clock_offset = 0; ///< virtual clock of a stopped machine, ns

    icount_mode use_icount = icount_mode::off;
    std::int64_t qemu_icount_bias = 0;
    std::int64_t qemu_icount = 0;

    bool has_warp_timer = false; ///< with sleep=on
    std::int64_t vm_clock_warp_start = 0;
    std::int64_t icount_warp_timer = -1; ///< expiry, ns; -1: not pending

    bool has_adjust_timers = false; ///< with shift=auto
    std::int64_t icount_rt_timer = -1;
    std::int64_t icount_vm_timer = -1;

    std::int16_t icount_time_shift = 0;
    std::int64_t last_delta = 0;
};

inline bool icount_state_needed(const TimersState& s) { return s.use_icount != icount_mode::off; }

inline bool warp_timer_state_needed(const TimersState& s) { return s.has_warp_timer; }

inline bool adjust_timers_state_needed(const TimersState& s) { return s.has_adjust_timers; }

inline bool icount_shift_state_needed(const TimersState& s) { return s.use_icount == icount_mode::adaptive; }

// QEMU knows its -icount from the command line. Here the stream says it, by the subsections that it has.
inline void timers_pre_load(TimersState& s) {
    s.use_icount = icount_mode::off;
    s.has_warp_timer = false;
    s.has_adjust_timers = false;
}

inline void warp_timer_post_load(TimersState& s, int /*version_id*/) { s.has_warp_timer = true; }

inline void adjust_timers_post_load(TimersState& s, int /*version_id*/) { s.has_adjust_timers = true; }

inline void icount_shift_post_load(TimersState& s, int /*version_id*/) {
    s.use_icount = icount_mode::adaptive;
}

// Runs after the three above.
inline void icount_post_load(TimersState& s, int /*version_id*/) {
    if (s.use_icount == icount_mode::off) {
        s.use_icount = icount_mode::fixed;
    }
}

// clang-format off: tables, one item a line
inline constexpr auto icount_vmstate_warp_timer = vmstate::describe<TimersState>(
    {.name = "timer/icount/warp_timer", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<warp_timer_state_needed>,
    vmstate::post_load<warp_timer_post_load>,
    vmstate::field<&TimersState::vm_clock_warp_start>,
    vmstate::field<&TimersState::icount_warp_timer, vmstate::as_timer>);

inline constexpr auto icount_vmstate_adjust_timers = vmstate::describe<TimersState>(
    {.name = "timer/icount/timers", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<adjust_timers_state_needed>,
    vmstate::post_load<adjust_timers_post_load>,
    vmstate::field<&TimersState::icount_rt_timer, vmstate::as_timer>,
    vmstate::field<&TimersState::icount_vm_timer, vmstate::as_timer>);

inline constexpr auto icount_vmstate_shift = vmstate::describe<TimersState>(
    {.name = "timer/icount/shift", .version_id = 2, .minimum_version_id = 2},
    vmstate::needed<icount_shift_state_needed>,
    vmstate::post_load<icount_shift_post_load>,
    vmstate::field<&TimersState::icount_time_shift>,
    vmstate::field<&TimersState::last_delta>);

inline constexpr auto icount_vmstate_timers = vmstate::describe<TimersState>(
    {.name = "timer/icount", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<icount_state_needed>,
    vmstate::post_load<icount_post_load>,
    vmstate::field<&TimersState::qemu_icount_bias>,
    vmstate::field<&TimersState::qemu_icount>,
    vmstate::subsection<icount_vmstate_warp_timer>,
    vmstate::subsection<icount_vmstate_adjust_timers>,
    vmstate::subsection<icount_vmstate_shift>);

inline constexpr auto vmstate_timers = vmstate::describe<TimersState>(
    {.name = "timer", .version_id = 2, .minimum_version_id = 1},
    vmstate::pre_load<timers_pre_load>,
    vmstate::field<&TimersState::cpu_ticks_offset>,
    vmstate::unused<8>,
    vmstate::field<&TimersState::cpu_clock_offset, vmstate::since<2>>,
    vmstate::subsection<icount_vmstate_timers>,
    vmstate::transient<&TimersState::use_icount, &TimersState::has_warp_timer, &TimersState::has_adjust_timers>);
// clang-format on

} // namespace pc_devices
