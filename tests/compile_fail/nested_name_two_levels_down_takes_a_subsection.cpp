// EXPECT: a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct fifo { std::uint8_t level; };
#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_fifo = vmstate::describe<fifo>({.name = "uart"}, vmstate::field<&fifo::level>);
#else
inline constexpr auto vmstate_fifo = vmstate::describe<fifo>({.name = "fifo"}, vmstate::field<&fifo::level>);
#endif

struct channel { fifo receive; };
inline constexpr auto vmstate_channel = vmstate::describe<channel>({.name = "channel"},
    vmstate::field<&channel::receive, vmstate::as<vmstate_fifo>>);

struct uart { channel first; std::uint8_t trigger; };
bool trigger_needed(const uart& s);

inline constexpr auto vmstate_uart_trigger = vmstate::describe<uart>({.name = "uart/trigger"},
    vmstate::needed<trigger_needed>, vmstate::field<&uart::trigger>);
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::first, vmstate::as<vmstate_channel>>, vmstate::subsection<vmstate_uart_trigger>);
