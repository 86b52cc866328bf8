// SPDX-License-Identifier: BSL-1.0
// Whole streams, put together by hand, walked to the last byte: what is there is told, what is wrong is named.
#include "support/catch.hpp"

#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/stream_walk.hpp>
#include <vmstate/machine/vmdesc_parse.hpp>

#include <algorithm>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

using namespace vmstate;
using vmstate::tests::contains;

namespace {

/// Writes streams item by item.
class stream_builder {
public:
    vector_writer out;

    void header(std::uint32_t version = stream_version) {
        out.put_be32(stream_magic);
        out.put_be32(version);
    }
    void text(std::string_view bytes) { out.write(bytes.data(), bytes.size()); }
    void configuration(std::string_view machine) {
        out.put_u8(7);
        out.put_be32(static_cast<std::uint32_t>(machine.size()));
        text(machine);
    }
    void subsection(std::string_view name, std::uint32_t version = 1) {
        out.put_u8(5);
        out.put_counted_string(name);
        out.put_be32(version);
    }
    void section(section_type type, std::uint32_t id, std::string_view name, std::uint32_t instance,
        std::uint32_t version) {
        out.put_u8(static_cast<std::uint8_t>(type));
        out.put_be32(id);
        out.put_counted_string(name);
        out.put_be32(instance);
        out.put_be32(version);
    }
    void piece(section_type type, std::uint32_t id) {
        out.put_u8(static_cast<std::uint8_t>(type));
        out.put_be32(id);
    }
    void footer(std::uint32_t id) {
        out.put_u8(0x7e);
        out.put_be32(id);
    }
    void device(std::uint32_t id, std::string_view name, std::uint32_t instance, std::uint32_t version,
        std::string_view body) {
        section(section_type::full, id, name, instance, version);
        text(body);
        footer(id);
    }
    void command(command number, std::string_view payload = {}) {
        out.put_u8(8);
        out.put_be16(static_cast<std::uint16_t>(number));
        out.put_be16(static_cast<std::uint16_t>(payload.size()));
        text(payload);
    }
    void ram_start(std::uint64_t length = 0x4000) {
        section(section_type::start, 2, "ram", 0, 4);
        out.put_be64(length | ram_flag::mem_size);
        out.put_counted_string("pc.ram");
        out.put_be64(length);
        out.put_be64(ram_flag::eos);
        footer(2);
    }
    void zero_page(std::uint64_t offset) {
        out.put_be64(offset | ram_flag::zero);
        out.put_counted_string("pc.ram");
        out.put_u8(0);
    }
    void ram_end() {
        piece(section_type::end, 2);
        out.put_be64(ram_flag::eos);
        footer(2);
    }
    void description(std::string_view json) {
        out.put_u8(0);
        out.put_u8(6);
        out.put_be32(static_cast<std::uint32_t>(json.size()));
        text(json);
    }
    std::vector<std::byte> take() { return out.take(); }
};

std::string be(std::uint64_t value, std::size_t bytes) {
    std::string text;
    for (std::size_t i = bytes; i-- != 0;)
        text += static_cast<char>(value >> (8 * i));
    return text;
}

constexpr std::string_view two_devices =
    R"({"page_size": 4096, "devices": [{"name": "kbd", "instance_id": 0, "vmsd_name": "kbd", "version": 3, "fields": [)"
    R"({"name": "status", "type": "uint8", "size": 1}, {"name": "mode", "type": "uint8", "size": 1}]}, )"
    R"({"name": "pic", "instance_id": 1, "vmsd_name": "pic", "version": 1, "fields": [{"name": "irr", "type": "uint16", "size": 2}]}]})";

/// Writes down what it is told.
class recorder final : public stream_visitor {
public:
    void configuration(const stream_configuration& found) override { machine = found; }
    void command(const stream_command& found) override { add("command " + std::string(found.name())); }
    void discard(const ram_discard& range) override {
        add("discard " + range.block + ' ' + std::to_string(range.start) + '+' +
            std::to_string(range.length));
    }
    void begin_package(std::uint64_t, std::uint64_t size) override { add("package " + std::to_string(size)); }
    void end_package() override { add("end of package"); }
    void begin_ram(const stream_section& section, std::size_t page_size) override {
        add("ram " + std::to_string(static_cast<int>(section.type)) + " pages of " +
            std::to_string(page_size));
    }
    void ram_block(const stream_ram_block& block, std::size_t index) override {
        add("block " + std::to_string(index) + ' ' + block.name + ' ' + std::to_string(block.used_length) +
            (block.page_size ? " page size " + std::to_string(*block.page_size) : "") +
            (block.guest_address ? " at " + std::to_string(*block.guest_address) : ""));
    }
    void ram_page(const ram_record& record, std::size_t block, std::span<const std::byte> payload) override {
        add(std::string(to_string(record.kind)) + ' ' + std::to_string(block) + ' ' +
            std::to_string(record.value) + ' ' + std::to_string(payload.size()));
    }
    void device(const stream_section& section, const vmdesc_device* description,
        std::span<const std::byte> body, body_extent extent) override {
        constexpr const char* extents[] = {"described", "guessed", "broken", "unknown"};
        add(section.name() + ' ' + std::to_string(body.size()) + ' ' + extents[static_cast<int>(extent)] +
            (description != nullptr ? "" : " alone"));
    }
    void end_of_sections(std::uint64_t) override { add("end"); }
    void description(const vmdesc_location&) override { add("description"); }
    void problem(const error& found) override { problems.push_back(found.message()); }

