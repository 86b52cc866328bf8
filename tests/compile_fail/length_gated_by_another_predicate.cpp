// EXPECT: a_length_must_be_present_whenever_its_array_is
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::uint8_t packet[64]; };
bool has_packet(const nic& s);
bool has_count(const nic& s);

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic", .version_id = 3, .minimum_version_id = 0},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::count, vmstate::when<has_count>>,
#else
    vmstate::field<&nic::count, vmstate::when<has_packet>>,
#endif
    vmstate::field<&nic::packet, vmstate::length<&nic::count>, vmstate::when<has_packet>>);
