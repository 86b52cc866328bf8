// SPDX-License-Identifier: BSL-1.0
// i8254: the interval timer. Its table is in QEMU's hw/timer/i8254_common.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

struct PITChannelState {
    std::int32_t count = 0x10000;
    std::uint16_t latched_count = 0;
    std::uint8_t count_latched = 0;
    std::uint8_t status_latched = 0;
    std::uint8_t status = 0;
    std::uint8_t read_state = 0;
    std::uint8_t write_state = 0;
    std::uint8_t write_latch = 0;
    std::uint8_t rw_mode = 0;
    std::uint8_t mode = 3;
    std::uint8_t bcd = 0;
    std::uint8_t gate = 0;
    std::int64_t count_load_time = 0;       ///< virtual clock, ns
    std::int64_t next_transition_time = -1; ///< virtual clock, ns; -1: none
};

/// Only channel 0 drives an interrupt, so what QEMU keeps in every channel for it is here once.
struct PITCommonState {
    std::uint32_t irq_disabled = 0; ///< QEMU: channels[0].irq_disabled
    PITChannelState channels[3];
    std::int64_t irq_timer = -1; ///< QEMU sends channels[0].next_transition_time where this timer once was
};

inline void pit_pre_save(PITCommonState& s) { s.irq_timer = s.channels[0].next_transition_time; }

// The second copy is the one that counts, as it is in QEMU, where both are loaded into one member.
inline void pit_post_load(PITCommonState& s, int /*version_id*/) {
    s.channels[0].next_transition_time = s.irq_timer;
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_pit_channel = vmstate::describe<PITChannelState>(
    {.name = "pit channel", .version_id = 2, .minimum_version_id = 2},
    vmstate::field<&PITChannelState::count>,
    vmstate::field<&PITChannelState::latched_count>,
    vmstate::field<&PITChannelState::count_latched>,
    vmstate::field<&PITChannelState::status_latched>,
    vmstate::field<&PITChannelState::status>,
    vmstate::field<&PITChannelState::read_state>,
    vmstate::field<&PITChannelState::write_state>,
    vmstate::field<&PITChannelState::write_latch>,
    vmstate::field<&PITChannelState::rw_mode>,
    vmstate::field<&PITChannelState::mode>,
    vmstate::field<&PITChannelState::bcd>,
    vmstate::field<&PITChannelState::gate>,
    vmstate::field<&PITChannelState::count_load_time>,
    vmstate::field<&PITChannelState::next_transition_time>);

inline constexpr auto vmstate_pit_common = vmstate::describe<PITCommonState>(
    {.name = "i8254", .version_id = 3, .minimum_version_id = 2},
    vmstate::pre_save<pit_pre_save>,
    vmstate::post_load<pit_post_load>,
    vmstate::field<&PITCommonState::irq_disabled, vmstate::since<3>>,
    vmstate::field<&PITCommonState::channels, vmstate::as<vmstate_pit_channel>, vmstate::since<2>>,
    vmstate::field<&PITCommonState::irq_timer>);
// clang-format on

} // namespace pc_devices
