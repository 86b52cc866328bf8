// EXPECT: an_attribute_must_fit_its_member
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct board { std::uint8_t value[8]; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::value, vmstate::limit<4>>);
#else
    vmstate::field<&board::value>);
#endif
