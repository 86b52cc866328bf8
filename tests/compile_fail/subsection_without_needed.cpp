// EXPECT: a_subsection_must_have_needed
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, fifo; };
bool fifo_needed(const uart& s);

inline constexpr auto vmstate_uart_fifo = vmstate::describe<uart>({.name = "uart/fifo"},
#ifdef VMSTATE_POSITIVE
    vmstate::needed<fifo_needed>,
#endif
    vmstate::partial, vmstate::field<&uart::fifo>);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>, vmstate::subsection<vmstate_uart_fifo>);
