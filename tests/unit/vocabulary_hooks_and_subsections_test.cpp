// SPDX-License-Identifier: BSL-1.0
// Hooks in QEMU's order, subsections in any, old loaders, temporaries, validation, codecs of the author's own, and the
// items that say something about the device as a whole.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

// --- order -----------------------------------------------------------------------------------------------------------

namespace {

std::string trace;
std::string taken() {
    std::string text;
    text.swap(trace);
    return text;
}

struct fifo {
    std::uint8_t level = 1;
};
void fifo_pre_save(fifo&) { trace += "fifo.pre_save "; }
void fifo_post_save(fifo&) { trace += "fifo.post_save "; }
void fifo_pre_load(fifo&) { trace += "fifo.pre_load "; }
void fifo_post_load(fifo&, int version_id) { trace += "fifo.post_load(" + std::to_string(version_id) + ") "; }
constexpr auto vmstate_fifo = describe<fifo>(
    {.name = "fifo", .version_id = 4, .minimum_version_id = 2},
    pre_save<fifo_pre_save>, post_save<fifo_post_save>, pre_load<fifo_pre_load>, post_load<fifo_post_load>,
    field<&fifo::level, between<0, 16>>);

struct uart {
    std::uint8_t divider = 2;
    fifo receive;
    std::uint8_t trigger = 0;
    std::uint16_t timeout = 0;
};
void uart_pre_save(uart&) { trace += "uart.pre_save "; }
void uart_post_save(uart&) { trace += "uart.post_save "; }
void uart_pre_load(uart& s) {
    trace += "uart.pre_load ";
    s.trigger = 0;   // the default of an absent subsection
}
void uart_post_load(uart& s, int version_id) {
    trace += "uart.post_load(" + std::to_string(version_id) + "," + std::to_string(s.receive.level) + ") ";
}
bool trigger_needed(const uart& s) { return s.trigger != 0; }
bool timeout_needed(const uart& s) { return s.timeout != 0; }
void trigger_pre_save(uart&) { trace += "trigger.pre_save "; }
void trigger_post_save(uart&) { trace += "trigger.post_save "; }
void trigger_pre_load(uart&) { trace += "trigger.pre_load "; }
void trigger_post_load(uart&, int version_id) { trace += "trigger.post_load(" + std::to_string(version_id) + ") "; }

constexpr auto vmstate_uart_trigger = describe<uart>(
    {.name = "uart/trigger", .version_id = 3, .minimum_version_id = 1},
    needed<trigger_needed>,
    post_load<trigger_post_load>, pre_load<trigger_pre_load>, post_save<trigger_post_save>, pre_save<trigger_pre_save>,
    field<&uart::trigger>);
constexpr auto vmstate_uart_timeout =
    describe<uart>({.name = "uart/timeout"}, needed<timeout_needed>, field<&uart::timeout>);
constexpr auto vmstate_uart = describe<uart>(
    {.name = "uart", .version_id = 3, .minimum_version_id = 2},
    post_load<uart_post_load>, pre_load<uart_pre_load>, post_save<uart_post_save>, pre_save<uart_pre_save>,
    field<&uart::divider>,
    field<&uart::receive, as<vmstate_fifo>>,
    subsection<vmstate_uart_trigger, vmstate_uart_timeout>);

static_assert(completeness_checked<vmstate_uart>, "members in a subsection count as described");

constexpr std::string_view uart_wire = "07 08";
constexpr std::string_view trigger_wire = "05 0c 'uart/trigger' 00000003 09";
constexpr std::string_view timeout_wire = "05 0c 'uart/timeout' 00000000 0102";

std::string join(std::initializer_list<std::string_view> parts) {
    std::string text;
    for (const std::string_view part : parts) text += hex(part);
    return text;
}

} // namespace

TEST_CASE("saving calls pre_save, writes fields, then subsections, and calls post_save") {
    uart state;
    state.trigger = 9;
    (void)taken();
    const auto bytes = to_bytes<vmstate_uart>(state);
    REQUIRE(bytes.has_value());
    CHECK(hex(*bytes) == join({"02 01", trigger_wire}));
    CHECK(taken() == "uart.pre_save fifo.pre_save fifo.post_save trigger.pre_save trigger.post_save uart.post_save ");
}

