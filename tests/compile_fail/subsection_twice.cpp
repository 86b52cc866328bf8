// EXPECT: a_subsection_must_not_be_given_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, fifo; };
bool fifo_needed(const uart& s);

inline constexpr auto vmstate_uart_fifo = vmstate::describe<uart>({.name = "uart/fifo"},
    vmstate::needed<fifo_needed>, vmstate::field<&uart::fifo>);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
#ifndef VMSTATE_POSITIVE
    vmstate::subsection<vmstate_uart_fifo>,
#endif
    vmstate::subsection<vmstate_uart_fifo>);
