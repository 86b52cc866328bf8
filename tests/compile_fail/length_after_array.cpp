// EXPECT: a_length_must_come_before_its_array
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <vector>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::vector<std::uint8_t> packet; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&nic::count>,
#endif
    vmstate::field<&nic::packet, vmstate::length<&nic::count>>
#ifndef VMSTATE_POSITIVE
    , vmstate::field<&nic::count>
#endif
);