TEST_CASE("loading calls pre_load, reads fields, then subsections, and calls post_load: the child's before the parent's") {
    uart state;
    (void)taken();
    REQUIRE(outcome(loaded<vmstate_uart>(join({uart_wire, trigger_wire}), state)) == "ok");
    CHECK(taken() == "uart.pre_load fifo.pre_load fifo.post_load(4) trigger.pre_load trigger.post_load(3) uart.post_load(3,8) ");
    CHECK(state.divider == 7);
    CHECK(state.receive.level == 8);
    CHECK(state.trigger == 9);
}

TEST_CASE("post_load is told the version that was received") {
    uart state;
    (void)taken();
    REQUIRE(outcome(loaded<vmstate_uart>(join({uart_wire, "05 0c 'uart/trigger' 00000001 09"}), state, 2)) == "ok");
    CHECK(taken() == "uart.pre_load fifo.pre_load fifo.post_load(4) trigger.pre_load trigger.post_load(1) uart.post_load(2,8) ");
}

TEST_CASE("an absent subsection's hooks are not called, and pre_load's default stays") {
    uart state;
    state.trigger = 5;
    (void)taken();
    REQUIRE(outcome(loaded<vmstate_uart>(uart_wire, state)) == "ok");
    CHECK(taken() == "uart.pre_load fifo.pre_load fifo.post_load(4) uart.post_load(3,8) ");
    CHECK(state.trigger == 0);
}

TEST_CASE("measuring calls no hook") {
    const uart state;
    (void)taken();
    CHECK(wire_size<vmstate_uart>(state) == 2);
    CHECK(taken() == "");
}

TEST_CASE("a failed load stops where it failed: nothing after it is called") {
    uart state;
    (void)taken();
    CHECK(outcome(loaded<vmstate_uart>("07 11", state)) == failure(errc::out_of_range, "uart/receive/level", 1));
    CHECK(taken() == "uart.pre_load fifo.pre_load ");
    CHECK(loaded<vmstate_uart>(uart_wire, state, 4).has_error());
    CHECK(loaded<vmstate_uart>(uart_wire, state, 1).has_error());
    CHECK(taken() == "");
}

// --- subsections -----------------------------------------------------------------------------------------------------

TEST_CASE("a subsection is 5, its name counted, its version, its body") {
    uart state;
    state.trigger = 9;
    state.timeout = 0x0102;
    CHECK(saved<vmstate_uart>(state) == join({"02 01", trigger_wire, timeout_wire}));
    CHECK(saved<vmstate_uart>(uart{}) == hex("02 01"));
}

TEST_CASE("subsections are loaded in any order, absent, and repeated: the last one stays") {
    uart state;
    REQUIRE(outcome(loaded<vmstate_uart>(join({uart_wire, timeout_wire, trigger_wire}), state)) == "ok");
    CHECK(state.trigger == 9);
    CHECK(state.timeout == 0x0102);

    state = {};
    REQUIRE(outcome(loaded<vmstate_uart>(join({uart_wire, timeout_wire}), state)) == "ok");
    CHECK(state.trigger == 0);
    CHECK(state.timeout == 0x0102);

    state = {};
    REQUIRE(outcome(loaded<vmstate_uart>(join({uart_wire, timeout_wire, trigger_wire,
                                               "05 0c 'uart/timeout' 00000000 0708"}), state)) == "ok");
    CHECK(state.timeout == 0x0708);
}

TEST_CASE("every strict prefix of a body with subsections is refused, but for the whole ones") {
    check_every_prefix_is_refused<vmstate_uart>(join({uart_wire, trigger_wire, timeout_wire}), 3, [] { return uart{}; },
                                                {2, 2 + 19});
}

TEST_CASE("an unknown subsection of this device is an error that names it") {
    uart state;
    const auto r = loaded<vmstate_uart>(join({uart_wire, trigger_wire, "05 0a 'uart/extra' 00000001 00"}), state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::unknown_subsection);
    CHECK_THAT(r.error().message(), contains("uart/extra"));
    CHECK(r.error().offset() == 2 + 19);
}

TEST_CASE("what only looks like a subsection is left to whoever reads on") {
    for (const char* rest : {"05", "05 0c", "05 0c 'uart/tr'", "05 04 'uart' 00000001", "05 09 'fdc/extra' 00000001", "06"}) {
        uart state;
        const auto bytes = wire(join({uart_wire, rest}));
        memory_reader r(bytes);
        CHECK(load<vmstate_uart>(r, state, 3).has_value());
        CHECK(r.offset() == 2);
        CHECK(outcome(loaded<vmstate_uart>(bytes, state)) == failure(errc::trailing_bytes, "uart", 2));
    }
}

