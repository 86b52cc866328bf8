// EXPECT: an_attribute_must_fit_its_member
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"},
    vmstate::field<&timer::expiry>);

struct board { timer value; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::value, vmstate::equal, vmstate::as<vmstate_timer>>);
#else
    vmstate::field<&board::value, vmstate::as<vmstate_timer>>);
#endif
