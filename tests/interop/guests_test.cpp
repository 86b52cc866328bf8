// SPDX-License-Identifier: BSL-1.0
// The guest programs and the QEMU driver do what the other tests take for granted, without vmstate in between.
#include "support/catch.hpp"
#include "support/counter.hpp"
#include "support/qemu.hpp"

#include <string>

using namespace vmstate::tests;

TEST_CASE("the counter counts on every machine, and goes on in another QEMU after a migration to a file") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "q35", "isapc", "microvm");
    CAPTURE(machine);
    const qemu_options options{.machine = machine, .rom = guest_rom("counter")};

    temporary_directory directory;
    const auto file = directory / "vm.state";
    qemu source(options);
    source.wait_serial(lines(5), "5 lines");
    const auto outcome = source.migrate_to_file(file);
    REQUIRE(outcome.error == "");
    REQUIRE(outcome.completed);
    CHECK(source.status() == "postmigrate");
    const std::string before = source.serial();
    std::uint32_t round = 0;
    CHECK(counter::check_memory(source.memory(0, 0x60000), round) == "");

    qemu_options more = options;
    more.incoming_file = file;
    qemu destination(more);
    const auto incoming = destination.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    destination.wait_serial(lines(5), "5 more lines");
    destination.stop();
    CHECK(counter::check_order(counter::parse_output(before + destination.serial())) == "");
    CHECK(counter::check_memory(destination.memory(0, 0x60000), round) == "");
    CHECK(round > 5);
    CHECK(destination.complaints() == "");
}

TEST_CASE("the counter starts from a floppy and from a disk, through the firmware") {
    VMSTATE_REQUIRE_QEMU();
    qemu_options options;
    SECTION("pc, floppy") { options = {.machine = "pc", .floppy = guest_disk("counter")}; }
    SECTION("isapc, floppy") { options = {.machine = "isapc", .floppy = guest_disk("counter")}; }
    SECTION("pc, disk") { options = {.machine = "pc", .disk = guest_disk("counter")}; }
    SECTION("q35, disk") { options = {.machine = "q35", .disk = guest_disk("counter")}; }
    CAPTURE(options.machine);
    qemu machine(options);
    CHECK(counter::check_order(counter::parse_output(machine.wait_serial(lines(5), "5 lines"))) == "");
}

TEST_CASE("the device program comes to its end on every machine") {
    VMSTATE_REQUIRE_QEMU();
    const std::string machine = GENERATE("pc", "q35", "isapc", "microvm");
    CAPTURE(machine);
    qemu guest({.machine = machine, .rom = guest_rom("devices")});
    guest.wait_serial("READY\n");

    temporary_directory directory;
    REQUIRE(guest.migrate_to_file(directory / "vm.state").completed);
    const auto bytes = read_file(directory / "vm.state");
    const std::string stream(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    if (machine != "microvm") {
        CHECK_THAT(stream, contains("\x05\x0dpckbd_outport"));
        CHECK_THAT(stream, contains("\x05\x14pckbd/extended_state"));
        CHECK_THAT(stream, contains("\x05\x0fps2kbd/ledstate"));
        CHECK_THAT(stream, contains("\x05\x1aps2kbd/command_reply_queue"));
    }
}

TEST_CASE("ports can be read and written through the monitor") {
    VMSTATE_REQUIRE_QEMU();
    qemu guest({.machine = "pc", .stopped = true});
    CHECK(guest.status() == "prelaunch");
    guest.outb(0x70, 0x45);
    guest.outb(0x71, 0xa7);
    guest.outb(0x70, 0x45);
    CHECK(guest.inb(0x71) == 0xa7);
    CHECK_THROWS_WITH(guest.execute("no-such-command"), contains("no-such-command"));
    CHECK(guest.quit() == 0);
}

TEST_CASE("a QEMU that doesn't start, or refuses a stream, says why") {
    VMSTATE_REQUIRE_QEMU();
    CHECK_THROWS_WITH(qemu({.machine = "pdp11"}), contains("unsupported machine type"));

    temporary_directory directory;
    write_file(directory / "bad.state", std::vector<std::byte>(100));
    qemu refusing({.machine = "pc", .incoming_file = directory / "bad.state"});
    const auto outcome = refusing.wait_incoming();
    CHECK_FALSE(outcome.completed);
    CHECK_THAT(outcome.error, contains("Not a migration stream"));
    CHECK(refusing.wait_exit() == 1);
}

TEST_CASE("a migration that can't be written fails with a reason") {
    VMSTATE_REQUIRE_QEMU();
    qemu guest({.machine = "pc", .stopped = true});
    const auto outcome = guest.migrate("exec:exit 3");
    CHECK_FALSE(outcome.completed);
    CHECK(outcome.error != "");
    CHECK(guest.alive());
}
