// SPDX-License-Identifier: BSL-1.0
// Single values and what decides that they are there: widths, enums, atomics, floating point, since, when, equal,
// at_most_current, between.
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

struct scalars {
    bool on = false;
    bool off = false;
    std::uint8_t u8 = 0;
    std::uint16_t u16 = 0;
    std::uint32_t u32 = 0;
    std::uint64_t u64 = 0;
    std::int8_t s8 = 0;
    std::int16_t s16 = 0;
    std::int32_t s32 = 0;
    std::int64_t s64 = 0;
    bool operator==(const scalars&) const = default;
};
constexpr auto vmstate_scalars = describe<scalars>(
    {.name = "scalars", .version_id = 1},
    field<&scalars::on>, field<&scalars::off>,
    field<&scalars::u8>, field<&scalars::u16>, field<&scalars::u32>, field<&scalars::u64>,
    field<&scalars::s8>, field<&scalars::s16>, field<&scalars::s32>, field<&scalars::s64>);

static_assert(vmstate_scalars.name == "scalars");
static_assert(vmstate_scalars.version_id == 1);
static_assert(vmstate_scalars.minimum_version_id == 1, "the oldest version accepted is the current one unless given");
static_assert(completeness_checked<vmstate_scalars>);
static_assert(wire_size<vmstate_scalars>(scalars{}) == 32, "a fixed layout's size is a constant expression");

constexpr std::string_view scalars_wire =
    "01 00 82 1234 89abcdef 0123456789abcdef  bf fe00 fffeee90 ffffffffff470b84";

} // namespace

TEST_CASE("integers travel big-endian in the width of the member's type") {
    const scalars state{.on = true, .off = false, .u8 = 0x82, .u16 = 0x1234, .u32 = 0x89abcdef,
                        .u64 = 0x0123456789abcdef, .s8 = -65, .s16 = -512, .s32 = -70000, .s64 = -12121212};
    CHECK(saved<vmstate_scalars>(state) == hex(scalars_wire));
    scalars other;
    CHECK(outcome(loaded<vmstate_scalars>(scalars_wire, other)) == "ok");
    CHECK(other == state);
}

TEST_CASE("the extremes of every integer survive") {
    scalars state{.on = true, .off = true, .u8 = 255, .u16 = 65535, .u32 = 0xffffffff, .u64 = ~std::uint64_t{0},
                  .s8 = -128, .s16 = -32768, .s32 = std::numeric_limits<std::int32_t>::min(),
                  .s64 = std::numeric_limits<std::int64_t>::min()};
    CHECK(saved<vmstate_scalars>(state) == hex("01 01 ff ffff ffffffff ffffffffffffffff 80 8000 80000000 8000000000000000"));
    scalars other;
    CHECK(outcome(loaded<vmstate_scalars>(saved<vmstate_scalars>(state), other)) == "ok");
    CHECK(other == state);
}

TEST_CASE("any byte but zero is a true bool") {
    for (const char* byte : {"01", "02", "80", "ff"}) {
        std::string text = hex(scalars_wire);
        text.replace(2, 2, byte);
        scalars state;
        REQUIRE(outcome(loaded<vmstate_scalars>(text, state)) == "ok");
        CHECK(state.off);
        CHECK(saved<vmstate_scalars>(state).substr(2, 2) == "01");
    }
}

TEST_CASE("every strict prefix of a run of scalars is refused, and names the field it ends in") {
    check_every_prefix_is_refused<vmstate_scalars>(scalars_wire, 1, [] { return scalars{}; });
    const auto path_of = [](std::size_t size) {
        scalars state;
        const auto bytes = wire(scalars_wire);
        const auto r = loaded<vmstate_scalars>(std::span(bytes).first(size), state);
        return outcome(r);
    };
    CHECK(path_of(0) == failure(errc::truncated, "scalars/on", 0));
    CHECK(path_of(2) == failure(errc::truncated, "scalars/u8", 2));
    CHECK(path_of(3) == failure(errc::truncated, "scalars/u16", 3));
    CHECK(path_of(4) == failure(errc::truncated, "scalars/u16", 3));
    CHECK(path_of(8) == failure(errc::truncated, "scalars/u32", 5));
    CHECK(path_of(31) == failure(errc::truncated, "scalars/s64", 24));
}

