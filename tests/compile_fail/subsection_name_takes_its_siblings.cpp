// EXPECT: a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, fifo, trigger; };
bool fifo_needed(const uart& s);

// After "uart/fifo" the reader looks for a subsection of it, and "uart/fifo-trigger" looks like one.
inline constexpr auto vmstate_uart_fifo = vmstate::describe<uart>({.name = "uart/fifo"},
    vmstate::needed<fifo_needed>, vmstate::field<&uart::fifo>);
#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart_trigger = vmstate::describe<uart>({.name = "uart/fifo-trigger"},
#else
inline constexpr auto vmstate_uart_trigger = vmstate::describe<uart>({.name = "uart/trigger"},
#endif
    vmstate::needed<fifo_needed>, vmstate::field<&uart::trigger>);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
    vmstate::subsection<vmstate_uart_fifo, vmstate_uart_trigger>);
