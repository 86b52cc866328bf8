// SPDX-License-Identifier: BSL-1.0
// A stream for another machine is refused, in both directions: QEMU refuses ours with its words, we refuse QEMU's with
// ours, which name the place.
#include "support/catch.hpp"
#include "support/outcome.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"

#include <vmstate/machine/carry.hpp>

#include <cstdint>
#include <string>
#include <vector>

using namespace vmstate::tests;
namespace pc = pc_devices;
using vmstate::errc;

namespace {

/// What a pc is, after reset; recorded once.
const recorded_stream& original() {
    static const recorded_stream recorded = [] {
        qemu source({.machine = "pc-i440fx-7.2", .stopped = true});
        return record(source);
    }();
    return recorded;
}

/// What a QEMU says to a stream of ours.
std::string qemu_refusal(std::span<const std::byte> stream) {
    temporary_directory directory;
    write_file(directory / "vm.state", stream);
    qemu destination({.machine = "pc-i440fx-7.2", .incoming_file = directory / "vm.state", .stopped = true});
    const auto outcome = destination.wait_incoming();
    CHECK_FALSE(outcome.completed);
    CHECK(destination.wait_exit() == 1);
    return outcome.error;
}

std::vector<std::byte> saved(replica& machine) {
    auto bytes = machine.save();
    REQUIRE(message_of(bytes) == "");
    return std::move(*bytes);
}

void load_original(replica& machine) {
    REQUIRE(message_of(machine.load(original().bytes, &original().description)) == "");
}

/// A machine as ours would be, with other options or devices.
vmstate::error our_refusal(vmstate::machine& machine, const vmstate::load_options& options = {}) {
    vmstate::memory_reader in(original().bytes);
    const auto outcome = vmstate::load(machine, in, options);
    REQUIRE_FALSE(outcome);
    return outcome.error();
}

struct scratch_device {
    std::uint32_t value = 7;
};
inline constexpr auto vmstate_scratch = vmstate::describe<scratch_device>(
    {.name = "not-of-qemu", .version_id = 1}, vmstate::field<&scratch_device::value>);

/// pcspk as a version that is not there yet.
inline constexpr auto vmstate_spk_of_tomorrow = vmstate::describe<pc::PCSpkState>(
    {.name = "pcspk", .version_id = 2, .minimum_version_id = 2}, vmstate::partial,
    vmstate::field<&pc::PCSpkState::data_on>, vmstate::field<&pc::PCSpkState::dummy_refresh_clock>);

struct speaker_with_a_subsection {
    std::uint8_t data_on = 0;
    std::uint8_t dummy_refresh_clock = 0;
    std::uint8_t volume = 11;
};
inline bool volume_needed(const speaker_with_a_subsection&) { return true; }
inline constexpr auto vmstate_volume =
    vmstate::describe<speaker_with_a_subsection>({.name = "pcspk/volume", .version_id = 1},
        vmstate::needed<volume_needed>, vmstate::field<&speaker_with_a_subsection::volume>);
inline constexpr auto vmstate_loud_speaker = vmstate::describe<speaker_with_a_subsection>(
    {.name = "pcspk", .version_id = 1}, vmstate::field<&speaker_with_a_subsection::data_on>,
    vmstate::field<&speaker_with_a_subsection::dummy_refresh_clock>, vmstate::subsection<vmstate_volume>);

/// Our stream with another device, `description`, in the place of the speaker.
template <const auto& description, class Device>
std::vector<std::byte> with_another_speaker(Device& device) {
    replica ours(original());
    load_original(ours);
    ours.machine.template remove_device<pc::vmstate_spk>(ours.devices.pcspk);
    REQUIRE(ours.machine.template add_device<description>(device));
    return saved(ours);
}

} // namespace

TEST_CASE("QEMU refuses our stream of another machine type") {
    VMSTATE_REQUIRE_QEMU();
    auto bytes = original().bytes; // header 8, type 1, length 4, name
    replica ours(original());
    load_original(ours);
    auto stream = saved(ours);
    CHECK(std::equal(bytes.begin(), bytes.begin() + 26, stream.begin()));
    const std::string_view other = "pc-i440fx-9.9";
    std::transform(
        other.begin(), other.end(), stream.begin() + 13, [](char c) { return static_cast<std::byte>(c); });
    CHECK_THAT(qemu_refusal(stream),
        contains("Machine type received is 'pc-i440fx-9.9' and local is 'pc-i440fx-7.2'"));
}

TEST_CASE("QEMU refuses our stream of a machine with more memory, and with memory that it hasn't") {
    VMSTATE_REQUIRE_QEMU();
    replica ours(original());
    load_original(ours);
    std::vector<std::byte> memory(32 << 20);
    SECTION("more") {
        ours.machine.remove_ram("pc.ram");
        REQUIRE(ours.machine.add_ram("pc.ram", memory));
        CHECK_THAT(qemu_refusal(saved(ours)), contains("Size mismatch: pc.ram: 0x2000000 != 0x1000000"));
    }
    SECTION("another") {
        REQUIRE(ours.machine.add_ram("vmstate.ram", memory));
        CHECK_THAT(qemu_refusal(saved(ours)), contains("Unknown ramblock \"vmstate.ram\""));
    }
}

TEST_CASE("QEMU refuses a device of ours that it hasn't") {
    VMSTATE_REQUIRE_QEMU();
    replica ours(original());
    load_original(ours);
    scratch_device device;
    REQUIRE(ours.machine.add_device<vmstate_scratch>(device, {.instance_id = 3}));
    CHECK_THAT(qemu_refusal(saved(ours)), contains("Unknown savevm section or instance 'not-of-qemu' 3"));
}

