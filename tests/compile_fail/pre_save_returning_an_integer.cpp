// EXPECT: a_hook_must_return_nothing_bool_or_result
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart {
    std::uint8_t divider;
#ifndef VMSTATE_POSITIVE
    int fetch();
#else
    bool fetch();
#endif
};

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::pre_save<&uart::fetch>,
    vmstate::field<&uart::divider>);
