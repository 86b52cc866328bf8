// SPDX-License-Identifier: BSL-1.0
// Whole aggregates by reflection, through Boost.PFR and Boost.Hana, and which descriptions can be checked for forgotten
// members.
#include <boost/hana/adapt_struct.hpp>
#include <boost/hana/at.hpp>
#include <boost/hana/count_if.hpp>
#include <boost/hana/define_struct.hpp>
#include <boost/hana/equal.hpp>
#include <boost/hana/filter.hpp>
#include <boost/hana/find_if.hpp>
#include <boost/hana/fold_left.hpp>
#include <boost/hana/for_each.hpp>
#include <boost/hana/length.hpp>
#include <boost/hana/transform.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "vocabulary_support.hpp"

#include <vmstate/describe/hana.hpp>

using namespace vmstate;
using namespace vmstate::tests;

// --- an aggregate, as it is ------------------------------------------------------------------------------------------

namespace registers {

struct timer {
    std::uint32_t reload = 0;
    std::uint8_t control = 0;
    bool operator==(const timer&) const = default;
};

struct cpu {
    std::uint64_t pc = 0;
    std::uint32_t gpr[3]{};
    std::uint8_t grid[2][2]{};
    bool halted = false;
    timer clock;
    std::array<timer, 2> clocks{};
    double real = 0;
    std::uint16_t last = 0;
    bool operator==(const cpu&) const = default;
};

} // namespace registers

template <>
inline constexpr auto vmstate::description_of<registers::timer> = reflect<registers::timer>({.name = "timer"});

namespace {

constexpr auto vmstate_cpu = reflect<registers::cpu>({.name = "cpu", .version_id = 3, .minimum_version_id = 2});
static_assert(completeness_checked<vmstate_cpu>);
static_assert(vmstate_cpu.version_id == 3);
static_assert(vmstate_cpu.minimum_version_id == 2);
static_assert(wire_size<vmstate_cpu>(registers::cpu{}) == 8 + 12 + 4 + 1 + 5 + 10 + 8 + 2);

constexpr std::string_view cpu_wire =
    "0123456789abcdef 00000001 00000002 00000003 01020304 01 0000000a 0b"
    "0000000c 0d 0000000e 0f 3ff0000000000000 abcd";

} // namespace

TEST_CASE("reflect sends every member in order, C arrays and nested structs included") {
    const registers::cpu state{.pc = 0x0123456789abcdef,
                               .gpr = {1, 2, 3},
                               .grid = {{1, 2}, {3, 4}},
                               .halted = true,
                               .clock = {10, 11},
                               .clocks = {registers::timer{12, 13}, registers::timer{14, 15}},
                               .real = 1.0,
                               .last = 0xabcd};
    CHECK(saved<vmstate_cpu>(state) == hex(cpu_wire));
    registers::cpu other;
    REQUIRE(outcome(loaded<vmstate_cpu>(cpu_wire, other)) == "ok");
    CHECK(other == state);
    check_every_prefix_is_refused<vmstate_cpu>(cpu_wire, 2, [] { return registers::cpu{}; });
}

TEST_CASE("reflect knows the members' names") {
    const schema& body = schema_of<vmstate_cpu>();
    REQUIRE(body.fields.size() == 8);
    const char* names[] = {"pc", "gpr", "grid", "halted", "clock", "clocks", "real", "last"};
    for (std::size_t i = 0; i != 8; ++i) CHECK(body.fields[i].name == names[i]);
    registers::cpu state;
    CHECK(outcome(loaded<vmstate_cpu>("0123456789abcdef 0000", state)) == failure(errc::truncated, "cpu/gpr", 8));
}

namespace {

struct plain_uart {
    std::uint8_t divider = 0, line = 0;
    std::uint16_t fifo[2]{};
};
constexpr auto vmstate_reflected_uart = reflect<plain_uart>({.name = "uart", .version_id = 1});
constexpr auto vmstate_written_uart = describe<plain_uart>(
    {.name = "uart", .version_id = 1}, field<&plain_uart::divider>, field<&plain_uart::line>, field<&plain_uart::fifo>);

} // namespace

