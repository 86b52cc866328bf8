// SPDX-License-Identifier: BSL-1.0
// More than one value: arrays of one and two dimensions, buffers, slices, arrays whose length another member holds.
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

// --- arrays of a fixed number ----------------------------------------------------------------------------------------

namespace {

enum class mode : std::uint16_t { a = 1, b = 0x0203 };

struct arrays {
    std::uint16_t c[3]{};
    std::array<std::uint32_t, 2> s{};
    std::uint8_t grid[2][3]{};
    std::array<std::array<std::int16_t, 2>, 2> square{};
    std::array<std::uint8_t, 2> mixed[2]{};
    std::uint64_t words[2]{};
    bool flags[3]{};
    mode modes[2]{};
    double reals[2]{};
    bool operator==(const arrays&) const = default;
};
constexpr auto vmstate_arrays = describe<arrays>(
    {.name = "arrays"},
    field<&arrays::c>, field<&arrays::s>, field<&arrays::grid>, field<&arrays::square>, field<&arrays::mixed>,
    field<&arrays::words>, field<&arrays::flags>, field<&arrays::modes>, field<&arrays::reals>);

static_assert(completeness_checked<vmstate_arrays>);
static_assert(wire_size<vmstate_arrays>(arrays{}) == 6 + 8 + 6 + 8 + 4 + 16 + 3 + 4 + 16);

constexpr std::string_view arrays_wire =
    "0042 0043 0144"
    "00010203 fffefdfc"
    "010203 040506"
    "0001 fffe 0003 fffc"
    "0a0b 0c0d"
    "0123456789abcdef fedcba9876543210"
    "01 00 01"
    "0001 0203"
    "3ff0000000000000 4000000000000000";

arrays filled() {
    return {.c = {0x42, 0x43, 0x144},
            .s = {0x00010203, 0xfffefdfc},
            .grid = {{1, 2, 3}, {4, 5, 6}},
            .square = {{{1, -2}, {3, -4}}},
            .mixed = {{0x0a, 0x0b}, {0x0c, 0x0d}},
            .words = {0x0123456789abcdef, 0xfedcba9876543210},
            .flags = {true, false, true},
            .modes = {mode::a, mode::b},
            .reals = {1.0, 2.0}};
}

} // namespace

TEST_CASE("arrays are their elements in row order, C arrays and std::array alike") {
    CHECK(saved<vmstate_arrays>(filled()) == hex(arrays_wire));
    arrays state;
    REQUIRE(outcome(loaded<vmstate_arrays>(arrays_wire, state)) == "ok");
    CHECK(state == filled());
}

TEST_CASE("every strict prefix of arrays is refused") {
    check_every_prefix_is_refused<vmstate_arrays>(arrays_wire, 0, [] { return arrays{}; });
}

TEST_CASE("an array that the stream ends in is named") {
    arrays state;
    const auto bytes = wire(arrays_wire);
    const auto r = loaded<vmstate_arrays>(std::span(bytes).first(15), state);
    REQUIRE(r.has_error());
    CHECK_THAT(std::string(r.error().path()), contains("arrays/grid"));
    CHECK(r.error().offset() >= 14);
    CHECK(r.error().offset() <= 15);
}

namespace {

struct flags {
    bool set[4]{};
};
constexpr auto vmstate_flags = describe<flags>({.name = "flags"}, field<&flags::set>);

struct long_array {
    std::uint32_t values[1000]{};
    std::uint16_t shorts[777]{};
    std::uint64_t longs[515]{};
};
constexpr auto vmstate_long_array =
    describe<long_array>({.name = "long-array"}, field<&long_array::values>, field<&long_array::shorts>, field<&long_array::longs>);

} // namespace

TEST_CASE("any byte but zero is true in an array of bool") {
    flags state;
    REQUIRE(outcome(loaded<vmstate_flags>("00 02 80 ff", state)) == "ok");
    CHECK(saved<vmstate_flags>(state) == hex("00 01 01 01"));
}

