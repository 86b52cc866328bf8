// SPDX-License-Identifier: BSL-1.0
// The devices of examples/pc_devices against a real QEMU: whatever it wrote for them, in every state that it could be
// brought into, is decoded and comes out again byte for byte. At the end stands which states were seen.
#include "support/catch.hpp"
#include "support/qemu.hpp"
#include "support/qtest.hpp"
#include "support/recorded_stream.hpp"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <set>
#include <string>
#include <thread>
#include <vector>

using namespace vmstate::tests;
namespace pc = pc_devices;

namespace {

/// What the test cases of this program have seen in QEMU's streams, all together.
struct sightings {
    std::set<std::string> sections;
    std::set<std::string> subsections;
};
sightings seen;

/// Decodes and encodes each section that one of our devices stands for. Returns its subsections.
std::set<std::string> check_typed_sections(const recorded_stream& stream, pc::pc_machine_devices& devices) {
    std::set<std::string> subsections;
    std::size_t checked = 0;
    devices.apply_compat(stream.machine);
    devices.for_each_device([&]<const auto & description>(
        auto& device, const vmstate::device_options& options) {
        const recorded_section* section = stream.find(options.id, options.instance_id);
        if (section == nullptr) return;
        CAPTURE(options.id, options.instance_id);
        const auto loaded = vmstate::from_bytes<description>(
            section->body, device, static_cast<int>(section->header.version_id));
        REQUIRE((loaded ? "" : loaded.error().message()) == "");
        const auto saved = vmstate::to_bytes<description>(device);
        REQUIRE((saved ? "" : saved.error().message()) == "");
        CHECK(difference(section->body, *saved) == "");
        REQUIRE(section->description != nullptr);
        collect_subsections(*section->description, subsections);
        seen.sections.insert(options.id);
        ++checked;
    });
    CHECK(checked > 0);
    seen.subsections.insert(subsections.begin(), subsections.end());
    return subsections;
}

std::set<std::string> check_typed_sections(const recorded_stream& stream) {
    pc::pc_machine_devices devices(
        pc::machine_kind_of(stream.machine), stream.find("cpu_common") != nullptr ? 1 : 0);
    return check_typed_sections(stream, devices);
}

/// All that the descriptions could write.
void collect_subsections_of(const vmstate::schema& body, std::set<std::string>& names) {
    for (const vmstate::schema_field& field : body.fields)
        if (field.has_nested) collect_subsections_of(*field.nested, names);
    for (const vmstate::schema* subsection : body.subsections) {
        names.insert(std::string(subsection->name));
        collect_subsections_of(*subsection, names);
    }
}

sightings all_that_there_are() {
    sightings all;
    for (const pc::machine_kind kind : {pc::machine_kind::pc, pc::machine_kind::microvm}) {
        pc::pc_machine_devices devices(kind);
        devices.for_each_device([&]<const auto & description>(auto&, const vmstate::device_options& options) {
            all.sections.insert(options.id);
            collect_subsections_of(vmstate::schema_of<description>(), all.subsections);
        });
    }
    return all;
}

/// The first 64 KiB that a processor sees: what is at the reset vector, and nothing else.
void write_reset_code(const std::filesystem::path& path, std::initializer_list<unsigned> code) {
    std::vector<std::byte> rom(0x10000, std::byte{0xf4});
    auto at = rom.size() - 16;
    for (const unsigned byte : code)
        rom.at(at++) = static_cast<std::byte>(byte);
    write_file(path, rom);
}

void wait_until(const char* what, const std::function<bool()>& done) {
    for (int i = 0; i < 1000; ++i) {
        if (done()) return;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    FAIL("no end to the wait for " << what);
}

} // namespace

TEST_CASE("every machine as it is after reset") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "q35", "isapc", "microvm", "none");
    CAPTURE(machine);
    qemu source({.machine = machine, .stopped = true});
    const recorded_stream stream = record(source);
    CHECK(pc::machine_kind_of(stream.machine) == (machine == "pc"           ? pc::machine_kind::pc
                                                     : machine == "q35"     ? pc::machine_kind::q35
                                                     : machine == "isapc"   ? pc::machine_kind::isapc
                                                     : machine == "microvm" ? pc::machine_kind::microvm
                                                                            : pc::machine_kind::none));
    check_typed_sections(stream);
}