TEST_CASE("bytes left over are an error") {
    scalars state;
    const auto r = loaded<vmstate_scalars>(hex(scalars_wire) + "00", state);
    CHECK(outcome(r) == failure(errc::trailing_bytes, "scalars", 32));
}

TEST_CASE("a writer without room says so and the state is not half written") {
    std::byte room[31];
    memory_writer w(room);
    const scalars state;
    const auto r = save<vmstate_scalars>(w, state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::no_space);
    std::byte enough[32];
    memory_writer w2(enough);
    CHECK(save<vmstate_scalars>(w2, state).has_value());
    CHECK(w2.offset() == 32);
}

// --- other types that have the form of an integer --------------------------------------------------------------------

namespace {

enum class parity : std::uint16_t { none, odd = 0x0102 };
enum speed { slow, fast = 3 };
enum class sign : std::int8_t { minus = -1 };

struct kinds {
    parity p = parity::none;
    speed s = slow;
    sign g{};
    std::atomic<std::uint32_t> counter{0};
    std::atomic<bool> ready{false};
    std::byte raw{};
    char letter = 0;
    char16_t wide = 0;
    long number = 0;
    std::size_t size = 0;
};
constexpr auto vmstate_kinds = describe<kinds>(
    {.name = "kinds"},
    field<&kinds::p>, field<&kinds::s>, field<&kinds::g>, field<&kinds::counter>, field<&kinds::ready>,
    field<&kinds::raw>, field<&kinds::letter>, field<&kinds::wide>, field<&kinds::number>, field<&kinds::size>);

} // namespace

TEST_CASE("enums travel as their underlying type, atomics as what they hold") {
    kinds state;
    state.p = parity::odd;
    state.s = fast;
    state.g = sign::minus;
    state.counter = 0xdeadbeef;
    state.ready = true;
    state.raw = std::byte{0xa5};
    state.letter = 'v';
    state.wide = 0x20ac;
    state.number = -2;
    state.size = 5;
    const std::string_view bytes =
        "0102 00000003 ff deadbeef 01 a5 'v' 20ac fffffffffffffffe 0000000000000005";
    CHECK(saved<vmstate_kinds>(state) == hex(bytes));
    kinds other;
    REQUIRE(outcome(loaded<vmstate_kinds>(bytes, other)) == "ok");
    CHECK(other.p == parity::odd);
    CHECK(other.s == fast);
    CHECK(other.g == sign::minus);
    CHECK(other.counter.load() == 0xdeadbeef);
    CHECK(other.ready.load());
    CHECK(other.raw == std::byte{0xa5});
    CHECK(other.letter == 'v');
    CHECK(other.wide == 0x20ac);
    CHECK(other.number == -2);
    CHECK(other.size == 5);
}

namespace {

// Without a fixed underlying type only the values that its bits can hold are values of it.
enum narrow { zero, one, two };
struct with_narrow {
    narrow value = zero;
};
constexpr auto vmstate_with_narrow = describe<with_narrow>({.name = "with-narrow"}, field<&with_narrow::value>);

} // namespace

namespace {

enum class gear : std::uint8_t { first = 1, second, third };
struct checked_enums {
    gear now = gear::first;
    gear fixed = gear::second;
    narrow few = one;
};
constexpr auto vmstate_checked_enums = describe<checked_enums>(
    {.name = "checked-enums"}, field<&checked_enums::now, between<gear::first, gear::third>>,
    field<&checked_enums::fixed, equal>, field<&checked_enums::few, between<zero, two>>);

} // namespace

