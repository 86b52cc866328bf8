// EXPECT: since_must_not_be_above_version_id
// QUOTED BY: README.md
// clang++: non-constexpr function 'since_must_not_be_above_version_id<vmstate::detail::in_description_of<KBDState, vmstate::detail::field_item<&KBDState::pending, vmstate::since<4>>>>'
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

using qemu_irq = struct IRQState*;
struct KBDState { std::uint8_t write_cmd, status, mode, pending; qemu_irq irq; };

inline constexpr auto vmstate_kbd = vmstate::describe<KBDState>(
    {.name = "pckbd", .version_id = 3, .minimum_version_id = 3},
    vmstate::field<&KBDState::write_cmd>,
    vmstate::field<&KBDState::status>,
    vmstate::field<&KBDState::mode>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&KBDState::pending, vmstate::since<4>>,
#else
    vmstate::field<&KBDState::pending, vmstate::since<3>>,
#endif
    vmstate::transient<&KBDState::irq>);
