// SPDX-License-Identifier: BSL-1.0
// The container: header, configuration, sections, commands, description; registration under QEMU's rules; what is
// refused, and by which name.
#include "vocabulary_support.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/vmstate.hpp>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

using namespace vmstate;
using vmstate::tests::contains;
using vmstate::tests::failure;
using vmstate::tests::hex;
using vmstate::tests::outcome;
using vmstate::tests::wire;

namespace {

struct kbd_state {
    std::uint8_t write_cmd = 0, status = 0, mode = 0, pending = 0;
};
constexpr auto kbd = describe<kbd_state>({.name = "pckbd", .version_id = 3, .minimum_version_id = 2},
    field<&kbd_state::write_cmd>, field<&kbd_state::status>, field<&kbd_state::mode>,
    field<&kbd_state::pending>);

struct timer_state {
    std::int64_t cpu_ticks_offset = 0, cpu_clock_offset = 0;
};
constexpr auto timer = describe<timer_state>({.name = "timer", .version_id = 2, .minimum_version_id = 1},
    field<&timer_state::cpu_ticks_offset>, unused<8>, field<&timer_state::cpu_clock_offset, since<2>>);

struct bus_state {
    std::uint32_t irqs[4] = {};
};
constexpr auto bus = describe<bus_state>(
    {.name = "PCIBUS", .version_id = 1}, priority<migration_priority::pci_bus>, field<&bus_state::irqs>);

struct optional_state {
    std::uint8_t value = 0;
    bool wanted = true;
};
bool optional_needed(const optional_state& s) { return s.wanted; }
constexpr auto optional_device = describe<optional_state>(
    {.name = "optional", .version_id = 1}, needed<optional_needed>, field<&optional_state::value>);

constexpr auto stuck =
    describe<kbd_state>({.name = "stuck", .version_id = 1}, partial, unmigratable, field<&kbd_state::mode>);

// A device whose hook clears, after saving, what decides which fields there are.
struct forgetful_state {
    std::uint32_t value = 7;
    bool present = false;
};
void remember(forgetful_state& s) { s.present = true; }
void forget(forgetful_state& s) { s.present = false; }
bool is_present(const forgetful_state& s) { return s.present; }
constexpr auto forgetful =
    describe<forgetful_state>({.name = "forgetful", .version_id = 1}, pre_save<remember>, post_save<forget>,
        field<&forgetful_state::value, when<is_present>>, transient<&forgetful_state::present>);

// Nested, with a subsection, an array, and elements that are described one by one.
struct fdrive {
    std::uint8_t head = 0, track = 0, media_rate = 0;
};
bool media_rate_needed(const fdrive& s) { return s.media_rate != 0; }
constexpr auto fdrive_media_rate = describe<fdrive>(
    {.name = "fdrive/media_rate", .version_id = 1}, needed<media_rate_needed>, field<&fdrive::media_rate>);
constexpr auto vmstate_fdrive = describe<fdrive>({.name = "fdrive", .version_id = 1}, field<&fdrive::head>,
    field<&fdrive::track>, subsection<fdrive_media_rate>);
struct fdc_state {
    std::uint16_t fifo[3] = {};
    fdrive drives[2] = {};
};
constexpr auto fdc = describe<fdc_state>(
    {.name = "fdc", .version_id = 2}, field<&fdc_state::fifo>, field<&fdc_state::drives, as<vmstate_fdrive>>);

constexpr std::string_view magic = "5145564d 00000003";
constexpr std::string_view none_configuration = "07 00000004 'none'";

std::vector<std::byte> saved(machine& source) {
    vector_writer out;
    const result<void> done = save(source, out);
    INFO(outcome(done));
    REQUIRE(done);
    return out.take();
}
result<void> loaded(
    machine& destination, std::span<const std::byte> bytes, const load_options& options = {}) {
    // Memory that ends where the stream ends.
    const std::unique_ptr<std::byte[]> exact(new std::byte[bytes.size()]);
    std::copy(bytes.begin(), bytes.end(), exact.get());
    memory_reader in(std::span<const std::byte>(exact.get(), bytes.size()));
    return load(destination, in, options);
}
/// A stream of machine "none" with these items.
std::vector<std::byte> stream(std::string_view items) {
    return wire(std::string(magic) + std::string(none_configuration) + std::string(items) + "00");
}
machine none_machine() { return machine{{.name = "none"}}; }

/// The description at a stream's end.
std::string json_of(std::span<const std::byte> bytes) {
    const auto where = find_vmdesc(bytes);
    REQUIRE(where.has_value());
    return std::string(where->text_in(bytes));
}
/// The stream from the configuration's end to the end of the sections.
std::string items_of(std::span<const std::byte> bytes, std::size_t configuration_size) {
    const std::size_t begin = 8 + configuration_size;
    const std::size_t end = bytes.size() - json_of(bytes).size() - 6;
    return hex(bytes.subspan(begin, end - begin));
}
constexpr std::size_t none_configuration_size = 9;

std::string why(const result<void>& r) { return r ? "ok" : r.error().message(); }

} // namespace

// ---- what is written ---------------------------------------------------------------------------------------

TEST_CASE("a machine without devices is a header, a configuration, an end and a description") {
    machine empty{{.name = "pc-i440fx-7.2"}};
    CHECK(hex(saved(empty)) == hex("5145564d 00000003 07 0000000d 'pc-i440fx-7.2' 00 06 00000022"
                                   "'{\"page_size\": 4096, \"devices\": []}'"));
    machine quiet{{.name = "none", .send_configuration = false, .suppress_vmdesc = true}};
    CHECK(hex(saved(quiet)) == hex("5145564d 00000003 00"));
}

TEST_CASE("a device is a FULL section with header and footer, as QEMU 7.2 writes it") {
    machine m = none_machine();
    timer_state state{0x528c8504, 0x1fbfe393};
    m.add_device<timer>(state);
    const std::vector<std::byte> bytes = saved(m);
    CHECK(
        items_of(bytes, none_configuration_size) ==
        hex("04 00000000 05 'timer' 00000000 00000002 00000000528c8504 0000000000000000 000000001fbfe393 7e 00000000"));
    CHECK(
        json_of(bytes) ==
        R"({"page_size": 4096, "devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, )"
        R"("fields": [{"name": "cpu_ticks_offset", "type": "int64", "size": 8}, )"
        R"({"name": "unused", "type": "unused_buffer", "size": 8}, )"
        R"({"name": "cpu_clock_offset", "type": "int64", "size": 8}]}]})");
}