TEST_CASE("an enum is checked like its underlying integer") {
    checked_enums state;
    REQUIRE(outcome(loaded<vmstate_checked_enums>("03 02 00000002", state)) == "ok");
    CHECK(state.now == gear::third);
    CHECK(state.few == two);
    CHECK(outcome(loaded<vmstate_checked_enums>("04 02 00000002", state)) == failure(errc::out_of_range, "checked-enums/now", 0));
    CHECK(outcome(loaded<vmstate_checked_enums>("01 01 00000002", state)) ==
          failure(errc::value_mismatch, "checked-enums/fixed", 1));
    CHECK(outcome(loaded<vmstate_checked_enums>("01 02 ffffffff", state)) ==
          failure(errc::out_of_range, "checked-enums/few", 2));
}

TEST_CASE("no value in a stream is undefined behaviour for an enum") {
    with_narrow state;
    REQUIRE(outcome(loaded<vmstate_with_narrow>("00000002", state)) == "ok");
    CHECK(state.value == two);
    // Refused or kept, as the type allows: the sanitizers watch.
    if (loaded<vmstate_with_narrow>("ffffffff", state).has_value()) CHECK(saved<vmstate_with_narrow>(state) == "ffffffff");
}

namespace {

struct reals {
    double d = 0;
    float f = 0;
    bool operator==(const reals&) const = default;
};
constexpr auto vmstate_reals = describe<reals>({.name = "reals"}, field<&reals::d>, field<&reals::f>);

} // namespace

TEST_CASE("a double travels as two halves of its bits, the upper first") {
    reals state{.d = -2.5, .f = 1.5f};
    CHECK(saved<vmstate_reals>(state) == hex("c0040000 00000000 3fc00000"));
    reals other;
    REQUIRE(outcome(loaded<vmstate_reals>("3ff00000 00000001 80000000", other)) == "ok");
    CHECK(std::bit_cast<std::uint64_t>(other.d) == 0x3ff0000000000001);
    CHECK(std::bit_cast<std::uint32_t>(other.f) == 0x80000000);
}

TEST_CASE("the bits of a NaN are kept") {
    reals state;
    REQUIRE(outcome(loaded<vmstate_reals>("7ff8dead beef0001 7fc12345", state)) == "ok");
    CHECK(saved<vmstate_reals>(state) == hex("7ff8dead beef0001 7fc12345"));
}

// --- since -----------------------------------------------------------------------------------------------------------

namespace {

struct versioned {
    std::uint32_t a = 1, b = 2, c = 3;
    std::uint64_t d = 4;
    std::uint32_t e = 5;
    std::uint64_t f = 6;
    bool operator==(const versioned&) const = default;
};
constexpr auto vmstate_versioned = describe<versioned>(
    {.name = "test/versioned", .version_id = 3, .minimum_version_id = 1},
    field<&versioned::a>,
    field<&versioned::b, since<2>>,   // in the middle, where a mistake moves what follows
    field<&versioned::c>,
    field<&versioned::d>,
    field<&versioned::e, since<2>>,
    field<&versioned::f, since<3>>);

static_assert(vmstate_versioned.minimum_version_id == 1);

} // namespace

TEST_CASE("saving writes the fields of every version") {
    CHECK(saved<vmstate_versioned>(versioned{}) ==
          hex("00000001 00000002 00000003 0000000000000004 00000005 0000000000000006"));
}

TEST_CASE("loading an older version leaves the younger fields alone") {
    versioned state;
    REQUIRE(outcome(loaded<vmstate_versioned>("0000000a 0000001e 0000000000000028", state, 1)) == "ok");
    CHECK(state == versioned{.a = 10, .b = 2, .c = 30, .d = 40, .e = 5, .f = 6});
    REQUIRE(outcome(loaded<vmstate_versioned>("0000000b 0000000c 0000001f 0000000000000029 0000000d", state, 2)) == "ok");
    CHECK(state == versioned{.a = 11, .b = 12, .c = 31, .d = 41, .e = 13, .f = 6});
    REQUIRE(outcome(loaded<vmstate_versioned>(
                "00000001 00000002 00000003 0000000000000004 00000005 0000000000000007", state, 3)) == "ok");
    CHECK(state == versioned{.a = 1, .b = 2, .c = 3, .d = 4, .e = 5, .f = 7});
}

