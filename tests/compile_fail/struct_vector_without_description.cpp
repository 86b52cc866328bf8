// EXPECT: a_struct_member_must_have_a_description
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <vector>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"},
    vmstate::field<&timer::expiry>);

struct board { std::uint8_t count; std::vector<timer> clocks; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
    vmstate::field<&board::count>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::clocks, vmstate::length<&board::count>>);
#else
    vmstate::field<&board::clocks, vmstate::as<vmstate_timer>, vmstate::length<&board::count>>);
#endif
