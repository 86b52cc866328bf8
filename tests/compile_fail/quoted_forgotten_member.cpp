// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// QUOTED BY: README.md
// g++: every_member_must_be_in_a_field_or_a_subsection_or_transient() [with Where = vmstate::detail::forgotten_member<KBDState, vmstate::detail::member_text<3>{"irq"}>]
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
#ifdef VMSTATE_POSITIVE
    vmstate::transient<&KBDState::irq>,
#endif
    vmstate::field<&KBDState::pending>);