TEST_CASE("without section footers none is written and none expected") {
    machine m{{.name = "none", .send_section_footer = false}};
    kbd_state state{1, 2, 3, 4};
    m.add_device<kbd>(state);
    const std::vector<std::byte> bytes = saved(m);
    CHECK(
        items_of(bytes, none_configuration_size) == hex("04 00000000 05 'pckbd' 00000000 00000003 01020304"));
    state = {};
    CHECK(why(loaded(m, bytes)) == "ok");
    CHECK(state.pending == 4);
}

TEST_CASE("the description nests structs, indexes what cannot be compressed, and lists subsections") {
    machine m = none_machine();
    fdc_state state;
    state.fifo[1] = 0x1234;
    state.drives[0] = {1, 2, 0};
    state.drives[1] = {3, 4, 9};
    m.add_device<fdc>(state, {.id = "isa/fdc"});
    const std::vector<std::byte> bytes = saved(m);
    CHECK(items_of(bytes, none_configuration_size) ==
          hex("04 00000000 07 'isa/fdc' 00000000 00000002 0000 1234 0000 0102 0304"
              "05 11 'fdrive/media_rate' 00000001 09 7e 00000000"));
    const std::string text = json_of(bytes);
    CHECK_THAT(text, contains(R"({"name": "fifo", "array_len": 3, "type": "uint16", "size": 2})"));
    CHECK_THAT(text,
        contains(
            R"({"name": "drives", "index": 0, "type": "struct", "struct": {"vmsd_name": "fdrive", "version": 1, )"
            R"("fields": [{"name": "head", "type": "uint8", "size": 1}, {"name": "track", "type": "uint8", "size": 1}]}, "size": 2})"));
    CHECK_THAT(text,
        contains(R"("subsections": [{"vmsd_name": "fdrive/media_rate", "version": 1, )"
                 R"("fields": [{"name": "media_rate", "type": "uint8", "size": 1}]}]}, "size": 26}]}]})"));
    const result<vmdesc> parsed = parse_vmdesc(text);
    REQUIRE(parsed.has_value());
    REQUIRE(parsed->devices.size() == 1);
    memory_reader body(std::span<const std::byte>(bytes).subspan(8 + none_configuration_size + 21));
    CHECK(why(skip_body(parsed->devices[0], body)) == "ok");
    CHECK(body.get_u8() == 0x7e);
}

TEST_CASE("entries that do not account for the bytes are described as a buffer") {
    machine m = none_machine();
    forgetful_state state;
    m.add_device<forgetful>(state);
    const std::vector<std::byte> bytes = saved(m);
    CHECK(items_of(bytes, none_configuration_size) ==
          hex("04 00000000 09 'forgetful' 00000000 00000001 00000007 7e 00000000"));
    CHECK_THAT(json_of(bytes), contains(R"({"name": "forgetful", "instance_id": 0, "size": 4, )"
                                        R"("fields": [{"name": "data", "size": 4, "type": "buffer"}]})"));
}

TEST_CASE("the legacy pair of functions writes a body that the description calls a buffer") {
    machine m = none_machine();
    int version = 0;
    std::uint32_t value = 0;
    m.add_handlers("slirp", {.version_id = 4,
                                .save = [](writer& out) { out.put_be32(0xcafe); },
                                .load =
                                    [&](reader& in, int version_id) {
                                        version = version_id;
                                        value = in.get_be32();
                                    }});
    const std::vector<std::byte> bytes = saved(m);
    CHECK(items_of(bytes, none_configuration_size) ==
          hex("04 00000000 05 'slirp' 00000000 00000004 0000cafe 7e 00000000"));
    CHECK(json_of(bytes) ==
          R"({"page_size": 4096, "devices": [{"name": "slirp", "instance_id": 0, "size": 4, )"
          R"("fields": [{"name": "data", "size": 4, "type": "buffer"}]}]})");
    CHECK(why(loaded(m, bytes)) == "ok");
    CHECK(version == 4);
    CHECK(value == 0xcafe);
    CHECK(why(loaded(m, stream("04 00000009 05 'slirp' 00000000 00000003 00000001 7e 00000009"))) == "ok");
    CHECK(version == 3);
}

TEST_CASE("a legacy function may return nothing, a bool or a result, and may be missing") {
    machine m = none_machine();
    m.add_handlers("silent", {.version_id = 1});
    m.add_handlers("refusing",
        {.version_id = 1, .save = [](writer&) { return true; }, .load = [](reader&) { return false; }});
    const std::vector<std::byte> bytes = saved(m);
    CHECK(items_of(bytes, none_configuration_size) ==
          hex("04 00000001 08 'refusing' 00000000 00000001 7e 00000001"));
    const result<void> refused = loaded(m, bytes);
    REQUIRE_FALSE(refused);
    CHECK(refused.error() == errc::hook_failed);
    CHECK(refused.error().path() == "refusing");
    const result<void> missing = loaded(m, stream("04 00000000 06 'silent' 00000000 00000001 7e 00000000"));
    REQUIRE_FALSE(missing);
    CHECK(missing.error() == errc::unsupported);
    CHECK(missing.error().path() == "silent");

    machine failing = none_machine();
    failing.add_handlers(
        "broken", {.save = [](writer&) -> result<void> { return error(errc::hook_failed, {}, "no room"); }});
    vector_writer out;
    CHECK_THAT(why(save(failing, out)), contains("broken: hook failed: no room"));
}

TEST_CASE("sections are in the order of priority, then of registration; ids are those of registration") {
    machine m{{.name = "none", .suppress_vmdesc = true}};
    kbd_state keyboard;
    bus_state pci;
    timer_state clock;
    optional_state extra;
    m.add_device<kbd>(keyboard);
    m.add_device<bus>(pci);
    m.add_device<timer>(clock);
    m.add_device<optional_device>(extra);
    std::vector<std::string> order;
    for (const auto& entry : m.sections())
        order.push_back(entry->idstr + ' ' + std::to_string(entry->section_id));
    CHECK(order == std::vector<std::string>{"PCIBUS 1", "pckbd 0", "timer 2", "optional 3"});

    extra.wanted = false;
    CHECK_THAT(hex(saved(m)), !contains(hex("'optional'")));
    extra.wanted = true;
    CHECK_THAT(hex(saved(m)), contains(hex("'optional'")));

    m.remove_device<bus>(pci);
    CHECK_THAT(hex(saved(m)), !contains(hex("'PCIBUS'")));
    m.add_device<bus>(pci);
    CHECK(m.sections().front()->section_id == 4);
}