    stream_configuration machine;
    std::vector<std::string> seen;
    std::vector<std::string> problems;

private:
    void add(std::string line) { seen.push_back(std::move(line)); }
};

struct walked {
    recorder told;
    error first;
};

void walk(std::span<const std::byte> stream, walked& into) {
    vmdesc tree;
    stream_walk_options options;
    if (const result<vmdesc_location> location = find_vmdesc(stream))
        if (result<vmdesc> parsed = parse_vmdesc(location->text_in(stream))) {
            tree = std::move(*parsed);
            options.description = &tree;
            options.location = *location;
        }
    const result<void> outcome = walk_stream(stream, options, into.told);
    if (!outcome)
        into.first = outcome.error();
    CHECK(outcome.has_value() == into.told.problems.empty());
    if (!outcome)
        CHECK(outcome.error().message() == into.told.problems.front());
}

/// What a stream is walked as; fails the test if there is a problem.
std::vector<std::string> items_of(std::span<const std::byte> stream) {
    walked whole;
    walk(stream, whole);
    if (whole.first)
        FAIL(whole.first.message());
    return whole.told.seen;
}
/// The first problem with a stream whose head is fine and whose items `build` writes.
std::string problem_with(const std::function<void(stream_builder&)>& build) {
    stream_builder stream;
    stream.header();
    build(stream);
    walked whole;
    walk(stream.take(), whole);
    return whole.first ? whole.first.message() : "none";
}

using lines = std::vector<std::string>;

std::vector<std::byte> small_stream() {
    stream_builder stream;
    stream.header();
    stream.configuration("pc-i440fx-7.2");
    stream.ram_start();
    stream.piece(section_type::part, 2);
    stream.zero_page(0x1000);
    stream.out.put_be64(0x2000 | ram_flag::page | ram_flag::continued);
    stream.out.fill(std::byte{7}, 4096);
    stream.out.put_be64(ram_flag::eos);
    stream.footer(2);
    stream.ram_end();
    stream.device(7, "kbd", 0, 3, "\x1c\x03");
    stream.device(9, "pic", 1, 1, be(0x1234, 2));
    stream.description(two_devices);
    return stream.take();
}

} // namespace

TEST_CASE("a whole stream is walked to its last byte") {
    CHECK(items_of(small_stream()) == lines{"ram 1 pages of 4096", "block 0 pc.ram 16384",
                                          "ram 2 pages of 4096", "ZERO 0 4096 0", "PAGE 0 8192 4096",
                                          "ram 3 pages of 4096", "kbd 2 described", "pic#1 2 described",
                                          "end", "description"});
}

