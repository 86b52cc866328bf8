// SPDX-License-Identifier: BSL-1.0
// The "ram" section: what is written for memory that stands still, and every record of a precopy stream read.
#include "vocabulary_support.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/vmstate.hpp>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

using namespace vmstate;
using vmstate::tests::contains;
using vmstate::tests::hex;
using vmstate::tests::wire;

namespace {

constexpr std::size_t page_size = 4096;

std::string why(const result<void>& r) { return r ? "ok" : r.error().message(); }
std::string page_of(std::string_view byte) {
    std::string text;
    for (std::size_t i = 0; i < page_size; ++i) text += byte;
    return text;
}
std::vector<std::byte> filled(std::size_t pages, int value) {
    return std::vector<std::byte>(pages * page_size, static_cast<std::byte>(value));
}
bool all_are(std::span<const std::byte> bytes, int value) {
    for (const std::byte byte : bytes)
        if (byte != static_cast<std::byte>(value)) return false;
    return true;
}

constexpr std::string_view header = "5145564d 00000003 07 00000004 'none'";
constexpr std::string_view start = "01 00000002 03 'ram' 00000000 00000004";
constexpr std::string_view footer = "7e 00000002";
constexpr std::string_view eos = "0000000000000010";
/// One block of two pages, "a".
constexpr std::string_view list = "0000000000002004 01 'a' 0000000000002000 0000000000000010";

/// A stream whose memory section has these records in a PART.
std::vector<std::byte> stream_with(std::string_view records, std::string_view blocks = list) {
    return wire(std::string(header) + std::string(start) + std::string(blocks) + std::string(footer) +
                "02 00000002" + std::string(records) + std::string(eos) + std::string(footer) +
                "03 00000002" + std::string(eos) + std::string(footer) + "00");
}

struct two_pages {
    std::vector<std::byte> memory = filled(2, 0x11);
    machine m{{.name = "none", .suppress_vmdesc = true}};
    two_pages() { m.add_ram("a", memory); }

    result<void> load(const std::vector<std::byte>& bytes, const load_options& options = {}) {
        memory_reader in(bytes);
        return vmstate::load(m, in, options);
    }
    std::span<const std::byte> page(std::size_t n) const {
        return std::span<const std::byte>(memory).subspan(n * page_size, page_size);
    }
};

std::string refused(std::string_view records, std::string_view blocks = list) {
    two_pages guest;
    const result<void> r = guest.load(stream_with(records, blocks));
    REQUIRE_FALSE(r);
    CHECK_THAT(std::string(r.error().path()), contains("ram"));
    CHECK(r.error().offset() != error::no_offset);
    return r.error().message();
}

} // namespace

TEST_CASE("memory is a list of blocks, every page once, and nothing left at the end") {
    machine m{{.name = "none", .suppress_vmdesc = true}};
    std::vector<std::byte> small = filled(1, 0);
    std::vector<std::byte> large = filled(2, 0);
    for (std::size_t i = 0; i < page_size; ++i) large[page_size + i] = std::byte{0xab};
    m.add_ram("rom", small);
    m.add_ram("pc.ram", large);
    vector_writer out;
    REQUIRE(save(m, out));
    // The largest block first, as in QEMU's list; CONTINUE where the block is the one before.
    CHECK(
        hex(out.written()) ==
        hex(std::string(header) +
            "01 00000000 03 'ram' 00000000 00000004"
            "0000000000003004 06 'pc.ram' 0000000000002000 03 'rom' 0000000000001000 0000000000000010 7e 00000000"
            "02 00000000 0000000000000002 06 'pc.ram' 00 0000000000001028" +
            page_of("ab") +
            "0000000000000002 03 'rom' 00 0000000000000010 7e 00000000"
            "03 00000000 0000000000000010 7e 00000000 00"));
}

TEST_CASE("memory that was saved is loaded") {
    machine source{{.name = "none"}};
    std::vector<std::byte> ram(64 * page_size);
    for (std::size_t i = 0; i < ram.size(); ++i)
        if (i / page_size % 3 != 0) ram[i] = static_cast<std::byte>(i * 31 / 7);
    source.add_ram("pc.ram", ram);
    memory_output_channel saved;
    REQUIRE(save(source, saved));

    std::vector<std::byte> copy(ram.size(), std::byte{0x5a});
    machine destination{{.name = "none"}};
    destination.add_ram("pc.ram", copy);
    memory_input_channel input(saved.written());
    CHECK(why(load(destination, input)) == "ok");
    CHECK(copy == ram);
}

