// SPDX-License-Identifier: BSL-1.0
// Queues and trees, bitmaps, timers and time.
#include <array>
#include <bitset>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <forward_list>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

// --- queues ----------------------------------------------------------------------------------------------------------

namespace {

struct request {
    bool write = false;
    std::uint8_t lun = 0;
    bool operator==(const request&) const = default;
};
constexpr auto vmstate_request = describe<request>(
    {.name = "test/queue-element", .version_id = 1}, field<&request::write>, field<&request::lun, between<0, 0xf0>>);

template <class Queue>
struct with_queue {
    std::int16_t before = 0;
    Queue q;
    std::int32_t after = 0;
    bool operator==(const with_queue&) const = default;
};
template <class Queue>
constexpr auto vmstate_with_queue = describe<with_queue<Queue>>(
    {.name = "test/queue", .version_id = 1},
    field<&with_queue<Queue>::before>,
    field<&with_queue<Queue>::q, as<vmstate_request>, since<1>>,
    field<&with_queue<Queue>::after>);

constexpr std::string_view queue_wire = "fe00 01 01 82 01 00 41 00 00011170";

} // namespace

TEMPLATE_TEST_CASE("a queue is 1 before each element and 0 at its end", "", std::list<request>, std::deque<request>,
                   std::forward_list<request>) {
    constexpr const auto& description = vmstate_with_queue<TestType>;
    const with_queue<TestType> state{.before = -512, .q = {{true, 130}, {false, 65}}, .after = 70000};
    CHECK(saved<description>(state) == hex(queue_wire));
    with_queue<TestType> other;
    REQUIRE(outcome(loaded<description>(queue_wire, other)) == "ok");
    CHECK(other == state);
    check_every_prefix_is_refused<description>(queue_wire, 1, [] { return with_queue<TestType>{}; });
}

TEMPLATE_TEST_CASE("a queue is emptied before it is loaded", "", std::list<request>, std::deque<request>,
                   std::forward_list<request>) {
    with_queue<TestType> state;
    state.q = {{true, 1}, {true, 2}, {true, 3}};
    REQUIRE(outcome(loaded<vmstate_with_queue<TestType>>("0000 01 00 07 00 00000000", state)) == "ok");
    CHECK(state.q == TestType{{false, 7}});
    REQUIRE(outcome(loaded<vmstate_with_queue<TestType>>("0000 00 00000000", state)) == "ok");
    CHECK(state.q.empty());
    CHECK(saved<vmstate_with_queue<TestType>>(state) == hex("0000 00 00000000"));
}

TEST_CASE("a bad element of a queue is named by its index") {
    with_queue<std::list<request>> state;
    CHECK(outcome(loaded<vmstate_with_queue<std::list<request>>>("0000 01 00 07 01 00 ff 00 00000000", state)) ==
          failure(errc::out_of_range, "test/queue/q[1]/lun", 7));
}

namespace {

struct grown_request {
    std::uint8_t tag = 1;
    std::uint8_t young = 2;
    bool operator==(const grown_request&) const = default;
};
constexpr auto vmstate_grown_request = describe<grown_request>(
    {.name = "grown-request", .version_id = 2, .minimum_version_id = 1},
    field<&grown_request::tag>, field<&grown_request::young, since<2>>);

struct grown_disk {
    std::list<grown_request> queue;
};
constexpr auto vmstate_grown_disk = describe<grown_disk>(
    {.name = "grown-disk", .version_id = 2, .minimum_version_id = 1},
    field<&grown_disk::queue, as<vmstate_grown_request>, since<2>>);

} // namespace

TEST_CASE("elements of a queue are loaded at the version of their field") {
    grown_disk state{.queue = {{3, 4}}};
    CHECK(saved<vmstate_grown_disk>(state) == hex("01 03 04 00"));
    REQUIRE(outcome(loaded<vmstate_grown_disk>("01 05 06 01 07 08 00", state)) == "ok");
    CHECK(state.queue == std::list<grown_request>{{5, 6}, {7, 8}});
    REQUIRE(outcome(loaded<vmstate_grown_disk>("", state, 1)) == "ok");
    CHECK(state.queue.size() == 2);
}

