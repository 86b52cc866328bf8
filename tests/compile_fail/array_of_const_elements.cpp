// EXPECT: a_const_member_can_not_be_loaded
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <array>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { std::array<const std::uint8_t, 4> regs; };
#else
struct uart { std::array<std::uint8_t, 4> regs; };
#endif
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::regs>);