TEST_CASE("the configuration carries page bits, capabilities and uuid in their subsections") {
    const machine_options options{.name = "virt",
        .target_page_bits = 12,
        .capabilities = {"x-ignore-shared"},
        .uuid = std::array<std::uint8_t, 16>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
        .suppress_vmdesc = true};
    machine m{options};
    const std::vector<std::byte> bytes = saved(m);
    CHECK(hex(bytes) == hex("5145564d 00000003 07 00000004 'virt'"
                            "05 1e 'configuration/target-page-bits' 00000001 0000000c"
                            "05 1a 'configuration/capabilities' 00000001 00000001 0f 'x-ignore-shared'"
                            "05 12 'configuration/uuid' 00000001 000102030405060708090a0b0c0d0e0f 00"));
    CHECK(why(loaded(m, bytes)) == "ok");
    for (std::size_t size = 0; size < bytes.size(); ++size) {
        machine again{options};
        const result<void> r = loaded(again, std::span(bytes).first(size));
        INFO(size << ": " << why(r));
        REQUIRE_FALSE(r);
        CHECK(!r.error().path().empty());
        CHECK(r.error().offset() <= size);
    }
}

// ---- registration ------------------------------------------------------------------------------------------

TEST_CASE("an id has each instance once; any gives the next free one") {
    machine m = none_machine();
    kbd_state states[5];
    CHECK(m.add_device<kbd>(states[0]).instance_id() == 0);
    CHECK(m.add_device<kbd>(states[1], {.instance_id = 4}).instance_id() == 4);
    CHECK(m.add_device<kbd>(states[2], {.instance_id = instance_id_any}).instance_id() == 5);
    CHECK(m.check());
    const registration twice = m.add_device<kbd>(states[3], {.instance_id = 4});
    CHECK_FALSE(twice);
    CHECK(twice.has_error());
    CHECK_FALSE(twice.has_value());
    CHECK(twice.error() == errc::duplicate);
    CHECK(twice.error().path() == "add_device/pckbd#4");

    // A failure is remembered until the machine is used, and then nothing is written or read.
    vector_writer out;
    const result<void> r = save(m, out);
    REQUIRE_FALSE(r);
    CHECK(r.error() == errc::duplicate);
    CHECK(out.offset() == 0);
    CHECK(loaded(m, stream("")).error() == errc::duplicate);

    machine clash = none_machine();
    clash.add_device<kbd>(states[0]);
    CHECK(clash.add_device<kbd>(states[1], {.allow_duplicate = true}));
    states[0].mode = 1;
    states[1].mode = 2;
    const std::vector<std::byte> bytes = saved(clash);
    states[0] = states[1] = {};
    CHECK(why(loaded(clash, bytes)) == "ok");
    CHECK(states[0].mode == 1);
    CHECK(states[1].mode == 2);
}

TEST_CASE("a registration that failed says which call it was, and is taken back with its device") {
    kbd_state first, second;
    std::vector<std::byte> memory(4096);
    machine m = none_machine();
    m.add_device<kbd>(first);
    CHECK(m.add_device<kbd>(second).error().message() ==
          "add_device/pckbd: registered twice: expected another instance id than 0");
    m.add_handlers("slirp", {});
    CHECK(m.add_handlers("slirp", {}).error().path() == "add_handlers/slirp");
    CHECK(m.add_ram("pc.ram", std::span(memory).first(100)).error().path() == "add_ram/pc.ram");
    CHECK(m.check().error().path() == "add_device/pckbd");

    m.remove_device<kbd>(first); // not the one that failed
    CHECK(m.check().error().path() == "add_device/pckbd");
    m.remove_device<kbd>(second);
    CHECK(m.check().error().path() == "add_handlers/slirp");
    m.remove_handlers("slirp");
    CHECK(m.check().error().path() == "add_ram/pc.ram");
    m.remove_ram("pc.ram");
    CHECK(m.check());
    CHECK(m.add_device<kbd>(second).has_value());
    CHECK(why(loaded(m, saved(m))) == "ok");

    machine odd{{.name = "none", .page_size = 4095}};
    CHECK(odd.add_ram("pc.ram", memory).error().path() == "machine_options");
}

TEST_CASE("registrations that cannot be meant are refused") {
    kbd_state state;
    const std::string long_name(256, 'x');
    machine a = none_machine();
    CHECK(a.add_device<kbd>(state, {.id = long_name}).error() == errc::invalid_argument);
    machine b = none_machine();
    CHECK(b.add_handlers("", {}).error() == errc::invalid_argument);
    machine c = none_machine();
    CHECK(c.add_device<kbd>(state, {.alias_id = 7, .alias_required_for_version = 1}).error() ==
          errc::invalid_argument);
    CHECK(machine{{.name = long_name}}.check().error() == errc::invalid_argument);
    CHECK(machine{{.name = "none", .page_size = 4095}}.check().error() == errc::invalid_argument);
    CHECK(machine{{.name = "none", .page_size = 512}}.check().error() == errc::invalid_argument);
    CHECK(machine{{.name = "none", .target_page_bits = 64}}.check().error() == errc::invalid_argument);
    CHECK(machine{{.name = "none", .capabilities = {"mapped-ram"}}}.check().error() == errc::unsupported);
    machine d = none_machine();
    std::vector<std::byte> memory(8192);
    machine no_pages{{.name = "none", .page_size = 0}};
    CHECK(no_pages.add_ram("pc.ram", memory).error() == errc::invalid_argument);
    d.add_ram("pc.ram", memory);
    CHECK(d.add_ram("pc.ram", memory).error() == errc::duplicate);
    machine e = none_machine();
    CHECK(e.add_ram("pc.ram", std::span(memory).first(5000)).error() == errc::invalid_argument);
    machine f = none_machine();
    CHECK(f.add_ram("", memory).error() == errc::invalid_argument);
    machine g = none_machine();
    CHECK(g.add_ram("x", memory, {.used_length = 12288}).error() == errc::invalid_argument);
}

TEST_CASE("a device that forbids migration stops saving and loading") {
    machine m = none_machine();
    kbd_state state;
    m.add_device<stuck>(state);
    vector_writer out;
    CHECK(why(save(m, out)) == "stuck: device is unmigratable");
    CHECK(out.offset() == 0);
    CHECK(why(loaded(m, stream(""))) == "stuck: device is unmigratable");
    m.remove_device<stuck>(state);
    CHECK(save(m, out));
}

