// EXPECT: since_must_not_be_above_version_id
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 2, .minimum_version_id = 1},
    vmstate::field<&uart::divider>,
#ifndef VMSTATE_POSITIVE
    vmstate::unused<4, vmstate::since<3>>);
#else
    vmstate::unused<4, vmstate::since<2>>);
#endif
