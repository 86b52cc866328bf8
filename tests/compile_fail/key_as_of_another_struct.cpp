// EXPECT: the_description_in_as_must_describe_the_elements_type
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <map>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; };
struct counter { std::uint64_t value; };
inline constexpr auto vmstate_timer = vmstate::describe<timer>({.name = "timer"},
    vmstate::field<&timer::expiry>);
inline constexpr auto vmstate_counter = vmstate::describe<counter>({.name = "counter"},
    vmstate::field<&counter::value>);

struct earlier { bool operator()(const timer& a, const timer& b) const { return a.expiry < b.expiry; } };
struct board { std::map<timer, counter, earlier> clock; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::clock, vmstate::key_as<vmstate_counter>, vmstate::as<vmstate_counter>>);
#else
    vmstate::field<&board::clock, vmstate::key_as<vmstate_timer>, vmstate::as<vmstate_counter>>);
#endif
