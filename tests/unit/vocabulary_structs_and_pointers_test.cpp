// SPDX-License-Identifier: BSL-1.0
// Structs in structs: nested descriptions, arrays of them, versions of their own, pointers to them and null markers.
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

struct timer {
    std::uint32_t reload = 0;
    std::uint8_t control = 0;
    bool operator==(const timer&) const = default;
};
constexpr auto vmstate_timer =
    describe<timer>({.name = "timer", .version_id = 4}, field<&timer::reload>, field<&timer::control, between<0, 9>>);

struct channel {
    std::uint8_t id = 0;
    timer clocks[2]{};
    bool operator==(const channel&) const = default;
};

} // namespace

template <>
inline constexpr auto vmstate::description_of<channel> =
    describe<channel>({.name = "channel"}, field<&channel::id>, field<&channel::clocks, as<vmstate_timer>>);

namespace {

struct board {
    timer first;
    channel channels[2]{};
    std::array<timer, 1> last{};
    bool operator==(const board&) const = default;
};
constexpr auto vmstate_board = describe<board>(
    {.name = "board", .version_id = 1},
    field<&board::first, as<vmstate_timer>>,
    field<&board::channels>,                        // description_of<channel>
    field<&board::last, as<vmstate_timer>>);

static_assert(completeness_checked<vmstate_board>);
static_assert(wire_size<vmstate_board>(board{}) == 5 + 2 * (1 + 2 * 5) + 5);

constexpr std::string_view board_wire =
    "00000001 01"
    "0a 00000002 02 00000003 03"
    "0b 00000004 04 00000005 05"
    "00000006 06";

} // namespace

TEST_CASE("a nested struct is its bytes, without a frame") {
    const board state{.first = {1, 1},
                      .channels = {{0x0a, {{2, 2}, {3, 3}}}, {0x0b, {{4, 4}, {5, 5}}}},
                      .last = {timer{6, 6}}};
    CHECK(saved<vmstate_board>(state) == hex(board_wire));
    board other;
    REQUIRE(outcome(loaded<vmstate_board>(board_wire, other)) == "ok");
    CHECK(other == state);
    check_every_prefix_is_refused<vmstate_board>(board_wire, 1, [] { return board{}; });
}

TEST_CASE("the path of an error leads through the structs and says which element") {
    const auto with_byte = [](std::size_t at) {
        std::string text = hex(board_wire);
        text.replace(2 * at, 2, "0c");
        board state;
        return outcome(loaded<vmstate_board>(text, state));
    };
    CHECK(with_byte(4) == failure(errc::out_of_range, "board/first/control", 4));
    CHECK(with_byte(10) == failure(errc::out_of_range, "board/channels[0]/clocks[0]/control", 10));
    CHECK(with_byte(15) == failure(errc::out_of_range, "board/channels[0]/clocks[1]/control", 15));
    CHECK(with_byte(26) == failure(errc::out_of_range, "board/channels[1]/clocks[1]/control", 26));
    CHECK(with_byte(31) == failure(errc::out_of_range, "board/last[0]/control", 31));
}

namespace {

struct lane {
    std::uint16_t low = 0, high = 0;
};
constexpr auto vmstate_lane = describe<lane>({.name = "lane"}, field<&lane::low>, field<&lane::high>);
struct road {
    std::uint8_t id = 0;
    lane lanes[3]{};
    std::uint8_t tail[2]{};
};
constexpr auto vmstate_road = describe<road>(
    {.name = "road"}, field<&road::id>, field<&road::lanes, as<vmstate_lane>>, field<&road::tail>);
struct owner_of_one {
    std::vector<std::unique_ptr<lane>> lanes;
    std::uint32_t count = 0;
};
constexpr auto vmstate_owner_of_one = describe<owner_of_one>(
    {.name = "owner"}, field<&owner_of_one::count>, field<&owner_of_one::lanes, length<&owner_of_one::count>, as<vmstate_lane>>);

} // namespace

