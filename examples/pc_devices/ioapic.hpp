// SPDX-License-Identifier: BSL-1.0
// ioapic: the I/O interrupt controller. Its table is in QEMU's hw/intc/ioapic_common.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

inline constexpr int ioapic_num_pins = 24;

struct IOAPICCommonState {
    std::uint8_t id = 0;
    std::uint8_t ioregsel = 0;
    std::uint32_t irr = 0;
    std::uint64_t ioredtbl[ioapic_num_pins] = {};
    std::uint8_t version = 0x20; // what the guest reads: machine property
};

/// A stream of version 1 has no requests.
inline void ioapic_pre_load(IOAPICCommonState& s) { s.irr = 0; }

// clang-format off: tables, one item a line
inline constexpr auto vmstate_ioapic_common = vmstate::describe<IOAPICCommonState>(
    {.name = "ioapic", .version_id = 3, .minimum_version_id = 1},
    vmstate::pre_load<ioapic_pre_load>,
    vmstate::field<&IOAPICCommonState::id>,
    vmstate::field<&IOAPICCommonState::ioregsel>,
    vmstate::unused<8, vmstate::since<2>>, // qemu-kvm had a base address here
    vmstate::field<&IOAPICCommonState::irr, vmstate::since<2>>,
    vmstate::field<&IOAPICCommonState::ioredtbl>,
    vmstate::transient<&IOAPICCommonState::version>);
// clang-format on

} // namespace pc_devices