// --- trees -----------------------------------------------------------------------------------------------------------

namespace {

struct interval {
    std::uint64_t low = 0, high = 0;
    auto operator<=>(const interval&) const = default;
};
constexpr auto vmstate_interval =
    describe<interval>({.name = "interval", .version_id = 1, .minimum_version_id = 0}, field<&interval::low>, field<&interval::high>);

struct mapping {
    std::uint64_t phys_addr = 0;
    std::uint32_t flags = 0;
    bool operator==(const mapping&) const = default;
};
constexpr auto vmstate_mapping =
    describe<mapping>({.name = "mapping", .version_id = 1, .minimum_version_id = 0}, field<&mapping::phys_addr>, field<&mapping::flags>);

struct domain {
    std::int32_t id = 0;
    std::map<interval, mapping> mappings;
    bool operator==(const domain&) const = default;
};
constexpr auto vmstate_domain = describe<domain>(
    {.name = "domain", .version_id = 1, .minimum_version_id = 0},
    field<&domain::id>,
    field<&domain::mappings, as<vmstate_mapping>, key_as<vmstate_interval>>);

struct iommu {
    std::int32_t id = 0;
    std::map<std::uint32_t, domain> domains;
    bool operator==(const iommu&) const = default;
};
constexpr auto vmstate_iommu = describe<iommu>(
    {.name = "iommu", .version_id = 1},
    field<&iommu::id>,
    field<&iommu::domains, as<vmstate_domain>>);

constexpr std::string_view domain_wire =
    "00000001"
    "00000002"
    "01 0000000000001000 0000000000001fff 000000000000a000 00000001"
    "01 0000000000004000 0000000000004fff 000000000000e000 00000002"
    "00";
constexpr std::string_view iommu_wire =
    "00000007"
    "00000002"
    "01 0000000000000001  00000001 00000001 01 0000000001000000 0000000001ffffff 0000000007000000 00000008 00"
    "01 0000000000000005  00000005 00000000 00"
    "00";

} // namespace

TEST_CASE("a tree is its count, then 1, key and value for each node, and 0 at its end") {
    const domain state{.id = 1, .mappings = {{{0x1000, 0x1fff}, {0xa000, 1}}, {{0x4000, 0x4fff}, {0xe000, 2}}}};
    CHECK(saved<vmstate_domain>(state) == hex(domain_wire));
    domain other;
    other.mappings[{1, 2}] = {3, 4};
    REQUIRE(outcome(loaded<vmstate_domain>(domain_wire, other)) == "ok");
    CHECK(other == state);
    check_every_prefix_is_refused<vmstate_domain>(domain_wire, 1, [] { return domain{}; });
}

TEST_CASE("an integer key travels as be64, and trees nest") {
    const iommu state{.id = 7, .domains = {{1, {1, {{{0x1000000, 0x1ffffff}, {0x7000000, 8}}}}}, {5, {5, {}}}}};
    CHECK(saved<vmstate_iommu>(state) == hex(iommu_wire));
    iommu other;
    REQUIRE(outcome(loaded<vmstate_iommu>(iommu_wire, other)) == "ok");
    CHECK(other == state);
    check_every_prefix_is_refused<vmstate_iommu>(iommu_wire, 1, [] { return iommu{}; });
}

TEST_CASE("a tree whose nodes are not as many as it said is refused") {
    domain state;
    const auto with_count = [&](const char* count) {
        std::string text = hex(domain_wire);
        text.replace(8, 8, count);
        return loaded<vmstate_domain>(text, state);
    };
    for (const char* count : {"00000000", "00000001", "00000003", "ffffffff"}) {
        const auto r = with_count(count);
        REQUIRE(r.has_error());
        CHECK_THAT(std::string(r.error().path()), contains("domain/mappings"));
    }
}

