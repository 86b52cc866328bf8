// EXPECT: a_description_must_have_a_name
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = ""}, vmstate::field<&uart::divider>);
#else
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "u"}, vmstate::field<&uart::divider>);
#endif