TEST_CASE("a stream that ends inside flat structs is named down to the field") {
    road state;
    const result<void> r = loaded<vmstate_road>("01 0002 0003 0004 00", state);
    CHECK(outcome(r) == failure(errc::truncated, "road/lanes[1]/high", 7));
    CHECK(r.error().message() == "road/lanes[1]/high: stream ends too early: expected 2 bytes, found 1 (offset 7)");
    CHECK(outcome(loaded<vmstate_road>("01 0002 0003 0004 0005 0006 0007 01", state)) ==
          failure(errc::truncated, "road/tail", 13));
}

TEST_CASE("a vector keeps the objects that it points to") {
    owner_of_one state;
    state.count = 2;
    state.lanes.push_back(std::make_unique<lane>(lane{1, 2}));
    state.lanes.push_back(nullptr);
    const lane* const first = state.lanes[0].get();
    CHECK(saved<vmstate_owner_of_one>(state) == hex("00000002 0001 0002 30"));
    REQUIRE(outcome(loaded<vmstate_owner_of_one>("00000002 0005 0006 30", state)) == "ok");
    CHECK(state.lanes[0].get() == first);
    CHECK(first->high == 6);
    CHECK(loaded<vmstate_owner_of_one>("00000002 0005 0006 0007 0008", state).error() == errc::bad_marker);
}

// --- versions of nested structs --------------------------------------------------------------------------------------

namespace {

struct chip {
    std::uint8_t old = 1;
    std::uint8_t young = 2;
    bool operator==(const chip&) const = default;
};
constexpr auto vmstate_chip = describe<chip>(
    {.name = "chip", .version_id = 2, .minimum_version_id = 1},
    field<&chip::old>, field<&chip::young, since<2>>);

struct card {
    chip plain;
    chip first_version;
    chip second_version;
    chip added;
    bool operator==(const card&) const = default;
};
constexpr auto vmstate_card = describe<card>(
    {.name = "card", .version_id = 5, .minimum_version_id = 1},
    field<&card::plain, as<vmstate_chip>>,
    field<&card::first_version, as<vmstate_chip, 1>>,     // VMSTATE_VSTRUCT
    field<&card::second_version, as<vmstate_chip, 2>>,
    field<&card::added, since<5>, as<vmstate_chip>>);

} // namespace

TEST_CASE("a nested struct has the local description's version, whatever the version of its parent") {
    card state;
    REQUIRE(outcome(loaded<vmstate_card>("0a0b 0c 0d0e", state, 1)) == "ok");
    CHECK(state == card{.plain = {10, 11}, .first_version = {12, 2}, .second_version = {13, 14}, .added = {1, 2}});
}

TEST_CASE("a struct of a given version is saved and loaded at that version") {
    CHECK(saved<vmstate_card>(card{}) == hex("0102 01 0102 0102"));
    card state;
    REQUIRE(outcome(loaded<vmstate_card>("0a0b 0c 0d0e 0f10", state)) == "ok");
    CHECK(state == card{.plain = {10, 11}, .first_version = {12, 2}, .second_version = {13, 14}, .added = {15, 16}});
}

namespace {

int chip_version_seen = -1;
void note_version(chip&, int version_id) { chip_version_seen = version_id; }

constexpr auto vmstate_noting_chip = describe<chip>(
    {.name = "chip", .version_id = 3, .minimum_version_id = 0},
    post_load<note_version>, field<&chip::old>, field<&chip::young>);
struct noting_card {
    chip c;
};
constexpr auto vmstate_noting_card =
    describe<noting_card>({.name = "noting-card"}, field<&noting_card::c, as<vmstate_noting_chip, 2>>);
constexpr auto vmstate_local_card =
    describe<noting_card>({.name = "noting-card"}, field<&noting_card::c, as<vmstate_noting_chip>>);

} // namespace

TEST_CASE("a nested struct's post_load is told its own version") {
    noting_card state;
    REQUIRE(outcome(loaded<vmstate_noting_card>("0102", state)) == "ok");
    CHECK(chip_version_seen == 2);
    REQUIRE(outcome(loaded<vmstate_local_card>("0102", state)) == "ok");
    CHECK(chip_version_seen == 3);
}