namespace {

struct direct {
    std::map<std::uint8_t, mapping> small;
};
constexpr auto vmstate_direct = describe<direct>({.name = "direct"}, field<&direct::small, as<vmstate_mapping>>);

struct signed_keys {
    std::map<std::int32_t, mapping> m;
};
constexpr auto vmstate_signed_keys = describe<signed_keys>({.name = "signed-keys"}, field<&signed_keys::m, as<vmstate_mapping>>);

} // namespace

TEST_CASE("a key that does not fit the map's key type is refused, not cut") {
    direct state;
    const auto r = loaded<vmstate_direct>("00000001 01 0000000000000101 0000000000000000 00000000 00", state);
    REQUIRE(r.has_error());
    CHECK(r.error().code() == errc::out_of_range);
    CHECK_THAT(std::string(r.error().path()), contains("direct/small"));
}

TEST_CASE("a negative key is sign-extended, as a pointer-sized integer is") {
    signed_keys state{.m = {{-2, {1, 2}}}};
    CHECK(saved<vmstate_signed_keys>(state) == hex("00000001 01 fffffffffffffffe 0000000000000001 00000002 00"));
    signed_keys other;
    REQUIRE(outcome(loaded<vmstate_signed_keys>(saved<vmstate_signed_keys>(state), other)) == "ok");
    CHECK(other.m == state.m);
}

TEST_CASE("two nodes with one key are refused: the tree that was saved had no such thing") {
    direct state;
    const auto r = loaded<vmstate_direct>("00000002 01 0000000000000001 0000000000000000 00000000"
                                          "01 0000000000000001 0000000000000009 00000000 00", state);
    CHECK(r.has_error());
}

// --- bitmaps ---------------------------------------------------------------------------------------------------------

namespace {

struct bitmaps {
    std::int32_t bits = 0;
    std::uint64_t here[2]{};
    std::vector<std::uint64_t> grown;
    bool operator==(const bitmaps&) const = default;
};
constexpr auto vmstate_bitmaps = describe<bitmaps>(
    {.name = "bitmaps"},
    field<&bitmaps::bits>,
    field<&bitmaps::here, bitmap<&bitmaps::bits>>,
    field<&bitmaps::grown, bitmap<&bitmaps::bits>, limit<128>>);

} // namespace

TEST_CASE("a bitmap is as many be64 words as its bits need") {
    struct {
        std::int32_t bits;
        const char* text;
    } const sizes[] = {
        {0, "00000000"},
        {1, "00000001 0000000000000001 0000000000000001"},
        {63, "0000003f 4000000000000001 4000000000000001"},
        {64, "00000040 8000000000000001 8000000000000001"},
        {65, "00000041 8000000000000001 0000000000000001 8000000000000001 0000000000000001"},
        {128, "00000080 8000000000000001 8000000000000000 8000000000000001 8000000000000000"},
    };
    for (const auto& size : sizes) {
        INFO(size.bits << " bits");
        bitmaps state;
        REQUIRE(outcome(loaded<vmstate_bitmaps>(size.text, state)) == "ok");
        CHECK(state.bits == size.bits);
        CHECK(state.grown.size() == static_cast<std::size_t>((size.bits + 63) / 64));
        if (size.bits > 0) CHECK((state.here[0] & 1) == 1);
        CHECK(saved<vmstate_bitmaps>(state) == hex(size.text));
        check_every_prefix_is_refused<vmstate_bitmaps>(size.text, 0, [] { return bitmaps{}; });
    }
}

TEST_CASE("a bitmap with more bits than there is room for, or fewer than none, is refused") {
    for (const char* bits : {"00000081", "7fffffff", "ffffffff", "80000000"}) {
        bitmaps state;
        const auto r = loaded<vmstate_bitmaps>(std::string(bits) + std::string(64, '0'), state);
        REQUIRE(r.has_error());
        CHECK(r.error().code() == errc::out_of_range);
        CHECK(r.error().path() == "bitmaps/here");
        CHECK(r.error().offset() == 4);
    }
    CHECK(why_not_saved<vmstate_bitmaps>(bitmaps{.bits = 129, .grown = {}}) != errc::ok);
    CHECK(why_not_saved<vmstate_bitmaps>(bitmaps{.bits = -1, .grown = {}}) != errc::ok);
}

