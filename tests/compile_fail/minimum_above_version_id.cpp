// EXPECT: minimum_version_id_must_not_be_above_version_id
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 2, .minimum_version_id = 3},
#else
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 3, .minimum_version_id = 2},
#endif
    vmstate::field<&uart::divider>);
