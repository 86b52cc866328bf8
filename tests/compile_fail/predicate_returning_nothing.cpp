// EXPECT: a_predicate_must_take_the_described_struct_and_return_bool
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, line; };
#ifndef VMSTATE_POSITIVE
void has_line(const uart& s);
#else
bool has_line(const uart& s);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
    vmstate::field<&uart::line, vmstate::when<has_line>>);
