// EXPECT: an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint32_t baud; };
struct uart_on_the_wire {
    explicit uart_on_the_wire(uart& s) : parent(s) {}
    uart& parent;
    std::uint16_t divider = 0;
};

inline constexpr auto vmstate_uart_on_the_wire = vmstate::describe<uart_on_the_wire>(
    {.name = "uart-on-the-wire", .version_id = 1, .minimum_version_id = 0},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart_on_the_wire::divider, vmstate::since<1>>);
#else
    vmstate::field<&uart_on_the_wire::divider>);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::transient<&uart::baud>,
    vmstate::with_temporary<vmstate_uart_on_the_wire>);
