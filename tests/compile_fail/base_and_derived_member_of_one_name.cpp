// EXPECT: two_fields_must_not_have_one_wire_name
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct isa_device { std::uint8_t status; };
#ifndef VMSTATE_POSITIVE
struct uart : isa_device { std::uint8_t status; };
#else
struct uart : isa_device { std::uint8_t line_status; };
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&uart::line_status>,
#else
    vmstate::field<&uart::status>,
#endif
    vmstate::field<&isa_device::status>);
