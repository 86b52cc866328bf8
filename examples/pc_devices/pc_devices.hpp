// SPDX-License-Identifier: BSL-1.0
// The devices of QEMU's PC and ISA machines that are plain VMState, one header each, and an owner of one of each that
// registers those that a machine type has. Depends on vmstate/migrate.hpp.
#pragma once

#include "cpu_common.hpp"
#include "globalstate.hpp"
#include "hpet.hpp"
#include "i8254.hpp"
#include "i8257.hpp"
#include "i8259.hpp"
#include "ioapic.hpp"
#include "kvmvapic.hpp"
#include "mc146818rtc.hpp"
#include "pckbd.hpp"
#include "pcspk.hpp"
#include "port92.hpp"
#include "ps2.hpp"
#include "timer.hpp"
#include "vmmouse.hpp"

#include <vmstate/migrate.hpp>

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace pc_devices {

/// The machine types of qemu-system-x86_64, without their versions.
enum class machine_kind : std::uint8_t { pc, q35, isapc, microvm, none };

/// The kind of a machine that a stream's configuration names "pc-i440fx-7.2" or the like. A type that is none of
/// the known ones counts as `none`: it has only what every machine has.
inline machine_kind machine_kind_of(std::string_view type) {
    if (type.starts_with("pc-q35-")) {
        return machine_kind::q35;
    }
    if (type.starts_with("pc-")) {
        return machine_kind::pc;
    }
    if (type == "isapc") {
        return machine_kind::isapc;
    }
    return type == "microvm" ? machine_kind::microvm : machine_kind::none;
}

/// Major and minor number.
using machine_version = std::pair<int, int>;

/// The version at the end of a machine type's name.
inline std::optional<machine_version> machine_version_of(std::string_view type) {
    type.remove_prefix(type.find_last_of('-') + 1); // npos + 1 is 0
    machine_version version{};
    const char* const end = type.data() + type.size();
    const auto first = std::from_chars(type.data(), end, version.first);
    if (first.ec != std::errc{} || first.ptr == end || *first.ptr != '.') {
        return std::nullopt;
    }
    const auto second = std::from_chars(first.ptr + 1, end, version.second);
    if (second.ec != std::errc{} || second.ptr != end) {
        return std::nullopt;
    }
    return version;
}

/// One of each device (and what a machine has two of, twice), in the state after reset.
struct pc_machine_devices {
    machine_kind kind;

    TimersState timers;
    std::vector<CPUState> cpus;
    VAPICROMState vapic;
    I8257State dma[2];
    PICCommonState pic[2];
    IOAPICCommonState ioapic[2]; // microvm has two
    HPETState hpet;
    RTCState rtc;
    PITCommonState pit;
    PCSpkState pcspk;
    PS2KbdState keyboard;
    PS2MouseState mouse;
    ISAKBDState i8042;
    VMMouseState vmmouse;
    Port92State port92;
    GlobalState globalstate;

    /// The devices of a machine of this kind with that many vCPUs; `none` has no vCPU.
    explicit pc_machine_devices(machine_kind machine = machine_kind::pc, std::size_t vcpus = 1)
        : kind(machine), cpus(machine == machine_kind::none ? 0 : vcpus) {
        dma[1].dshift = 1;
        pic[0].master = true;
        pic[0].elcr_mask = 0xf8;
        pic[1].elcr_mask = 0xde;
        for (std::size_t i = 0; i < std::size(hpet.timer); ++i) {
            hpet.timer[i].tn = static_cast<std::uint8_t>(i);
        }
    }

    // The machine keeps pointers to them.
    pc_machine_devices(const pc_machine_devices&) = delete;
    pc_machine_devices& operator=(const pc_machine_devices&) = delete;

    /// Sets what properties of versioned machine types change on the wire (QEMU's hw_compat and pc_compat tables) for
    /// a machine type like "pc-i440fx-2.11". Nothing for one without a version.
    void apply_compat(std::string_view type) {
        const std::optional<machine_version> version = machine_version_of(type);
        if (!version) {
            return;
        }
        i8042.kbd.extended_state = *version > machine_version{6, 0};
        hpet.hpet_offset_saved = *version > machine_version{2, 11};
        pcspk.migrate = *version > machine_version{2, 7};
        globalstate.store_global_state = *version > machine_version{2, 3};
    }

    /// Calls `visit.operator()<description>(device, options)` for what a machine of this kind has, under the names and
    /// in the order of QEMU 7.2's streams. The alias ids are the I/O ports that once told such devices apart.
    template <class Visitor>
    void for_each_device(Visitor&& visit) {
        const bool has_pci = kind == machine_kind::pc || kind == machine_kind::q35;
        const bool is_pc = has_pci || kind == machine_kind::isapc;
        const bool is_microvm = kind == machine_kind::microvm;
        using vmstate::device_options;

        const auto see_ioapic = [&](std::uint32_t i) {
            visit.template operator()<vmstate_ioapic_common>(
                ioapic[i], device_options{.id = "ioapic", .instance_id = i});
        };
        const auto see_pics = [&] {
            for (std::uint32_t i = 0; i < 2; ++i) {
                visit.template operator()<vmstate_pic_common>(pic[i], device_options{.id = "i8259", .instance_id = i,
                    .alias_id = i == 0 ? 0x20u : 0xa0u, .alias_required_for_version = 1});
            }
        };
        const auto see_pit = [&] {
            visit.template operator()<vmstate_pit_common>(
                pit, device_options{.id = "i8254", .alias_id = 0x40u, .alias_required_for_version = 2});
        };
        const auto see_rtc = [&] {
            visit.template operator()<vmstate_rtc>(
                rtc, device_options{.id = "mc146818rtc", .alias_id = 0x70u, .alias_required_for_version = 3});
        };

        visit.template operator()<vmstate_timers>(timers, device_options{.id = "timer"});
        for (std::uint32_t i = 0; i < cpus.size(); ++i) {
            visit.template operator()<vmstate_cpu_common>(
                cpus[i], device_options{.id = "cpu_common", .instance_id = i});
        }
        if (has_pci || is_microvm) {
            visit.template operator()<vmstate_vapic>(vapic, device_options{.id = "kvm-tpr-opt"});
        }
        if (is_microvm) {
            see_ioapic(0);
            see_ioapic(1);
            see_pics();
            see_pit();
            see_rtc();
        }
        if (is_pc) {
            visit.template operator()<vmstate_i8257>(dma[0], device_options{.id = "dma", .instance_id = 0});
            visit.template operator()<vmstate_i8257>(dma[1], device_options{.id = "dma", .instance_id = 1});
            see_pics();
        }
        if (has_pci) {
            see_ioapic(0);
            visit.template operator()<vmstate_hpet>(hpet, device_options{.id = "hpet"});
        }
        if (is_pc) {
            see_rtc();
            see_pit();
            visit.template operator()<vmstate_spk>(pcspk, device_options{.id = "pcspk"});
            visit.template operator()<vmstate_ps2_keyboard>(keyboard, device_options{.id = "ps2kbd"});
            visit.template operator()<vmstate_ps2_mouse>(mouse, device_options{.id = "ps2mouse"});
            visit.template operator()<vmstate_kbd_isa>(i8042, device_options{.id = "pckbd"});
            visit.template operator()<vmstate_vmmouse>(vmmouse, device_options{.id = "vmmouse"});
            visit.template operator()<vmstate_port92_isa>(port92, device_options{.id = "port92"});
        }
        visit.template operator()<vmstate_globalstate>(globalstate, device_options{.id = "globalstate"});
    }

    /// Registers those devices of this kind of machine for which `present(id, instance_id)` says yes: a machine may
    /// have been started without its HPET or its mouse. The first device that the machine refuses ends it.
    template <class Present>
    vmstate::result<void> register_with(vmstate::machine& machine, Present&& present) {
        vmstate::result<void> outcome;
        for_each_device([&]<const auto& description>(auto& device, const vmstate::device_options& options) {
            if (outcome && present(std::string_view(options.id), options.instance_id)) {
                outcome = machine.add_device<description>(device, options);
            }
        });
        return outcome;
    }

    /// Registers all of them.
    vmstate::result<void> register_with(vmstate::machine& machine) {
        return register_with(machine, [](std::string_view, std::uint32_t) { return true; });
    }
};

} // namespace pc_devices