TEST_CASE("arrays longer than any window or vector register come out in order") {
    const auto state = std::make_unique<long_array>();
    for (std::uint32_t i = 0; i != 1000; ++i) state->values[i] = 0x01020304u * (i + 1);
    for (std::uint32_t i = 0; i != 777; ++i) state->shorts[i] = static_cast<std::uint16_t>(0x0102u * (i + 3));
    for (std::uint32_t i = 0; i != 515; ++i) state->longs[i] = 0x0102030405060708u * (i + 5);
    const auto bytes = to_bytes<vmstate_long_array>(*state);
    REQUIRE(bytes.has_value());
    REQUIRE(bytes->size() == 4000 + 1554 + 4120);
    std::size_t at = 0;
    const auto next = [&](std::size_t size) {
        std::uint64_t value = 0;
        for (std::size_t i = 0; i != size; ++i) value = value << 8 | std::to_integer<std::uint64_t>((*bytes)[at++]);
        return value;
    };
    bool same = true;
    for (const auto v : state->values) same = same && next(4) == v;
    for (const auto v : state->shorts) same = same && next(2) == v;
    for (const auto v : state->longs) same = same && next(8) == v;
    CHECK(same);
    const auto other = std::make_unique<long_array>();
    REQUIRE(outcome(loaded<vmstate_long_array>(*bytes, *other)) == "ok");
    CHECK(std::equal(std::begin(state->values), std::end(state->values), std::begin(other->values)));
    CHECK(std::equal(std::begin(state->shorts), std::end(state->shorts), std::begin(other->shorts)));
    CHECK(std::equal(std::begin(state->longs), std::end(state->longs), std::begin(other->longs)));
}

// --- buffers ---------------------------------------------------------------------------------------------------------

namespace {

struct buffers {
    std::uint8_t sector[8]{};
    std::array<std::byte, 4> key{};
    char name[4]{};
    std::int8_t deltas[3]{};
    bool operator==(const buffers&) const = default;
};
constexpr auto vmstate_buffers = describe<buffers>(
    {.name = "buffers"}, field<&buffers::sector>, field<&buffers::key>, field<&buffers::name>, field<&buffers::deltas>);

} // namespace

TEST_CASE("buffers are their bytes") {
    buffers state{.sector = {0, 1, 2, 3, 0xfc, 0xfd, 0xfe, 0xff},
                  .key = {std::byte{9}, std::byte{8}, std::byte{7}, std::byte{0xf6}},
                  .name = {'c', 'p', 'u', 0},
                  .deltas = {-1, 0, 1}};
    const std::string_view bytes = "00010203fcfdfeff 090807f6 'cpu'00 ff0001";
    CHECK(saved<vmstate_buffers>(state) == hex(bytes));
    buffers other;
    REQUIRE(outcome(loaded<vmstate_buffers>(bytes, other)) == "ok");
    CHECK(other == state);
    check_every_prefix_is_refused<vmstate_buffers>(bytes, 0, [] { return buffers{}; });
}

// --- slices ----------------------------------------------------------------------------------------------------------

namespace {

struct sliced {
    std::uint8_t buffer[8]{1, 2, 3, 4, 5, 6, 7, 8};
    std::uint16_t ports[4]{1, 2, 3, 4};
    std::array<std::uint32_t, 3> regs{1, 2, 3};
    std::uint8_t matrix[3][2]{{1, 2}, {3, 4}, {5, 6}};
    bool operator==(const sliced&) const = default;
};
constexpr auto vmstate_sliced = describe<sliced>(
    {.name = "sliced", .version_id = 2, .minimum_version_id = 1},
    field<&sliced::buffer, slice<2, 4>>,               // BUFFER_START_MIDDLE and a size
    field<&sliced::ports, slice<0, 2>>,                // PARTIAL
    field<&sliced::regs, slice<1, 2>, since<2>>,       // SUB_ARRAY
    field<&sliced::ports, slice<3, 1>>,                // the same array, another part
    field<&sliced::matrix, slice<1, 1>>);              // rows

} // namespace