TEST_CASE("a zero page is all zero, to the last byte") {
    std::array<std::byte, page_size> page{};
    CHECK(is_zero_page(page));
    for (const std::size_t i :
        {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{2048}, page_size - 1}) {
        page[i] = std::byte{1};
        CHECK_FALSE(is_zero_page(page));
        page[i] = std::byte{0};
    }
    CHECK(is_zero_page({}));
}

TEST_CASE("pages are loaded as they are or as a fill byte, and CONTINUE stays with the block") {
    two_pages guest;
    CHECK(why(guest.load(stream_with("0000000000001008 01 'a'" + page_of("5a") + "0000000000000022 00"))) ==
          "ok");
    CHECK(all_are(guest.page(0), 0));
    CHECK(all_are(guest.page(1), 0x5a));
    // QEMU 7.2 fills a page with any byte.
    CHECK(why(guest.load(stream_with("0000000000000002 01 'a' 77"))) == "ok");
    CHECK(all_are(guest.page(0), 0x77));
    // A page sent again: the last one counts.
    CHECK(
        why(guest.load(stream_with(
            "0000000000000002 01 'a' 01 0000000000000022 02 0000000000000200 0000000000000022 03"))) == "ok");
    CHECK(all_are(guest.page(0), 3));
}

TEST_CASE("CONTINUE is remembered from section to section, and not from stream to stream") {
    two_pages guest;
    const std::string part = "02 00000002";
    CHECK(why(guest.load(
              wire(std::string(header) + std::string(start) + std::string(list) + std::string(footer) + part +
                   "0000000000000002 01 'a' 41" + std::string(eos) + std::string(footer) + part +
                   "0000000000001022 42" + std::string(eos) + std::string(footer) + "03 00000002" +
                   std::string(eos) + std::string(footer) + "00"))) == "ok");
    CHECK(all_are(guest.page(0), 0x41));
    CHECK(all_are(guest.page(1), 0x42));
    CHECK_THAT(why(guest.load(stream_with("0000000000000022 00"))),
        contains("expected a block's name in the first page record"));
}

TEST_CASE("XBZRLE changes a page where it says so") {
    two_pages guest;
    // 16 bytes kept, 3 changed, 300 kept (two bytes of length), 1 changed.
    CHECK(why(guest.load(stream_with("0000000000001040 01 'a' 01 0009 1003aabbcc ac0201dd"))) == "ok");
    std::vector<std::byte> expected = filled(1, 0x11);
    expected[16] = std::byte{0xaa};
    expected[17] = std::byte{0xbb};
    expected[18] = std::byte{0xcc};
    expected[319] = std::byte{0xdd};
    CHECK(hex(guest.page(1)) == hex(expected));
    CHECK(all_are(guest.page(0), 0x11));
    // Nothing changed; the first byte changed; all of the page changed.
    CHECK(why(guest.load(stream_with("0000000000000040 01 'a' 01 0000 0000000000000060 01 0003 0001ee"))) ==
          "ok");
    CHECK(guest.page(0)[0] == std::byte{0xee});
}

TEST_CASE("XBZRLE that is broken, or leaves the page, is refused") {
    for (const std::string_view encoded : {
             "0002 1000",          // a changed run of nothing
             "0001 10",            // no changed run
             "0003 100201",        // a changed run longer than what is there
             "0005 8020 01 ee 00", // kept 4096 of a page of 4096, then one more
             "0006 0001ee 0001ee", // a kept run of nothing in the middle
             "0003 ff8001",        // a length of three bytes
             "0004 ff7f 01 ee",    // kept beyond the page
             "0001 80",            // half a length
         }) {
        CAPTURE(encoded);
        CHECK_THAT(refused("0000000000000040 01 'a' 01" + std::string(encoded)),
            contains("ram/a: bad RAM record: expected an XBZRLE encoding"));
    }
    CHECK_THAT(refused("0000000000000040 01 'a' 02 0003 0001ee"), contains("XBZRLE encoding 1"));
    CHECK_THAT(refused("0000000000000040 01 'a' 01 1001" + page_of("00") + "00"),
        contains("XBZRLE length within a page"));
}

