// EXPECT: a_length_must_come_before_its_array
// QUOTED BY: README.md
// clang++: non-constexpr function 'a_length_must_come_before_its_array<vmstate::detail::in_description_of<NICState, vmstate::detail::field_item<&NICState::packet, vmstate::length<&NICState::count>>>>'
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <vector>

#include <vmstate/describe.hpp>

struct NICState { std::uint32_t count; std::vector<std::uint8_t> packet; };

inline constexpr auto vmstate_nic = vmstate::describe<NICState>({.name = "nic"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&NICState::count>,
    vmstate::field<&NICState::packet, vmstate::length<&NICState::count>>);
#else
    vmstate::field<&NICState::packet, vmstate::length<&NICState::count>>,
    vmstate::field<&NICState::count>);
#endif