TEST_CASE("a slice is a part of an array, the rest is left alone") {
    CHECK(saved<vmstate_sliced>(sliced{}) == hex("03040506 0001 0002 00000002 00000003 0004 0304"));
    sliced state;
    REQUIRE(outcome(loaded<vmstate_sliced>("13141516 0011 0012 00000012 00000013 0014 1314", state)) == "ok");
    CHECK(state == sliced{.buffer = {1, 2, 0x13, 0x14, 0x15, 0x16, 7, 8},
                          .ports = {0x11, 0x12, 3, 0x14},
                          .regs = {1, 0x12, 0x13},
                          .matrix = {{1, 2}, {0x13, 0x14}, {5, 6}}});
    state = {};
    REQUIRE(outcome(loaded<vmstate_sliced>("13141516 0011 0012 0014 1314", state, 1)) == "ok");
    CHECK(state.regs == std::array<std::uint32_t, 3>{1, 2, 3});
    CHECK(state.ports[3] == 0x14);
}

// --- arrays whose length is in another member ------------------------------------------------------------------------

namespace {

struct fixed_room {
    std::uint8_t count = 0;
    std::uint16_t values[4]{1, 2, 3, 4};
    bool operator==(const fixed_room&) const = default;
};
constexpr auto vmstate_fixed_room = describe<fixed_room>(
    {.name = "fixed-room"},
    field<&fixed_room::count>,
    field<&fixed_room::values, length<&fixed_room::count>>);

} // namespace

TEST_CASE("only as many elements as the length says are sent, and none for zero") {
    CHECK(saved<vmstate_fixed_room>(fixed_room{.count = 0}) == hex("00"));
    CHECK(saved<vmstate_fixed_room>(fixed_room{.count = 3}) == hex("03 0001 0002 0003"));
    CHECK(saved<vmstate_fixed_room>(fixed_room{.count = 4}) == hex("04 0001 0002 0003 0004"));
    fixed_room state;
    REQUIRE(outcome(loaded<vmstate_fixed_room>("02 0011 0012", state)) == "ok");
    CHECK(state == fixed_room{.count = 2, .values = {0x11, 0x12, 3, 4}});
    REQUIRE(outcome(loaded<vmstate_fixed_room>("00", state)) == "ok");
    CHECK(state == fixed_room{.count = 0, .values = {0x11, 0x12, 3, 4}});
    check_every_prefix_is_refused<vmstate_fixed_room>("03 0001 0002 0003", 0, [] { return fixed_room{}; });
}

TEST_CASE("a length above the array's room is refused on load and on save") {
    for (const char* text : {"05 0001 0002 0003 0004 0005", "ff", "80"}) {
        fixed_room state;
        const auto r = loaded<vmstate_fixed_room>(text, state);
        REQUIRE(r.has_error());
        CHECK(r.error().code() == errc::out_of_range);
        CHECK(r.error().path() == "fixed-room/values");
        CHECK(r.error().offset() == 1);
    }
    CHECK(why_not_saved<vmstate_fixed_room>(fixed_room{.count = 5}) != errc::ok);
}

namespace {

template <class Length>
struct with_vector {
    Length count{};
    std::vector<std::uint16_t> values;
    std::uint8_t after = 0;
    bool operator==(const with_vector&) const = default;
};
template <class Length>
constexpr auto vmstate_with_vector = describe<with_vector<Length>>(
    {.name = "with-vector"},
    field<&with_vector<Length>::count>,
    field<&with_vector<Length>::values, length<&with_vector<Length>::count>>,
    field<&with_vector<Length>::after>);

} // namespace

TEMPLATE_TEST_CASE("a vector gets as many elements as its length says", "", std::uint8_t, std::uint16_t, std::uint32_t,
                   std::int32_t, std::uint64_t, std::int64_t, std::int8_t) {
    constexpr const auto& description = vmstate_with_vector<TestType>;
    const std::string count = std::string(2 * sizeof(TestType) - 2, '0');
    const with_vector<TestType> state{.count = 2, .values = {0x0102, 0x0304}, .after = 9};
    CHECK(saved<description>(state) == hex(count + "02 0102 0304 09"));
    with_vector<TestType> other{.count = 1, .values = {7, 7, 7, 7}};
    REQUIRE(outcome(loaded<description>(count + "02 0102 0304 09", other)) == "ok");
    CHECK(other == state);
    REQUIRE(outcome(loaded<description>(count + "00 08", other)) == "ok");
    CHECK(other == with_vector<TestType>{.count = 0, .values = {}, .after = 8});
    check_every_prefix_is_refused<description>(count + "02 0102 0304 09", 0, [] { return with_vector<TestType>{}; });
}

