// EXPECT: an_array_behind_a_pointer_must_have_limit_where_its_length_is_in_an_outer_description
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::uint8_t* packet; };
bool packet_needed(const nic& s);

// The room behind `packet` is what `count` says before the load; here it has come from the stream already.
inline constexpr auto vmstate_nic_packet = vmstate::describe<nic>({.name = "nic/packet"},
    vmstate::needed<packet_needed>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::packet, vmstate::length<&nic::count>>);
#else
    vmstate::field<&nic::packet, vmstate::length<&nic::count>, vmstate::limit<2048>>);
#endif

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
    vmstate::field<&nic::count>, vmstate::subsection<vmstate_nic_packet>);
