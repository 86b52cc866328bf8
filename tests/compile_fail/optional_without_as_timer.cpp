// EXPECT: an_optional_has_a_wire_form_only_with_as_timer
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <optional>

#include <vmstate/describe.hpp>

struct uart { std::optional<std::int64_t> deadline; };
#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::deadline>);
#else
inline constexpr auto vmstate_uart =
    vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::deadline, vmstate::as_timer>);
#endif
