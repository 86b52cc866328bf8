// EXPECT: a_const_member_can_not_be_loaded
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { const std::uint8_t model; };
#else
struct uart { std::uint8_t model; };
#endif
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::model>);
