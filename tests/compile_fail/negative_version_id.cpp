// EXPECT: version_ids_must_not_be_negative
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = -1},
#else
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 1},
#endif
    vmstate::field<&uart::divider>);