TEST_CASE("a section is found by its id, by the bare name of old streams, and by its alias") {
    machine m = none_machine();
    kbd_state first, second, aliased;
    m.add_device<kbd>(first, {.id = "isa/0/pckbd"});
    m.add_device<kbd>(second, {.id = "isa/1/pckbd"});
    m.add_device<kbd>(
        aliased, {.id = "odd", .instance_id = 2, .alias_id = 60, .alias_required_for_version = 2});
    CHECK(why(loaded(m, stream("04 00000001 0b 'isa/0/pckbd' 00000000 00000003 01010101 7e 00000001"
                               "04 00000002 0b 'isa/1/pckbd' 00000000 00000003 02020202 7e 00000002"
                               "04 00000003 03 'odd' 0000003c 00000003 03030303 7e 00000003"))) == "ok");
    CHECK(first.mode == 1);
    CHECK(second.mode == 2);
    CHECK(aliased.mode == 3);
    CHECK(why(loaded(m, stream("04 00000001 05 'pckbd' 00000000 00000003 04040404 7e 00000001"
                               "04 00000002 05 'pckbd' 00000001 00000003 05050505 7e 00000002"
                               "04 00000003 03 'odd' 00000002 00000003 06060606 7e 00000003"))) == "ok");
    CHECK(first.mode == 4);
    CHECK(second.mode == 5);
    CHECK(aliased.mode == 6);
    for (const char* wrong :
        {"05 'pckbd' 00000002", "05 'pckbd' ffffffff", "0b 'isa/2/pckbd' 00000000", "03 'odd' 00000000"}) {
        const result<void> r =
            loaded(m, stream("04 00000001" + std::string(wrong) + "00000003 01010101 7e 00000001"));
        CAPTURE(wrong, why(r));
        REQUIRE_FALSE(r);
        CHECK(r.error() == errc::unknown_section);
    }
}

// ---- what is refused ---------------------------------------------------------------------------------------

TEST_CASE("every strict prefix of a stream is refused with place and offset") {
    kbd_state keyboard{1, 2, 3, 4};
    timer_state clock{5, 6};
    fdc_state floppy;
    floppy.drives[1] = {3, 4, 9};
    const auto make = [&] {
        machine m = none_machine();
        m.add_device<kbd>(keyboard);
        m.add_device<timer>(clock, {.instance_id = 1});
        m.add_device<fdc>(floppy);
        return m;
    };
    machine source = make();
    const std::vector<std::byte> bytes = saved(source);
    const std::size_t without_description = bytes.size() - json_of(bytes).size() - 5;
    for (std::size_t size = 0; size < bytes.size(); ++size) {
        machine m = make();
        const result<void> r = loaded(m, std::span(bytes).first(size));
        INFO(size << " of " << bytes.size() << ": " << why(r));
        CHECK(r.has_value() == (size == without_description));
        if (r) continue;
        CHECK((r.error() == errc::truncated || r.error() == errc::bad_section));
        CHECK(!r.error().path().empty());
        CHECK(r.error().offset() <= size);
    }
    machine m = make();
    CHECK(why(loaded(m, bytes)) == "ok");
}

TEST_CASE("what is no stream, or one of another format, is refused") {
    machine m = none_machine();
    CHECK(why(loaded(m, wire("7f454c46 02010100 00"))) ==
          "header: not a migration stream: expected \"QEVM\", found 0x7f454c46 (offset 0)");
    CHECK_THAT(why(loaded(m, wire("5145564d 00000002 00"))), contains("obsolete"));
    CHECK(loaded(m, wire("5145564d 00000004 00")).error() == errc::not_a_stream);
    CHECK(
        why(loaded(m, wire("5145564d 00000003 00"))) ==
        "configuration: machine configured differently: expected a configuration section, found type 0x0 (offset 8)");
}

TEST_CASE("a machine's name has to be the beginning of ours") {
    machine m{{.name = "pc-i440fx-7.2"}};
    const std::string head(magic);
    CHECK(why(loaded(m, wire(head + "07 0000000d 'pc-i440fx-7.2' 00"))) == "ok");
    CHECK(why(loaded(m, wire(head + "07 00000002 'pc' 00"))) == "ok");
    CHECK(
        why(loaded(m, wire(head + "07 0000000d 'pc-i440fx-8.2' 00"))) ==
        "configuration/name: machine configured differently: expected pc-i440fx-7.2, found pc-i440fx-8.2 (offset 9)");
    CHECK(loaded(m, wire(head + "07 0000000e 'pc-i440fx-7.22' 00")).error() == errc::bad_configuration);
    CHECK(loaded(m, wire(head + "07 ffffffff 'pc' 00")).error() == errc::bad_configuration);
}

TEST_CASE("a configuration that differs is refused by the name of what differs") {
    const auto load_with = [](machine_options options, std::string_view subsections) {
        machine m{std::move(options)};
        return loaded(m, wire(std::string(magic) + "07 00000004 'none'" + std::string(subsections) + "00"));
    };
    const std::string bits = "05 1e 'configuration/target-page-bits' 00000001";
    const std::string capabilities = "05 1a 'configuration/capabilities' 00000001";
    const std::string uuid = "05 12 'configuration/uuid' 00000001 000102030405060708090a0b0c0d0e0f";
    const std::array<std::uint8_t, 16> other_uuid{1};

    CHECK(why(load_with({.name = "none"}, bits + "0000000c")) == "ok");
    CHECK_THAT(why(load_with({.name = "none"}, bits + "0000000e")),
        contains("configuration/target-page-bits: machine configured differently: expected 12, found 14"));
    CHECK_THAT(why(load_with({.name = "none", .target_page_bits = 14}, "")),
        contains("expected target page bits 14, found none"));
    CHECK(why(load_with({.name = "none", .target_page_bits = 14}, bits + "0000000e")) == "ok");

    CHECK(why(load_with({.name = "none"}, capabilities + "00000000")) == "ok");
    CHECK_THAT(why(load_with({.name = "none"}, capabilities + "00000001 0f 'x-ignore-shared'")),
        contains(
            "configuration/capabilities: machine configured differently: expected x-ignore-shared off, found on"));
    CHECK_THAT(why(load_with({.name = "none", .capabilities = {"x-ignore-shared"}}, "")),
        contains(
            "configuration/capabilities: machine configured differently: expected x-ignore-shared on, found off"));
    CHECK(load_with({.name = "none", .capabilities = {"x-ignore-shared"}},
              capabilities + "ffffffff 0f 'x-ignore-shared' 0f 'x-ignore-shared'")
              .error() == errc::bad_configuration);

    CHECK(why(load_with({.name = "none"}, uuid)) == "ok");
    CHECK_THAT(why(load_with({.name = "none", .uuid = other_uuid}, uuid)),
        contains(
            "configuration/uuid: machine configured differently: expected 01000000-0000-0000-0000-000000000000, found 00010203-0405-0607-0809-0a0b0c0d0e0f"));

    // Each at the offset of its own value, whatever follows it.
    CHECK(load_with({.name = "none"}, bits + "0000000e" + uuid).error().offset() == 17 + 36);
    CHECK(load_with({.name = "none"}, capabilities + "00000001 0f 'x-ignore-shared'" + uuid).error().offset() == 17 + 32);
    CHECK(load_with({.name = "none", .capabilities = {"x-ignore-shared"}}, capabilities + "00000000" + uuid)
              .error()
              .offset() == 17 + 32);
    CHECK(load_with({.name = "none", .uuid = other_uuid}, uuid + bits + "0000000c").error().offset() == 17 + 24);
    CHECK(load_with({.name = "none", .capabilities = {"x-ignore-shared"}}, uuid).error().offset() == 17 + 40);

    CHECK(load_with({.name = "none"}, "05 12 'configuration/uuix' 00000001").error() ==
          errc::unknown_subsection);
    CHECK(load_with({.name = "none"}, "05 12 'configuration/uuid' 00000002 000102030405060708090a0b0c0d0e0f")
              .error() == errc::version_too_new);
    // Only the low 8 bits of a subsection's version count in QEMU.
    CHECK(why(load_with({.name = "none"},
              "05 12 'configuration/uuid' 00000101 000102030405060708090a0b0c0d0e0f")) == "ok");
}