TEST_CASE("a negative length is refused, on load and on save") {
    with_vector<std::int32_t> state;
    for (const char* text : {"ffffffff 00", "80000000 00"}) {
        const auto r = loaded<vmstate_with_vector<std::int32_t>>(text, state);
        CHECK(outcome(r) == failure(errc::out_of_range, "with-vector/values", 4));
    }
    with_vector<std::int8_t> small;
    CHECK(outcome(loaded<vmstate_with_vector<std::int8_t>>("80 00", small)) ==
          failure(errc::out_of_range, "with-vector/values", 1));
    CHECK(why_not_saved<vmstate_with_vector<std::int32_t>>(with_vector<std::int32_t>{.count = -1, .values = {}}) != errc::ok);
}

TEST_CASE("a vector shorter than its length is not read beyond its end on save") {
    CHECK(why_not_saved<vmstate_with_vector<std::uint8_t>>(with_vector<std::uint8_t>{.count = 3, .values = {1, 2}}) != errc::ok);
    CHECK(saved<vmstate_with_vector<std::uint8_t>>(with_vector<std::uint8_t>{.count = 1, .values = {1, 2}}) ==
          hex("01 0001 00"));
}

TEST_CASE("a length for more than the stream has is refused") {
    with_vector<std::uint64_t> state;
    for (const char* text : {"ffffffffffffffff 0000", "8000000000000000 0000", "7fffffffffffffff 0000",
                             "0000000100000000 0000", "0000000000000002 0000"}) {
        const auto r = loaded<vmstate_with_vector<std::uint64_t>>(text, state);
        REQUIRE(r.has_error());
        CHECK((r.error().code() == errc::truncated || r.error().code() == errc::out_of_range));
        CHECK_THAT(std::string(r.error().path()), contains("with-vector/values"));
        CHECK(state.values.capacity() < 16);
    }
}

namespace {

struct fixed_length {
    std::uint32_t count = 3; // from the machine's configuration, not sent
    std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(3, 7);
};
constexpr auto vmstate_fixed_length = describe<fixed_length>(
    {.name = "fixed-length"},
    transient<&fixed_length::count>,
    field<&fixed_length::bytes, length<&fixed_length::count>>);

} // namespace

TEST_CASE("a length need not be sent") {
    CHECK(saved<vmstate_fixed_length>(fixed_length{}) == hex("070707"));
    fixed_length state;
    REQUIRE(outcome(loaded<vmstate_fixed_length>("040506", state)) == "ok");
    CHECK(state.bytes == std::vector<std::uint8_t>{4, 5, 6});
    CHECK(outcome(loaded<vmstate_fixed_length>("04050607", state)) == failure(errc::trailing_bytes, "fixed-length", 3));
    check_every_prefix_is_refused<vmstate_fixed_length>("040506", 0, [] { return fixed_length{}; });
}

// --- pointers --------------------------------------------------------------------------------------------------------

namespace {

struct borrowed {
    std::uint32_t count = 0;
    std::uint32_t* values = nullptr;
};
constexpr auto vmstate_borrowed = describe<borrowed>(
    {.name = "borrowed"},
    field<&borrowed::count>, field<&borrowed::values, length<&borrowed::count>>);

struct borrowed_with_limit {
    std::uint32_t count = 0;
    std::uint8_t* values = nullptr;
};
constexpr auto vmstate_borrowed_with_limit = describe<borrowed_with_limit>(
    {.name = "borrowed"},
    field<&borrowed_with_limit::count>,
    field<&borrowed_with_limit::values, length<&borrowed_with_limit::count>, limit<4>>);

} // namespace

TEST_CASE("a pointer to an array is followed") {
    std::uint32_t values[3] = {1, 2, 0xfffffffd};
    borrowed state{.count = 3, .values = values};
    CHECK(saved<vmstate_borrowed>(state) == hex("00000003 00000001 00000002 fffffffd"));
    REQUIRE(outcome(loaded<vmstate_borrowed>("00000002 0000000a 0000000b", state)) == "ok");
    CHECK(state.count == 2);
    CHECK(state.values == values);
    CHECK(values[0] == 10);
    CHECK(values[1] == 11);
    CHECK(values[2] == 0xfffffffd);
    check_every_prefix_is_refused<vmstate_borrowed>("00000002 0000000a 0000000b", 0,
                                                    [&] { return borrowed{.count = 3, .values = values}; });
}

