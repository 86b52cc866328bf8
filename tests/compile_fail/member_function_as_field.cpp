// EXPECT: a_function_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; void reset(); };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::reset>,
#endif
    vmstate::field<&uart::divider>);
