// EXPECT: a_temporary_must_be_constructible_from_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint32_t baud; };
struct uart_on_the_wire {
#ifndef VMSTATE_POSITIVE
    explicit uart_on_the_wire(int) {}
#else
    explicit uart_on_the_wire(uart&) {}
#endif
    std::uint16_t divider = 0;
};

inline constexpr auto vmstate_uart_on_the_wire = vmstate::describe<uart_on_the_wire>({.name = "uart-on-the-wire"},
    vmstate::field<&uart_on_the_wire::divider>);
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::transient<&uart::baud>,
    vmstate::with_temporary<vmstate_uart_on_the_wire>);