TEST_CASE("a pointer's room is the length it had before, unless limit says how much it is") {
    std::uint32_t values[3] = {1, 2, 3};
    borrowed state{.count = 2, .values = values};
    CHECK(outcome(loaded<vmstate_borrowed>("00000003 0000000a 0000000b 0000000c", state)) ==
          failure(errc::out_of_range, "borrowed/values", 4));
    CHECK(values[0] == 1);
    CHECK(values[2] == 3);

    std::uint8_t bytes[4] = {1, 2, 3, 4};
    borrowed_with_limit limited{.count = 0, .values = bytes};
    REQUIRE(outcome(loaded<vmstate_borrowed_with_limit>("00000004 05060708", limited)) == "ok");
    CHECK(bytes[3] == 8);
    CHECK(outcome(loaded<vmstate_borrowed_with_limit>("00000005 0506070809", limited)) ==
          failure(errc::out_of_range, "borrowed/values", 4));
}

TEST_CASE("a load that was refused does not make the room look larger to the next one") {
    std::uint32_t values[3] = {1, 2, 3};
    borrowed state{.count = 2, .values = values};
    CHECK(outcome(loaded<vmstate_borrowed>("00000003 0000000a 0000000b 0000000c", state)) ==
          failure(errc::out_of_range, "borrowed/values", 4));
    CHECK(outcome(loaded<vmstate_borrowed>("00000003 0000000a 0000000b 0000000c", state)) ==
          failure(errc::out_of_range, "borrowed/values", 4));
    // The stream ends between the length and the array.
    CHECK(loaded<vmstate_borrowed>("00000003", state).has_error());
    CHECK(loaded<vmstate_borrowed>("00000003 0000000a 0000000b 0000000c", state).has_error());
    CHECK(values[2] == 3);
}

TEST_CASE("a null pointer with a length is allocated on load, and refused on save") {
    borrowed state;
    REQUIRE(outcome(loaded<vmstate_borrowed>("00000002 0000000a 0000000b", state)) == "ok");
    const std::unique_ptr<std::uint32_t[]> owner(state.values);
    REQUIRE(owner != nullptr);
    CHECK(owner[0] == 10);
    CHECK(owner[1] == 11);

    CHECK(why_not_saved<vmstate_borrowed>(borrowed{.count = 1}) == errc::null_pointer);
    CHECK(saved<vmstate_borrowed>(borrowed{}) == hex("00000000"));
}

namespace {

struct owned {
    std::uint16_t count = 0;
    std::unique_ptr<std::uint16_t[]> values;
};
constexpr auto vmstate_owned = describe<owned>(
    {.name = "owned"},
    field<&owned::count>, field<&owned::values, length<&owned::count>>);

} // namespace

TEST_CASE("a unique_ptr to an array is allocated on load, whatever it held") {
    owned state;
    REQUIRE(outcome(loaded<vmstate_owned>("0003 0001 0002 0003", state)) == "ok");
    REQUIRE(state.values != nullptr);
    CHECK(state.values[2] == 3);
    CHECK(saved<vmstate_owned>(state) == hex("0003 0001 0002 0003"));
    REQUIRE(outcome(loaded<vmstate_owned>("0005 0001 0002 0003 0004 0005", state)) == "ok");
    CHECK(state.values[4] == 5);
    owned without;
    without.count = 1;
    CHECK(why_not_saved<vmstate_owned>(without) == errc::null_pointer);
    check_every_prefix_is_refused<vmstate_owned>("0003 0001 0002 0003", 0, [] { return owned{}; });
}

namespace {

struct vbuffer_u64 {
    std::uint64_t size = 0;
    std::vector<std::uint8_t> data;
};
constexpr auto vmstate_vbuffer_u64 = describe<vbuffer_u64>(
    {.name = "vbuffer"}, field<&vbuffer_u64::size>, field<&vbuffer_u64::data, length<&vbuffer_u64::size>>);

} // namespace

// --- the room behind a pointer, when the stream changes its length ---------------------------------------------------