TEST_CASE("after the firmware has looked for something to start") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "q35", "isapc");
    CAPTURE(machine);
    // The counter comes from a floppy or a disk: the firmware has done all of its work by then.
    qemu source(machine == "q35" ? qemu_options{.machine = machine, .disk = guest_disk("counter")}
                                 : qemu_options{.machine = machine, .floppy = guest_disk("counter")});
    source.wait_serial("counter 3 ");
    check_typed_sections(record(source));
}

TEST_CASE("after a guest has programmed every device, half done things among them") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "q35", "isapc", "microvm");
    CAPTURE(machine);
    qemu source({.machine = machine, .rom = guest_rom("devices")});
    source.wait_serial("READY\n");
    const recorded_stream stream = record(source);
    pc::pc_machine_devices devices(pc::machine_kind_of(stream.machine));
    const auto subsections = check_typed_sections(stream, devices);

    // What tests/guests/devices.S has written is what we understood.
    for (unsigned i = 0x40; i < 0x78; ++i)
        REQUIRE(devices.rtc.cmos_data[i] == (i ^ 0xa5u));
    CHECK(devices.rtc.cmos_index == 0x4a);
    CHECK(devices.rtc.period == 256);
    CHECK(devices.pit.channels[0].mode == 2);
    CHECK(devices.pit.channels[0].count == 0x1234);
    CHECK(devices.pit.channels[0].count_latched != 0);
    CHECK(devices.pit.channels[1].write_latch == 0x55);
    CHECK(devices.pic[0].irq_base == 8);
    CHECK(devices.pic[0].imr == 0xb8);
    if (machine == "pc" || machine == "q35") {
        CHECK(devices.ioapic[0].id == 5);
        CHECK(devices.ioapic[0].ioredtbl[3] == 0x10031);
        CHECK(devices.hpet.config == 1);
        CHECK((devices.hpet.timer[0].config & 0xc) == 0xc);
        CHECK(subsections.contains("hpet/offset"));
    }
    if (machine != "microvm") {
        CHECK(devices.pcspk.data_on != 0);
        CHECK(devices.port92.outport == 2);
        CHECK(devices.keyboard.ledstate == 5);
        CHECK(devices.keyboard.cwptr != -1);
        CHECK(devices.mouse.mouse_sample_rate == 40);
        CHECK(devices.mouse.mouse_resolution == 2);
        CHECK(devices.i8042.kbd.mode == 7);
        CHECK(devices.i8042.kbd.outport == 0xdd);
        CHECK(devices.dma[0].regs[2].page == 0x23);
        CHECK(devices.dma[1].regs[1].base[1] == 0x234);
        for (const char* name :
            {"pckbd_outport", "pckbd/extended_state", "ps2kbd/ledstate", "ps2kbd/command_reply_queue"})
            CHECK(subsections.count(name) == 1);
    }
}

TEST_CASE("keys and pointer events that nobody has read") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "isapc");
    CAPTURE(machine);
    // A guest that never looks: it halts with interrupts off. The device program has the mouse send its movements.
    const bool programmed = GENERATE(true, false);
    CAPTURE(programmed);
    temporary_directory directory;
    write_reset_code(directory / "halt.rom", {0xfa, 0xf4, 0xeb, 0xfc});
    qemu source({.machine = machine, .rom = programmed ? guest_rom("devices") : directory / "halt.rom"});
    if (programmed) source.wait_serial("READY\n");
    for (const char* key : {"a", "shift-b", "ctrl-alt-delete", "print", "pause"})
        source.human(std::string("sendkey ") + key);
    source.human("mouse_move 10 -20 3");
    source.human("mouse_button 5");
    source.human("mouse_move -300 400 -1");
    const recorded_stream stream = record(source);
    pc::pc_machine_devices devices(pc::machine_kind_of(stream.machine));
    check_typed_sections(stream, devices);
    CHECK(devices.keyboard.parent_obj.count > 0);
    CHECK(devices.keyboard.parent_obj.data[0] != 0);
    if (programmed) CHECK(devices.mouse.parent_obj.count > 0);
    CHECK(devices.i8042.kbd.status != pc::KBDState{}.status);
}

