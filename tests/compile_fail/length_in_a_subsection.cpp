// EXPECT: a_length_must_come_before_its_array
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::uint8_t packet[64]; };
bool count_needed(const nic& s);

inline constexpr auto vmstate_nic_count = vmstate::describe<nic>({.name = "nic/count"},
    vmstate::needed<count_needed>, vmstate::field<&nic::count>);

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::packet, vmstate::length<&nic::count>>,
#else
    vmstate::field<&nic::packet>,
#endif
    vmstate::subsection<vmstate_nic_count>);