TEST_CASE(
    "QEMU refuses a device of ours of a newer version, and one with a subsection that it doesn't know") {
    VMSTATE_REQUIRE_QEMU();
    SECTION("version") {
        pc::PCSpkState device;
        CHECK_THAT(qemu_refusal(with_another_speaker<vmstate_spk_of_tomorrow>(device)),
            contains("savevm: unsupported version 2 for 'pcspk' v1"));
    }
    SECTION("subsection") {
        speaker_with_a_subsection device;
        CHECK_THAT(qemu_refusal(with_another_speaker<vmstate_loud_speaker>(device)),
            contains("error while loading state for instance 0x0 of device 'pcspk'"));
    }
}

TEST_CASE("QEMU refuses what we refuse: a value that has to be equal") {
    VMSTATE_REQUIRE_QEMU();
    replica ours(original());
    load_original(ours);
    ours.devices.vmmouse.queue_size = 1023;
    const auto stream = saved(ours);
    CHECK_THAT(qemu_refusal(stream), contains("400 != 3ff"));

    replica other(original());
    const auto outcome = other.load(stream);
    REQUIRE_FALSE(outcome);
    CHECK(outcome.error().code() == errc::value_mismatch);
    CHECK(outcome.error().path() == "vmmouse/queue_size");
    CHECK(outcome.error().expected() == "1024");
    CHECK(outcome.error().found() == "1023");
}

TEST_CASE("we refuse QEMU's stream of another machine type") {
    VMSTATE_REQUIRE_QEMU();
    vmstate::machine machine({.name = "pc-q35-7.2"});
    const auto failure = our_refusal(machine);
    CHECK(failure.code() == errc::bad_configuration);
    CHECK_THAT(failure.message(), contains("pc-q35-7.2"));
    CHECK_THAT(failure.message(), contains("pc-i440fx-7.2"));
    CHECK(failure.offset() < 26);
}

TEST_CASE("we refuse QEMU's memory of another size, and a block that we haven't") {
    VMSTATE_REQUIRE_QEMU();
    std::vector<std::byte> memory(8 << 20);
    vmstate::machine machine({.name = "pc-i440fx-7.2"});
    SECTION("another size") {
        REQUIRE(machine.add_ram("pc.ram", memory));
        const auto failure = our_refusal(machine, vmstate::carry_unknown());
        CHECK(failure.code() == errc::bad_ram);
        CHECK(failure.path() == "ram/pc.ram");
        CHECK_THAT(failure.message(), contains("8388608 bytes"));
        CHECK_THAT(failure.message(), contains("16777216 bytes"));
    }
    SECTION("no such block") {
        REQUIRE(machine.add_ram("my.ram", memory));
        const auto failure = our_refusal(machine);
        CHECK(failure.code() == errc::bad_ram);
        CHECK_THAT(failure.message(), contains("pc.ram"));
    }
}

TEST_CASE("we refuse QEMU's section that nobody registered, by its name") {
    VMSTATE_REQUIRE_QEMU();
    replica ours(original());
    vmstate::memory_reader in(original().bytes);
    const auto outcome = vmstate::load(ours.machine, in); // nothing carried
    REQUIRE_FALSE(outcome);
    CHECK(outcome.error().code() == errc::unknown_section);
    const auto& first =
        *std::find_if(original().sections.begin(), original().sections.end(), [](const auto& section) {
            return section.header.idstr ==
                   "cpu"; // the first after timer and cpu_common that has no description of ours
        });
    CHECK(outcome.error().path() == "cpu");
    CHECK(outcome.error().offset() == first.header.offset);
    CHECK_THAT(outcome.error().message(), contains("'cpu' instance 0 version 12"));
}

TEST_CASE(
    "we refuse QEMU's section of a version that our device doesn't know, and a subsection that it hasn't") {
    VMSTATE_REQUIRE_QEMU();
    replica ours(original());
    struct old_keyboard {
        std::uint8_t write_cmd, status, mode, pending_tmp;
    };
    SECTION("newer") {
        static constexpr auto vmstate_old =
            vmstate::describe<old_keyboard>({.name = "pckbd", .version_id = 2},
                vmstate::field<&old_keyboard::write_cmd>, vmstate::field<&old_keyboard::status>,
                vmstate::field<&old_keyboard::mode>, vmstate::field<&old_keyboard::pending_tmp>);
        old_keyboard device{};
        ours.machine.remove_device<pc::vmstate_kbd_isa>(ours.devices.i8042);
        REQUIRE(ours.machine.add_device<vmstate_old>(device));
        const auto outcome = ours.load(original().bytes);
        REQUIRE_FALSE(outcome);
        CHECK(outcome.error().code() == errc::version_too_new);
        CHECK(outcome.error().path() == "pckbd");
        CHECK(outcome.error().offset() == original().find("pckbd")->header.offset);
    }
    SECTION("a subsection") {
        static constexpr auto vmstate_plain =
            vmstate::describe<old_keyboard>({.name = "pckbd", .version_id = 3},
                vmstate::field<&old_keyboard::write_cmd>, vmstate::field<&old_keyboard::status>,
                vmstate::field<&old_keyboard::mode>, vmstate::field<&old_keyboard::pending_tmp>);
        old_keyboard device{};
        ours.machine.remove_device<pc::vmstate_kbd_isa>(ours.devices.i8042);
        REQUIRE(ours.machine.add_device<vmstate_plain>(device));
        const auto outcome = ours.load(original().bytes);
        REQUIRE_FALSE(outcome);
        CHECK(outcome.error().code() == errc::unknown_subsection);
        CHECK_THAT(outcome.error().message(), contains("pckbd/extended_state"));
        CHECK(outcome.error().offset() == original().find("pckbd")->header.body_offset + 4);
    }
}
