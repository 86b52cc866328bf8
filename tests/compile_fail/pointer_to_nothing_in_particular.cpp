// EXPECT: a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { void* value; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#else
struct uart { std::uintptr_t value; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#endif
