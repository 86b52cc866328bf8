// EXPECT: a_union_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

union word { std::uint32_t whole; std::uint16_t half[2]; };

#ifndef VMSTATE_POSITIVE
struct uart { word value; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#else
struct uart { std::uint32_t value; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::value>);
#endif
