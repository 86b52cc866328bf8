// EXPECT: a_hook_must_take_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };
struct fdc { std::uint8_t dor; };
#ifndef VMSTATE_POSITIVE
void prepare(fdc& s);
#else
void prepare(uart& s);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::post_save<prepare>,
    vmstate::field<&uart::divider>);
