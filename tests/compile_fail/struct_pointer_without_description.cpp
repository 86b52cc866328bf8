// EXPECT: a_struct_member_must_have_a_description
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"},
    vmstate::field<&timer::expiry>);

struct board { std::uint8_t id; timer* clock; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
    vmstate::field<&board::id>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::clock>);
#else
    vmstate::field<&board::clock, vmstate::as<vmstate_timer>>);
#endif