TEST_CASE("a subsection's version is checked like a device's") {
    uart state;
    auto r = loaded<vmstate_uart>(join({uart_wire, "05 0c 'uart/trigger' 00000004 09"}), state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::version_too_new);
    CHECK_THAT(r.error().message(), contains("trigger"));
    r = loaded<vmstate_uart>(join({uart_wire, "05 0c 'uart/trigger' 00000000 09"}), state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::version_too_old);
}

TEST_CASE("only the low 8 bits of a subsection's version count") {
    uart state;
    CHECK(outcome(loaded<vmstate_uart>(join({uart_wire, "05 0c 'uart/trigger' 00000103 09"}), state)) == "ok");
    CHECK(state.trigger == 9);
}

namespace {

struct deep {
    std::uint8_t a = 1, b = 0, c = 0;
};
bool b_needed(const deep& s) { return s.b != 0; }
bool c_needed(const deep& s) { return s.c != 0; }
constexpr auto vmstate_deep_b_c = describe<deep>({.name = "deep/b/c"}, needed<c_needed>, field<&deep::c, between<0, 9>>);
constexpr auto vmstate_deep_b =
    describe<deep>({.name = "deep/b"}, needed<b_needed>, field<&deep::b>, subsection<vmstate_deep_b_c>);
constexpr auto vmstate_deep = describe<deep>({.name = "deep"}, field<&deep::a>, subsection<vmstate_deep_b>);
static_assert(completeness_checked<vmstate_deep>);

struct outer {
    deep first, second;
    std::uint8_t last = 7;
};
constexpr auto vmstate_outer = describe<outer>(
    {.name = "outer"},
    field<&outer::first, as<vmstate_deep>>, field<&outer::second, as<vmstate_deep>>, field<&outer::last>);

} // namespace

TEST_CASE("a subsection has subsections of its own") {
    CHECK(saved<vmstate_deep>(deep{.a = 1, .b = 2, .c = 3}) ==
          hex("01 05 06 'deep/b' 00000000 02 05 08 'deep/b/c' 00000000 03"));
    CHECK(saved<vmstate_deep>(deep{.a = 1, .b = 0, .c = 3}) == hex("01"));
    deep state;
    REQUIRE(outcome(loaded<vmstate_deep>("09 05 06 'deep/b' 00000000 08 05 08 'deep/b/c' 00000000 07", state)) == "ok");
    CHECK(state.a == 9);
    CHECK(state.b == 8);
    CHECK(state.c == 7);
}

TEST_CASE("nested structs have their subsections where they stand") {
    const outer state{.first = {1, 2, 0}, .second = {4, 5, 6}, .last = 7};
    const std::string_view bytes =
        "01 05 06 'deep/b' 00000000 02"
        "04 05 06 'deep/b' 00000000 05 05 08 'deep/b/c' 00000000 06"
        "07";
    CHECK(saved<vmstate_outer>(state) == hex(bytes));
    outer other;
    REQUIRE(outcome(loaded<vmstate_outer>(bytes, other)) == "ok");
    CHECK(other.first.b == 2);
    CHECK(other.second.c == 6);
    CHECK(other.last == 7);
    check_every_prefix_is_refused<vmstate_outer>(bytes, 0, [] { return outer{}; },
                                                 // What is left of the last subsection's header can be read as fields.
                                                 {3, 16, 29});
}

TEST_CASE("an error inside a subsection has the way to it in its path") {
    outer state;
    const auto r = loaded<vmstate_outer>("01 04 05 06 'deep/b' 00000000 05 05 08 'deep/b/c' 00000000 0a 07", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::out_of_range);
    CHECK(r.error().offset() == 29);
    CHECK_THAT(std::string(r.error().path()), contains("outer/second/"));
    CHECK_THAT(std::string(r.error().path()), contains("/c"));
}

// --- what hooks return -----------------------------------------------------------------------------------------------

namespace {

struct strict {
    std::uint8_t value = 0;
    int post_saves = 0;
    bool check_value(int) { return value != 13; }
    result<void> prepare() {
        if (value == 14) return error(errc::hook_failed, "an even temper", "14");
        return {};
    }
};
bool strict_pre_load(strict& s) { return s.value != 99; }
result<void> strict_post_save(strict& s) {
    ++s.post_saves;
    if (s.value == 15) return error(errc::hook_failed, "a good end", "15");
    return {};
}
constexpr auto vmstate_strict = describe<strict>(
    {.name = "strict"},
    pre_load<strict_pre_load>, post_load<&strict::check_value>, pre_save<&strict::prepare>, post_save<strict_post_save>,
    transient<&strict::post_saves>,
    field<&strict::value, between<0, 20>>);

} // namespace

