// EXPECT: a_length_must_be_an_integer
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
using count_type = bool;
#else
using count_type = std::uint16_t;
#endif
struct nic { count_type count; std::uint8_t packet[64]; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
    vmstate::transient<&nic::count>,
    vmstate::field<&nic::packet, vmstate::length<&nic::count>>);
