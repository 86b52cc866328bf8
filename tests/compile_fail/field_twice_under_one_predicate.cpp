// EXPECT: a_member_must_not_be_described_twice
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
bool is_old(const uart& s);
bool is_new(const uart& s);

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider, vmstate::when<is_old>>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::divider, vmstate::when<is_old>>);
#else
    vmstate::field<&uart::divider, vmstate::when<is_new>>);
#endif
