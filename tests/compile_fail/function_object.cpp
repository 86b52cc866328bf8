// EXPECT: a_function_has_no_wire_form
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <functional>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; std::function<void(int)> raise; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::raise>);
#else
    vmstate::transient<&uart::raise>);
#endif