TEST_CASE("a section that nobody registered is an error that names it") {
    machine m = none_machine();
    const result<void> r = loaded(m, stream("04 00000007 05 'slirp' 00000003 00000004 00 7e 00000007"));
    REQUIRE_FALSE(r);
    CHECK(r.error() == errc::unknown_section);
    CHECK(r.error().path() == "slirp#3");
    CHECK(r.error().offset() == 17);
    CHECK_THAT(r.error().message(), contains("'slirp' instance 3 version 4"));
}

TEST_CASE("sections that are malformed are refused with name and offset") {
    const auto refused = [](std::string_view items) {
        machine m = none_machine();
        kbd_state state;
        m.add_device<kbd>(state);
        const result<void> r = loaded(m, stream(items));
        REQUIRE_FALSE(r);
        return r.error().message();
    };
    const std::string good = "04 00000001 05 'pckbd' 00000000 00000003 01020304 7e 00000001";
    CHECK(
        refused("09") ==
        "next section: malformed section: expected a section, a command or the end, found type 0x9 (offset 17)");
    CHECK_THAT(refused(good + good),
        contains("pckbd: malformed section: expected a section id of its own, found 1 (offset 45)"));
    CHECK_THAT(refused(good + "04 00000002 05 'pckbd' 00000000 00000003 01020304 7e 00000002"),
        contains("pckbd: malformed section: expected each section once"));
    CHECK_THAT(refused("04 00000001 00 00000000 00000003"), contains("section header: malformed section"));
    CHECK(refused("04 00000001 05 'pckbd' 00000000 00000004 01020304 7e 00000001") ==
          "pckbd: version too new: expected version 3 or older, found 4 (offset 17)");
    CHECK_THAT(refused("04 00000001 05 'pckbd' 00000000 ffffffff 01020304 7e 00000001"),
        contains("version too new"));
    CHECK_THAT(refused("04 00000001 05 'pckbd' 00000000 00000001 01020304 7e 00000001"),
        contains("pckbd: version too old"));
    CHECK(refused("04 00000001 05 'pckbd' 00000000 00000003 01020304 7f 00000001") ==
          "pckbd/footer: malformed section: expected the section's footer, found type 0x7f (offset 40)");
    CHECK(refused("04 00000001 05 'pckbd' 00000000 00000003 01020304 7e 00000002") ==
          "pckbd/footer: malformed section: expected section id 1, found 2 (offset 40)");
    CHECK_THAT(refused("02 00000001 7e 00000001"),
        contains("expected the id of a section that was started, found 1 (offset 17)"));
    CHECK_THAT(refused(good + "03 00000001 7e 00000001"), contains("unknown section"));
}

TEST_CASE("an error inside a device has section, field and offset") {
    machine m = none_machine();
    fdc_state state;
    m.add_device<fdc>(state, {.instance_id = 1});
    const std::vector<std::byte> bytes =
        stream("04 00000001 03 'fdc' 00000001 00000002 0000 1234 0000 0102 03");
    const result<void> r = loaded(m, std::span(bytes).first(bytes.size() - 1));
    REQUIRE_FALSE(r);
    CHECK(r.error() == errc::truncated);
    CHECK_THAT(std::string(r.error().path()), contains("fdc#1/drives[1]/"));
    CHECK(r.error().offset() >= 17 + 17 + 8);
}

// ---- commands ----------------------------------------------------------------------------------------------

TEST_CASE("the commands of a plain precopy stream are obeyed") {
    machine m = none_machine();
    std::vector<std::byte> memory(4096);
    m.add_ram("pc.ram", memory);
    CHECK(why(loaded(m, stream("08 0001 0000 08 0001 0000 08 0002 0004 00000001"
                               "08 0003 0010 0000000000001000 0000000000001000 08 000b 0000"))) == "ok");
    CHECK(why(loaded(m, stream("08 0003 0000"))) == "ok");
}

TEST_CASE("other commands are refused by name, and lengths that cannot be are") {
    const auto refused = [](std::string_view items) {
        machine m = none_machine();
        std::vector<std::byte> memory(4096);
        m.add_ram("pc.ram", memory);
        const result<void> r = loaded(m, stream(items));
        REQUIRE_FALSE(r);
        CHECK(r.error().offset() >= 17);
        return r.error().message();
    };
    CHECK_THAT(refused("08 0002 0004 00000001"),
        contains("PING: bad command: expected OPEN_RETURN_PATH before a PING"));
    CHECK_THAT(
        refused("08 0000 0000"), contains("command: bad command: expected a command from 1 to 11, found 0"));
    CHECK_THAT(refused("08 000c 0000"), contains("found 12"));
    CHECK_THAT(
        refused("08 0001 0001 00"), contains("OPEN_RETURN_PATH: bad command: expected 0 bytes, found 1"));
    CHECK_THAT(refused("08 0002 ffff"), contains("PING: bad command: expected 4 bytes, found 65535"));
    CHECK_THAT(refused("08 0003 0008 0000000000001000"),
        contains("POSTCOPY_ADVISE: bad command: expected 0 or 16 bytes"));
    CHECK_THAT(refused("08 0003 0010 0000000000201000 0000000000001000"),
        contains("expected RAM page sizes 0x1000, found 0x201000"));
    CHECK_THAT(refused("08 0003 0010 0000000000001000 0000000000002000"),
        contains("expected guest pages of 4096 bytes, found 8192"));
    CHECK_THAT(refused("08 0003 0000 08 0003 0000"), contains("POSTCOPY_ADVISE once"));
    for (const auto& [items, name] :
        std::vector<std::pair<std::string, std::string>>{{"08 0004 0000", "POSTCOPY_LISTEN"},
            {"08 0005 0000", "POSTCOPY_RUN"}, {"08 0006 0014", "POSTCOPY_RAM_DISCARD"},
            {"08 0007 0004 00000000", "PACKAGED"}, {"08 0008 0000", "ENABLE_COLO"},
            {"08 0009 0000", "POSTCOPY_RESUME"}, {"08 000a 0001 00", "RECV_BITMAP"}})
        CHECK_THAT(refused(items), contains(name + ": unsupported"));
}

