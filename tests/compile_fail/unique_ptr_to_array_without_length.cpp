// EXPECT: a_vector_string_or_unique_ptr_to_array_must_have_length
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <memory>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::unique_ptr<std::uint8_t[]> packet; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
    vmstate::field<&nic::count>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::packet>);
#else
    vmstate::field<&nic::packet, vmstate::length<&nic::count>>);
#endif
