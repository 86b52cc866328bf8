// EXPECT: long_double_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { long double value[4]; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#else
struct uart { double value[4]; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#endif
