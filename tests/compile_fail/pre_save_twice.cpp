// EXPECT: an_item_must_not_be_given_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
void drain(uart& s);
void flush(uart& s);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::pre_save<drain>,
#ifndef VMSTATE_POSITIVE
    vmstate::pre_save<flush>,
#endif
    vmstate::field<&uart::divider>);