// --- as many structs as a length says --------------------------------------------------------------------------------

namespace {

struct varrays {
    std::uint8_t count = 0;
    timer fixed[3]{};
    std::vector<timer> grown;
    std::unique_ptr<timer[]> owned;
    timer* borrowed = nullptr;
};
constexpr auto vmstate_varrays = describe<varrays>(
    {.name = "varrays"},
    field<&varrays::count>,
    field<&varrays::fixed, as<vmstate_timer>, length<&varrays::count>>,
    field<&varrays::grown, length<&varrays::count>, as<vmstate_timer>>,
    field<&varrays::owned, as<vmstate_timer>, length<&varrays::count>>,
    field<&varrays::borrowed, as<vmstate_timer>, length<&varrays::count>, limit<3>>);

constexpr std::string_view varrays_wire =
    "02"
    "00000001 01 00000002 02"
    "00000003 03 00000004 04"
    "00000005 05 00000006 06"
    "00000007 07 00000008 08";

} // namespace

TEST_CASE("arrays of structs have as many elements as their length says") {
    timer here[3]{};
    varrays state;
    state.borrowed = here;
    REQUIRE(outcome(loaded<vmstate_varrays>(varrays_wire, state)) == "ok");
    CHECK(state.fixed[1] == timer{2, 2});
    CHECK(state.fixed[2] == timer{});
    CHECK(state.grown == std::vector<timer>{{3, 3}, {4, 4}});
    CHECK(state.owned[1] == timer{6, 6});
    CHECK(here[1] == timer{8, 8});
    CHECK(here[2] == timer{});
    CHECK(saved<vmstate_varrays>(state) == hex(varrays_wire));
    check_every_prefix_is_refused<vmstate_varrays>(varrays_wire, 0, [&] {
        varrays fresh;
        fresh.borrowed = here;
        return fresh;
    });
}

TEST_CASE("an element of an array of structs that is wrong is named by its index") {
    varrays state;
    timer here[3]{};
    state.borrowed = here;
    CHECK(outcome(loaded<vmstate_varrays>("02 00000001 01 00000002 02 00000003 03 00000004 0a", state)) ==
          failure(errc::out_of_range, "varrays/grown[1]/control", 20));
    CHECK(outcome(loaded<vmstate_varrays>("04", state)) == failure(errc::out_of_range, "varrays/fixed", 1));
}

// --- pointers to structs ---------------------------------------------------------------------------------------------

namespace {

struct pointers {
    timer* raw = nullptr;
    std::unique_ptr<timer> owned;
};
constexpr auto vmstate_pointers = describe<pointers>(
    {.name = "pointers"},
    field<&pointers::raw, as<vmstate_timer>>, field<&pointers::owned, as<vmstate_timer>>);

} // namespace

TEST_CASE("a pointer to a struct is followed, without a marker") {
    timer here{1, 2};
    pointers state{.raw = &here, .owned = std::make_unique<timer>(timer{3, 4})};
    CHECK(saved<vmstate_pointers>(state) == hex("00000001 02 00000003 04"));
    REQUIRE(outcome(loaded<vmstate_pointers>("00000005 06 00000007 08", state)) == "ok");
    CHECK(here == timer{5, 6});
    CHECK(*state.owned == timer{7, 8});
    check_every_prefix_is_refused<vmstate_pointers>("00000005 06 00000007 08", 0, [&] {
        return pointers{.raw = &here, .owned = nullptr};
    });
}

