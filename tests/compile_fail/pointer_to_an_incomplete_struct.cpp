// EXPECT: a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct line;
struct uart { std::uint8_t divider; line* irq; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::irq>);
#else
    vmstate::transient<&uart::irq>);
#endif
