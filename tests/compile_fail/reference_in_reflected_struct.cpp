// EXPECT: a_reference_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { std::uint8_t divider; std::uint8_t& line; };
#else
struct uart { std::uint8_t divider; std::uint8_t line; };
#endif

inline constexpr auto vmstate_uart = vmstate::reflect<uart>({.name = "uart"});
