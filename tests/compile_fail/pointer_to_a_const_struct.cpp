// EXPECT: a_const_member_can_not_be_loaded
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint32_t reload; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"}, vmstate::field<&timer::reload>);

#ifndef VMSTATE_POSITIVE
struct board { const timer* watchdog; };
#else
struct board { timer* watchdog; };
#endif
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
    vmstate::field<&board::watchdog, vmstate::as<vmstate_timer>>);