TEST_CASE("every subsection of the configuration is read") {
    stream_builder stream;
    stream.header();
    stream.configuration("virt-7.2");
    stream.subsection("configuration/target-page-bits");
    stream.out.put_be32(14);
    stream.subsection("configuration/capabilities");
    stream.out.put_be32(1);
    stream.out.put_counted_string("x-ignore-shared");
    stream.subsection("configuration/uuid");
    stream.text("0123456789abcdef");
    stream.section(section_type::start, 2, "ram", 0, 4);
    stream.out.put_be64(0x8000 | ram_flag::mem_size);
    stream.out.put_counted_string("mach-virt.ram");
    stream.out.put_be64(0x8000);
    stream.out.put_be64(0x40000000);
    stream.out.put_be64(ram_flag::eos);
    stream.footer(2);
    stream.ram_end();
    stream.out.put_u8(0);
    walked whole;
    walk(stream.take(), whole);
    CHECK(whole.told.problems == lines{});
    CHECK(whole.told.machine.machine == "virt-7.2");
    CHECK(whole.told.machine.target_page_bits == 14U);
    CHECK(whole.told.machine.capabilities == std::vector<std::string>{"x-ignore-shared"});
    REQUIRE(whole.told.machine.uuid.has_value());
    CHECK(whole.told.machine.uuid->at(15) == 'f');
    CHECK(whole.told.seen.at(0) == "ram 1 pages of 16384");
    CHECK(whole.told.seen.at(1) == "block 0 mach-virt.ram 32768 at 1073741824");
}

TEST_CASE("a postcopy stream is walked, its package and its discards included") {
    stream_builder package;
    package.command(command::postcopy_listen);
    package.device(7, "kbd", 0, 3, "\x1c\x03");
    package.device(9, "pic", 1, 1, "\x7e");
    package.command(command::ping, be(3, 4));
    package.command(command::postcopy_run);
    const std::vector<std::byte> inside = package.take();

    stream_builder stream;
    stream.header();
    stream.configuration("pc-i440fx-7.2");
    stream.command(command::open_return_path);
    stream.command(command::ping, be(1, 4));
    stream.command(command::postcopy_advise, be(0x201000, 8) + be(4096, 8));
    stream.section(section_type::start, 2, "ram", 0, 4);
    stream.out.put_be64(0x8000 | ram_flag::mem_size);
    stream.out.put_counted_string("huge");
    stream.out.put_be64(0x4000);
    stream.out.put_be64(0x200000);
    stream.out.put_counted_string("pc.ram");
    stream.out.put_be64(0x4000);
    stream.out.put_be64(ram_flag::eos);
    stream.footer(2);
    stream.command(command::postcopy_ram_discard, std::string(1, '\0') + "\x06pc.ram" + std::string(1, '\0') +
                                                      be(0, 8) + be(0x1000, 8) + be(0x2000, 8) +
                                                      be(0x2000, 8));
    stream.command(command::packaged, be(inside.size(), 4));
    stream.out.write(inside);
    stream.command(command::ping, be(4, 4));
    stream.piece(section_type::end, 2);
    stream.out.put_be64(ram_flag::eos);
    stream.footer(2);
    stream.out.put_u8(0);
    CHECK(items_of(stream.take()) ==
          lines{"command OPEN_RETURN_PATH", "command PING", "command POSTCOPY_ADVISE", "ram 1 pages of 4096",
              "block 0 huge 16384 page size 2097152", "block 1 pc.ram 16384", "command POSTCOPY_RAM_DISCARD",
              "discard pc.ram 0+4096", "discard pc.ram 8192+8192", "command PACKAGED",
              "package " + std::to_string(inside.size()), "command POSTCOPY_LISTEN", "kbd 2 guessed alone",
              "pic#1 1 guessed alone", "command PING", "command POSTCOPY_RUN", "end of package",
              "command PING", "ram 3 pages of 4096", "end"});
}