TEST_CASE("a hook that returns false fails the load") {
    strict state{.value = 99};
    auto r = loaded<vmstate_strict>("01", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::hook_failed);
    CHECK_THAT(std::string(r.error().path()), contains("strict"));
    CHECK_THAT(r.error().message(), contains("pre_load"));
    state = {};
    r = loaded<vmstate_strict>("0d", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::hook_failed);
    CHECK_THAT(r.error().message(), contains("post_load"));
    CHECK(outcome(loaded<vmstate_strict>("0c", state)) == "ok");
}

TEST_CASE("a hook's own error is what the caller gets") {
    strict state{.value = 14};
    const auto bytes = to_bytes<vmstate_strict>(state);
    REQUIRE(bytes.has_error());
    CHECK(bytes.error().code() == errc::hook_failed);
    CHECK(bytes.error().expected() == "an even temper");
    CHECK(bytes.error().found() == "14");
    CHECK(state.post_saves == 0); // not after a failing pre_save
}

TEST_CASE("post_save can fail the save, and is called after a field failed too") {
    strict state{.value = 15};
    CHECK(why_not_saved<vmstate_strict>(state) == errc::hook_failed);
    CHECK(state.post_saves == 1);

    state = {.value = 3};
    memory_writer w(std::span<std::byte>{});
    CHECK(save<vmstate_strict>(w, state).has_error());
    CHECK(state.post_saves == 1);
}

// --- validate --------------------------------------------------------------------------------------------------------

namespace {

struct ring {
    std::uint8_t head = 0, tail = 0;
};
bool head_in_ring(const ring& s) { return s.head < 16; }
constexpr auto vmstate_ring = describe<ring>(
    {.name = "ring"},
    field<&ring::head>,
    validate<"head lies in the ring", head_in_ring>,
    field<&ring::tail>);

} // namespace

TEST_CASE("validate is no bytes, and fails a load that it does not like before anything more is read") {
    CHECK(saved<vmstate_ring>(ring{.head = 15, .tail = 2}) == hex("0f 02"));
    ring state{.head = 1, .tail = 2};
    REQUIRE(outcome(loaded<vmstate_ring>("0f 03", state)) == "ok");
    CHECK(state.tail == 3);
    const auto r = loaded<vmstate_ring>("10 04", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::validation_failed);
    CHECK(r.error().offset() == 1);
    CHECK_THAT(r.error().message(), contains("head lies in the ring"));
    CHECK(state.tail == 3);
    CHECK(why_not_saved<vmstate_ring>(ring{.head = 16}) == errc::validation_failed);
}

// --- temporaries -----------------------------------------------------------------------------------------------------

namespace {

struct clock_card {
    std::uint32_t baud = 9600;
    std::uint8_t after = 7;
};
class clock_card_on_the_wire {
public:
    explicit clock_card_on_the_wire(clock_card& s) : parent_(s) {}
    void pre_save() { divider = static_cast<std::uint16_t>(115200 / parent_.baud); }
    bool post_load(int version_id) {
        version_seen = version_id;
        if (divider == 0) return false;
        parent_.baud = 115200u / divider;
        return true;
    }
    std::uint16_t divider = 0;
    static inline int version_seen = -1;

private:
    clock_card& parent_;
};
constexpr auto vmstate_clock_card_on_the_wire = describe<clock_card_on_the_wire>(
    {.name = "clock-card-on-the-wire"},
    pre_save<&clock_card_on_the_wire::pre_save>, post_load<&clock_card_on_the_wire::post_load>,
    field<&clock_card_on_the_wire::divider>);
constexpr auto vmstate_clock_card = describe<clock_card>(
    {.name = "clock-card"},
    transient<&clock_card::baud>,
    with_temporary<vmstate_clock_card_on_the_wire>,
    field<&clock_card::after>);

} // namespace

TEST_CASE("a temporary has the wire form, and its hooks convert") {
    clock_card state;
    CHECK(saved<vmstate_clock_card>(state) == hex("000c 07"));
    CHECK(saved<vmstate_clock_card>(std::as_const(state)) == hex("000c 07"));
    REQUIRE(outcome(loaded<vmstate_clock_card>("0006 08", state)) == "ok");
    CHECK(state.baud == 19200);
    CHECK(state.after == 8);
    CHECK(clock_card_on_the_wire::version_seen == 0);
    const auto r = loaded<vmstate_clock_card>("0000 08", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::hook_failed);
    CHECK_THAT(std::string(r.error().path()), contains("clock-card"));
    check_every_prefix_is_refused<vmstate_clock_card>("0006 08", 0, [] { return clock_card{}; });
}

