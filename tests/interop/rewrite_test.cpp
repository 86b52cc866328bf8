// SPDX-License-Identifier: BSL-1.0
// A whole machine of QEMU's, loaded into ours and saved again: QEMU takes what we wrote, its guest goes on as if nothing
// had been, and what we changed on the way is what QEMU then has.
#include "support/catch.hpp"
#include "support/counter.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"

#include <vmstate/machine/carry.hpp>

#include <cstdint>
#include <string>
#include <vector>

using namespace vmstate::tests;
namespace pc = pc_devices;

namespace {

constexpr std::size_t memory_size = 16 << 20;

/// The counter's memory that a processor sees as plain RAM: all but what firmware and video cover below 1 MiB.
void check_main_memory(std::span<const std::byte> physical, std::span<const std::byte> block) {
    REQUIRE(physical.size() == block.size());
    CHECK(difference(physical.first(0xa0000), block.first(0xa0000)) == "");
    CHECK(difference(physical.subspan(0x100000), block.subspan(0x100000)) == "");
}

/// Sections in the same order, with the same headers and bodies.
void check_same_sections(const recorded_stream& expected, const recorded_stream& found) {
    CHECK(found.machine == expected.machine);
    REQUIRE(found.sections.size() == expected.sections.size());
    for (std::size_t i = 0; i < expected.sections.size(); ++i) {
        const auto& a = expected.sections[i];
        const auto& b = found.sections[i];
        CAPTURE(a.header.idstr, a.header.instance_id);
        CHECK(b.header.idstr == a.header.idstr);
        CHECK(b.header.instance_id == a.header.instance_id);
        CHECK(b.header.version_id == a.header.version_id);
        CHECK(b.header.section_id == a.header.section_id);
        CHECK(difference(a.body, b.body) == "");
    }
    REQUIRE(found.blocks.size() == expected.blocks.size());
    for (std::size_t i = 0; i < expected.blocks.size(); ++i) {
        CHECK(found.blocks[i].name == expected.blocks[i].name);
        CHECK(found.blocks[i].used_length == expected.blocks[i].used_length);
    }
}

/// Loads the stream into a machine of ours, and saves that.
recorded_stream rewrite(const recorded_stream& original, replica& ours) {
    REQUIRE(message_of(ours.load(original.bytes)) == "");
    auto saved = ours.save();
    REQUIRE(message_of(saved) == "");
    return recorded_stream(std::move(*saved));
}

} // namespace

TEST_CASE("a guest goes on in a QEMU that was given what we wrote") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "q35", "isapc", "microvm");
    CAPTURE(machine);
    const qemu_options options{.machine = machine, .rom = guest_rom("counter")};
    qemu source(options);
    source.wait_serial(lines(5), "5 lines");
    source.stop();
    const auto memory = source.memory(0, memory_size);
    const std::string before = source.serial();
    const recorded_stream original = record(source);

    replica ours(original);
    const recorded_stream rewritten = rewrite(original, ours);
    check_same_sections(original, rewritten);
    const std::string& main_block = original.blocks.front().name;
    check_main_memory(memory, ours.memory.at(main_block));
    CHECK(rewritten.pages.at(vmstate::ram_record_kind::zero) > 0);
    std::size_t carried = 0;
    for (const auto& section : ours.machine.sections())
        carried += section->is_carried() ? 1 : 0;
    CHECK(carried > 0);
    CHECK(carried < original.sections.size());

    temporary_directory directory;
    write_file(directory / "rewritten.state", rewritten.bytes);
    qemu_options more = options;
    more.incoming_file = directory / "rewritten.state";
    qemu destination(more);
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    CHECK(destination.status() == "paused"); // as the source was
    CHECK(difference(memory, destination.memory(0, memory_size)) == "");
    destination.cont();
    destination.wait_serial(lines(5), "5 more lines");
    destination.stop();

    const auto output = counter::parse_output(before + destination.serial()); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
    CHECK(counter::check_memory(destination.memory(0, memory_size)) == "");
    CHECK(destination.complaints() == "");
}