TEST_CASE("a device that does not follow its description is shown, and the walk goes on behind it") {
    stream_builder stream;
    stream.header();
    stream.device(7, "kbd", 0, 3, "\x1c\x03\x05");
    stream.device(9, "pic", 1, 2, be(0x1234, 2));
    stream.device(9, "pic", 2, 1, be(0x1234, 2));
    stream.description(two_devices);
    walked whole;
    walk(stream.take(), whole);
    CHECK(whole.told.seen ==
          lines{"kbd 3 broken", "pic#1 2 broken", "pic#2 2 guessed alone", "end", "description"});
    CHECK(
        whole.told.problems ==
        lines{"kbd: malformed section: expected the section's footer (0x7e), found 0x05 (offset 27)",
            "pic#1: bad JSON description: expected version 1, found 2 (offset 46)",
            "pic#2: bad JSON description: expected every section in the description, found not this one (offset 57)"});
}

TEST_CASE("a footer of another section is a problem that the walk steps over") {
    stream_builder stream;
    stream.header();
    stream.section(section_type::full, 7, "kbd", 0, 3);
    stream.text("\x1c\x03");
    stream.footer(8);
    stream.device(9, "pic", 1, 1, be(0x1234, 2));
    stream.description(two_devices);
    walked whole;
    walk(stream.take(), whole);
    CHECK(whole.told.seen == lines{"kbd 2 broken", "pic#1 2 described", "end", "description"});
    CHECK(whole.told.problems ==
          lines{"kbd: malformed section: expected footer of section 7, found 8 (offset 28)"});
}

