// EXPECT: an_attribute_must_fit_its_member
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t used; std::uint8_t fifo[16]; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::used>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::fifo, vmstate::length<16>>);
#else
    vmstate::field<&uart::fifo, vmstate::length<&uart::used>>);
#endif