TEST_CASE("records that do not fit the machine are refused with block and offset") {
    CHECK(refused("0000000000000002 01 'b' 00") ==
          "ram: bad RAM record: expected a block of the stream's list, found b (offset 70)");
    CHECK_THAT(refused("0000000000002002 01 'a' 00"),
        contains("ram/a: bad RAM record: expected a page within 8192 bytes, found offset 8192 (offset 70)"));
    CHECK_THAT(refused("fffffffffffff008 01 'a'" + page_of("00")),
        contains("ram/a: bad RAM record: expected a page within 8192 bytes"));
    CHECK_THAT(refused("0000000000000002 00"), contains("expected a block's name"));
    CHECK_THAT(refused("0000000000000001"), contains("a RAM record's flags"));
    CHECK_THAT(refused("000000000000000a 01 'a' 00"), contains("a RAM record's flags"));
    CHECK_THAT(refused("0000000000000400"), contains("a RAM record's flags"));
    CHECK_THAT(refused("0000000000000080"), contains("a RAM record's flags"));
    CHECK_THAT(refused("0000000000000030"), contains("CONTINUE on a page alone"));
    CHECK_THAT(
        refused("0000000000000100 01 'a' 00000004 00000000"), contains("ram/a: unsupported: COMPRESS_PAGE"));
    CHECK_THAT(refused("0000000000000100 01 'a' ffffffff"), contains("a compressed page's length"));
}

TEST_CASE("the list of blocks has to be this machine's") {
    CHECK(refused("", "0000000000002004 01 'b' 0000000000002000 0000000000000010") ==
          "ram/b: bad RAM record: expected a block of this machine, found b (offset 42)");
    CHECK_THAT(refused("", "0000000000001004 01 'a' 0000000000001000 0000000000000010"),
        contains("ram/a: bad RAM record: expected 8192 bytes, found 4096 bytes"));
    CHECK_THAT(refused("", "0000000000002004 01 'a' 0000000000004000 0000000000000010"),
        contains("expected a length of at most 8192, found 16384"));
    CHECK_THAT(refused("", "0000000000002004 01 'a' 0000000000000000 0000000000000010"),
        contains("ram/a: bad RAM record: expected 8192 bytes, found 0 bytes"));
    CHECK_THAT(refused("", "0000000000002004 00"), contains("expected a block's name, found none"));
    CHECK_THAT(refused("", "fffffffffffff004 01 'a' 0000000000002000"), contains("stream ends too early"));
}

TEST_CASE("a resizable block takes the length of the stream, within its memory") {
    std::vector<std::byte> memory = filled(4, 0x11);
    std::uint64_t told = 0;
    machine m{{.name = "none", .suppress_vmdesc = true}};
    m.add_ram("a", memory,
        {.used_length = 4096, .resizable = true, .on_resize = [&](std::uint64_t length) { told = length; }});
    const auto load_from = [&](const std::vector<std::byte>& bytes) {
        memory_reader in(bytes);
        return load(m, in);
    };
    CHECK(why(load_from(stream_with("0000000000001002 01 'a' 00"))) == "ok");
    CHECK(told == 8192);
    CHECK(m.ram()->find("a")->used_length == 8192);
    CHECK(all_are(std::span(memory).subspan(4096, 4096), 0));
    CHECK_THAT(
        why(load_from(stream_with("0000000000002002 01 'a' 00"))), contains("a page within 8192 bytes"));
    CHECK_THAT(why(load_from(stream_with("", "0000000000005004 01 'a' 0000000000005000 0000000000000010"))),
        contains("ram/a: bad RAM record: expected at most 16384 bytes, found 20480 bytes"));
    vector_writer out;
    REQUIRE(save(m, out));
    CHECK_THAT(
        hex(out.written()), contains(hex("0000000000002004 01 'a' 0000000000002000 0000000000000010")));
}