TEST_CASE("what is wrong with a stream is named, with section and offset") {
    const auto ram = [](const std::function<void(stream_builder&)>& records) {
        return problem_with([&](stream_builder& stream) {
            stream.ram_start();
            stream.piece(section_type::part, 2);
            records(stream);
        });
    };
    using builder = stream_builder;

    walked nothing;
    walk({}, nothing);
    CHECK(nothing.first.message() == "stream ends too early: expected 4 bytes, found 0 (offset 0)");
    walked picture;
    walk(std::vector<std::byte>(100), picture);
    CHECK(picture.first.message() ==
          "not a migration stream: expected \"QEVM\", found something else (offset 0)");
    stream_builder old;
    old.header(2);
    walked obsolete;
    walk(old.take(), obsolete);
    CHECK(obsolete.first.message() == "not a migration stream: expected version 3, found 2 (offset 4)");

    CHECK(problem_with([](builder&) {}) == "stream ends too early: expected 1 byte, found 0 (offset 8)");
    CHECK(problem_with([](builder& s) { s.out.put_u8(0); }) == "none");
    CHECK(problem_with([](builder& s) { s.text(std::string(2, '\0')); }) ==
          "bytes left over: expected the end, or a description (0x06), found 0x00 (offset 9)");
    CHECK(problem_with([](builder& s) { s.out.put_u8(0x7e); }) ==
          "malformed section: expected an item, found type byte 0x7e (offset 8)");
    CHECK(problem_with([](builder& s) {
        s.description(two_devices);
        s.out.put_u8(1);
    }) == "bytes left over: expected the end, found 1 bytes (offset " +
              std::to_string(14 + two_devices.size()) + ")");
    CHECK(
        problem_with([](builder& s) { s.description(two_devices); }) ==
        "kbd: bad JSON description: expected every section that the description has, found not this one (offset 9)");

    // configuration
    CHECK(problem_with([](builder& s) {
        s.out.put_u8(7);
        s.out.put_be32(0x7fffffff);
    }) == "configuration/name: machine configured differently: expected a machine's name of at most 255 bytes, found "
           "2147483647 (offset 9)");
    CHECK(problem_with([](builder& s) {
        s.configuration("pc");
        s.subsection("configuration/other");
    }) == "configuration/other: unknown subsection: configuration/other (offset 15)");
    CHECK(
        problem_with([](builder& s) {
            s.configuration("pc");
            s.subsection("configuration/target-page-bits");
            s.out.put_be32(40);
        }) ==
        "configuration/target-page-bits: machine configured differently: expected 10 to 16 target page bits, found 40 (offset 51)");
    CHECK_THAT(problem_with([](builder& s) {
        s.configuration("pc");
        s.subsection("configuration/capabilities");
        s.out.put_be32(0xffffffff);
        s.text("\x03xyz");
    }),
        contains("configuration/capabilities: machine configured differently: expected at most 255 capabilities"));
    CHECK_THAT(problem_with([](builder& s) {
        s.configuration("pc");
        s.subsection("configuration/capabilities");
        s.out.put_be32(2);
        s.text("\x03xyz");
    }),
        contains("configuration/capabilities: stream ends too early"));
    CHECK_THAT(problem_with([](builder& s) {
        s.configuration("pc");
        s.subsection("configuration/uuid");
        s.text("short");
    }),
        contains("configuration/uuid: stream ends too early"));

    // sections
    CHECK(problem_with([](builder& s) { s.section(section_type::full, 1, "", 0, 1); }) ==
          "malformed section: expected a name, found none (offset 13)");
    CHECK(problem_with([](builder& s) {
        s.device(1, "a", 0, 1, "xyz");
        s.out.put_u8(0);
    }) == "none");
    CHECK(problem_with([](builder& s) {
        s.section(section_type::full, 1, "a", 3, 1);
        s.text("xyz");
    }) == "a#3: stream ends too early: expected the section's footer, found none (offset 23)");
    CHECK(problem_with([](builder& s) { s.piece(section_type::part, 5); }) ==
          "malformed section: expected the id of a section that has begun, found 5 (offset 9)");
    CHECK(problem_with([](builder& s) {
        s.ram_start();
        s.ram_start();
    }) == "malformed section: expected a new section id, found 2 (offset 62)");
    CHECK(problem_with([](builder& s) {
        s.ram_start();
        s.out.put_u8(0);
    }) == "ram: malformed section: expected the END of every section, found none (offset 61)");
    CHECK(problem_with([](builder& s) {
        s.ram_start();
        s.piece(section_type::end, 2);
        s.out.put_be64(ram_flag::eos);
        s.footer(3);
    }) == "ram: malformed section: expected footer of section 2, found 3 (offset 75)");
    CHECK(problem_with([](builder& s) { s.section(section_type::full, 2, "ram", 0, 4); }) ==
          "malformed section: expected START, PART or END of ram, found FULL (offset 8)");

    // RAM
    CHECK(ram([](builder& s) { s.zero_page(0x4000); }) ==
          "ram/pc.ram: bad RAM record: expected a page within 16384 bytes, found offset 16384 (offset 66)");
    CHECK(
        ram([](builder& s) { s.zero_page(~std::uint64_t{0xfff}); }) ==
        "ram/pc.ram: bad RAM record: expected a page within 16384 bytes, found offset 18446744073709547520 (offset 66)");
    CHECK(ram([](builder& s) { s.out.put_be64(ram_flag::zero | ram_flag::continued); }) ==
          "ram: bad RAM record: expected a block's name in the first page record, found 34 (offset 66)");
    CHECK(ram([](builder& s) {
        s.out.put_be64(ram_flag::zero);
        s.out.put_counted_string("vga");
        s.out.put_u8(0);
    }) == "ram/vga: bad RAM record: expected a block of the list, found another (offset 66)");
    CHECK_THAT(ram([](builder& s) { s.out.put_be64(0x80); }),
        contains("ram: bad RAM record: expected a RAM record's flags, found 128"));
    CHECK_THAT(
        ram([](builder& s) { s.out.put_be64(0x0a); }), contains("expected a RAM record's flags, found 10"));
    CHECK_THAT(ram([](builder& s) { s.out.put_be64(0x30); }), contains("CONTINUE on a page alone"));
    CHECK_THAT(ram([](builder& s) {
        s.out.put_be64(ram_flag::page);
        s.out.put_counted_string("pc.ram");
        s.text("x");
    }),
        contains("ram/pc.ram: stream ends too early: expected 4096 bytes, found 1"));
    CHECK_THAT(
        ram([](builder& s) { s.out.put_be64(0x4000 | ram_flag::mem_size); }), contains("one list of blocks"));
    CHECK_THAT(ram([](builder& s) {
        s.out.put_be64(ram_flag::xbzrle);
        s.out.put_counted_string("pc.ram");
        s.out.put_u8(1);
        s.out.put_be16(4097);
    }),
        contains("an XBZRLE length within a page"));
    CHECK_THAT(ram([](builder& s) {
        s.out.put_be64(ram_flag::xbzrle);
        s.out.put_counted_string("pc.ram");
        s.out.put_u8(1);
        s.out.put_be16(3);
        s.text("\x01\x05x");
    }),
        contains("runs that stay within the page"));
    CHECK_THAT(problem_with([](builder& s) {
        s.section(section_type::start, 2, "ram", 0, 4);
        s.out.put_be64(0x1000 | ram_flag::mem_size);
        s.out.put_counted_string("a");
        s.out.put_be64(0x2000);
    }),
        contains("ram/a: bad RAM record: expected a length of at most 4096, found 8192"));
    CHECK_THAT(problem_with([](builder& s) {
        s.section(section_type::start, 2, "ram", 0, 4);
        s.out.put_be64(0x2000 | ram_flag::mem_size);
        s.out.put_counted_string("a");
        s.out.put_be64(0x1000);
        s.out.put_counted_string("a");
        s.out.put_be64(0x1000);
    }),
        contains("ram/a: bad RAM record: expected each block once"));

    // commands
    CHECK(problem_with([](builder& s) { s.command(static_cast<command>(0)); }) ==
          "bad command: expected a command, found 0 (offset 9)");
    CHECK(problem_with([](builder& s) { s.command(static_cast<command>(12)); }) ==
          "bad command: expected a command, found 12 (offset 9)");
    CHECK(problem_with([](builder& s) { s.command(command::ping, "12345"); }) ==
          "PING: bad command: expected 4 bytes, found 5 (offset 11)");
    CHECK(problem_with([](builder& s) {
        s.out.put_u8(8);
        s.out.put_be16(10);
        s.out.put_be16(9);
    }) == "RECV_BITMAP: stream ends too early: expected 9 bytes, found 0 (offset 13)");
    CHECK(problem_with([](builder& s) { s.command(command::postcopy_advise, "12345678"); }) ==
          "POSTCOPY_ADVISE: bad command: expected 0 or 16 bytes, found 8 (offset 13)");
    CHECK(problem_with([](builder& s) { s.command(command::packaged, be(100, 4)); }) ==
          "PACKAGED: stream ends too early: expected 100 bytes, found 0 (offset 17)");
    CHECK(problem_with([](builder& s) {
        s.command(command::packaged, be(1, 4));
        s.text(std::string(2, '\0'));
    }) == "malformed section: expected an item of the package, found 0x00 (offset 17)");
    CHECK_THAT(problem_with([](builder& s) {
        s.ram_start();
        s.command(command::postcopy_ram_discard,
            std::string(1, '\0') + "\x06pc.ram" + std::string(1, '\0') + be(0x3000, 8) + be(0x2000, 8));
    }),
        contains(
            "POSTCOPY_RAM_DISCARD: bad RAM record: expected a range within 16384 bytes, found 12288+8192"));
    CHECK_THAT(problem_with([](builder& s) {
        s.command(command::postcopy_ram_discard,
            std::string(1, '\0') + "\x03vga" + std::string(1, '\0') + be(0, 8) + be(1, 8));
    }),
        contains("a block of the list, found \"vga\""));
}

TEST_CASE("each prefix of a stream is an error within it, and each changed byte an error or another stream") {
    const std::vector<std::byte> whole = small_stream();
    const std::size_t json = whole.size() - two_devices.size();
    for (std::size_t size = 0; size < whole.size(); ++size) {
        // Where a stream without description would end it is whole; devices are then told by their footers.
        if (size == json - 5)
            continue;
        if (size > 200 && size < 4200)
            continue;
        walked part;
        walk(std::span<const std::byte>(whole).first(size), part);
        INFO(size);
        REQUIRE(static_cast<bool>(part.first));
        CHECK(part.first.offset() <= size);
    }
    for (std::size_t i = 0; i < json; ++i) {
        if (i > 200 && i < 4200)
            continue;
        for (int bit = 0; bit < 8; ++bit) {
            std::vector<std::byte> changed = whole;
            changed[i] ^= static_cast<std::byte>(1 << bit);
            walked other;
            walk(changed, other);
            if (other.first)
                CHECK(other.first.offset() <= changed.size());
        }
    }
}