TEST_CASE("every strict prefix of every version is refused") {
    const auto make = [] { return versioned{}; };
    check_every_prefix_is_refused<vmstate_versioned>("0000000a 0000001e 0000000000000028", 1, make);
    check_every_prefix_is_refused<vmstate_versioned>("0000000b 0000000c 0000001f 0000000000000029 0000000d", 2, make);
    check_every_prefix_is_refused<vmstate_versioned>(
        "00000001 00000002 00000003 0000000000000004 00000005 0000000000000007", 3, make);
}

TEST_CASE("a version above the description's is refused before anything is read") {
    versioned state;
    auto r = loaded<vmstate_versioned>("", state, 4);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::version_too_new);
    CHECK(r.error().path() == "test/versioned");
    CHECK_THAT(r.error().message(), contains("3"));
    CHECK_THAT(r.error().message(), contains("4"));
    CHECK(state == versioned{});
}

TEST_CASE("a version below the oldest one accepted is refused before anything is read") {
    versioned state;
    for (const int version : {0, -1, std::numeric_limits<int>::min()}) {
        const auto r = loaded<vmstate_versioned>("", state, version);
        REQUIRE(r.has_error());
        CHECK(r.error().code() == errc::version_too_old);
        CHECK(r.error().path() == "test/versioned");
    }
    CHECK(state == versioned{});
}

// --- when ------------------------------------------------------------------------------------------------------------

namespace {

struct skipping {
    std::uint8_t flags = 0;
    std::uint32_t c = 300;
    std::uint16_t d = 400;
    std::uint32_t e = 500;
    bool operator==(const skipping&) const = default;
};
bool has_c(const skipping& s) { return (s.flags & 1) != 0; }
bool has_e(const skipping& s, int version_id) { return version_id >= 2 || (s.flags & 2) != 0; }

constexpr auto vmstate_skipping = describe<skipping>(
    {.name = "skipping", .version_id = 2, .minimum_version_id = 1},
    field<&skipping::flags>,
    field<&skipping::c, when<has_c>>,
    field<&skipping::d>,
    field<&skipping::e, when<has_e>>);

} // namespace

TEST_CASE("a predicate sees what has been loaded before its field") {
    CHECK(saved<vmstate_skipping>(skipping{.flags = 0}) == hex("00 0190 000001f4"));
    CHECK(saved<vmstate_skipping>(skipping{.flags = 1}) == hex("01 0000012c 0190 000001f4"));
    skipping state;
    REQUIRE(outcome(loaded<vmstate_skipping>("01 0000000c 000d 0000000e", state)) == "ok");
    CHECK(state == skipping{.flags = 1, .c = 12, .d = 13, .e = 14});
    state = {};
    REQUIRE(outcome(loaded<vmstate_skipping>("00 000d 0000000e", state)) == "ok");
    CHECK(state == skipping{.flags = 0, .c = 300, .d = 13, .e = 14});
}

TEST_CASE("a predicate is told the version that is loaded") {
    skipping state;
    REQUIRE(outcome(loaded<vmstate_skipping>("00 000d", state, 1)) == "ok");
    CHECK(state == skipping{.flags = 0, .c = 300, .d = 13, .e = 500});
    state = {};
    REQUIRE(outcome(loaded<vmstate_skipping>("02 000d 0000000e", state, 1)) == "ok");
    CHECK(state.e == 14);
}

TEST_CASE("every strict prefix of a body with predicates is refused") {
    check_every_prefix_is_refused<vmstate_skipping>("01 0000000c 000d 0000000e", 2, [] { return skipping{}; });
    check_every_prefix_is_refused<vmstate_skipping>("00 000d 0000000e", 2, [] { return skipping{}; });
    check_every_prefix_is_refused<vmstate_skipping>("00 000d", 1, [] { return skipping{}; });
}

