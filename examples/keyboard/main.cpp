// SPDX-License-Identifier: BSL-1.0
//
// The tutorial: QEMU's keyboard controller, annotated, saved, loaded, and changed without breaking old streams.
// Read it from top to bottom, beside what it prints.
#include <vmstate/describe.hpp>

#include "hex_dump.hpp"

#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

// ---- 1. A device and its description --------------------------------------------------------------------------------

using qemu_irq = struct IRQState*;

namespace first {

struct KBDState {
    std::uint8_t write_cmd; // if not zero, the next write to the data port is for this command
    std::uint8_t status;
    std::uint8_t mode;
    std::uint8_t pending; // which device has a byte for the guest

    qemu_irq irq; // wiring: the destination has its own
};

// A constant beside the struct. The wire type of a field is the member's type; its name comes from the compiler.
// `transient` says that a member stays at home on purpose: a member that is not mentioned doesn't compile.
inline constexpr auto vmstate_kbd = vmstate::describe<KBDState>(
    {.name = "pckbd", .version_id = 3, .minimum_version_id = 3},
    vmstate::field<&KBDState::write_cmd>,
    vmstate::field<&KBDState::status>,
    vmstate::field<&KBDState::mode>,
    vmstate::field<&KBDState::pending>,
    vmstate::transient<&KBDState::irq>);

// Four fields, no gaps, nothing around them. Where the layout is fixed, its size is a constant.
static_assert(vmstate::wire_size<vmstate_kbd>(KBDState{}) == 4);

} // namespace first

// ---- 2. A year later ------------------------------------------------------------------------------------------------

namespace second {

struct KBDState {
    std::uint8_t write_cmd;
    std::uint8_t status;
    std::uint8_t mode;
    std::uint8_t pending;
    std::uint8_t outport; // new, and always needed: a new version

    std::uint32_t obsrc; // new, and rarely needed: a subsection
    std::uint8_t obdata;