// ---- what follows the end ----------------------------------------------------------------------------------

TEST_CASE("the description is passed over, may be missing, and must be whole if it is there") {
    const std::string whole = std::string(magic) + std::string(none_configuration) + "00";
    machine m = none_machine();
    CHECK(why(loaded(m, wire(whole))) == "ok");
    CHECK(why(loaded(m, wire(whole + "06 00000002 '{}'"))) == "ok");
    CHECK(why(loaded(m, wire(whole + "06 00000002 '{}' ffff"))) == "ok");
    const result<void> cut = loaded(m, wire(whole + "06 ffffffff '{}'"));
    REQUIRE_FALSE(cut);
    CHECK(cut.error() == errc::truncated);
    CHECK(cut.error().path() == "vmdesc");
    machine quiet{{.name = "none", .suppress_vmdesc = true}};
    CHECK(why(loaded(quiet, wire(whole + "06 ffffffff"))) == "ok");
}

TEST_CASE("what follows the end and is no description is a section whose type was damaged") {
    const std::string whole = std::string(magic) + std::string(none_configuration) + "00";
    machine m = none_machine();
    machine quiet{{.name = "none", .suppress_vmdesc = true}};
    for (machine* one : {&m, &quiet}) {
        const result<void> trailing = loaded(*one, wire(whole + "00 00000001 05 'pckbd'"));
        CHECK(outcome(trailing) == failure(errc::trailing_bytes, "vmdesc", 18));
        CHECK_THAT(why(trailing), contains("expected the description or the end of the stream, found type 0x0"));
    }
    // A user's channel doesn't know its end, but what came along with the sections is there to be looked at.
    struct all_at_once {
        std::vector<std::byte> rest;
        result<std::size_t> read_some(std::span<std::byte> into) {
            const std::size_t count = std::min(into.size(), rest.size());
            std::copy_n(rest.begin(), count, into.begin());
            rest.erase(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(count));
            return count;
        }
    } source{wire(whole + "ff")};
    CHECK(load(quiet, source).error() == errc::trailing_bytes);
}

namespace {

/// A source that keeps its channel open: asked for more than the stream has, it would wait for good.
struct live_source {
    std::vector<std::byte> bytes;
    std::size_t position = 0;
    bool waited = false;

    result<std::size_t> read_some(std::span<std::byte> into) {
        if (position == bytes.size()) {
            waited = true;
            return error(errc::io, {}, "waits");
        }
        into[0] = bytes[position++];
        return std::size_t{1};
    }
};

} // namespace

TEST_CASE("on a live channel no byte is waited for that need not come") {
    kbd_state state;
    for (const bool suppress_vmdesc : {false, true})
        for (const bool send_section_footer : {false, true}) {
            machine m{{.name = "none", .send_section_footer = send_section_footer, .suppress_vmdesc = suppress_vmdesc}};
            CAPTURE(suppress_vmdesc, send_section_footer);
            for (const bool with_device : {false, true}) {
                CAPTURE(with_device);
                if (with_device) m.add_device<kbd>(state);
                live_source source{saved(m)};
                CHECK(why(load(m, source)) == "ok");
                CHECK_FALSE(source.waited);
            }
        }
}

// ---- sections in parts -------------------------------------------------------------------------------------

TEST_CASE("a section that was started has to be ended") {
    machine m = none_machine();
    std::vector<std::byte> memory(4096);
    kbd_state state;
    m.add_ram("pc.ram", memory);
    m.add_device<kbd>(state);
    const std::vector<std::byte> good = saved(m);
    REQUIRE(why(loaded(m, good)) == "ok");

    // The type bytes of the stream, each turned into the end of the sections.
    const std::size_t ram_setup = 1 + 4 + 4 + 4 + 4 + 8 + 1 + 6 + 8 + 8 + 5;
    const std::size_t start = 8 + none_configuration_size;
    const std::size_t part = start + ram_setup;
    const std::size_t end = part + 5 + 8 + 7 + 1 + 8 + 5;
    const std::size_t device = end + 5 + 8 + 5;
    REQUIRE(good.at(start) == std::byte{1});
    REQUIRE(good.at(part) == std::byte{2});
    REQUIRE(good.at(end) == std::byte{3});
    REQUIRE(good.at(device) == std::byte{4});
    const auto with = [&](std::size_t at, unsigned type) {
        std::vector<std::byte> changed = good;
        changed[at] = std::byte(static_cast<unsigned char>(type));
        return outcome(loaded(m, changed));
    };
    CHECK(with(start, 0) == failure(errc::trailing_bytes, "vmdesc", start + 1));
    CHECK(with(part, 0) == failure(errc::bad_section, "ram", part));
    CHECK(with(end, 0) == failure(errc::bad_section, "ram", end));
    CHECK(with(device, 0) == failure(errc::trailing_bytes, "vmdesc", device + 1));
    // A PART in the END's place leaves the section open; an END in the PART's closes it too early.
    CHECK_THAT(with(end, 2), contains("malformed section | ram"));
    CHECK(with(part, 3) == failure(errc::unknown_section, "section header", end));
    CHECK(with(start, 4) == failure(errc::unknown_section, "section header", part));
}

