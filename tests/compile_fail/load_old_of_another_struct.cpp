// EXPECT: a_hook_must_take_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
struct fdc { std::uint8_t dor; };
#ifndef VMSTATE_POSITIVE
vmstate::result<void> read_old(vmstate::reader& r, fdc& s, int version_id);
#else
vmstate::result<void> read_old(vmstate::reader& r, uart& s, int version_id);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::load_old<read_old, 0>,
    vmstate::field<&uart::divider>);