// --- unused ----------------------------------------------------------------------------------------------------------

namespace {

struct shrunk {
    bool legacy = false;
    std::uint8_t a = 1, b = 2;
};
bool is_legacy(const shrunk& s) { return s.legacy; }
constexpr auto vmstate_shrunk = describe<shrunk>(
    {.name = "shrunk", .version_id = 2, .minimum_version_id = 1},
    field<&shrunk::legacy>,
    unused<3>,
    field<&shrunk::a>,
    unused<2, since<2>>,
    unused<1, when<is_legacy>>,
    field<&shrunk::b>);

} // namespace

namespace {

struct outgrown {
    std::uint16_t count = 0;
    std::uint8_t after = 7;
};
constexpr auto vmstate_outgrown = describe<outgrown>(
    {.name = "outgrown"}, field<&outgrown::count>, unused<3, length<&outgrown::count>>, field<&outgrown::after>);

} // namespace

TEST_CASE("unused bytes may have a length (VMSTATE_UNUSED_VARRAY_UINT32)") {
    CHECK(saved<vmstate_outgrown>(outgrown{.count = 2}) == hex("0002 000000 000000 07"));
    CHECK(saved<vmstate_outgrown>(outgrown{}) == hex("0000 07"));
    outgrown state;
    REQUIRE(outcome(loaded<vmstate_outgrown>("0001 ffffff 09", state)) == "ok");
    CHECK(state.after == 9);
    check_every_prefix_is_refused<vmstate_outgrown>("0002 ffffff ffffff 09", 0, [] { return outgrown{}; });
    CHECK(fingerprint_of<vmstate_outgrown>() != fingerprint_of<vmstate_shrunk>());
}

TEST_CASE("unused bytes are written as zeros and skipped on load") {
    CHECK(saved<vmstate_shrunk>(shrunk{}) == hex("00 000000 01 0000 02"));
    CHECK(saved<vmstate_shrunk>(shrunk{.legacy = true}) == hex("01 000000 01 0000 00 02"));
    shrunk state;
    REQUIRE(outcome(loaded<vmstate_shrunk>("01 ffffff 0a ffff ff 0b", state)) == "ok");
    CHECK(state.a == 10);
    CHECK(state.b == 11);
    REQUIRE(outcome(loaded<vmstate_shrunk>("00 ffffff 0c 0d", state, 1)) == "ok");
    CHECK(state.a == 12);
    CHECK(state.b == 13);
    check_every_prefix_is_refused<vmstate_shrunk>("01 ffffff 0a ffff ff 0b", 2, [] { return shrunk{}; });
}

namespace {

struct holed {
    std::uint8_t a = 1;
};
constexpr auto vmstate_holed = describe<holed>({.name = "holed"}, unused<70000>, field<&holed::a>, unused<5000>);
static_assert(wire_size<vmstate_holed>(holed{}) == 75001);

} // namespace

TEST_CASE("unused bytes may be more than any window") {
    const auto bytes = to_bytes<vmstate_holed>(holed{.a = 5});
    REQUIRE(bytes.has_value());
    REQUIRE(bytes->size() == 75001);
    std::vector<std::byte> expected(75001);
    expected[70000] = std::byte{5};
    CHECK(*bytes == expected);
    holed state;
    CHECK(outcome(loaded<vmstate_holed>(*bytes, state)) == "ok");
    CHECK(state.a == 5);
    for (const std::size_t size : {std::size_t{0}, std::size_t{69999}, std::size_t{70000}, std::size_t{70001}, std::size_t{75000}})
        CHECK(loaded<vmstate_holed>(std::span(*bytes).first(size), state).has_error());
}

// --- codecs of the author's own --------------------------------------------------------------------------------------

