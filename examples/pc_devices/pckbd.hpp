// SPDX-License-Identifier: BSL-1.0
// pckbd: the i8042 keyboard controller. Its table is in QEMU's hw/input/pckbd.c; the keyboard and the mouse
// behind it send sections of their own (ps2.hpp). Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

namespace kbd {

// Status register.
inline constexpr std::uint8_t stat_obf = 0x01;
inline constexpr std::uint8_t stat_cmd = 0x08;
inline constexpr std::uint8_t stat_unlocked = 0x10;
inline constexpr std::uint8_t stat_mouse_obf = 0x20;

// Mode register.
inline constexpr std::uint8_t mode_kbd_int = 0x01;
inline constexpr std::uint8_t mode_mouse_int = 0x02;

// Output port; the pins that nothing drives read as ones.
inline constexpr std::uint8_t out_reset = 0x01;
inline constexpr std::uint8_t out_a20 = 0x02;
inline constexpr std::uint8_t out_obf = 0x10;
inline constexpr std::uint8_t out_mouse_obf = 0x20;
inline constexpr std::uint8_t out_ones = 0xcc;

// Who has a byte for the guest. The first two are how this was said before there was an extended state.
inline constexpr std::uint8_t pending_kbd_compat = 0x01;
inline constexpr std::uint8_t pending_aux_compat = 0x02;
inline constexpr std::uint8_t pending_ctrl_kbd = 0x04;
inline constexpr std::uint8_t pending_ctrl_aux = 0x08;
inline constexpr std::uint8_t pending_kbd = 0x10;
inline constexpr std::uint8_t pending_aux = 0x20;

// Where the byte in the output buffer came from.
inline constexpr std::uint32_t obsrc_kbd = 0x01;
inline constexpr std::uint32_t obsrc_mouse = 0x02;

inline constexpr std::uint32_t migr_timer_pending = 0x1;

} // namespace kbd

/// The controller, with its state after reset.
struct KBDState {
    std::uint8_t write_cmd = 0; ///< command that the next data byte belongs to
    std::uint8_t status = kbd::stat_cmd | kbd::stat_unlocked;
    std::uint8_t mode = kbd::mode_kbd_int | kbd::mode_mouse_int;
    std::uint8_t outport = kbd::out_reset | kbd::out_a20 | kbd::out_ones;
    std::uint32_t migration_flags = 0;
    std::uint32_t obsrc = 0;
    bool outport_present = false;       ///< the stream being loaded had the output port
    bool extended_state = true;         ///< machine property, off for machine types up to 6.0
    bool extended_state_loaded = false; ///< the stream being loaded had the extended state
    std::uint8_t pending = 0;
    std::uint8_t obdata = 0;
    std::uint8_t cbdata = 0;
    std::uint8_t pending_tmp = 0;        ///< `pending` as the machine type wants it on the wire
    bool throttle_timer_pending = false; ///< the wire has no expiry for this timer, only that it runs
};

/// What the output port holds when the guest has not touched it: its subsection is then left out.
constexpr std::uint8_t kbd_outport_default(const KBDState& s) {
    unsigned value = kbd::out_reset | kbd::out_a20 | kbd::out_ones;
    if ((s.status & kbd::stat_obf) != 0) {
        value |= kbd::out_obf;
    }
    if ((s.status & kbd::stat_mouse_obf) != 0) {
        value |= kbd::out_mouse_obf;
    }
    return static_cast<std::uint8_t>(value);
}

inline bool kbd_outport_needed(const KBDState& s) { return s.outport != kbd_outport_default(s); }

inline void kbd_outport_post_load(KBDState& s, int /*version_id*/) { s.outport_present = true; }

inline bool kbd_extended_state_needed(const KBDState& s) { return s.extended_state; }

inline void kbd_extended_state_pre_save(KBDState& s) {
    s.migration_flags = s.throttle_timer_pending ? kbd::migr_timer_pending : 0;
}

