// SPDX-License-Identifier: BSL-1.0
// kvm-tpr-opt: the option ROM that makes 32-bit Windows touch the local APIC's task priority less often. Its
// table is in QEMU's hw/i386/kvmvapic.c. Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

enum class vapic_mode : std::uint32_t { inactive = 0, active = 1, standby = 2 };

/// Guest addresses of the ROM's replacements for an access to the task priority.
struct VAPICHandlers {
    std::uint32_t set_tpr = 0;
    std::uint32_t set_tpr_eax = 0;
    std::uint32_t get_tpr[8] = {};
    std::uint32_t get_tpr_stack = 0;
};

/// What the ROM says about itself, read from guest memory.
struct GuestROMState {
    char signature[8] = {}; // in the ROM, not on the wire: there it is eight unused bytes
    std::uint32_t vaddr = 0;
    std::uint32_t fixup_start = 0;
    std::uint32_t fixup_end = 0;
    std::uint32_t vapic_vaddr = 0;
    std::uint32_t vapic_size = 0;
    std::uint32_t vcpu_shift = 0;
    std::uint32_t real_tpr_addr = 0;
    VAPICHandlers up;
    VAPICHandlers mp;
};

struct VAPICROMState {
    vapic_mode state = vapic_mode::inactive;
    std::uint32_t rom_state_paddr = 0;
    std::uint32_t rom_state_vaddr = 0;
    std::uint32_t vapic_paddr = 0;
    std::uint32_t real_tpr_addr = 0;
    GuestROMState rom_state;
};

// qemu-kvm had no standby; it shows as an inactive ROM that has an address. QEMU goes on to patch the ROM in
// guest memory, which is no part of this state.
inline void vapic_post_load(VAPICROMState& s, int /*version_id*/) {
    if (s.state == vapic_mode::inactive && s.rom_state_paddr != 0) {
        s.state = vapic_mode::standby;
    }
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_handlers = vmstate::describe<VAPICHandlers>(
    {.name = "kvmvapic-handlers", .version_id = 1, .minimum_version_id = 1},
    vmstate::field<&VAPICHandlers::set_tpr>,
    vmstate::field<&VAPICHandlers::set_tpr_eax>,
    vmstate::field<&VAPICHandlers::get_tpr>,
    vmstate::field<&VAPICHandlers::get_tpr_stack>);

inline constexpr auto vmstate_guest_rom = vmstate::describe<GuestROMState>(
    {.name = "kvmvapic-guest-rom", .version_id = 1, .minimum_version_id = 1},
    vmstate::unused<8>,
    vmstate::field<&GuestROMState::vaddr>,
    vmstate::field<&GuestROMState::fixup_start>,
    vmstate::field<&GuestROMState::fixup_end>,
    vmstate::field<&GuestROMState::vapic_vaddr>,
    vmstate::field<&GuestROMState::vapic_size>,
    vmstate::field<&GuestROMState::vcpu_shift>,
    vmstate::field<&GuestROMState::real_tpr_addr>,
    vmstate::field<&GuestROMState::up, vmstate::as<vmstate_handlers>>,
    vmstate::field<&GuestROMState::mp, vmstate::as<vmstate_handlers>>,
    vmstate::transient<&GuestROMState::signature>);

inline constexpr auto vmstate_vapic = vmstate::describe<VAPICROMState>(
    {.name = "kvm-tpr-opt", .version_id = 1, .minimum_version_id = 1},
    vmstate::post_load<vapic_post_load>,
    vmstate::field<&VAPICROMState::rom_state, vmstate::as<vmstate_guest_rom>>,
    vmstate::field<&VAPICROMState::state>,
    vmstate::field<&VAPICROMState::real_tpr_addr>,
    vmstate::field<&VAPICROMState::rom_state_vaddr>,
    vmstate::field<&VAPICROMState::vapic_paddr>,
    vmstate::field<&VAPICROMState::rom_state_paddr>);
// clang-format on

} // namespace pc_devices
