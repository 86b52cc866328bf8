// EXPECT: an_attribute_must_not_be_given_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 2, .minimum_version_id = 1},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::divider, vmstate::since<1>, vmstate::since<2>>);
#else
    vmstate::field<&uart::divider, vmstate::since<2>>);
#endif