namespace {

struct roomy {
    std::uint8_t id = 0;
    std::uint32_t count = 0;
    std::uint32_t* values = nullptr;
};
bool always(const roomy&) { return true; }
constexpr auto vmstate_roomy_both = describe<roomy>(
    {.name = "roomy/both"}, needed<always>,
    field<&roomy::count>, field<&roomy::values, length<&roomy::count>, limit<64>>);
constexpr auto vmstate_roomy = describe<roomy>({.name = "roomy"}, field<&roomy::id>, subsection<vmstate_roomy_both>);

constexpr auto vmstate_siblings_count = describe<roomy>({.name = "siblings/count"}, needed<always>, field<&roomy::count>);
constexpr auto vmstate_siblings_values = describe<roomy>(
    {.name = "siblings/values"}, needed<always>, field<&roomy::values, length<&roomy::count>>);
constexpr auto vmstate_siblings = describe<roomy>(
    {.name = "siblings"}, field<&roomy::id>, subsection<vmstate_siblings_count, vmstate_siblings_values>);

constexpr auto vmstate_younger_array = describe<roomy>(
    {.name = "younger", .version_id = 2, .minimum_version_id = 1},
    transient<&roomy::id>, field<&roomy::count>, field<&roomy::values, length<&roomy::count>, since<2>>);

std::string subsection_bytes(std::string_view name, std::string_view body) {
    return " 05 " + hex(std::span<const std::byte>(std::array{static_cast<std::byte>(name.size())})) + " '" + std::string(name) +
           "' 00000000 " + std::string(body);
}
const std::string sixty_four = [] {
    std::string text = "00000040";
    for (int i = 0; i != 64; ++i) text += " 01020304";
    return text;
}();

} // namespace

TEST_CASE("memory that a load allocated has room for as many as limit says") {
    // The subsection comes twice, the second time with more.
    roomy state;
    REQUIRE(outcome(loaded<vmstate_roomy>("00" + subsection_bytes("roomy/both", "00000001 00000007") +
                                              subsection_bytes("roomy/both", sixty_four), state)) == "ok");
    CHECK(state.count == 64);
    CHECK(state.values[63] == 0x01020304);
    const std::uint32_t* const before = state.values;
    REQUIRE(outcome(loaded<vmstate_roomy>("00" + subsection_bytes("roomy/both", "00000001 00000009"), state)) == "ok");
    CHECK(state.values == before);
    CHECK(state.values[0] == 9);
    delete[] state.values;
}

TEST_CASE("a length from one subsection does not make the room in another look larger") {
    const std::unique_ptr<std::uint32_t[]> values(new std::uint32_t[4]());
    roomy state{.count = 4, .values = values.get()};
    CHECK(outcome(loaded<vmstate_siblings>("00" + subsection_bytes("siblings/count", sixty_four.substr(0, 8)) +
                                               subsection_bytes("siblings/values", sixty_four.substr(9)), state)) ==
          failure(errc::out_of_range, "siblings/values/values", 46));
    CHECK(state.count == 4);
    REQUIRE(outcome(loaded<vmstate_siblings>("00" + subsection_bytes("siblings/count", "00000002") +
                                                 subsection_bytes("siblings/values", "00000005 00000006"), state)) == "ok");
    CHECK(values[1] == 6);
}

TEST_CASE("a length that came without its array must not say more than there is") {
    const std::unique_ptr<std::uint32_t[]> values(new std::uint32_t[4]());
    roomy state{.count = 4, .values = values.get()};
    CHECK(loaded<vmstate_younger_array>("00000040", state, 1).error() == errc::out_of_range);
    CHECK(state.count == 4);
    REQUIRE(outcome(loaded<vmstate_younger_array>("00000003", state, 1)) == "ok");
    CHECK(state.count == 3);

    // Alone, the subsection with the length does no harm either.
    CHECK(loaded<vmstate_siblings>("00" + subsection_bytes("siblings/count", "00000040"), state).error() == errc::out_of_range);
    CHECK(state.count == 3);
}

