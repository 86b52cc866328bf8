// EXPECT: the_description_in_as_must_describe_the_elements_type
// SPDX-License-Identifier: BSL-1.0
#include <array>
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; };
struct counter { std::uint64_t value; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"},
    vmstate::field<&timer::expiry>);
inline constexpr auto vmstate_counter = vmstate::describe<counter>({.name = "counter"},
    vmstate::field<&counter::value>);

struct board { std::array<timer, 2> clock; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::clock, vmstate::as<vmstate_counter>>);
#else
    vmstate::field<&board::clock, vmstate::as<vmstate_timer>>);
#endif
