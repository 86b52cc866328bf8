// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider, line_status, modem_status; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&uart::line_status>,
#endif
    vmstate::field<&uart::divider>,
    vmstate::field<&uart::modem_status>);
