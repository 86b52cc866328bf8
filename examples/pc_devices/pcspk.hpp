// SPDX-License-Identifier: BSL-1.0
// pcspk: the speaker and port 0x61. Its table is in QEMU's hw/audio/pcspk.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

struct PCSpkState {
    std::uint8_t data_on = 0;
    std::uint8_t dummy_refresh_clock = 0;
    bool migrate = true; ///< machine property, off for machine types up to 2.7
};

/// A machine type that does not migrate its speaker sends no section at all.
inline bool pcspk_migrate_needed(const PCSpkState& s) { return s.migrate; }

// clang-format off: tables, one item a line
inline constexpr auto vmstate_spk = vmstate::describe<PCSpkState>(
    {.name = "pcspk", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<pcspk_migrate_needed>,
    vmstate::field<&PCSpkState::data_on>,
    vmstate::field<&PCSpkState::dummy_refresh_clock>,
    vmstate::transient<&PCSpkState::migrate>);
// clang-format on

} // namespace pc_devices