namespace {

struct bcd {
    unsigned value = 0;
    bool operator==(const bcd&) const = default;
};
// Two decimal digits in a byte, preceded by how many bytes there are.
struct bcd_codec {
    static constexpr std::string_view type = "bcd";
    static result<void> save(writer& w, const bcd& v) {
        w.put_u8(static_cast<std::uint8_t>(v.value / 10 << 4 | v.value % 10));
        return w.status();
    }
    static result<void> load(reader& r, bcd& v) {
        const unsigned byte = r.get_u8();
        if (r.failed()) return r.status();
        if (byte >> 4 > 9 || (byte & 15) > 9) return error(errc::hook_failed, "two decimal digits", std::to_string(byte));
        v.value = (byte >> 4) * 10 + (byte & 15);
        return {};
    }
    static std::size_t size(const bcd&) { return 1; }
};
struct cmos {
    bcd seconds;
    bcd alarms[2];
    bool operator==(const cmos&) const = default;
};
constexpr auto vmstate_cmos = describe<cmos>(
    {.name = "cmos", .version_id = 2, .minimum_version_id = 1},
    field<&cmos::seconds, coded<bcd_codec>>, field<&cmos::alarms, since<2>, coded<bcd_codec>>);

} // namespace

TEST_CASE("a codec writes and reads its own form, elements of an array one by one") {
    const cmos state{.seconds = {59}, .alarms = {{7}, {30}}};
    CHECK(saved<vmstate_cmos>(state) == hex("59 07 30"));
    cmos other;
    REQUIRE(outcome(loaded<vmstate_cmos>("59 07 30", other)) == "ok");
    CHECK(other == state);
    REQUIRE(outcome(loaded<vmstate_cmos>("12", other, 1)) == "ok");
    CHECK(other == cmos{.seconds = {12}, .alarms = {{7}, {30}}});
    check_every_prefix_is_refused<vmstate_cmos>("59 07 30", 2, [] { return cmos{}; });
}

TEST_CASE("a codec's error gets the place") {
    cmos state;
    const auto r = loaded<vmstate_cmos>("59 07 3a", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::hook_failed);
    CHECK(r.error().path() == "cmos/alarms[1]");
    CHECK(r.error().offset() <= 3);
    CHECK(r.error().offset() >= 2);
    CHECK(r.error().expected() == "two decimal digits");
}

// --- old loaders -----------------------------------------------------------------------------------------------------

namespace {

struct ancient {
    std::uint16_t value = 0;
    int loaded_by_hand = -1;
};
result<void> load_ancient(reader& r, ancient& s, int version_id) {
    s.value = r.get_u8();
    s.loaded_by_hand = version_id;
    return r.status();
}
constexpr auto vmstate_ancient = describe<ancient>(
    {.name = "ancient", .version_id = 5, .minimum_version_id = 3},
    load_old<load_ancient, 1>,
    transient<&ancient::loaded_by_hand>,
    field<&ancient::value>);

static_assert(vmstate_ancient.oldest_version_id() == 1);
static_assert(vmstate_uart.oldest_version_id() == 2);

} // namespace

TEST_CASE("versions below the oldest described one go to the loader by hand") {
    ancient state;
    REQUIRE(outcome(loaded<vmstate_ancient>("0102", state, 3)) == "ok");
    CHECK(state.value == 0x0102);
    CHECK(state.loaded_by_hand == -1);
    REQUIRE(outcome(loaded<vmstate_ancient>("07", state, 2)) == "ok");
    CHECK(state.value == 7);
    CHECK(state.loaded_by_hand == 2);
    REQUIRE(outcome(loaded<vmstate_ancient>("08", state, 1)) == "ok");
    auto r = loaded<vmstate_ancient>("09", state, 0);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::version_too_old);
    r = loaded<vmstate_ancient>("", state, 2);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::truncated);
    CHECK_THAT(std::string(r.error().path()), contains("ancient"));
}

// --- about the device as a whole -------------------------------------------------------------------------------------

namespace {

struct bus {
    std::uint8_t present = 0;
};
bool bus_present(const bus& s) { return s.present != 0; }
constexpr auto vmstate_bus = describe<bus>(
    {.name = "bus"}, needed<bus_present>, priority<migration_priority::pci_bus>, field<&bus::present>);
constexpr auto vmstate_pinned = describe<bus>({.name = "pinned"}, unmigratable, field<&bus::present>);

static_assert(vmstate_bus.priority() == 2);
static_assert(!vmstate_bus.is_unmigratable());
static_assert(vmstate_pinned.priority() == 0);
static_assert(vmstate_pinned.is_unmigratable());
static_assert(vmstate_uart.priority() == 0);

} // namespace

TEST_CASE("a device says itself whether it is needed") {
    CHECK(is_needed<vmstate_bus>(bus{1}));
    CHECK_FALSE(is_needed<vmstate_bus>(bus{0}));
    CHECK(is_needed<vmstate_pinned>(bus{0}));
}
