// EXPECT: a_length_must_come_before_its_array
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct balloon { std::int32_t pages; std::uint64_t dirty[4]; };

inline constexpr auto vmstate_balloon = vmstate::describe<balloon>({.name = "balloon"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&balloon::pages>,
#endif
    vmstate::field<&balloon::dirty, vmstate::bitmap<&balloon::pages>>
#ifndef VMSTATE_POSITIVE
    , vmstate::field<&balloon::pages>
#endif
);
