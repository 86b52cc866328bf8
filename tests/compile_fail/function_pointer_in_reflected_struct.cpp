// EXPECT: a_function_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>
#include <vmstate/describe/reflect.hpp>

struct uart { std::uint8_t divider; void (*raise)(int); std::uint8_t regs[4]; };
#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::reflect<uart>({.name = "uart"});
#else
inline constexpr auto vmstate_uart = vmstate::reflect<uart>({.name = "uart"}, vmstate::transient<&uart::raise>);
#endif
