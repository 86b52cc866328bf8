// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct cpu { std::uint64_t a, b, c, d, e, f, g, h, i, j, k, l; std::uint8_t buffer[65536]; };

inline constexpr auto vmstate_cpu = vmstate::describe<cpu>({.name = "cpu"},
    vmstate::field<&cpu::a>, vmstate::field<&cpu::b>, vmstate::field<&cpu::c>, vmstate::field<&cpu::d>,
    vmstate::field<&cpu::e>, vmstate::field<&cpu::f>, vmstate::field<&cpu::g>, vmstate::field<&cpu::h>,
#ifdef VMSTATE_POSITIVE
    vmstate::field<&cpu::i>,
#endif
    vmstate::field<&cpu::j>, vmstate::field<&cpu::k>, vmstate::field<&cpu::l>, vmstate::field<&cpu::buffer>);