TEST_CASE("a load that fails leaves no length that says more than there is: unique_ptr") {
    owned state;
    state.count = 2;
    state.values = std::make_unique<std::uint16_t[]>(2);
    CHECK(loaded<vmstate_owned>("1000 0001", state).has_error());
    CHECK((state.values == nullptr || state.count <= 2));
    CHECK(to_bytes<vmstate_owned>(state).has_value() == (state.values != nullptr));
    REQUIRE(outcome(loaded<vmstate_owned>("0003 0001 0002 0003", state)) == "ok");
    CHECK(saved<vmstate_owned>(state) == hex("0003 0001 0002 0003"));
}

TEST_CASE("a null pointer stays null where nothing comes, and is allocated when something does") {
    borrowed state;
    REQUIRE(outcome(loaded<vmstate_borrowed>("00000000", state)) == "ok");
    CHECK(state.values == nullptr);
    REQUIRE(outcome(loaded<vmstate_borrowed>("00000003 00000001 00000002 00000003", state)) == "ok");
    REQUIRE(state.values != nullptr);
    CHECK(state.values[2] == 3);
    delete[] state.values;
}

namespace {

struct checked_vector {
    std::uint32_t count = 0;
    std::vector<std::uint32_t> values;
};
constexpr auto vmstate_checked_vector = describe<checked_vector>(
    {.name = "checked"}, field<&checked_vector::count>, field<&checked_vector::values, length<&checked_vector::count>, equal>);

} // namespace

TEST_CASE("a load goes over the elements that a vector has") {
    checked_vector state{.count = 2, .values = {5, 6}};
    CHECK(outcome(loaded<vmstate_checked_vector>("00000002 00000005 00000006", state)) == "ok");
    CHECK(outcome(loaded<vmstate_checked_vector>("00000002 00000005 00000007", state)) ==
          failure(errc::value_mismatch, "checked/values[1]", 8));
}

TEST_CASE("an unsigned length is reported as one") {
    vbuffer_u64 state;
    CHECK_THAT(loaded<vmstate_vbuffer_u64>("ffffffffffffffff", state).error().message(), contains("18446744073709551615"));
}

namespace {

struct vbuffer {
    std::int32_t size = 0;
    std::vector<std::uint8_t> data;
    std::string text;
};
constexpr auto vmstate_vbuffer = describe<vbuffer>(
    {.name = "vbuffer"},
    field<&vbuffer::size>,
    field<&vbuffer::data, length<&vbuffer::size>, limit<8>>,
    field<&vbuffer::text, length<&vbuffer::size>>);

} // namespace

TEST_CASE("a buffer of variable size is its bytes") {
    vbuffer state{.size = 3, .data = {0xff, 0, 1}, .text = "cpu"};
    CHECK(saved<vmstate_vbuffer>(state) == hex("00000003 ff0001 'cpu'"));
    vbuffer other;
    REQUIRE(outcome(loaded<vmstate_vbuffer>("00000003 ff0001 'cpu'", other)) == "ok");
    CHECK(other.data == state.data);
    CHECK(other.text == "cpu");
    CHECK(outcome(loaded<vmstate_vbuffer>("00000009 000102030405060708 000102030405060708", other)) ==
          failure(errc::out_of_range, "vbuffer/data", 4));
}

// A pre_save that makes what is saved.
namespace {

struct collected {
    std::uint16_t count = 0;
    std::vector<std::uint8_t> bytes;
    std::string source = "abc";
};
void collect(collected& s) {
    s.bytes.assign(s.source.begin(), s.source.end());
    s.count = static_cast<std::uint16_t>(s.bytes.size());
}
constexpr auto vmstate_collected = describe<collected>(
    {.name = "collected"}, pre_save<collect>, field<&collected::count>,
    field<&collected::bytes, length<&collected::count>>, transient<&collected::source>);

} // namespace

TEST_CASE("a pre_save may make what is saved, whatever was measured before") {
    collected state;
    const auto bytes = to_bytes<vmstate_collected>(state);
    REQUIRE(bytes.has_value());
    CHECK(hex(*bytes) == hex("0003 'abc'"));
    state.source = "a";
    CHECK(saved<vmstate_collected>(state) == hex("0001 'a'"));
}

// --- multiply and limit ----------------------------------------------------------------------------------------------