namespace {

struct both_gates {
    std::uint8_t a = 1, b = 2, c = 3;
};
bool always(const both_gates&) { return true; }
bool never(const both_gates&) { return false; }

constexpr auto vmstate_both_gates = describe<both_gates>(
    {.name = "both-gates", .version_id = 2, .minimum_version_id = 1},
    field<&both_gates::a, since<2>, when<always>>,
    field<&both_gates::b, when<never>, since<1>>,
    field<&both_gates::c, since<2>>);

} // namespace

TEST_CASE("where a predicate is given it alone decides, whatever since says") {
    CHECK(saved<vmstate_both_gates>(both_gates{}) == hex("01 03"));
    both_gates state;
    REQUIRE(outcome(loaded<vmstate_both_gates>("09", state, 1)) == "ok");
    CHECK(state.a == 9);
    CHECK(state.b == 2);
    CHECK(state.c == 3);
}

namespace {

struct two_ways {
    bool wide = false;
    std::uint32_t value = 7;
};
bool is_wide(const two_ways& s) { return s.wide; }
bool is_narrow(const two_ways& s) { return !s.wide; }

constexpr auto vmstate_two_ways = describe<two_ways>(
    {.name = "two-ways"},
    field<&two_ways::wide>,
    field<&two_ways::value, when<is_wide>>,
    unused<1>,
    field<&two_ways::value, when<is_narrow>, between<0, 9>>);

} // namespace

TEST_CASE("one member in two places under different predicates") {
    CHECK(saved<vmstate_two_ways>(two_ways{.wide = true}) == hex("01 00000007 00"));
    CHECK(saved<vmstate_two_ways>(two_ways{.wide = false}) == hex("00 00 00000007"));
    two_ways state;
    REQUIRE(outcome(loaded<vmstate_two_ways>("01 00000063 ff", state)) == "ok");
    CHECK(state.value == 99);
    CHECK(outcome(loaded<vmstate_two_ways>("00 ff 00000063", state)) ==
          failure(errc::out_of_range, "two-ways/value", 2));
}

namespace {

class private_parts {
public:
    explicit private_parts(bool extended) : extended_(extended) {}
    bool is_extended() const { return extended_; }
    std::uint8_t level = 5;

private:
    bool extended_;
};
constexpr auto vmstate_private_parts = describe<private_parts>(
    {.name = "private-parts"}, field<&private_parts::level, when<&private_parts::is_extended>>);
static_assert(!completeness_checked<vmstate_private_parts>);

} // namespace

TEST_CASE("a member function is a predicate too") {
    CHECK(saved<vmstate_private_parts>(private_parts(true)) == hex("05"));
    CHECK(saved<vmstate_private_parts>(private_parts(false)) == "");
}

// --- equal -----------------------------------------------------------------------------------------------------------

namespace {

struct configured {
    std::uint8_t a = 1;
    std::uint16_t b = 2;
    std::int32_t c = -3;
    std::uint32_t d = 4;
    std::uint64_t e = 5;
    bool operator==(const configured&) const = default;
};
constexpr auto vmstate_configured = describe<configured>(
    {.name = "configured"},
    field<&configured::a, equal>, field<&configured::b, equal>, field<&configured::c, equal>,
    field<&configured::d, equal>, field<&configured::e, equal>);

} // namespace

