// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; std::uint32_t reload; };
struct board { timer first, second; };

inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&timer::reload>,
#endif
    vmstate::field<&timer::expiry>);

inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
    vmstate::field<&board::first, vmstate::as<vmstate_timer>>,
    vmstate::field<&board::second, vmstate::as<vmstate_timer>>);