namespace {

struct multiplied {
    std::uint32_t rows = 0;
    std::vector<std::uint16_t> cells;
};
constexpr auto vmstate_multiplied = describe<multiplied>(
    {.name = "multiplied"},
    field<&multiplied::rows>,
    field<&multiplied::cells, multiply<3>, length<&multiplied::rows>, limit<6>>);

} // namespace

TEST_CASE("multiply: the length counts rows of so many elements, and limit counts elements") {
    multiplied state{.rows = 2, .cells = {1, 2, 3, 4, 5, 6}};
    CHECK(saved<vmstate_multiplied>(state) == hex("00000002 0001 0002 0003 0004 0005 0006"));
    multiplied other;
    REQUIRE(outcome(loaded<vmstate_multiplied>("00000001 0007 0008 0009", other)) == "ok");
    CHECK(other.cells == std::vector<std::uint16_t>{7, 8, 9});
    CHECK(outcome(loaded<vmstate_multiplied>("00000003 0001 0002 0003 0004 0005 0006 0007 0008 0009", other)) ==
          failure(errc::out_of_range, "multiplied/cells", 4));
    // 3 * 0x55555556 is 2 in 32 bits.
    const auto r = loaded<vmstate_multiplied>("55555556 0001 0002", other);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::out_of_range);
}

namespace {

struct multiplied_64 {
    std::uint64_t rows = 0;
    std::vector<std::uint32_t> cells;
};
constexpr auto vmstate_multiplied_64 = describe<multiplied_64>(
    {.name = "multiplied"},
    field<&multiplied_64::rows>,
    field<&multiplied_64::cells, multiply<4>, length<&multiplied_64::rows>>);

} // namespace

TEST_CASE("a length whose product overflows is refused") {
    for (const char* text : {"4000000000000000 00000000", "4000000000000001 00000000000000000000000000000000",
                             "1000000000000001 00000000000000000000000000000000", "c000000000000001 00000000"}) {
        multiplied_64 state;
        const auto r = loaded<vmstate_multiplied_64>(text, state);
        REQUIRE(r.has_error());
        CHECK((r.error().code() == errc::out_of_range || r.error().code() == errc::truncated));
        CHECK(state.cells.capacity() < 16);
        CHECK(why_not_saved<vmstate_multiplied_64>(multiplied_64{.rows = 0x4000000000000000, .cells = {}}) != errc::ok);
    }
}

// --- gates on both, and everything at once ---------------------------------------------------------------------------

namespace {

struct gated {
    bool has_packet = false;
    std::uint8_t count = 0;
    std::uint8_t packet[8]{};
    std::uint16_t newer = 1;
    std::vector<std::uint8_t> newer_bytes = std::vector<std::uint8_t>(1, 9);
    bool operator==(const gated&) const = default;
};
bool has_packet(const gated& s) { return s.has_packet; }

constexpr auto vmstate_gated = describe<gated>(
    {.name = "gated", .version_id = 2, .minimum_version_id = 1},
    field<&gated::has_packet>,
    field<&gated::count, when<has_packet>>,
    field<&gated::packet, limit<4>, when<has_packet>, length<&gated::count>>,
    field<&gated::newer, since<2>>,
    field<&gated::newer_bytes, length<&gated::newer>, limit<3>, since<2>>);

} // namespace

TEST_CASE("a length and its array under one gate come and go together") {
    CHECK(saved<vmstate_gated>(gated{}) == hex("00 0001 09"));
    CHECK(saved<vmstate_gated>(gated{.has_packet = true, .count = 2, .packet = {5, 6}}) == hex("01 02 0506 0001 09"));
    gated state;
    REQUIRE(outcome(loaded<vmstate_gated>("01 01 07", state, 1)) == "ok");
    CHECK(state == gated{.has_packet = true, .count = 1, .packet = {7}});
    REQUIRE(outcome(loaded<vmstate_gated>("00 0003 010203", state, 2)) == "ok");
    CHECK(state.newer_bytes == std::vector<std::uint8_t>{1, 2, 3});
    CHECK(outcome(loaded<vmstate_gated>("00 0004 01020304", state, 2)) ==
          failure(errc::out_of_range, "gated/newer_bytes", 3));
    CHECK(outcome(loaded<vmstate_gated>("01 05 0102030405 0001 09", state, 2)) ==
          failure(errc::out_of_range, "gated/packet", 2));
}
