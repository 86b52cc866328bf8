// EXPECT: a_length_must_be_present_whenever_its_array_is
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::uint8_t packet[64]; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic", .version_id = 3, .minimum_version_id = 0},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::count, vmstate::since<3>>,
#else
    vmstate::field<&nic::count, vmstate::since<2>>,
#endif
    vmstate::field<&nic::packet, vmstate::length<&nic::count>, vmstate::since<2>>);