TEST_CASE("reflect and the same thing written out are the same on the wire") {
    STATIC_REQUIRE(fingerprint_of<vmstate_reflected_uart>() == fingerprint_of<vmstate_written_uart>());
    STATIC_REQUIRE(loads<vmstate_reflected_uart, vmstate_written_uart>);
    STATIC_REQUIRE(loads<vmstate_written_uart, vmstate_reflected_uart>);
    const plain_uart state{1, 2, {3, 4}};
    CHECK(saved<vmstate_reflected_uart>(state) == saved<vmstate_written_uart>(state));
}

TEST_CASE("a struct of an unnamed namespace has names, too") {
    const schema& body = schema_of<vmstate_reflected_uart>();
    REQUIRE(body.fields.size() == 3);
    CHECK(body.fields[0].name == "divider");
    CHECK(body.fields[1].name == "line");
    CHECK(body.fields[2].name == "fifo");
}

namespace {

struct one {
    std::uint32_t only = 0;
};
constexpr auto vmstate_one = reflect<one>({.name = "one"});
struct none {};
constexpr auto vmstate_none = reflect<none>({.name = "none"});

} // namespace

TEST_CASE("a struct of one member, and of none") {
    CHECK(saved<vmstate_one>(one{7}) == hex("00000007"));
    CHECK(saved<vmstate_none>(none{}) == "");
    CHECK(schema_of<vmstate_one>().fields[0].name == "only");
}

// --- Hana-adapted structs --------------------------------------------------------------------------------------------

namespace adapted {

struct uart {
    std::uint8_t divider = 0;
    std::uint16_t fifo[2]{};
    int not_sent = 5;   // not among the adapted members
    registers::timer clock;
};

struct keyboard {
    BOOST_HANA_DEFINE_STRUCT(keyboard,
        (std::uint8_t, write_cmd),
        (std::uint16_t, status),
        (std::uint64_t, mode));
};

} // namespace adapted

BOOST_HANA_ADAPT_STRUCT(adapted::uart, divider, clock, fifo);

namespace {

constexpr auto vmstate_adapted_uart = reflect<adapted::uart>({.name = "uart"}, transient<&adapted::uart::not_sent>);
constexpr auto vmstate_adapted_keyboard = reflect<adapted::keyboard>({.name = "keyboard", .version_id = 2});

} // namespace

TEST_CASE("of an adapted struct the adapted members are sent, in the adapted order") {
    adapted::uart state;
    state.divider = 1;
    state.fifo[0] = 2;
    state.fifo[1] = 3;
    state.clock = {4, 5};
    CHECK(saved<vmstate_adapted_uart>(state) == hex("01 00000004 05 0002 0003"));
    REQUIRE(outcome(loaded<vmstate_adapted_uart>("0a 0000000b 0c 000d 000e", state)) == "ok");
    CHECK(state.divider == 10);
    CHECK(state.clock == registers::timer{11, 12});
    CHECK(state.fifo[1] == 14);
    CHECK(state.not_sent == 5);
    const schema& body = schema_of<vmstate_adapted_uart>();
    REQUIRE(body.fields.size() == 3);
    CHECK(body.fields[0].name == "divider");
    CHECK(body.fields[1].name == "clock");
    CHECK(body.fields[2].name == "fifo");
    CHECK(outcome(loaded<vmstate_adapted_uart>("0a 0000000b", state)) == failure(errc::truncated, "uart/clock/control", 5));
}