TEST_CASE("a page's block has to be in the stream's list, even if it is registered") {
    machine source = none_machine();
    std::vector<std::byte> memory(4096), more(4096);
    source.add_ram("pc.ram", memory);
    std::vector<std::byte> bytes = saved(source);
    const std::size_t name_in_list = 8 + none_configuration_size + 17 + 8 + 1;
    REQUIRE(bytes.at(name_in_list) == std::byte{'p'});
    bytes[name_in_list] = std::byte{'q'};
    machine m = none_machine();
    m.add_ram("pc.ram", memory);
    m.add_ram("qc.ram", more);
    CHECK_THAT(why(loaded(m, bytes)), contains("ram: bad RAM record: expected a block of the stream's list, found pc.ram"));
}

TEST_CASE("a device comes in one piece; a section of one's own may come in parts") {
    machine m = none_machine();
    kbd_state state;
    m.add_device<kbd>(state);
    const std::string header = " 00000001 05 'pckbd' 00000000 00000003 01020304 7e 00000001";
    const result<void> started = loaded(m, stream("01" + header + "03 00000001 01020304 7e 00000001"));
    CHECK(outcome(started) == failure(errc::bad_section, "pckbd", 17));
    CHECK_THAT(why(started), contains("expected a device as FULL, found START"));
    CHECK(loaded(m, stream("04" + header + "02 00000001 01020304 7e 00000001")).error() == errc::unknown_section);

    machine parts = none_machine();
    int loads = 0;
    parts.add_handlers("live", {.version_id = 1, .load = [&](reader& in) {
                                    ++loads;
                                    in.get_u8();
                                }});
    const std::string begin = "01 00000001 04 'live' 00000000 00000001 01 7e 00000001";
    const std::string part = "02 00000001 02 7e 00000001";
    const std::string end = "03 00000001 03 7e 00000001";
    CHECK(why(loaded(parts, stream(begin + part + part + end))) == "ok");
    CHECK(loads == 4);
    CHECK_THAT(why(loaded(parts, stream(begin + part))),
        contains("live: malformed section: expected the section's END, found the end of the sections"));
    CHECK(loaded(parts, stream(begin + end + part)).error() == errc::unknown_section);
    CHECK(loaded(parts, stream(begin + end + end)).error() == errc::unknown_section);
}

TEST_CASE("what is registered and was not in the stream is known afterwards") {
    machine m = none_machine();
    kbd_state keyboard, second;
    std::vector<std::byte> memory(4096), more(4096);
    m.add_device<kbd>(keyboard);
    m.add_ram("pc.ram", memory);
    const std::vector<std::byte> bytes = saved(m);
    m.add_device<kbd>(second, {.instance_id = 1});
    m.add_ram("vga.vram", more);
    CHECK(why(loaded(m, bytes)) == "ok");
    CHECK(m.not_in_stream() == std::vector<std::string>{"ram/vga.vram", "pckbd#1"});
    CHECK(why(loaded(m, saved(m))) == "ok");
    CHECK(m.not_in_stream().empty());
    CHECK(why(loaded(m, stream(""))) == "ok");
    CHECK(m.not_in_stream() == std::vector<std::string>{"pckbd", "ram/pc.ram", "ram/vga.vram", "pckbd#1"});
}

// ---- sections carried through ------------------------------------------------------------------------------

namespace {

/// What a machine with more devices than we know would write.
std::vector<std::byte> foreign_stream() {
    machine source = none_machine();
    static kbd_state keyboard{1, 2, 3, 4}, second{9, 9, 9, 9};
    static timer_state clock{5, 6};
    static fdc_state floppy;
    static std::vector<std::byte> ram(3 * 4096);
    ram[5000] = std::byte{77};
    floppy.drives[1] = {3, 4, 9};
    source.add_device<timer>(clock);
    source.add_handlers(
        "old", {.version_id = 2, .save = [](writer& out) { out.put_be64(0x0123456789abcdef); }});
    source.add_ram("pc.ram", ram);
    source.add_device<fdc>(floppy, {.id = "isa/fdc"});
    source.add_device<kbd>(keyboard);
    source.add_device<kbd>(second, {.allow_duplicate = true});
    return saved(source);
}

} // namespace

TEST_CASE("a stream of which nothing is registered is written again byte by byte") {
    const std::vector<std::byte> bytes = foreign_stream();
    machine m = none_machine();
    CHECK(why(loaded(m, bytes, carry_unknown())) == "ok");
    CHECK(hex(saved(m)) == hex(bytes));
}

TEST_CASE("registered sections are loaded, the others keep their place around them") {
    const std::vector<std::byte> bytes = foreign_stream();
    machine m = none_machine();
    kbd_state keyboard;
    optional_state absent;
    std::vector<std::byte> ram(3 * 4096);
    m.add_device<kbd>(keyboard);
    m.add_ram("pc.ram", ram);
    m.add_device<optional_device>(absent);
    CHECK(why(loaded(m, bytes, carry_unknown())) == "ok");
    CHECK(keyboard.mode == 3);
    CHECK(ram[5000] == std::byte{77});
    absent.wanted = false;
    CHECK(hex(saved(m)) == hex(bytes));
    absent.wanted = true;
    CHECK_THAT(hex(saved(m)), contains(hex("'optional'")));
    keyboard.mode = 0x55;
    std::vector<std::byte> changed = saved(m);
    machine again = none_machine();
    again.add_device<kbd>(keyboard);
    keyboard = {};
    CHECK(why(loaded(again, changed, carry_unknown())) == "ok");
    CHECK(keyboard.mode == 0x55);
}

TEST_CASE("a description read beforehand serves as well, without holding the stream in memory") {
    const std::vector<std::byte> bytes = foreign_stream();
    const result<vmdesc> description = parse_vmdesc(json_of(bytes));
    REQUIRE(description.has_value());
    machine m = none_machine();
    const load_options options{.carry_unknown = true, .description = &*description, .tail_limit = 0};
    memory_input_channel input(bytes);
    CHECK(why(load(m, input, options)) == "ok");
    CHECK(hex(saved(m)) == hex(bytes));
}

