// EXPECT: an_item_must_not_be_given_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
bool is_open(const uart& s);
bool is_fast(const uart& s);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::needed<is_open>,
#ifndef VMSTATE_POSITIVE
    vmstate::needed<is_fast>,
#endif
    vmstate::field<&uart::divider>);
