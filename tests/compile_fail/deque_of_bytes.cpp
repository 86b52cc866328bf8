// EXPECT: elements_of_a_list_or_map_must_be_structs_with_a_description
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <deque>
#include <vector>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
struct uart { std::deque<std::uint8_t> fifo; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"}, vmstate::field<&uart::fifo>);
#else
struct uart { std::uint8_t used; std::vector<std::uint8_t> fifo; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::used>, vmstate::field<&uart::fifo, vmstate::length<&uart::used>>);
#endif