TEST_CASE("an equal field loads its own value only") {
    configured state;
    const std::string good = hex("01 0002 fffffffd 00000004 0000000000000005");
    CHECK(saved<vmstate_configured>(state) == good);
    CHECK(outcome(loaded<vmstate_configured>(good, state)) == "ok");

    struct {
        std::size_t byte;
        const char* path;
        std::uint64_t offset;
    } const wrong[] = {{0, "configured/a", 0}, {1, "configured/b", 1}, {2, "configured/b", 1}, {6, "configured/c", 3},
                       {7, "configured/d", 7}, {18, "configured/e", 11}};
    for (const auto& one : wrong) {
        std::string text = good;
        text[one.byte * 2] = text[one.byte * 2] == 'f' ? '7' : '6';
        const auto r = loaded<vmstate_configured>(text, state);
        CHECK(outcome(r) == failure(errc::value_mismatch, one.path, one.offset));
        CHECK(state == configured{});
    }
}

TEST_CASE("a mismatch says which value was expected and which came") {
    configured state;
    const auto r = loaded<vmstate_configured>("01 0002 fffffffd 0000002a 0000000000000005", state);
    REQUIRE(r.has_error());
    CHECK_THAT(std::string(r.error().expected()), contains("4"));
    CHECK_THAT(std::string(r.error().found()), contains("42"));
    CHECK_THAT(r.error().message(), contains("configured/d"));
    CHECK_THAT(r.error().message(), contains("offset 7"));
}

// --- at_most_current, between ----------------------------------------------------------------------------------------

namespace {

struct bounded {
    std::int32_t used = 10;
    bool operator==(const bounded&) const = default;
};
constexpr auto vmstate_bounded = describe<bounded>({.name = "bounded"}, field<&bounded::used, at_most_current>);

} // namespace

TEST_CASE("at_most_current takes zero up to what the member holds") {
    for (const auto& [text, value] : {std::pair{"00000000", 0}, {"00000009", 9}, {"0000000a", 10}}) {
        bounded state;
        CHECK(outcome(loaded<vmstate_bounded>(text, state)) == "ok");
        CHECK(state.used == value);
    }
    for (const char* text : {"0000000b", "7fffffff", "ffffffff", "80000000"}) {
        bounded state;
        CHECK(outcome(loaded<vmstate_bounded>(text, state)) == failure(errc::out_of_range, "bounded/used", 0));
        CHECK(state == bounded{});
    }
}

namespace {

struct ranges {
    std::uint8_t a = 1;
    std::int16_t b = 0;
    std::uint64_t c = 0;
    std::int64_t d = 0;
    bool operator==(const ranges&) const = default;
};
constexpr auto vmstate_ranges = describe<ranges>(
    {.name = "ranges"},
    field<&ranges::a, between<1, 4>>,
    field<&ranges::b, between<-2, 2>>,
    field<&ranges::c, between<0, 0xffffffffffffffffu>>,
    field<&ranges::d, between<-1, 1>>);

} // namespace

TEST_CASE("between takes its bounds and what is between them") {
    ranges state;
    CHECK(outcome(loaded<vmstate_ranges>("01 fffe 0000000000000000 ffffffffffffffff", state)) == "ok");
    CHECK(state == ranges{.a = 1, .b = -2, .c = 0, .d = -1});
    CHECK(outcome(loaded<vmstate_ranges>("04 0002 ffffffffffffffff 0000000000000001", state)) == "ok");
    CHECK(state == ranges{.a = 4, .b = 2, .c = ~std::uint64_t{0}, .d = 1});
}

TEST_CASE("outside its bounds a value is refused and the member keeps its own") {
    struct {
        const char* text;
        const char* path;
        std::uint64_t offset;
    } const wrong[] = {
        {"00 0000 0000000000000000 0000000000000000", "ranges/a", 0},
        {"05 0000 0000000000000000 0000000000000000", "ranges/a", 0},
        {"81 0000 0000000000000000 0000000000000000", "ranges/a", 0},
        {"01 0003 0000000000000000 0000000000000000", "ranges/b", 1},
        {"01 fffd 0000000000000000 0000000000000000", "ranges/b", 1},
        {"01 0000 0000000000000000 8000000000000000", "ranges/d", 11},
        {"01 0000 0000000000000000 0000000000000002", "ranges/d", 11},
    };
    for (const auto& one : wrong) {
        ranges state;
        CHECK(outcome(loaded<vmstate_ranges>(one.text, state)) == failure(errc::out_of_range, one.path, one.offset));
    }
}