TEST_CASE("what cannot be carried is an error that names it") {
    const std::vector<std::byte> bytes = foreign_stream();
    machine m = none_machine();
    CHECK_THAT(why(loaded(m, bytes, {.carry_unknown = true})),
        contains("timer: unknown section: expected a description"));

    load_options little = carry_unknown();
    little.tail_limit = 100;
    CHECK_THAT(why(loaded(m, bytes, little)), contains("timer: value out of range"));

    load_options no_ram = carry_unknown();
    no_ram.ram_limit = 8192;
    const result<void> r = loaded(m, bytes, no_ram);
    REQUIRE_FALSE(r);
    CHECK(r.error() == errc::bad_ram);
    CHECK(r.error().path() == "ram/pc.ram");

    // A live section is not in the description.
    const auto live = [](std::string_view item) {
        return wire(std::string(magic) + std::string(none_configuration) + std::string(item) +
                    "00 06 00000022 '{\"page_size\": 4096, \"devices\": []}'");
    };
    CHECK_THAT(why(loaded(m, live("01 00000001 04 'vfio' 00000000 00000001"), carry_unknown())),
        contains("vfio: unknown section: 'vfio' instance 0"));
    CHECK_THAT(why(loaded(m, live("04 00000001 04 'vfio' 00000000 00000001"), carry_unknown())),
        contains("vfio: unknown section: expected a section that is registered or described, found neither"));
    CHECK_THAT(why(loaded(m, stream("04 00000001 04 'vfio' 00000000 00000001"), carry_unknown())),
        contains("vfio: bad JSON description"));

    // A description whose devices have no text of their own to be written again.
    std::string json = R"({"d\u0065vices": [{"name": "vfio", "instance_id": 0, "size": 0, "fields": []}]})";
    CHECK_THAT(why(loaded(m,
                   wire(std::string(magic) + std::string(none_configuration) +
                        "04 00000001 04 'vfio' 00000000 00000001 7e 00000001 00 06 000000" +
                        hex(std::vector<std::byte>{static_cast<std::byte>(json.size())}) + "'" + json + "'"),
                   carry_unknown())),
        contains("without escapes"));
}

TEST_CASE("carried sections belong to the stream that was loaded last") {
    const std::vector<std::byte> bytes = foreign_stream();
    machine m = none_machine();
    kbd_state keyboard;
    m.add_device<kbd>(keyboard);
    CHECK(why(loaded(m, bytes, carry_unknown())) == "ok");
    CHECK(m.sections().size() == 6);
    CHECK(why(loaded(m, stream("04 00000001 05 'pckbd' 00000000 00000003 01020304 7e 00000001"))) == "ok");
    CHECK(m.sections().size() == 2);
    CHECK(m.ram()->blocks().empty());
}

TEST_CASE("every strict prefix of a stream that is carried is refused") {
    const std::vector<std::byte> bytes = foreign_stream();
    const result<vmdesc> description = parse_vmdesc(json_of(bytes));
    REQUIRE(description.has_value());
    const std::size_t without_description = bytes.size() - json_of(bytes).size() - 5;
    for (std::size_t size = 0; size < bytes.size(); ++size) {
        if (size > 300 && size < 4400) continue; // one page
        machine m = none_machine();
        const result<void> r =
            loaded(m, std::span(bytes).first(size), {.carry_unknown = true, .description = &*description});
        INFO(size << ": " << why(r));
        CHECK(r.has_value() == (size == without_description));
        if (!r) CHECK(!r.error().path().empty());
        machine n = none_machine();
        CHECK_FALSE(loaded(n, std::span(bytes).first(size), carry_unknown()));
    }
}

// ---- channels ----------------------------------------------------------------------------------------------

TEST_CASE("a machine is saved to and loaded from URIs, channels and what the user has") {
    std::string directory = (std::filesystem::temp_directory_path() / "vmstate-machine-XXXXXX").string();
    REQUIRE(::mkdtemp(directory.data()) != nullptr);
    const std::string file = directory + "/vm.state";
    kbd_state state{1, 2, 3, 4};
    machine m = none_machine();
    m.add_device<kbd>(state);
    const std::vector<std::byte> expected = saved(m);
    const auto check_loads = [&](result<void> r) {
        CHECK(why(r) == "ok");
        CHECK(state.mode == 3);
        state = {};
    };

    result<void> r = save(m, *open_output("file:" + file));
    CHECK(why(r) == "ok");
    check_loads(load(m, *open_input("file:" + file)));
    state = {1, 2, 3, 4};
    CHECK(why(save(m, open_output("exec:gzip > " + file))) == "ok");
    check_loads(load(m, *open_input("exec:gzip -dc " + file)));
    state = {1, 2, 3, 4};

    opened_output kept = open_output("file:" + file);
    CHECK(why(save(m, kept)) == "ok");
    CHECK(why((*kept)->close()) == "ok");
    opened_input input = open_input("file:" + file);
    check_loads(load(m, *input));
    state = {1, 2, 3, 4};
    std::filesystem::remove_all(directory);

    CHECK(why(save(m, std::make_unique<memory_output_channel>())) == "ok");
    memory_output_channel memory;
    CHECK(why(save(m, memory)) == "ok");
    CHECK(hex(memory.written()) == hex(expected));
    memory_input_channel back(memory.written());
    check_loads(load(m, back));
    check_loads([&] {
        state = {};
        return load(m, std::make_unique<memory_input_channel>(memory.written()));
    }());

    struct own_channel {
        std::vector<std::byte> bytes = {};
        std::size_t position = 0;
        result<std::size_t> write_some(std::span<const std::byte> from) {
            bytes.insert(bytes.end(), from.begin(), from.end());
            return from.size();
        }
        result<std::size_t> read_some(std::span<std::byte> into) {
            const std::size_t count = std::min(into.size(), bytes.size() - position);
            std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(position), count, into.begin());
            position += count;
            return count;
        }
    } own;
    state = {1, 2, 3, 4};
    CHECK(why(save(m, own)) == "ok");
    CHECK(own.bytes == expected);
    check_loads(load(m, own));
}

TEST_CASE("a channel that cannot be opened, written or closed is what saving and loading report") {
    machine m = none_machine();
    CHECK_THAT(why(save(m, *open_output("file:/nonexistent/vm.state"))),
        contains("input/output error: /nonexistent/vm.state"));
    CHECK_THAT(why(save(m, open_output("file:/nonexistent/vm.state"))), contains("/nonexistent/vm.state"));
    CHECK_THAT(why(load(m, *open_input("file:/nonexistent/vm.state"))), contains("/nonexistent/vm.state"));
    CHECK_THAT(why(load(m, open_input("rdma:localhost:4444"))), contains("unsupported"));
    CHECK_THAT(why(save(m, *open_output("exec:cat > /dev/null; exit 5"))), contains("exit status 5"));
    CHECK_THAT(why(load(m, *open_input("exec:exit 6"))), contains("header: stream ends too early"));
    CHECK(save(m, std::unique_ptr<output_channel>()).error() == errc::invalid_argument);
    CHECK(load(m, std::unique_ptr<input_channel>()).error() == errc::invalid_argument);
    const std::unique_ptr<input_channel> null;
    CHECK(load(m, null).error() == errc::invalid_argument);
    CHECK_THAT(why(save(m, *open_output("file:/dev/full"))), contains("write: No space left on device"));
}