TEST_CASE("an owning pointer that is null is filled on load, another one is an error") {
    timer here{1, 2};
    pointers state{.raw = &here, .owned = nullptr};
    REQUIRE(outcome(loaded<vmstate_pointers>("00000005 06 00000007 08", state)) == "ok");
    REQUIRE(state.owned != nullptr);
    CHECK(*state.owned == timer{7, 8});

    pointers without;
    CHECK(outcome(loaded<vmstate_pointers>("00000005 06 00000007 08", without)) ==
          failure(errc::null_pointer, "pointers/raw", 0));
    CHECK(why_not_saved<vmstate_pointers>(without) == errc::null_pointer);
    CHECK(why_not_saved<vmstate_pointers>(pointers{.raw = &here, .owned = nullptr}) == errc::null_pointer);
}

// --- arrays of pointers ----------------------------------------------------------------------------------------------

namespace {

struct number {
    std::int32_t i = 0;
    bool operator==(const number&) const = default;
};
constexpr auto vmstate_number = describe<number>({.name = "test/tst", .version_id = 1}, field<&number::i>);

struct pointer_array {
    number* ar[4]{};
};
constexpr auto vmstate_pointer_array = describe<pointer_array>(
    {.name = "test/arps", .version_id = 1}, field<&pointer_array::ar, as<vmstate_number>>);

constexpr std::string_view all_there = "00000000 00000001 00000002 00000003";
constexpr std::string_view one_missing = "00000000 30 00000002 00000003";

} // namespace

TEST_CASE("an array of pointers to structs is the structs") {
    number numbers[4] = {{0}, {1}, {2}, {3}};
    pointer_array state{{&numbers[0], &numbers[1], &numbers[2], &numbers[3]}};
    CHECK(saved<vmstate_pointer_array>(state) == hex(all_there));
    number others[4]{};
    pointer_array other{{&others[0], &others[1], &others[2], &others[3]}};
    REQUIRE(outcome(loaded<vmstate_pointer_array>(all_there, other)) == "ok");
    for (int i = 0; i != 4; ++i) CHECK(others[i].i == i);
    check_every_prefix_is_refused<vmstate_pointer_array>(all_there, 1, [&] { return other; });
}

TEST_CASE("a null element is the byte 0x30, and stays null") {
    number numbers[4] = {{0}, {1}, {2}, {3}};
    pointer_array state{{&numbers[0], nullptr, &numbers[2], &numbers[3]}};
    CHECK(saved<vmstate_pointer_array>(state) == hex(one_missing));
    number others[4]{};
    pointer_array other{{&others[0], nullptr, &others[2], &others[3]}};
    REQUIRE(outcome(loaded<vmstate_pointer_array>(one_missing, other)) == "ok");
    CHECK(other.ar[1] == nullptr);
    CHECK(others[2].i == 2);
    CHECK(others[3].i == 3);
    check_every_prefix_is_refused<vmstate_pointer_array>(one_missing, 1, [&] { return other; });
}

TEST_CASE("the destination's own pointers decide where a marker is expected") {
    number others[4]{};
    pointer_array other{{&others[0], nullptr, &others[2], &others[3]}};
    CHECK(outcome(loaded<vmstate_pointer_array>(all_there, other)) == failure(errc::bad_marker, "test/arps/ar[1]", 4));
    pointer_array full{{&others[0], &others[1], &others[2], &others[3]}};
    const auto r = loaded<vmstate_pointer_array>(one_missing, full); // 30000000 is taken for the second
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::truncated);
    CHECK_THAT(std::string(r.error().path()), contains("test/arps/ar[3]"));
}

namespace {

struct owned_pointers {
    std::array<std::unique_ptr<number>, 3> ar;
};
constexpr auto vmstate_owned_pointers =
    describe<owned_pointers>({.name = "owned-pointers"}, field<&owned_pointers::ar, as<vmstate_number>>);

} // namespace

TEST_CASE("an array of owning pointers has the same markers") {
    owned_pointers state;
    state.ar[0] = std::make_unique<number>(number{7});
    state.ar[2] = std::make_unique<number>(number{8});
    CHECK(saved<vmstate_owned_pointers>(state) == hex("00000007 30 00000008"));
    REQUIRE(outcome(loaded<vmstate_owned_pointers>("00000009 30 0000000a", state)) == "ok");
    CHECK(state.ar[0]->i == 9);
    CHECK(state.ar[1] == nullptr);
    CHECK(state.ar[2]->i == 10);
    CHECK(outcome(loaded<vmstate_owned_pointers>("00000009 31 0000000a", state)) ==
          failure(errc::bad_marker, "owned-pointers/ar[1]", 4));
}

