// EXPECT: a_slice_must_lie_inside_its_array
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct disk { std::uint8_t buffer[16]; };

inline constexpr auto vmstate_disk = vmstate::describe<disk>({.name = "disk"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&disk::buffer, vmstate::slice<17, 1>>);
#else
    vmstate::field<&disk::buffer, vmstate::slice<15, 1>>);
#endif
