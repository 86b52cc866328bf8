// SPDX-License-Identifier: BSL-1.0
// ps2kbd and ps2mouse: the PS/2 keyboard and mouse. Their tables are in QEMU's hw/input/ps2.c.
// Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <algorithm>
#include <cstdint>

namespace pc_devices {

/// The queue's bytes: 256 for compatibility with old QEMUs, of which at most 16 scan codes and 8 bytes of
/// command reply are in use.
inline constexpr std::int32_t ps2_buffer_size = 256;
inline constexpr std::int32_t ps2_queue_size = 16;
inline constexpr std::int32_t ps2_queue_headroom = 8;

/// What keyboard and mouse share. QEMU keeps the last four in a `queue` of their own.
struct PS2State {
    std::int32_t write_cmd = -1; ///< command that the next byte is an argument of, -1: none
    std::int32_t rptr = 0;
    std::int32_t wptr = 0;
    std::int32_t count = 0;
    std::uint8_t data[ps2_buffer_size] = {};
};

struct PS2KbdState {
    PS2State parent_obj;
    std::int32_t scan_enabled = 1;
    std::int32_t translate = 0;
    std::int32_t scancode_set = 2; ///< 1: XT, 2: AT, 3: PS/2
    std::int32_t ledstate = 0;
    bool need_high_bit = false;
    std::uint32_t modifiers = 0;
    std::int32_t cwptr = -1; ///< end of the command reply at the head of the queue, -1: there is none
};

struct PS2MouseState {
    PS2State parent_obj;
    std::uint8_t mouse_status = 0;
    std::uint8_t mouse_resolution = 0;
    std::uint8_t mouse_sample_rate = 0;
    std::uint8_t mouse_wrap = 0;
    std::uint8_t mouse_type = 0; ///< 0: PS/2, 3: with a wheel, 4: with five buttons
    std::uint8_t mouse_detect_state = 0;
    std::int32_t mouse_dx = 0;
    std::int32_t mouse_dy = 0;
    std::int32_t mouse_dz = 0;
    std::int32_t mouse_dw = 0; // horizontal wheel: QEMU does not send it
    std::uint8_t mouse_buttons = 0;
};

/// Makes any queue a possible one; a queue that QEMU sent is one already, and stays as it is.
inline void ps2_common_post_load(PS2State& s, std::int32_t& cwptr) {
    constexpr std::uint32_t mask = ps2_buffer_size - 1;
    // Unsigned arithmetic throughout: the stream may hold any two integers.
    const auto wrap = [](std::uint32_t index) { return static_cast<std::int32_t>(index & mask); };

    std::int32_t reply = 0;
    if (cwptr != -1) {
        reply = wrap(static_cast<std::uint32_t>(cwptr) - static_cast<std::uint32_t>(s.rptr));
        reply = std::min(reply, ps2_queue_headroom);
    }
    s.count = std::clamp(s.count, reply, reply + ps2_queue_size);
    s.rptr = wrap(static_cast<std::uint32_t>(s.rptr));
    s.wptr = wrap(static_cast<std::uint32_t>(s.rptr + s.count));
    cwptr = reply != 0 ? wrap(static_cast<std::uint32_t>(s.rptr + reply)) : -1;
}

inline bool ps2_keyboard_ledstate_needed(const PS2KbdState& s) { return s.ledstate != 0; }

inline bool ps2_keyboard_need_high_bit_needed(const PS2KbdState& s) { return s.need_high_bit; }

inline bool ps2_keyboard_cqueue_needed(const PS2KbdState& s) { return s.cwptr != -1; }

// QEMU leaves these at what the reset before the load made them.
inline void ps2_kbd_pre_load(PS2KbdState& s) {
    s.ledstate = 0;
    s.need_high_bit = false;
    s.cwptr = -1;
}

inline void ps2_kbd_post_load(PS2KbdState& s, int version_id) {
    if (version_id == 2) {
        s.scancode_set = 2;
    }
    ps2_common_post_load(s.parent_obj, s.cwptr);
}

inline void ps2_mouse_post_load(PS2MouseState& s, int /*version_id*/) {
    std::int32_t no_reply = -1;
    ps2_common_post_load(s.parent_obj, no_reply);
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_ps2_common = vmstate::describe<PS2State>(
    {.name = "PS2 Common State", .version_id = 3, .minimum_version_id = 2},
    vmstate::field<&PS2State::write_cmd>,
    vmstate::field<&PS2State::rptr>,
    vmstate::field<&PS2State::wptr>,
    vmstate::field<&PS2State::count>,
    vmstate::field<&PS2State::data>);

inline constexpr auto vmstate_ps2_keyboard_ledstate = vmstate::describe<PS2KbdState>(
    {.name = "ps2kbd/ledstate", .version_id = 3, .minimum_version_id = 2},
    vmstate::needed<ps2_keyboard_ledstate_needed>,
    vmstate::field<&PS2KbdState::ledstate>);

inline constexpr auto vmstate_ps2_keyboard_need_high_bit = vmstate::describe<PS2KbdState>(
    {.name = "ps2kbd/need_high_bit", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<ps2_keyboard_need_high_bit_needed>,
    vmstate::field<&PS2KbdState::need_high_bit>);

inline constexpr auto vmstate_ps2_keyboard_cqueue = vmstate::describe<PS2KbdState>(
    {.name = "ps2kbd/command_reply_queue", .version_id = 0, .minimum_version_id = 0},
    vmstate::needed<ps2_keyboard_cqueue_needed>,
    vmstate::field<&PS2KbdState::cwptr>);

inline constexpr auto vmstate_ps2_keyboard = vmstate::describe<PS2KbdState>(
    {.name = "ps2kbd", .version_id = 3, .minimum_version_id = 2},
    vmstate::pre_load<ps2_kbd_pre_load>,
    vmstate::post_load<ps2_kbd_post_load>,
    vmstate::field<&PS2KbdState::parent_obj, vmstate::as<vmstate_ps2_common>>,
    vmstate::field<&PS2KbdState::scan_enabled>,
    vmstate::field<&PS2KbdState::translate>,
    vmstate::field<&PS2KbdState::scancode_set, vmstate::since<3>>,
    vmstate::subsection<vmstate_ps2_keyboard_ledstate>,
    vmstate::subsection<vmstate_ps2_keyboard_need_high_bit>,
    vmstate::subsection<vmstate_ps2_keyboard_cqueue>,
    vmstate::transient<&PS2KbdState::modifiers>);

inline constexpr auto vmstate_ps2_mouse = vmstate::describe<PS2MouseState>(
    {.name = "ps2mouse", .version_id = 2, .minimum_version_id = 2},
    vmstate::post_load<ps2_mouse_post_load>,
    vmstate::field<&PS2MouseState::parent_obj, vmstate::as<vmstate_ps2_common>>,
    vmstate::field<&PS2MouseState::mouse_status>,
    vmstate::field<&PS2MouseState::mouse_resolution>,
    vmstate::field<&PS2MouseState::mouse_sample_rate>,
    vmstate::field<&PS2MouseState::mouse_wrap>,
    vmstate::field<&PS2MouseState::mouse_type>,
    vmstate::field<&PS2MouseState::mouse_detect_state>,
    vmstate::field<&PS2MouseState::mouse_dx>,
    vmstate::field<&PS2MouseState::mouse_dy>,
    vmstate::field<&PS2MouseState::mouse_dz>,
    vmstate::field<&PS2MouseState::mouse_buttons>,
    vmstate::transient<&PS2MouseState::mouse_dw>);
// clang-format on

} // namespace pc_devices
