// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct nic { std::uint8_t mac[6]; std::uint32_t filters[2][3]; std::uint16_t command; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&nic::filters>,
#endif
    vmstate::field<&nic::mac>,
    vmstate::field<&nic::command>);