// --- the order of attributes -----------------------------------------------------------------------------------------

namespace {

struct ordered {
    bool on = true;
    std::uint16_t value = 3;
};
bool is_on(const ordered& s) { return s.on; }

constexpr auto vmstate_ordered_1 = describe<ordered>(
    {.name = "ordered", .version_id = 2, .minimum_version_id = 0}, field<&ordered::on>,
    field<&ordered::value, since<2>, between<1, 4>, when<is_on>>);
constexpr auto vmstate_ordered_2 = describe<ordered>(
    {.name = "ordered", .version_id = 2, .minimum_version_id = 0}, field<&ordered::on>,
    field<&ordered::value, when<is_on>, since<2>, between<1, 4>>);
constexpr auto vmstate_ordered_3 = describe<ordered>(
    {.name = "ordered", .version_id = 2, .minimum_version_id = 0}, field<&ordered::on>,
    field<&ordered::value, between<1, 4>, when<is_on>, since<2>>);

static_assert(fingerprint_of<vmstate_ordered_1>() == fingerprint_of<vmstate_ordered_2>());
static_assert(fingerprint_of<vmstate_ordered_1>() == fingerprint_of<vmstate_ordered_3>());

template <const auto& Description>
std::string behaviour() {
    std::string all = saved<Description>(ordered{}) + ' ' + saved<Description>(ordered{.on = false});
    for (const char* text : {"01 0004", "01 0005", "00", "00 0004", "01", "01 00"})
        for (const int version : {0, 2}) {
            ordered state;
            const auto r = loaded<Description>(text, state, version);
            all += ' ' + outcome(r) + ' ' + std::to_string(state.value);
        }
    return all;
}

} // namespace

TEST_CASE("attributes mean the same in any order") {
    CHECK(behaviour<vmstate_ordered_1>() == behaviour<vmstate_ordered_2>());
    CHECK(behaviour<vmstate_ordered_1>() == behaviour<vmstate_ordered_3>());
}

// --- memory that has more before and after ---------------------------------------------------------------------------

TEST_CASE("save and load use a reader and a writer where they stand") {
    std::byte memory[64]{};
    memory_writer w(memory);
    w.put_be32(0x11223344);
    const bounded seven{.used = 7};
    REQUIRE(save<vmstate_bounded>(w, seven).has_value());
    w.put_u8(0x55);
    CHECK(hex(w.written()) == "112233440000000755");

    memory_reader r(w.written());
    CHECK(r.get_be32() == 0x11223344);
    bounded state;
    REQUIRE(load<vmstate_bounded>(r, state, 0).has_value());
    CHECK(state.used == 7);
    CHECK(r.get_u8() == 0x55);
}

TEST_CASE("offsets count from the start of the stream, not of the device") {
    const auto bytes = wire("00000000 0000000b");
    memory_reader r(bytes);
    r.skip(4);
    bounded state;
    const auto outcome_of_load = load<vmstate_bounded>(r, state, 0);
    REQUIRE(outcome_of_load.has_error());
    CHECK(outcome_of_load.error().offset() == 4);
    CHECK(outcome_of_load.error().path() == "used");
}

// --- nothing at all --------------------------------------------------------------------------------------------------

namespace {

struct nothing {};
constexpr auto vmstate_nothing = describe<nothing>({.name = "nothing", .version_id = 1, .minimum_version_id = 0});
static_assert(wire_size<vmstate_nothing>(nothing{}) == 0);

} // namespace

TEST_CASE("a description of nothing is no bytes") {
    nothing state;
    CHECK(saved<vmstate_nothing>(state) == "");
    CHECK(outcome(loaded<vmstate_nothing>("", state)) == "ok");
    CHECK(outcome(loaded<vmstate_nothing>("00", state)) == failure(errc::trailing_bytes, "nothing", 0));
}
