// EXPECT: a_hook_must_take_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
#ifndef VMSTATE_POSITIVE
void restart();
#else
void restart(uart& s);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::post_load<restart>,
    vmstate::field<&uart::divider>);
