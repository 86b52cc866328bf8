// EXPECT: a_member_must_belong_to_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct fdc { std::uint8_t dor; };
struct uart { std::uint8_t divider; std::uint8_t fifo[16]; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
#ifndef VMSTATE_POSITIVE
    vmstate::transient<&fdc::dor>,
#endif
    vmstate::field<&uart::divider>,
    vmstate::field<&uart::fifo>);
