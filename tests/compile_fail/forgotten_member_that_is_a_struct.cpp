// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct timer { std::uint64_t expiry; std::uint32_t reload; };
struct board { std::uint8_t id; timer clock; std::uint16_t irq; };

inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
#ifdef VMSTATE_POSITIVE
    vmstate::transient<&board::clock>,
#endif
    vmstate::field<&board::id>,
    vmstate::field<&board::irq>);
