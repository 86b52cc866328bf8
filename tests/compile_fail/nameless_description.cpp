// EXPECT: a_description_must_have_a_name
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.version_id = 1}, vmstate::field<&uart::divider>);
#else
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 1},
    vmstate::field<&uart::divider>);
#endif
