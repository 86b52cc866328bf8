// EXPECT: a_member_must_not_be_described_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct disk { std::uint8_t buffer[16]; };

inline constexpr auto vmstate_disk = vmstate::describe<disk>({.name = "disk"},
    vmstate::field<&disk::buffer, vmstate::slice<0, 8>>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&disk::buffer, vmstate::slice<7, 9>>);
#else
    vmstate::field<&disk::buffer, vmstate::slice<8, 8>>);
#endif
