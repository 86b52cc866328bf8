// SPDX-License-Identifier: BSL-1.0
// dma: one of the two i8257 DMA controllers. Its table is in QEMU's hw/dma/i8257.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

/// One channel. Index 0 is the address, index 1 the count.
struct I8257Regs {
    std::int32_t now[2] = {};
    std::uint16_t base[2] = {};
    std::uint8_t mode = 0;
    std::uint8_t page = 0;
    std::uint8_t pageh = 0;
    std::uint8_t dack = 0;
    std::uint8_t eop = 0;
};

struct I8257State {
    std::int32_t dshift = 0; ///< 0: 8-bit channels; 1: 16-bit channels
    std::uint8_t status = 0; // not on the wire
    std::uint8_t command = 0;
    std::uint8_t mask = 0;
    std::uint8_t flip_flop = 0;
    I8257Regs regs[4];
};

// clang-format off: tables, one item a line
inline constexpr auto vmstate_i8257_regs = vmstate::describe<I8257Regs>(
    {.name = "dma_regs", .version_id = 1, .minimum_version_id = 1},
    vmstate::field<&I8257Regs::now>,
    vmstate::field<&I8257Regs::base>,
    vmstate::field<&I8257Regs::mode>,
    vmstate::field<&I8257Regs::page>,
    vmstate::field<&I8257Regs::pageh>,
    vmstate::field<&I8257Regs::dack>,
    vmstate::field<&I8257Regs::eop>);

inline constexpr auto vmstate_i8257 = vmstate::describe<I8257State>(
    {.name = "dma", .version_id = 1, .minimum_version_id = 1},
    vmstate::field<&I8257State::command>,
    vmstate::field<&I8257State::mask>,
    vmstate::field<&I8257State::flip_flop>,
    // QEMU takes any number and shifts by it later; no stream of its own has another than these.
    vmstate::field<&I8257State::dshift, vmstate::between<0, 1>>,
    vmstate::field<&I8257State::regs, vmstate::as<vmstate_i8257_regs>>,
    vmstate::transient<&I8257State::status>);
// clang-format on

} // namespace pc_devices
