// EXPECT: between_bounds_must_fit_the_members_type
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint16_t divider; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::divider, vmstate::between<-1, 7>>);
#else
    vmstate::field<&uart::divider, vmstate::between<0, 7>>);
#endif