TEST_CASE("a machine that we say is running runs on by itself") {
    VMSTATE_REQUIRE_QEMU();
    const qemu_options options{.machine = "pc", .floppy = guest_disk("counter")};
    qemu source(options);
    source.wait_serial(lines(3), "3 lines");
    // Stopped first: a QEMU 7.2 that emulates may miss pages that its guest writes while it migrates.
    source.stop();
    const std::string before = source.serial();
    const recorded_stream original = record(source);
    replica ours(original);
    REQUIRE(message_of(ours.load(original.bytes)) == "");
    CHECK(ours.devices.globalstate.state == pc::run_state::paused);
    pc::global_state_store(ours.devices.globalstate, pc::run_state::running);
    auto saved = ours.save();
    REQUIRE(message_of(saved) == "");

    temporary_directory directory;
    write_file(directory / "rewritten.state", *saved);
    qemu_options more = options;
    more.incoming_file = directory / "rewritten.state";
    qemu destination(more);
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    destination.wait_serial(lines(3), "3 more lines");
    CHECK(destination.status() == "running");
    destination.stop();
    const auto output = counter::parse_output(before + destination.serial());
    CHECK(counter::check_order(output) == "");
}

TEST_CASE("a machine with hardly anything, and machines that stand still, are written back as they came") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("none", "pc", "q35", "isapc", "microvm");
    CAPTURE(machine);
    qemu source({.machine = machine, .stopped = true});
    const recorded_stream original = record(source);
    replica ours(original);
    const recorded_stream rewritten = rewrite(original, ours);
    check_same_sections(original, rewritten);

    // With -S the machine stays as it was loaded, and its next stream is of what it was given.
    temporary_directory directory;
    write_file(directory / "rewritten.state", rewritten.bytes);
    qemu destination({.machine = machine, .incoming_file = directory / "rewritten.state", .stopped = true});
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const recorded_stream again = record(destination);
    REQUIRE(again.sections.size() == original.sections.size());
    for (std::size_t i = 0; i < again.sections.size(); ++i) {
        const auto& section = again.sections[i];
        CAPTURE(section.header.idstr, section.header.instance_id);
        CHECK(section.header.idstr == original.sections[i].header.idstr);
        // These clocks follow the host's, which goes on.
        if (section.header.idstr != "mc146818rtc" && section.header.idstr != "timer" &&
            section.header.idstr != "globalstate")
            CHECK(difference(original.sections[i].body, section.body) == "");
    }
}

TEST_CASE("what we change in a device is what QEMU has then, and what it sends on") {
    VMSTATE_REQUIRE_QEMU();
    const qemu_options options{.machine = "pc", .stopped = true};
    qemu source(options);
    const recorded_stream original = record(source);
    replica ours(original);
    REQUIRE(message_of(ours.load(original.bytes)) == "");

    ours.devices.rtc.cmos_data[0x5a] = 0xc3;
    ours.devices.i8042.kbd.mode = 0x47;
    ours.devices.pic[0].imr = 0x5e;
    ours.devices.pic[1].irq_base = 0x68;
    ours.devices.dma[0].regs[1].page = 0x9a;
    ours.devices.port92.outport = 0;
    ours.devices.keyboard.scancode_set = 3;
    ours.devices.ioapic[0].ioredtbl[5] = 0x0100000000010031;
    ours.devices.hpet.timer[1].fsb = 0x1122334455667788;
    ours.memory.at("pc.ram")[0x54321] = std::byte{0x77};
    auto saved = ours.save();
    REQUIRE(message_of(saved) == "");

    temporary_directory directory;
    write_file(directory / "changed.state", *saved);
    qemu_options more = options;
    more.incoming_file = directory / "changed.state";
    qemu destination(more);
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);

    // What a processor would see.
    destination.outb(0x70, 0x5a);
    CHECK(destination.inb(0x71) == 0xc3);
    CHECK(destination.inb(0x21) == 0x5e);
    CHECK(destination.inb(0x83) == 0x9a);
    CHECK(destination.memory(0x54321, 1).front() == std::byte{0x77});
    destination.outb(0x64, 0x20); // the controller's mode, into its output buffer
    CHECK(destination.inb(0x60) == 0x47);

    const recorded_stream next = record(destination);
    replica theirs(next);
    REQUIRE(message_of(theirs.load(next.bytes)) == "");
    CHECK(theirs.devices.rtc.cmos_data[0x5a] == 0xc3);
    CHECK(theirs.devices.i8042.kbd.mode == 0x47);
    CHECK(theirs.devices.pic[1].irq_base == 0x68);
    CHECK(theirs.devices.keyboard.scancode_set == 3);
    CHECK(theirs.devices.ioapic[0].ioredtbl[5] == 0x0100000000010031);
    CHECK(theirs.devices.hpet.timer[1].fsb == 0x1122334455667788);
    CHECK(theirs.memory.at("pc.ram")[0x54321] == std::byte{0x77});
}
