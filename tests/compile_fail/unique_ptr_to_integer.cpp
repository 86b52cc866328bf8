// EXPECT: a_pointer_to_a_scalar_must_have_length
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <memory>

#include <vmstate/describe.hpp>

struct nic { std::uint32_t count; std::unique_ptr<std::uint32_t> value; std::unique_ptr<std::uint32_t[]> values; };

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
    vmstate::field<&nic::count>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&nic::value>,
#else
    vmstate::transient<&nic::value>,
#endif
    vmstate::field<&nic::values, vmstate::length<&nic::count>>);
