// SPDX-License-Identifier: BSL-1.0
// i8259: one interrupt controller of the pair. Its table is in QEMU's hw/intc/i8259_common.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

struct PICCommonState {
    std::uint8_t last_irr = 0; ///< levels seen last, for finding edges
    std::uint8_t irr = 0;      ///< requested
    std::uint8_t imr = 0;      ///< masked
    std::uint8_t isr = 0;      ///< in service
    std::uint8_t priority_add = 0;
    std::uint8_t irq_base = 0;
    std::uint8_t read_reg_select = 0;
    std::uint8_t poll = 0;
    std::uint8_t special_mask = 0;
    std::uint8_t init_state = 0;
    std::uint8_t auto_eoi = 0;
    std::uint8_t rotate_on_auto_eoi = 0;
    std::uint8_t special_fully_nested_mode = 0;
    std::uint8_t init4 = 0;
    std::uint8_t single_mode = 0;
    std::uint8_t elcr = 0; ///< edge or level, per line
    std::uint8_t elcr_mask =
        0; ///< lines for which the guest may choose: 0xf8 on the master, 0xde on the slave
    bool master = false;
};

// clang-format off: tables, one item a line
inline constexpr auto vmstate_pic_common = vmstate::describe<PICCommonState>(
    {.name = "i8259", .version_id = 1, .minimum_version_id = 1},
    vmstate::field<&PICCommonState::last_irr>,
    vmstate::field<&PICCommonState::irr>,
    vmstate::field<&PICCommonState::imr>,
    vmstate::field<&PICCommonState::isr>,
    vmstate::field<&PICCommonState::priority_add>,
    vmstate::field<&PICCommonState::irq_base>,
    vmstate::field<&PICCommonState::read_reg_select>,
    vmstate::field<&PICCommonState::poll>,
    vmstate::field<&PICCommonState::special_mask>,
    vmstate::field<&PICCommonState::init_state>,
    vmstate::field<&PICCommonState::auto_eoi>,
    vmstate::field<&PICCommonState::rotate_on_auto_eoi>,
    vmstate::field<&PICCommonState::special_fully_nested_mode>,
    vmstate::field<&PICCommonState::init4>,
    vmstate::field<&PICCommonState::single_mode>,
    vmstate::field<&PICCommonState::elcr>,
    vmstate::transient<&PICCommonState::elcr_mask, &PICCommonState::master>);
// clang-format on

} // namespace pc_devices