TEST_CASE("shared blocks stay out of the stream with x-ignore-shared, and have their address in it") {
    const machine_options options{
        .name = "none", .capabilities = {"x-ignore-shared"}, .suppress_vmdesc = true};
    std::vector<std::byte> shared = filled(1, 0x33);
    std::vector<std::byte> own = filled(1, 0);
    machine m{options};
    m.add_ram("a", own, {.guest_address = 0x100000});
    m.add_ram("s", shared, {.guest_address = 0xc0000, .shared = true});
    vector_writer out;
    REQUIRE(save(m, out));
    const std::string text = hex(out.written());
    CHECK_THAT(text, contains(hex("0000000000002004 01 'a' 0000000000001000 0000000000100000"
                                  "01 's' 0000000000001000 00000000000c0000 0000000000000010")));
    CHECK_THAT(text, !contains("3333"));
    const std::vector<std::byte> bytes(out.written().begin(), out.written().end());
    memory_reader in(bytes);
    CHECK(why(load(m, in)) == "ok");

    machine moved{options};
    moved.add_ram("a", own);
    moved.add_ram("s", shared, {.guest_address = 0xd0000, .shared = true});
    memory_reader again(bytes);
    CHECK_THAT(why(load(moved, again)), contains("ram/s: bad RAM record: expected guest address"));
}

TEST_CASE("the page size of a huge block is in the list once postcopy is advised, and compared") {
    std::vector<std::byte> memory = filled(2, 0);
    const auto load_with = [&](std::uint64_t host_page_size, std::string_view stated) {
        machine m{{.name = "none", .suppress_vmdesc = true}};
        m.add_ram("a", memory, {.host_page_size = host_page_size});
        const std::vector<std::byte> bytes =
            wire(std::string(header) + "08 0003 0010 0000000000200000 0000000000001000" + std::string(start) +
                 "0000000000002004 01 'a' 0000000000002000" + std::string(stated) + std::string(eos) +
                 std::string(footer) + "03 00000002" + std::string(eos) + std::string(footer) + "00");
        memory_reader in(bytes);
        return load(m, in);
    };
    CHECK(why(load_with(0x200000, "0000000000200000")) == "ok");
    CHECK_THAT(why(load_with(0x1000, "0000000000200000")),
        contains("expected RAM page sizes 0x1000, found 0x200000"));
}

TEST_CASE("a section version other than 4 is refused") {
    two_pages guest;
    CHECK_THAT(why(guest.load(
                   wire(std::string(header) + "01 00000002 03 'ram' 00000000 00000003" + std::string(list)))),
        contains("ram: version too old"));
    CHECK_THAT(why(guest.load(
                   wire(std::string(header) + "01 00000002 03 'ram' 00000000 00000005" + std::string(list)))),
        contains("ram: version too new"));
}

TEST_CASE("every strict prefix of a memory section is refused") {
    const std::vector<std::byte> bytes =
        stream_with("0000000000000002 01 'a' 00 0000000000001060 01 0009 1003aabbcc ac0201dd");
    for (std::size_t size = 0; size < bytes.size(); ++size) {
        two_pages guest;
        std::vector<std::byte> prefix(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
        prefix.shrink_to_fit();
        const result<void> r = guest.load(prefix);
        INFO(size << ": " << why(r));
        REQUIRE_FALSE(r);
        CHECK(r.error() == errc::truncated);
        CHECK(!r.error().path().empty());
        CHECK(r.error().offset() <= size);
    }
}

TEST_CASE("blocks that nobody registered get memory, as much as is allowed, and keep their order") {
    machine source{{.name = "none"}};
    std::vector<std::byte> a = filled(2, 0x21);
    std::vector<std::byte> b = filled(3, 0);
    source.add_ram("a", a);
    source.add_ram("b", b);
    vector_writer out;
    REQUIRE(save(source, out));
    const std::vector<std::byte> bytes = out.take();

    machine m{{.name = "none"}};
    std::vector<std::byte> mine = filled(2, 0);
    m.add_ram("a", mine);
    memory_reader in(bytes);
    REQUIRE(load(m, in, carry_unknown()));
    CHECK(mine == a);
    CHECK(m.ram()->find("b")->used_length == 3 * page_size);
    vector_writer again;
    REQUIRE(save(m, again));
    CHECK(hex(again.written()) == hex(bytes));

    // A length that no machine has costs nothing.
    two_pages guest;
    const std::vector<std::byte> greedy = stream_with("", "7ffffffffffff004 01 'b' 7ffffffffffff000");
    CHECK_THAT(why(guest.load(greedy, carry_unknown())),
        contains("ram/b: bad RAM record: expected unregistered blocks of at most"));
    load_options generous = carry_unknown();
    generous.ram_limit = ~std::uint64_t{0};
    CHECK_THAT(why(guest.load(greedy, generous)),
        contains("ram/b: bad RAM record: expected 9223372036854771712 bytes of memory"));
}