// QEMU lets the throttle timer fire here; that belongs to a running controller, not to its state.
inline void kbd_extended_state_post_load(KBDState& s, int /*version_id*/) {
    s.throttle_timer_pending = (s.migration_flags & kbd::migr_timer_pending) != 0;
    s.extended_state_loaded = true;
}

inline void kbd_pre_save(KBDState& s) {
    if (s.extended_state) {
        s.pending_tmp = s.pending;
        return;
    }
    unsigned compat = 0;
    if ((s.pending & kbd::pending_kbd) != 0) {
        compat |= kbd::pending_kbd_compat;
    }
    if ((s.pending & kbd::pending_aux) != 0) {
        compat |= kbd::pending_aux_compat;
    }
    s.pending_tmp = static_cast<std::uint8_t>(compat);
}

inline void kbd_pre_load(KBDState& s) {
    s.outport_present = false;
    s.extended_state_loaded = false;
    s.throttle_timer_pending = false;
}

inline void kbd_post_load(KBDState& s, int /*version_id*/) {
    if (!s.outport_present) {
        s.outport = kbd_outport_default(s);
    }
    unsigned pending = s.pending_tmp;
    if (!s.extended_state_loaded) {
        if ((s.status & kbd::stat_obf) == 0) {
            s.obsrc = 0;
        } else {
            s.obsrc = (s.status & kbd::stat_mouse_obf) != 0 ? kbd::obsrc_mouse : kbd::obsrc_kbd;
        }
        if ((pending & kbd::pending_kbd_compat) != 0) {
            pending |= kbd::pending_kbd;
        }
        if ((pending & kbd::pending_aux_compat) != 0) {
            pending |= kbd::pending_aux;
        }
    }
    constexpr unsigned used =
        kbd::pending_ctrl_kbd | kbd::pending_ctrl_aux | kbd::pending_kbd | kbd::pending_aux;
    s.pending = static_cast<std::uint8_t>(pending & used);
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_kbd_outport = vmstate::describe<KBDState>(
    {.name = "pckbd_outport", .version_id = 1, .minimum_version_id = 1},
    vmstate::historic_name,
    vmstate::needed<kbd_outport_needed>,
    vmstate::post_load<kbd_outport_post_load>,
    vmstate::field<&KBDState::outport>);

inline constexpr auto vmstate_kbd_extended_state = vmstate::describe<KBDState>(
    {.name = "pckbd/extended_state", .version_id = 0, .minimum_version_id = 0},
    vmstate::needed<kbd_extended_state_needed>,
    vmstate::pre_save<kbd_extended_state_pre_save>,
    vmstate::post_load<kbd_extended_state_post_load>,
    vmstate::field<&KBDState::migration_flags>,
    vmstate::field<&KBDState::obsrc>,
    vmstate::field<&KBDState::obdata>,
    vmstate::field<&KBDState::cbdata>);

/// The controller proper, which other machines than the PC embed as well.
inline constexpr auto vmstate_kbd = vmstate::describe<KBDState>(
    {.name = "pckbd", .version_id = 3, .minimum_version_id = 3},
    vmstate::pre_load<kbd_pre_load>,
    vmstate::post_load<kbd_post_load>,
    vmstate::pre_save<kbd_pre_save>,
    vmstate::field<&KBDState::write_cmd>,
    vmstate::field<&KBDState::status>,
    vmstate::field<&KBDState::mode>,
    vmstate::field<&KBDState::pending_tmp>,
    vmstate::subsection<vmstate_kbd_outport>,
    vmstate::subsection<vmstate_kbd_extended_state>,
    vmstate::transient<&KBDState::outport_present, &KBDState::extended_state,
        &KBDState::extended_state_loaded, &KBDState::pending, &KBDState::throttle_timer_pending>);

/// The ISA device around the controller; this is what the PC's "pckbd" section holds.
struct ISAKBDState {
    KBDState kbd;
};

inline constexpr auto vmstate_kbd_isa = vmstate::describe<ISAKBDState>(
    {.name = "pckbd", .version_id = 3, .minimum_version_id = 3},
    vmstate::field<&ISAKBDState::kbd, vmstate::as<vmstate_kbd>>);
// clang-format on

} // namespace pc_devices