namespace {

struct integer_pointers {
    std::int32_t* ar[4]{};
};
constexpr auto vmstate_integer_pointers =
    describe<integer_pointers>({.name = "test/arps", .version_id = 1}, field<&integer_pointers::ar>);

struct counted_pointers {
    std::uint8_t count = 0;
    number* ar[4]{};
};
constexpr auto vmstate_counted_pointers = describe<counted_pointers>(
    {.name = "counted-pointers"},
    field<&counted_pointers::count>,
    field<&counted_pointers::ar, as<vmstate_number>, length<&counted_pointers::count>>);

} // namespace

TEST_CASE("an array of pointers to integers has the same markers") {
    std::int32_t numbers[4] = {0, 1, 2, 3};
    integer_pointers state{{&numbers[0], nullptr, &numbers[2], &numbers[3]}};
    CHECK(saved<vmstate_integer_pointers>(state) == hex(one_missing));
    std::int32_t others[4] = {3, 42, 1, 0};
    integer_pointers other{{&others[0], nullptr, &others[2], &others[3]}};
    REQUIRE(outcome(loaded<vmstate_integer_pointers>(one_missing, other)) == "ok");
    CHECK(others[0] == 0);
    CHECK(others[1] == 42);
    CHECK(others[2] == 2);
    CHECK(others[3] == 3);
}

TEST_CASE("as many pointers as a length says") {
    number numbers[2] = {{5}, {6}};
    counted_pointers state{.count = 3, .ar = {&numbers[0], nullptr, &numbers[1], nullptr}};
    CHECK(saved<vmstate_counted_pointers>(state) == hex("03 00000005 30 00000006"));
    REQUIRE(outcome(loaded<vmstate_counted_pointers>("02 00000007 30", state)) == "ok");
    CHECK(numbers[0].i == 7);
    CHECK(numbers[1].i == 6);
}

// --- base classes ----------------------------------------------------------------------------------------------------

namespace {

struct isa_device {
    std::uint8_t irq = 1;
};
constexpr auto vmstate_isa_device = describe<isa_device>({.name = "isa-device"}, field<&isa_device::irq>);

struct uart : isa_device {
    std::uint8_t divider = 2;
    timer clock;
};
constexpr auto vmstate_uart = describe<uart>(
    {.name = "uart"}, field<&uart::divider>, field<&uart::irq>, field<&uart::clock, as<vmstate_timer>>);
static_assert(!completeness_checked<vmstate_uart>);

struct two_uarts {
    uart ports[2];
};
// A description of a base class serves what derives from it.
constexpr auto vmstate_two_uarts =
    describe<two_uarts>({.name = "two-uarts"}, field<&two_uarts::ports, as<vmstate_isa_device>>);

} // namespace

TEST_CASE("members of a base class are members") {
    CHECK(saved<vmstate_uart>(uart{}) == hex("02 01 00000000 00"));
    uart state;
    REQUIRE(outcome(loaded<vmstate_uart>("05 06 00000007 08", state)) == "ok");
    CHECK(state.divider == 5);
    CHECK(state.irq == 6);
    CHECK(state.clock == timer{7, 8});
}

TEST_CASE("elements that derive from the described struct are walked at their own size") {
    two_uarts state;
    state.ports[0].irq = 3;
    state.ports[1].irq = 4;
    CHECK(saved<vmstate_two_uarts>(state) == hex("03 04"));
    REQUIRE(outcome(loaded<vmstate_two_uarts>("05 06", state)) == "ok");
    CHECK(state.ports[0].irq == 5);
    CHECK(state.ports[1].irq == 6);
    CHECK(state.ports[0].divider == 2);
}
