// EXPECT: an_attribute_must_not_be_given_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count, other; std::uint8_t packet[64]; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
    vmstate::field<&nic::count>,
    vmstate::field<&nic::other>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::packet, vmstate::length<&nic::count>, vmstate::length<&nic::other>>);
#else
    vmstate::field<&nic::packet, vmstate::length<&nic::count>>);
#endif