    qemu_irq irq;
};

constexpr std::uint8_t outport_after_reset = 0xcf;

// A subsection is a description of its own, sent only where `needed` says so. A destination that is older can load the
// stream as long as it isn't sent.
inline bool output_buffer_needed(const KBDState& s) { return s.obsrc != 0; }

inline constexpr auto vmstate_kbd_output_buffer = vmstate::describe<KBDState>(
    {.name = "pckbd/output_buffer", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<output_buffer_needed>,
    vmstate::field<&KBDState::obsrc>,
    vmstate::field<&KBDState::obdata>);

// What a subsection would have set is given its default before the load: it may not come.
inline void set_defaults(KBDState& s) {
    s.outport = outport_after_reset;
    s.obsrc = 0;
    s.obdata = 0;
}

// `since<4>`: in streams of version 4 and later. We go on reading those of version 3.
inline constexpr auto vmstate_kbd = vmstate::describe<KBDState>(
    {.name = "pckbd", .version_id = 4, .minimum_version_id = 3},
    vmstate::pre_load<set_defaults>,
    vmstate::field<&KBDState::write_cmd>,
    vmstate::field<&KBDState::status>,
    vmstate::field<&KBDState::mode>,
    vmstate::field<&KBDState::pending>,
    vmstate::field<&KBDState::outport, vmstate::since<4>>,
    vmstate::transient<&KBDState::irq>,
    vmstate::subsection<vmstate_kbd_output_buffer>);

// The compiler knows both layouts, so it can say what loads what. Keep the old description in a test, and nobody
// breaks its streams by accident.
static_assert(vmstate::loads<vmstate_kbd, first::vmstate_kbd>);
static_assert(!vmstate::loads<first::vmstate_kbd, vmstate_kbd>);

} // namespace second

// ---- What they do ---------------------------------------------------------------------------------------------------

namespace {

/// Ends the program with 1 if anything went otherwise than this file says.
int failures = 0;

void expect(bool condition, const char* what) {
    if (condition) return;
    std::printf("  NOT AS EXPECTED: %s\n", what);
    ++failures;
}

void print_outcome(const vmstate::result<void>& outcome) {
    std::printf("    %s\n", outcome ? "ok" : outcome.error().message().c_str());
}

std::vector<std::byte> save_and_load() {
    std::puts("Save: to_bytes<vmstate_kbd>(kbd)");
    const first::KBDState kbd{.write_cmd = 0xd1, .status = 0x18, .mode = 0x03, .pending = 0x00, .irq = nullptr};
    const std::vector<std::byte> bytes = vmstate::to_bytes<first::vmstate_kbd>(kbd).value();
    print_with_fields<first::vmstate_kbd>(kbd, bytes);

    std::puts("\nLoad: from_bytes<vmstate_kbd>(bytes, other)");
    first::KBDState other{};
    const vmstate::result<void> loaded = vmstate::from_bytes<first::vmstate_kbd>(bytes, other);
    print_outcome(loaded);
    std::printf("    write_cmd %02x, status %02x, mode %02x, pending %02x\n", other.write_cmd, other.status, other.mode, other.pending);
    expect(loaded.has_value() && other.write_cmd == 0xd1 && other.status == 0x18 && other.mode == 3, "the same state");
    return bytes;
}

void refuse_damaged(std::span<const std::byte> bytes) {
    std::puts("\nA copy that lost its last byte is refused, and the error says where:");
    first::KBDState other{};
    const vmstate::result<void> cut = vmstate::from_bytes<first::vmstate_kbd>(bytes.first(3), other);
    print_outcome(cut);
    expect(cut.has_error() && cut.error() == vmstate::errc::truncated && cut.error().path() == "pckbd/pending" &&
            cut.error().offset() == 3, "an error at byte 3 of the stream");

    std::puts("\nSo is one with a byte too many:");
    std::vector<std::byte> longer(bytes.begin(), bytes.end());
    longer.push_back(std::byte{0x00});
    const vmstate::result<void> rest = vmstate::from_bytes<first::vmstate_kbd>(longer, other);
    print_outcome(rest);
    expect(rest.has_error() && rest.error() == vmstate::errc::trailing_bytes, "an error about bytes left over");
}

void load_the_old_stream(std::span<const std::byte> version_3) {
    std::puts("\nVersion 4 of the device loads the stream of version 3; outport keeps its default:");
    second::KBDState kbd{};
    const vmstate::result<void> loaded = vmstate::from_bytes<second::vmstate_kbd>(version_3, kbd, 3);
    print_outcome(loaded);
    std::printf("    write_cmd %02x, status %02x, mode %02x, pending %02x, outport %02x\n", kbd.write_cmd, kbd.status, kbd.mode,
        kbd.pending, kbd.outport);
    expect(loaded.has_value() && kbd.write_cmd == 0xd1 && kbd.outport == second::outport_after_reset, "the old state");

    std::puts("\nWhat it writes itself; nothing is in the output buffer, so there is no subsection:");
    const std::vector<std::byte> idle = vmstate::to_bytes<second::vmstate_kbd>(kbd).value();
    print_with_fields<second::vmstate_kbd>(kbd, idle);

    std::puts("\nAfter a key press, with its subsection:");
    kbd.status |= 0x01;
    kbd.obsrc = 1;
    kbd.obdata = 0x1e;
    const std::vector<std::byte> busy = vmstate::to_bytes<second::vmstate_kbd>(kbd).value();
    print_with_fields<second::vmstate_kbd>(kbd, busy);
    expect(idle.size() == 5 && busy.size() == 5 + 1 + 1 + 19 + 4 + 5, "a body of 5 bytes, and of 35");

    second::KBDState other{};
    expect(vmstate::from_bytes<second::vmstate_kbd>(busy, other).has_value() && other.obdata == 0x1e, "the key");

    std::puts("\nVersion 3 of the device refuses it:");
    first::KBDState old{};
    const vmstate::result<void> refused = vmstate::from_bytes<first::vmstate_kbd>(busy, old, second::vmstate_kbd.version_id);
    print_outcome(refused);
    expect(refused.has_error() && refused.error() == vmstate::errc::version_too_new, "an error about the version");
}

} // namespace

int main() {
    const std::vector<std::byte> version_3 = save_and_load();
    refuse_damaged(version_3);
    load_the_old_stream(version_3);
    return failures == 0 ? 0 : 1;
}
