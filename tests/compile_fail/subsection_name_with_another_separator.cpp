// EXPECT: a_subsection_name_must_start_with_its_parents_name_and_a_slash
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, fifo; };
bool fifo_needed(const uart& s);

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart_fifo = vmstate::describe<uart>({.name = "uart.fifo"},
#else
inline constexpr auto vmstate_uart_fifo = vmstate::describe<uart>({.name = "uart/fifo"},
#endif
    vmstate::needed<fifo_needed>, vmstate::field<&uart::fifo>);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>, vmstate::subsection<vmstate_uart_fifo>);
