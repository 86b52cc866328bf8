// EXPECT: a_hook_must_take_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
#ifndef VMSTATE_POSITIVE
void restart(uart& s, int version_id, int extra);
#else
void restart(uart& s, int version_id);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::post_load<restart>,
    vmstate::field<&uart::divider>);