TEST_CASE("a struct defined through Hana is described by its own members") {
    adapted::keyboard state;
    state.write_cmd = 1;
    state.status = 2;
    state.mode = 3;
    CHECK(saved<vmstate_adapted_keyboard>(state) == hex("01 0002 0000000000000003"));
    adapted::keyboard other;
    REQUIRE(outcome(loaded<vmstate_adapted_keyboard>("04 0005 0000000000000006", other)) == "ok");
    CHECK(other.write_cmd == 4);
    CHECK(other.status == 5);
    CHECK(other.mode == 6);
    const schema& body = schema_of<vmstate_adapted_keyboard>();
    REQUIRE(body.fields.size() == 3);
    CHECK(body.fields[0].name == "write_cmd");
    CHECK(body.fields[1].name == "status");
    CHECK(body.fields[2].name == "mode");
}

// --- a description as a Hana sequence --------------------------------------------------------------------------------

namespace {

namespace hana = boost::hana;

void uart_restart(plain_uart&) {}
constexpr auto vmstate_sequence = describe<plain_uart>(
    {.name = "uart", .version_id = 2, .minimum_version_id = 1},
    post_load<uart_restart>, field<&plain_uart::divider>, unused<3>, field<&plain_uart::line, since<2>>,
    field<&plain_uart::fifo>);

constexpr auto is_field = [](auto item) { return hana::bool_c<decltype(item)::kind == detail::item_kind::field>; };

static_assert(hana::length(vmstate_sequence) == hana::size_c<5>);
static_assert(hana::count_if(vmstate_sequence, is_field) == hana::size_c<3>);

} // namespace

TEST_CASE("Hana's algorithms run over a description's items") {
    std::string names;
    hana::for_each(vmstate_sequence, [&](auto item) {
        if constexpr (decltype(is_field(item))::value) names += std::string(item.name()) + ' ';
    });
    CHECK(names == "divider line fifo ");

    constexpr auto fields = hana::filter(vmstate_sequence, is_field);
    STATIC_REQUIRE(decltype(hana::length(fields))::value == 3);
    CHECK(hana::at_c<1>(fields).name() == "line");

    const auto first = hana::find_if(vmstate_sequence, is_field);
    CHECK(first->name() == "divider");

    const auto members = hana::fold_left(vmstate_sequence, 0, [](int sum, auto item) {
        return sum + (decltype(is_field(item))::value ? 1 : 0);
    });
    CHECK(members == 3);
}

// --- which structs can be checked ------------------------------------------------------------------------------------

namespace checked {

struct with_everything {
    std::uint8_t buffer[64];
    std::uint32_t grid[2][3];
    registers::timer clock;
    registers::timer clocks[2];
    std::vector<std::uint8_t> packet;
    std::function<void(int)> raise;
    std::unique_ptr<int> backend;
    std::string label;
    const char* where;
    void (*callback)(int);
    enum : std::uint8_t { idle, busy } phase;
};
constexpr auto vmstate_with_everything = describe<with_everything>(
    {.name = "with-everything"},
    field<&with_everything::buffer>, field<&with_everything::grid>, field<&with_everything::clock>,
    field<&with_everything::clocks>, field<&with_everything::phase>,
    transient<&with_everything::packet, &with_everything::raise, &with_everything::backend, &with_everything::label,
              &with_everything::where, &with_everything::callback>);
static_assert(completeness_checked<vmstate_with_everything>);

// A struct nobody can copy, move or make from nothing but its default.
struct device_base {
    device_base(const device_base&) = delete;
    device_base() = default;
};
struct immovable {
    std::uint8_t status;
    device_base part;
};
constexpr auto vmstate_immovable = describe<immovable>({.name = "immovable"}, field<&immovable::status>, transient<&immovable::part>);
static_assert(completeness_checked<vmstate_immovable>);

struct large {
    std::uint8_t memory[1u << 20];
    std::uint8_t status;
};
constexpr auto vmstate_large = describe<large>({.name = "large"}, field<&large::memory>, field<&large::status>);
static_assert(completeness_checked<vmstate_large>);

struct one_array {
    std::uint8_t bytes[3];
};
constexpr auto vmstate_one_array = describe<one_array>({.name = "one-array"}, field<&one_array::bytes>);
static_assert(completeness_checked<vmstate_one_array>);

struct one_struct {
    one_array inner;
};
constexpr auto vmstate_one_struct = describe<one_struct>({.name = "one-struct"}, field<&one_struct::inner, as<vmstate_one_array>>);
static_assert(completeness_checked<vmstate_one_struct>);

struct wide {
    std::uint8_t a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, c0, c1, c2, c3, c4;
};
constexpr auto vmstate_wide = describe<wide>(
    {.name = "wide"},
    field<&wide::a0>, field<&wide::a1>, field<&wide::a2>, field<&wide::a3>, field<&wide::a4>, field<&wide::a5>,
    field<&wide::a6>, field<&wide::a7>, field<&wide::a8>, field<&wide::a9>, field<&wide::b0>, field<&wide::b1>,
    field<&wide::b2>, field<&wide::b3>, field<&wide::b4>, field<&wide::b5>, field<&wide::b6>, field<&wide::b7>,
    field<&wide::b8>, field<&wide::b9>, transient<&wide::c0, &wide::c1, &wide::c2, &wide::c3, &wide::c4>);
static_assert(completeness_checked<vmstate_wide>);

} // namespace checked

