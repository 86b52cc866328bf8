// EXPECT: an_item_must_not_be_given_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
void restart(uart& s, int version_id);
void rearm(uart& s, int version_id);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::post_load<restart>,
#ifndef VMSTATE_POSITIVE
    vmstate::post_load<rearm>,
#endif
    vmstate::field<&uart::divider>);
