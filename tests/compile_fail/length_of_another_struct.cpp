// EXPECT: a_member_must_belong_to_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct fdc { std::uint8_t dor; };
struct uart { std::uint8_t divider; std::uint8_t fifo[16]; };

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::divider>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::fifo, vmstate::length<&fdc::dor>>);
#else
    vmstate::field<&uart::fifo, vmstate::length<&uart::divider>>);
#endif