// What can't be looked into is described without the check.
namespace unchecked {

struct with_base : checked::one_array {
    std::uint8_t more;
};
constexpr auto vmstate_with_base = describe<with_base>({.name = "with-base"}, field<&with_base::more>);
static_assert(!completeness_checked<vmstate_with_base>);

struct with_bit_field {
    std::uint8_t whole;
    std::uint8_t low : 4;
    std::uint8_t high : 4;
};
constexpr auto vmstate_with_bit_field = describe<with_bit_field>({.name = "with-bit-field"}, field<&with_bit_field::whole>);
static_assert(!completeness_checked<vmstate_with_bit_field>);

class with_private_member {
public:
    std::uint8_t shown = 0;
    std::uint8_t get() const { return hidden; }

private:
    std::uint8_t hidden = 0;
};
constexpr auto vmstate_with_private_member =
    describe<with_private_member>({.name = "with-private-member"}, field<&with_private_member::shown>);
static_assert(!completeness_checked<vmstate_with_private_member>);

struct polymorphic {
    virtual ~polymorphic() = default;
    std::uint8_t a = 0, b = 0;
};
constexpr auto vmstate_polymorphic = describe<polymorphic>({.name = "polymorphic"}, field<&polymorphic::a>);
static_assert(!completeness_checked<vmstate_polymorphic>);

struct part_of {
    std::uint8_t a, b;
};
bool needed_part(const part_of&) { return true; }
constexpr auto vmstate_partial = describe<part_of>({.name = "partial"}, partial, field<&part_of::a>);
constexpr auto vmstate_needed = describe<part_of>({.name = "needed"}, needed<needed_part>, field<&part_of::b>);
static_assert(!completeness_checked<vmstate_partial>);
static_assert(!completeness_checked<vmstate_needed>);

} // namespace unchecked

TEST_CASE("a description that can't be checked works all the same") {
    unchecked::with_base derived{};
    derived.more = 7;
    CHECK(saved<unchecked::vmstate_with_base>(derived) == hex("07"));
    unchecked::with_bit_field bits{.whole = 8, .low = 3, .high = 1};
    CHECK(saved<unchecked::vmstate_with_bit_field>(bits) == hex("08"));
    const unchecked::part_of part{1, 2};
    CHECK(saved<unchecked::vmstate_partial>(part) == hex("01"));
    CHECK(saved<unchecked::vmstate_needed>(part) == hex("02"));
}

// --- a struct inside a function --------------------------------------------------------------------------------------

TEST_CASE("a struct of a function's own can be described") {
    struct local {
        std::uint8_t a = 1;
        std::uint16_t b = 2;
    };
    static constexpr auto vmstate_local = describe<local>({.name = "local"}, field<&local::a>, field<&local::b>);
    CHECK(saved<vmstate_local>(local{}) == hex("01 0002"));
}
