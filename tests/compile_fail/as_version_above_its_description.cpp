// EXPECT: the_version_in_as_must_not_be_above_its_descriptions_version_id
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint32_t count; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer", .version_id = 2, .minimum_version_id = 1},
    vmstate::field<&timer::count>);

struct board { timer first; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::first, vmstate::as<vmstate_timer, 3>>);
#else
    vmstate::field<&board::first, vmstate::as<vmstate_timer, 2>>);
#endif
