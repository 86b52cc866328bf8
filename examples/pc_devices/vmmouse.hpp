// SPDX-License-Identifier: BSL-1.0
// vmmouse: VMware's absolute pointer, as a queue of words read through the VMware port. Its table is in QEMU's
// hw/i386/vmmouse.c. Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

inline constexpr std::int32_t vmmouse_queue_size = 1024;

struct VMMouseState {
    std::uint32_t queue[vmmouse_queue_size] = {};
    std::int32_t queue_size = vmmouse_queue_size;
    std::uint16_t nb_queue = 0;
    std::uint16_t status = 0xffff; ///< 0xffff: disabled
    std::uint8_t absolute = 0;
};

// clang-format off: tables, one item a line
inline constexpr auto vmstate_vmmouse = vmstate::describe<VMMouseState>(
    {.name = "vmmouse", .version_id = 0, .minimum_version_id = 0},
    vmstate::field<&VMMouseState::queue_size, vmstate::equal>,
    vmstate::field<&VMMouseState::queue>,
    // QEMU 7.2 takes any number here, and then moves that many words within the queue.
    vmstate::field<&VMMouseState::nb_queue, vmstate::between<0, vmmouse_queue_size>>,
    vmstate::field<&VMMouseState::status>,
    vmstate::field<&VMMouseState::absolute>);
// clang-format on

} // namespace pc_devices
