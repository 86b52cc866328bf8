// SPDX-License-Identifier: BSL-1.0
// port92: system control port A (fast A20 gate and reset). Its table is in QEMU's hw/i386/port92.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

struct Port92State {
    std::uint8_t outport = 0;
};

// clang-format off: tables, one item a line
inline constexpr auto vmstate_port92_isa = vmstate::describe<Port92State>(
    {.name = "port92", .version_id = 1, .minimum_version_id = 1},
    vmstate::field<&Port92State::outport>);
// clang-format on

} // namespace pc_devices
