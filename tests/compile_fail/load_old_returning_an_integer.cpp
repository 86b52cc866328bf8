// EXPECT: a_hook_must_return_nothing_bool_or_result
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
#ifndef VMSTATE_POSITIVE
int load_first_version(vmstate::reader& r, uart& s, int version_id);
#else
vmstate::result<void> load_first_version(vmstate::reader& r, uart& s, int version_id);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart", .version_id = 2},
    vmstate::load_old<load_first_version, 1>,
    vmstate::field<&uart::divider>);
