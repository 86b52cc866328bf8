// EXPECT: a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <memory>

#include <vmstate/describe.hpp>

struct backend;
struct uart { std::uint8_t divider; std::unique_ptr<backend> output; ~uart(); };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::output>);
#else
    vmstate::transient<&uart::output>);
#endif