namespace {

struct huge_bitmap {
    std::int64_t bits = 0;
    std::vector<std::uint64_t> words;
};
constexpr auto vmstate_huge_bitmap = describe<huge_bitmap>(
    {.name = "huge-bitmap"}, transient<&huge_bitmap::bits>, field<&huge_bitmap::words, bitmap<&huge_bitmap::bits>>);

} // namespace

TEST_CASE("a bitmap that claims more bits than it has words is an error on save, not an allocation") {
    CHECK(why_not_saved<vmstate_huge_bitmap>(huge_bitmap{.bits = 0x7fffffffffffffff, .words = {}}) == errc::out_of_range);
    CHECK(why_not_saved<vmstate_huge_bitmap>(huge_bitmap{.bits = std::int64_t{1} << 50, .words = {1}}) == errc::out_of_range);
}

namespace {

template <std::size_t Bits>
struct with_bitset {
    std::bitset<Bits> set;
    std::uint8_t after = 0;
};
template <std::size_t Bits>
constexpr auto vmstate_with_bitset =
    describe<with_bitset<Bits>>({.name = "with-bitset"}, field<&with_bitset<Bits>::set>, field<&with_bitset<Bits>::after>);

template <std::size_t Bits>
void check_bitset(const char* lowest_and_highest) {
    with_bitset<Bits> state;
    state.set.set(0);
    state.set.set(Bits - 1);
    state.after = 9;
    CHECK(saved<vmstate_with_bitset<Bits>>(state) == hex(std::string(lowest_and_highest) + "09"));
    with_bitset<Bits> other;
    other.set.flip();
    REQUIRE(outcome(loaded<vmstate_with_bitset<Bits>>(std::string(lowest_and_highest) + "09", other)) == "ok");
    CHECK(other.set == state.set);
    CHECK(other.after == 9);
    check_every_prefix_is_refused<vmstate_with_bitset<Bits>>(std::string(lowest_and_highest) + "09", 0,
                                                             [] { return with_bitset<Bits>{}; });
    // Bits above the last one are nobody's.
    REQUIRE(outcome(loaded<vmstate_with_bitset<Bits>>(std::string((Bits + 63) / 64 * 16, 'f') + "01", other)) == "ok");
    CHECK(other.set.all());
    CHECK(other.set.count() == Bits);
}

} // namespace

TEST_CASE("a bitset is be64 words, bit 0 the lowest of the first") {
    check_bitset<1>("0000000000000001");
    check_bitset<63>("4000000000000001");
    check_bitset<64>("8000000000000001");
    check_bitset<65>("0000000000000001 0000000000000001");
    check_bitset<130>("0000000000000001 0000000000000000 0000000000000002");
}

namespace {

struct with_bit_vector {
    std::vector<bool> bits;
    std::uint8_t after = 0;
};
constexpr auto vmstate_with_bit_vector = describe<with_bit_vector>(
    {.name = "with-bit-vector"}, field<&with_bit_vector::bits>, field<&with_bit_vector::after>);

} // namespace

TEST_CASE("a vector of bool is a bitmap of the bits it has, on both sides") {
    for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{65}}) {
        with_bit_vector state{.bits = std::vector<bool>(size), .after = 9};
        std::string expected((size + 63) / 64 * 16, '0');
        if (size != 0) {
            state.bits[0] = true;
            expected[15] = '1';
        }
        if (size == 65) {
            state.bits[64] = true;
            expected[31] = '1';
        }
        CHECK(saved<vmstate_with_bit_vector>(state) == expected + "09");
        with_bit_vector other{.bits = std::vector<bool>(size, true), .after = 0};
        REQUIRE(outcome(loaded<vmstate_with_bit_vector>(expected + "09", other)) == "ok");
        CHECK(other.bits == state.bits);
        CHECK(other.after == 9);
    }
}

// --- timers and time -------------------------------------------------------------------------------------------------

