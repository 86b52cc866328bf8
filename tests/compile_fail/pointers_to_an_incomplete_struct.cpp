// EXPECT: a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct line;
struct pic { std::uint8_t mask; line* out[8]; };
inline constexpr auto vmstate_pic = vmstate::describe<pic>({.name = "pic"},
    vmstate::field<&pic::mask>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&pic::out>);
#else
    vmstate::transient<&pic::out>);
#endif