TEST_CASE("the monitor's own way to the ports: A20, a command half given, the vmmouse") {
    VMSTATE_REQUIRE_QEMU();
    qemu source({.machine = "pc", .stopped = true});
    source.outb(0x64, 0xd1);
    source.outb(0x60, 0xdd);
    source.outb(0x64, 0x60); // the mode is to follow, and doesn't
    source.outb(0x43, 0xb4);
    source.outb(0x42, 0x77);
    source.outb(0x70, 0x8f);
    const recorded_stream stream = record(source);
    pc::pc_machine_devices devices(pc::machine_kind::pc);
    CHECK(check_typed_sections(stream, devices).count("pckbd_outport") == 1);
    CHECK(devices.i8042.kbd.outport == 0xdd);
    CHECK(devices.i8042.kbd.write_cmd == 0x60);
    CHECK(devices.pit.channels[2].write_latch == 0x77);
    CHECK(devices.rtc.cmos_index == 0x0f);
}

TEST_CASE("the HPET in the place of the RTC, whose interrupt it holds back") {
    VMSTATE_REQUIRE_QEMU();
    qtest bus;
    qemu source({.machine = "q35", .rom = guest_rom("devices"), .arguments = bus.arguments()});
    bus.accept();
    source.wait_serial("READY\n");
    // In legacy mode the HPET keeps the level of the RTC's line. Register C, read, lowers it, and the next periodic
    // interrupt, of 128 a second, raises it again; only a stream shows whether that has come.
    bus.writeq(0xfed00010, 3);
    source.outb(0x70, 0x0c);
    source.inb(0x71);
    pc::pc_machine_devices devices(pc::machine_kind::q35);
    std::set<std::string> subsections;
    wait_until("a periodic interrupt", [&] {
        subsections = check_typed_sections(record(source), devices);
        if (subsections.contains("hpet/rtc_irq_level")) return true;
        source.cont();
        return false;
    });
    CHECK(subsections.count("hpet/rtc_irq_level") == 1);
    CHECK(subsections.count("hpet/offset") == 1);
    CHECK(devices.hpet.rtc_irq_level == 1);
    CHECK(devices.hpet.config == 3);
}

TEST_CASE("a virtual clock that counts instructions") {
    VMSTATE_REQUIRE_QEMU();
    const std::string icount = GENERATE("shift=3,sleep=off", "shift=7", "shift=auto");
    CAPTURE(icount);
    qemu source({.machine = "isapc", .rom = guest_rom("counter"), .arguments = {"-icount", icount}});
    source.wait_serial("counter 2 ");
    const recorded_stream stream = record(source);
    pc::pc_machine_devices devices(pc::machine_kind::isapc);
    const auto subsections = check_typed_sections(stream, devices);
    CHECK(subsections.count("timer/icount") == 1);
    CHECK(subsections.count("timer/icount/warp_timer") == (icount.ends_with("sleep=off") ? 0 : 1));
    CHECK(subsections.count("timer/icount/timers") == (icount == "shift=auto" ? 1 : 0));
    CHECK(subsections.count("timer/icount/shift") == (icount == "shift=auto" ? 1 : 0));
    CHECK(devices.timers.qemu_icount > 0);
}

TEST_CASE("a guest that said it has crashed") {
    VMSTATE_REQUIRE_QEMU();
    temporary_directory directory;
    write_reset_code(directory / "panic.rom", {0xba, 0x05, 0x05, 0xb0, 0x01, 0xee, 0xfa, 0xf4, 0xeb, 0xfc});
    qemu source({.machine = "pc",
        .rom = directory / "panic.rom",
        .arguments = {"-device", "pvpanic", "-action", "panic=pause"}});
    wait_until("the guest to panic", [&] { return source.status() == "guest-panicked"; });
    const recorded_stream stream = record(source);
    pc::pc_machine_devices devices(pc::machine_kind::pc);
    CHECK(check_typed_sections(stream, devices).count("cpu_common/crash_occurred") == 1);
    CHECK(devices.globalstate.state == pc::run_state::guest_panicked);
    CHECK(devices.cpus[0].crash_occurred);
}