namespace {

struct timers {
    std::int64_t plain = -1;
    std::uint64_t unsigned_plain = 5;
    std::optional<std::chrono::nanoseconds> maybe;
    std::int64_t many[2]{1, -1};
    bool operator==(const timers&) const = default;
};
constexpr auto vmstate_timers = describe<timers>(
    {.name = "timers"},
    field<&timers::plain, as_timer>,
    field<&timers::unsigned_plain, as_timer>,
    field<&timers::maybe, as_timer>,
    field<&timers::many, as_timer>);

} // namespace

TEST_CASE("a timer is its expiry in ns, and all ones when it is not pending") {
    CHECK(saved<vmstate_timers>(timers{}) ==
          hex("ffffffffffffffff 0000000000000005 ffffffffffffffff 0000000000000001 ffffffffffffffff"));
    timers state;
    REQUIRE(outcome(loaded<vmstate_timers>(
                "0000000000000007 ffffffffffffffff 000000003b9aca00 ffffffffffffffff 0000000000000002", state)) == "ok");
    CHECK(state == timers{.plain = 7, .unsigned_plain = ~std::uint64_t{0}, .maybe = std::chrono::seconds(1), .many = {-1, 2}});
    REQUIRE(outcome(loaded<vmstate_timers>(saved<vmstate_timers>(timers{}), state)) == "ok");
    CHECK(state == timers{});
    CHECK_FALSE(state.maybe.has_value());
    check_every_prefix_is_refused<vmstate_timers>(saved<vmstate_timers>(timers{}), 0, [] { return timers{}; });
}

namespace {

using virtual_time = std::chrono::time_point<std::chrono::steady_clock, std::chrono::nanoseconds>;

struct times {
    std::chrono::nanoseconds ns{};
    std::chrono::milliseconds ms{};
    virtual_time at{};
    std::array<std::chrono::microseconds, 2> us{};
    bool operator==(const times&) const = default;
};
constexpr auto vmstate_times = describe<times>(
    {.name = "times"}, field<&times::ns>, field<&times::ms>, field<&times::at>, field<&times::us>);

} // namespace

namespace {

struct odd_times {
    std::chrono::duration<std::int64_t, std::pico> ps{};
    std::chrono::hours h{};
    std::chrono::duration<double> s{};
};
constexpr auto vmstate_odd_times =
    describe<odd_times>({.name = "odd-times"}, field<&odd_times::ps>, field<&odd_times::h>, field<&odd_times::s>);

} // namespace

TEST_CASE("no time in a stream is undefined behaviour, whatever the unit it is kept in") {
    for (const char* ns : {"7fffffffffffffff", "8000000000000000", "ffffffffffffffff", "0000000000000001"}) {
        odd_times state;
        // Refused or clamped or cut, as it likes: the sanitizers watch.
        (void)loaded<vmstate_odd_times>(std::string(ns) + ns + ns, state);
        (void)saved<vmstate_odd_times>(state);
    }
}

TEST_CASE("a duration in floating-point seconds keeps its fraction") {
    odd_times state;
    state.s = std::chrono::duration<double>(-0.5);
    CHECK(saved<vmstate_odd_times>(state) == hex("0000000000000000 0000000000000000 ffffffffe2329b00"));
    odd_times other;
    REQUIRE(outcome(loaded<vmstate_odd_times>(saved<vmstate_odd_times>(state), other)) == "ok");
    CHECK(other.s == state.s);
}

TEST_CASE("durations and time points travel in nanoseconds") {
    using namespace std::chrono_literals;
    const times state{.ns = 5ns, .ms = -2ms, .at = virtual_time(1s), .us = {1us, 3us}};
    const std::string_view bytes =
        "0000000000000005 ffffffffffe17b80 000000003b9aca00 00000000000003e8 0000000000000bb8";
    CHECK(saved<vmstate_times>(state) == hex(bytes));
    times other;
    REQUIRE(outcome(loaded<vmstate_times>(bytes, other)) == "ok");
    CHECK(other == state);
}
