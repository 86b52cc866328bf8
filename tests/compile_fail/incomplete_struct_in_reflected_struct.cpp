// EXPECT: a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>
#include <vmstate/describe/reflect.hpp>

struct line;
struct uart { std::uint8_t divider; line* irq; };
#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::reflect<uart>({.name = "uart"});
#else
inline constexpr auto vmstate_uart = vmstate::reflect<uart>({.name = "uart"}, vmstate::transient<&uart::irq>);
#endif