TEST_CASE("machine types of long ago") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc-i440fx-2.4", "pc-i440fx-2.9", "pc-i440fx-6.0", "pc-q35-2.11");
    CAPTURE(machine);
    qemu source({.machine = machine, .rom = guest_rom("devices")});
    source.wait_serial("READY\n");
    const recorded_stream stream = record(source);
    CHECK(stream.machine == machine);
    const auto subsections = check_typed_sections(stream);
    CHECK(subsections.count("pckbd/extended_state") == 0);
    CHECK(subsections.count("hpet/offset") == (machine == "pc-i440fx-6.0" ? 1 : 0));
    CHECK((stream.find("pcspk") != nullptr) == (machine != "pc-i440fx-2.4"));
}

TEST_CASE("several processors") {
    VMSTATE_REQUIRE_QEMU();
    qemu source({.machine = "pc", .rom = guest_rom("devices"), .arguments = {"-smp", "3"}});
    source.wait_serial("READY\n");
    const recorded_stream stream = record(source);
    pc::pc_machine_devices devices(pc::machine_kind::pc, 3);
    check_typed_sections(stream, devices);
    CHECK(stream.find("cpu_common", 2) != nullptr);
    CHECK(devices.cpus[2].halted == 1); // it waits to be started
}

/// States that no command and no guest brings a QEMU into at a moment that can be chosen. They are written by us, loaded
/// by QEMU, and what it makes of them comes back in its own stream.
TEST_CASE("states that are over too soon to be caught, through a QEMU that is given them") {
    VMSTATE_REQUIRE_QEMU();
    qemu first({.machine = "pc", .rom = guest_rom("devices")});
    first.wait_serial("READY\n");
    const recorded_stream original = record(first);
    replica changed(original);
    const auto loaded = changed.load(original.bytes, &original.description);
    REQUIRE((loaded ? "" : loaded.error().message()) == "");
    changed.devices.cpus.at(0).exception_index = 13;
    changed.devices.rtc.irq_reinject_on_ack_count = 0x1234;
    changed.devices.keyboard.need_high_bit = true;
    changed.devices.i8042.kbd.throttle_timer_pending = true;
    changed.devices.vapic.real_tpr_addr = 0x8000abcd;
    changed.devices.vmmouse.nb_queue = 3;
    changed.devices.vmmouse.queue[2] = 0xcafebabe;
    changed.devices.vmmouse.absolute = 1;
    changed.devices.mouse.mouse_wrap = 1;
    pc::global_state_store(
        changed.devices.globalstate, pc::run_state::paused); // or the processor runs on at once
    const auto saved = changed.save();
    REQUIRE((saved ? "" : saved.error().message()) == "");

    temporary_directory directory;
    write_file(directory / "changed.state", *saved);
    qemu second({.machine = "pc", .rom = guest_rom("devices"), .incoming_file = directory / "changed.state"});
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    CHECK(second.status() == "paused");

    const recorded_stream stream = record(second);
    pc::pc_machine_devices devices(pc::machine_kind::pc);
    const auto subsections = check_typed_sections(stream, devices);
    for (const char* name :
        {"cpu_common/exception_index", "mc146818rtc/irq_reinject_on_ack_count", "ps2kbd/need_high_bit"})
        CHECK(subsections.count(name) == 1);
    CHECK(devices.cpus[0].exception_index == 13);
    CHECK(devices.rtc.irq_reinject_on_ack_count == 0x1234);
    CHECK(devices.keyboard.need_high_bit);
    CHECK(devices.vapic.real_tpr_addr == 0x8000abcd);
    CHECK(devices.vmmouse.nb_queue == 3);
    CHECK(devices.vmmouse.queue[2] == 0xcafebabe);
    CHECK(devices.vmmouse.absolute == 1);
    CHECK(devices.mouse.mouse_wrap == 1);
}

// Catch2 runs the test cases of a file in their order, unless it is asked for another or for some of them alone.
TEST_CASE("nothing that the descriptions know of was missing") {
    VMSTATE_REQUIRE_QEMU();
    if (seen.sections.empty()) {
        skip("the other test cases of this program didn't run");
        return;
    }
    const sightings all = all_that_there_are();
    CHECK(all.subsections.size() == 14);
    CHECK(seen.sections == all.sections);
    CHECK(seen.subsections == all.subsections);
}
