// SPDX-License-Identifier: BSL-1.0
// hpet: the high precision event timers. Its table is in QEMU's hw/timer/hpet.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

namespace hpet {

inline constexpr std::uint8_t min_timers = 3;
inline constexpr std::uint8_t max_timers = 32;

inline constexpr std::uint64_t cfg_enable = 0x001;
inline constexpr std::uint64_t tn_fsb_cap = 0x8000; // the timer can raise its interrupt by a message

// The capability register: revision and vendor, 64-bit counter, legacy routes, 10 ns per tick, in femtoseconds.
inline constexpr std::uint64_t capability = 0x8086a001 | (std::uint64_t{10'000'000} << 32);
inline constexpr unsigned id_num_tim_shift = 8;
inline constexpr std::uint64_t id_num_tim_mask = 0x1f00;

inline constexpr std::uint32_t flag_msi = 1;

} // namespace hpet

struct HPETTimer {
    std::uint8_t tn = 0; ///< the timer's number
    std::uint64_t config = 0;
    std::uint64_t cmp = ~std::uint64_t{0};
    std::uint64_t fsb = 0;
    std::uint64_t period = 0;
    std::uint8_t wrap_flag = 0;
    std::int64_t qemu_timer = -1; ///< expiry, virtual clock, ns; -1: not pending
};

struct HPETState {
    std::uint64_t hpet_offset = 0; ///< of the main counter to the virtual clock, ns
    bool hpet_offset_saved = true; ///< machine property, off for machine types up to 2.11
    std::uint32_t flags = 0;
    std::uint8_t rtc_irq_level = 0;
    std::uint8_t num_timers = hpet::min_timers;
    HPETTimer timer[hpet::max_timers];
    std::uint64_t capability = hpet::capability | ((hpet::min_timers - 1u) << hpet::id_num_tim_shift);
    std::uint64_t config = 0;
    std::uint64_t isr = 0;
    std::uint64_t hpet_counter = 0; ///< ticks of 10 ns
};

inline bool hpet_enabled(const HPETState& s) { return (s.config & hpet::cfg_enable) != 0; }

// A stream of version 1 does not say how many timers there are: there were always three. The other two are what
// the reset before the load left, in QEMU.
inline void hpet_pre_load(HPETState& s) {
    s.num_timers = hpet::min_timers;
    s.rtc_irq_level = 0;
    s.hpet_offset = 0;
}

inline bool hpet_validate_num_timers(const HPETState& s) {
    return s.num_timers >= hpet::min_timers && s.num_timers <= hpet::max_timers;
}

// The parts that follow from what was loaded. QEMU besides brings hpet_counter up to its clock before saving, and
// for a machine type without saved offset works the offset out from it: matters of a running clock.
inline void hpet_post_load(HPETState& s, int /*version_id*/) {
    s.capability &= ~hpet::id_num_tim_mask;
    s.capability |= (s.num_timers - std::uint64_t{1}) << hpet::id_num_tim_shift;

    s.flags &= ~hpet::flag_msi;
    if ((s.timer[0].config & hpet::tn_fsb_cap) != 0) {
        s.flags |= hpet::flag_msi;
    }
}

inline bool hpet_rtc_irq_level_needed(const HPETState& s) { return s.rtc_irq_level != 0; }

inline bool hpet_offset_needed(const HPETState& s) { return hpet_enabled(s) && s.hpet_offset_saved; }

// clang-format off: tables, one item a line
inline constexpr auto vmstate_hpet_rtc_irq_level = vmstate::describe<HPETState>(
    {.name = "hpet/rtc_irq_level", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<hpet_rtc_irq_level_needed>,
    vmstate::field<&HPETState::rtc_irq_level>);

inline constexpr auto vmstate_hpet_offset = vmstate::describe<HPETState>(
    {.name = "hpet/offset", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<hpet_offset_needed>,
    vmstate::field<&HPETState::hpet_offset>);

inline constexpr auto vmstate_hpet_timer = vmstate::describe<HPETTimer>(
    {.name = "hpet_timer", .version_id = 1, .minimum_version_id = 1},
    // QEMU takes any number and shifts by it later; in its own streams it is the timer's place in the array.
    vmstate::field<&HPETTimer::tn, vmstate::between<0, hpet::max_timers - 1>>,
    vmstate::field<&HPETTimer::config>,
    vmstate::field<&HPETTimer::cmp>,
    vmstate::field<&HPETTimer::fsb>,
    vmstate::field<&HPETTimer::period>,
    vmstate::field<&HPETTimer::wrap_flag>,
    vmstate::field<&HPETTimer::qemu_timer, vmstate::as_timer>);

/// Version 1 has no num_timers, and always three timers.
inline constexpr auto vmstate_hpet_v1 = vmstate::describe<HPETState>(
    {.name = "hpet", .version_id = 1, .minimum_version_id = 1},
    vmstate::partial,
    vmstate::pre_load<hpet_pre_load>,
    vmstate::post_load<hpet_post_load>,
    vmstate::field<&HPETState::config>,
    vmstate::field<&HPETState::isr>,
    vmstate::field<&HPETState::hpet_counter>,
    vmstate::field<&HPETState::timer, vmstate::as<vmstate_hpet_timer>, vmstate::slice<0, hpet::min_timers>>,
    vmstate::subsection<vmstate_hpet_rtc_irq_level>,
    vmstate::subsection<vmstate_hpet_offset>);

inline vmstate::result<void> hpet_load_v1(vmstate::reader& in, HPETState& s, int version_id) {
    return vmstate::load<vmstate_hpet_v1>(in, s, version_id);
}

inline constexpr auto vmstate_hpet = vmstate::describe<HPETState>(
    {.name = "hpet", .version_id = 2, .minimum_version_id = 2},
    // QEMU's table goes back to version 1 by itself, and takes the length that pre_load left. A length that is not on
    // the wire whenever its array is, is refused here: a mistake almost always, and this is the exception.
    vmstate::load_old<hpet_load_v1, 1>,
    vmstate::pre_load<hpet_pre_load>,
    vmstate::post_load<hpet_post_load>,
    vmstate::field<&HPETState::config>,
    vmstate::field<&HPETState::isr>,
    vmstate::field<&HPETState::hpet_counter>,
    vmstate::field<&HPETState::num_timers>,
    vmstate::validate<"num_timers in range", hpet_validate_num_timers>,
    vmstate::field<&HPETState::timer, vmstate::as<vmstate_hpet_timer>, vmstate::length<&HPETState::num_timers>>,
    vmstate::subsection<vmstate_hpet_rtc_irq_level>,
    vmstate::subsection<vmstate_hpet_offset>,
    vmstate::transient<&HPETState::hpet_offset_saved, &HPETState::flags, &HPETState::capability>);
// clang-format on

} // namespace pc_devices
