// EXPECT: wchar_t_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { wchar_t value[16]; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#else
struct uart { char value[16]; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#endif
