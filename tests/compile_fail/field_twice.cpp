// EXPECT: a_member_must_not_be_described_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, line_status; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
    vmstate::field<&uart::line_status>
#ifndef VMSTATE_POSITIVE
    , vmstate::field<&uart::divider>
#endif
);
