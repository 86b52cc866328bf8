// EXPECT: a_hook_must_take_its_struct_by_reference_not_a_copy
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
#ifndef VMSTATE_POSITIVE
vmstate::result<void> restart(uart s, int version_id) noexcept;
#else
vmstate::result<void> restart(uart& s, int version_id) noexcept;
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::post_load<restart>,
    vmstate::field<&uart::divider>);
