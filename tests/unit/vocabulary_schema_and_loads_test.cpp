// SPDX-License-Identifier: BSL-1.0
// What the compiler knows of the wire: the schema, its fingerprint, whether a new description reads an old one's
// stream. Nearly all of it is a static_assert: compiling is testing.
#include <array>
#include <bitset>
#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <vector>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

// --- schema ----------------------------------------------------------------------------------------------------------

struct point {
    std::uint16_t x = 0;
    std::int16_t y = 0;
};
constexpr auto vmstate_point = describe<point>(
    {.name = "point", .version_id = 2, .minimum_version_id = 0}, field<&point::x>, field<&point::y, since<2>>);

enum class phase : std::int8_t { idle };

struct everything {
    bool flag = false;
    std::uint8_t u8 = 0;
    std::int32_t s32 = 0;
    std::uint64_t u64 = 0;
    double real = 0;
    phase state = phase::idle;
    std::uint32_t configured = 0;
    std::int32_t used = 0;
    std::uint16_t table[2][3]{};
    std::uint8_t buffer[16]{};
    std::uint32_t count = 0;
    std::vector<std::uint32_t> values;
    std::vector<std::uint8_t> bytes;
    point origin;
    point corners[4];
    point* far[2]{};
    std::bitset<70> set;
    std::uint64_t words[4]{};
    std::int64_t expiry = -1;
    std::list<point> queue;
    std::map<std::uint32_t, point> tree;
    std::uint8_t odd = 0;
    std::uint32_t extra = 0;
};
bool odd_there(const everything&) { return true; }
bool extra_needed(const everything&) { return false; }

constexpr auto vmstate_everything_extra =
    describe<everything>({.name = "everything/extra", .version_id = 4}, needed<extra_needed>, field<&everything::extra>);
constexpr auto vmstate_everything = describe<everything>(
    {.name = "everything", .version_id = 3, .minimum_version_id = 1},
    field<&everything::flag>, field<&everything::u8>, field<&everything::s32>, field<&everything::u64, since<2>>,
    field<&everything::real>, field<&everything::state>, field<&everything::configured, equal>,
    field<&everything::used, at_most_current>, field<&everything::table>, field<&everything::buffer, slice<4, 8>>,
    field<&everything::count>, field<&everything::values, length<&everything::count>, multiply<2>, limit<64>>,
    field<&everything::bytes, length<&everything::count>>, field<&everything::origin, as<vmstate_point>>,
    field<&everything::corners, as<vmstate_point, 1>>, field<&everything::far, as<vmstate_point>>,
    field<&everything::set>, field<&everything::words, bitmap<&everything::count>>,
    field<&everything::expiry, as_timer>, field<&everything::queue, as<vmstate_point>, since<2>>,
    field<&everything::tree, as<vmstate_point>, since<2>>, unused<5>, field<&everything::odd, when<odd_there>>,
    subsection<vmstate_everything_extra>);

constexpr const schema& body = schema_of<vmstate_everything>();
static_assert(body.name == "everything");
static_assert(body.version_id == 3);
static_assert(body.minimum_version_id == 1);
static_assert(body.fields.size() == 23);
static_assert(body.subsections.size() == 1);
static_assert(body.subsections[0]->name == "everything/extra");
static_assert(body.subsections[0]->version_id == 4);
static_assert(body.subsections[0]->fields[0].name == "extra");

constexpr const schema_field& entry(std::string_view name) {
    for (const schema_field& one : body.fields)
        if (one.name == name) return one;
    return body.fields[body.fields.size()];   // no constant expression
}

// Types are QEMU's type strings.
static_assert(entry("flag").type == "bool");
static_assert(entry("u8").type == "uint8");
static_assert(entry("s32").type == "int32");
static_assert(entry("u64").type == "uint64");
static_assert(entry("real").type == "CPU_Double_U");
static_assert(entry("state").type == "int8");
static_assert(entry("configured").type == "uint32 equal");
static_assert(entry("used").type == "int32 le");
static_assert(entry("table").type == "uint16");
static_assert(entry("buffer").type == "buffer");
static_assert(entry("values").type == "uint32");
static_assert(entry("bytes").type == "buffer");
static_assert(entry("origin").type == "struct");
static_assert(entry("corners").type == "vstruct");
static_assert(entry("far").type == "struct");
static_assert(entry("set").type == "bitmap");
static_assert(entry("words").type == "bitmap");
static_assert(entry("expiry").type == "timer");
static_assert(entry("queue").type == "qtailq");
static_assert(entry("tree").type == "gtree");
static_assert(entry("unused").type == "unused_buffer");

// Counts, lengths, gates.
static_assert(entry("u64").since == 2 && !entry("u64").conditional);
static_assert(entry("odd").conditional);
static_assert(entry("table").repeat == repetition::array && entry("table").count == 6 && entry("table").size == 2);
static_assert(entry("buffer").count == 8);
static_assert(entry("values").repeat == repetition::by_length && entry("values").length_name == "count");
static_assert(entry("values").count == 2 && entry("values").limit == 64);
static_assert(entry("origin").nested == &schema_of<vmstate_point>() && entry("origin").nested_version == 2);
static_assert(entry("corners").count == 4 && entry("corners").nested_version == 1);
static_assert(entry("far").null_markers && entry("far").count == 2);
static_assert(entry("set").repeat == repetition::bits);
static_assert(entry("words").length_name == "count");
static_assert(entry("queue").repeat == repetition::list);
static_assert(entry("tree").repeat == repetition::map && entry("tree").key == nullptr);
static_assert(entry("unused").count == 5);

} // namespace

// --- the fingerprint -------------------------------------------------------------------------------------------------
// It changes when the wire changes, and only then.

namespace fingerprints {

struct s {
    std::uint32_t a;
    std::uint16_t b;
    std::uint8_t c[4];
    std::uint32_t n;
    std::vector<std::uint16_t> v;
};
bool p(const s&);
bool q(const s&);

constexpr auto base = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                  field<&s::a>, field<&s::b>, field<&s::c>);
constexpr auto same = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                  field<&s::a>, field<&s::b>, field<&s::c>);
static_assert(fingerprint_of<base>() == fingerprint_of<same>());
static_assert(fingerprint_of<base>() != 0);

// Other names, other types of the same width, other containers, checks that only look.
struct t {
    std::int32_t renamed;
    std::uint16_t b2;
    std::array<std::byte, 4> bytes;
};
bool fine(const t&);
void prepare(t&);
constexpr auto renamed = describe<t>({.name = "s", .version_id = 2, .minimum_version_id = 1}, field<&t::renamed>,
                                     field<&t::b2>, field<&t::bytes>);
static_assert(fingerprint_of<base>() == fingerprint_of<renamed>());
constexpr auto watched = describe<t>({.name = "s", .version_id = 2, .minimum_version_id = 1},
                                     pre_save<prepare>, validate<"it is fine", fine>,
                                     field<&t::renamed, between<0, 9>>, field<&t::b2, equal>, field<&t::bytes>);
static_assert(fingerprint_of<base>() == fingerprint_of<watched>());
struct u {
    float a;
    enum : std::uint16_t { x } b;
    bool c[4];
};
constexpr auto retyped = describe<u>({.name = "s", .version_id = 2, .minimum_version_id = 1}, field<&u::a>, field<&u::b>, field<&u::c>);
static_assert(fingerprint_of<base>() == fingerprint_of<retyped>());

// The same bytes through a nested struct.
struct inner {
    std::uint16_t b;
    std::uint8_t c[4];
};
struct outer {
    std::uint32_t a;
    inner rest;
};
constexpr auto vmstate_inner = describe<inner>({.name = "inner"}, field<&inner::b>, field<&inner::c>);
constexpr auto wrapped = describe<outer>({.name = "s", .version_id = 2, .minimum_version_id = 1}, field<&outer::a>,
                                         field<&outer::rest, as<vmstate_inner>>);
static_assert(fingerprint_of<base>() == fingerprint_of<wrapped>());

// Order.
constexpr auto reordered = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                       field<&s::b>, field<&s::a>, field<&s::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<reordered>());

// Width, count.
struct w {
    std::uint64_t a;
    std::uint16_t b;
    std::uint8_t c[4];
};
constexpr auto widened = describe<w>({.name = "s", .version_id = 2, .minimum_version_id = 1}, field<&w::a>, field<&w::b>, field<&w::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<widened>());
constexpr auto shorter = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                     field<&s::a>, field<&s::b>, field<&s::c, slice<0, 3>>);
static_assert(fingerprint_of<base>() != fingerprint_of<shorter>());
constexpr auto fewer = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial, field<&s::a>, field<&s::b>);
static_assert(fingerprint_of<base>() != fingerprint_of<fewer>());
constexpr auto more = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                  field<&s::a>, field<&s::b>, field<&s::c>, unused<1>);
static_assert(fingerprint_of<base>() != fingerprint_of<more>());

// Two u16 are not one u32: each is swapped for itself.
struct halves {
    std::uint16_t a[2];
    std::uint16_t b;
    std::uint8_t c[4];
};
constexpr auto split = describe<halves>({.name = "s", .version_id = 2, .minimum_version_id = 1}, field<&halves::a>,
                                        field<&halves::b>, field<&halves::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<split>());

// Gates.
constexpr auto gated = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                   field<&s::a>, field<&s::b, since<2>>, field<&s::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<gated>());
constexpr auto conditional = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                         field<&s::a>, field<&s::b, when<p>>, field<&s::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<conditional>());
static_assert(fingerprint_of<gated>() != fingerprint_of<conditional>());

// Version and name.
constexpr auto newer = describe<s>({.name = "s", .version_id = 3, .minimum_version_id = 1}, partial,
                                   field<&s::a>, field<&s::b>, field<&s::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<newer>());
constexpr auto other_name = describe<s>({.name = "s2", .version_id = 2, .minimum_version_id = 1}, partial,
                                        field<&s::a>, field<&s::b>, field<&s::c>);
static_assert(fingerprint_of<base>() != fingerprint_of<other_name>());

// Subsections: there, not there, of another name, another version, another body.
constexpr auto sub = describe<s>({.name = "s/sub", .version_id = 1}, needed<p>, field<&s::n>);
constexpr auto sub_newer = describe<s>({.name = "s/sub", .version_id = 2}, needed<p>, field<&s::n>);
constexpr auto sub_renamed = describe<s>({.name = "s/sub2", .version_id = 1}, needed<p>, field<&s::n>);
constexpr auto sub_other = describe<s>({.name = "s/sub", .version_id = 1}, needed<p>, field<&s::b>);
constexpr auto sub_needed_else = describe<s>({.name = "s/sub", .version_id = 1}, needed<q>, field<&s::n>);
template <const auto& Subsection>
constexpr auto with = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                  field<&s::a>, field<&s::b>, field<&s::c>, subsection<Subsection>);
static_assert(fingerprint_of<with<sub>>() != fingerprint_of<base>());
static_assert(fingerprint_of<with<sub>>() != fingerprint_of<with<sub_newer>>());
static_assert(fingerprint_of<with<sub>>() != fingerprint_of<with<sub_renamed>>());
static_assert(fingerprint_of<with<sub>>() != fingerprint_of<with<sub_other>>());
static_assert(fingerprint_of<with<sub>>() == fingerprint_of<with<sub_needed_else>>());

// Which member is the length.
struct lengths {
    std::uint16_t n, m, k;
    std::vector<std::uint16_t> v;
    std::array<std::uint16_t, 3> room;
};
constexpr auto length_n = describe<lengths>({.name = "l"}, partial, field<&lengths::n>, field<&lengths::m>,
                                            field<&lengths::v, length<&lengths::n>>);
constexpr auto length_m = describe<lengths>({.name = "l"}, partial, field<&lengths::n>, field<&lengths::m>,
                                            field<&lengths::v, length<&lengths::m>>);
constexpr auto length_of_room = describe<lengths>({.name = "l"}, partial, field<&lengths::n>, field<&lengths::m>,
                                                  field<&lengths::room, length<&lengths::n>, limit<2>>);
constexpr auto no_length = describe<lengths>({.name = "l"}, partial, field<&lengths::n>, field<&lengths::m>,
                                             field<&lengths::room>);
constexpr auto length_times_2 = describe<lengths>({.name = "l"}, partial, field<&lengths::n>, field<&lengths::m>,
                                                  field<&lengths::v, length<&lengths::n>, multiply<2>>);
static_assert(fingerprint_of<length_n>() != fingerprint_of<length_m>());
static_assert(fingerprint_of<length_n>() == fingerprint_of<length_of_room>());
static_assert(fingerprint_of<length_n>() != fingerprint_of<no_length>());
static_assert(fingerprint_of<length_n>() != fingerprint_of<length_times_2>());

// A nested description's version counts through the fields that it has.
struct holder {
    point at;
};
constexpr auto holds_1 = describe<holder>({.name = "h"}, field<&holder::at, as<vmstate_point, 1>>);
constexpr auto holds_2 = describe<holder>({.name = "h"}, field<&holder::at, as<vmstate_point, 2>>);
constexpr auto holds_local = describe<holder>({.name = "h"}, field<&holder::at, as<vmstate_point>>);
static_assert(fingerprint_of<holds_1>() != fingerprint_of<holds_2>());
static_assert(fingerprint_of<holds_2>() == fingerprint_of<holds_local>());

} // namespace fingerprints

// --- loads<New, Old> -------------------------------------------------------------------------------------------------

namespace compatible {

struct s {
    std::uint32_t a = 0;
    std::uint16_t b = 0;
    std::uint8_t c = 0;
    std::uint32_t n = 0;
    std::uint8_t buffer[4]{};
    std::vector<std::uint16_t> v;
};
bool p(const s&) { return true; }
bool q(const s&) { return true; }

constexpr auto v1 = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>);
constexpr auto v2 = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                field<&s::a>, field<&s::b>, field<&s::c, since<2>>);
constexpr auto v2_in_front = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                         field<&s::c, since<2>>, field<&s::a>, field<&s::b>);
static_assert(loads<v1, v1>);
static_assert(loads<v2, v2>);
static_assert(loads<v2, v1>, "a younger field is not in an older stream");
static_assert(loads<v2_in_front, v1>);
static_assert(!loads<v1, v2>, "an older description does not know the younger version");
static_assert(!loads<v2, v2_in_front>, "one version, two orders");

// A field added and no version for it: yesterday's stream ends too early.
constexpr auto forgot_since = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                          field<&s::a>, field<&s::b>, field<&s::c>);
static_assert(!loads<forgot_since, v1>);
// A field added under the same version.
constexpr auto forgot_version = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>, field<&s::c>);
static_assert(!loads<forgot_version, v1>);
static_assert(!loads<v1, forgot_version>);

// The old version is no longer accepted.
constexpr auto v3_only = describe<s>({.name = "s", .version_id = 3}, partial, field<&s::a>, field<&s::b>);
static_assert(!loads<v3_only, v1>);
constexpr auto v3_from_2 = describe<s>({.name = "s", .version_id = 3, .minimum_version_id = 2}, partial,
                                       field<&s::a>, field<&s::b>, field<&s::c, since<2>>);
static_assert(loads<v3_from_2, v2>);
static_assert(!loads<v3_from_2, v1>);

// A struct inside another one grows by a subsection, as the guide advises.
struct inner {
    std::uint8_t a = 0, extra = 0;
};
struct outer {
    inner one{}, two{};
    std::uint8_t after = 0;
};
bool has_extra(const inner&) { return true; }
constexpr auto inner_extra = describe<inner>({.name = "inner/extra"}, needed<has_extra>, field<&inner::extra>);
constexpr auto inner_old = describe<inner>({.name = "inner"}, field<&inner::a>, transient<&inner::extra>);
constexpr auto inner_new = describe<inner>({.name = "inner"}, field<&inner::a>, subsection<inner_extra>);
constexpr auto outer_old = describe<outer>({.name = "outer"}, field<&outer::one, as<inner_old>>,
                                           field<&outer::two, as<inner_old>>, field<&outer::after>);
constexpr auto outer_new = describe<outer>({.name = "outer"}, field<&outer::one, as<inner_new>>,
                                           field<&outer::two, as<inner_new>>, field<&outer::after>);
constexpr auto outer_half = describe<outer>({.name = "outer"}, field<&outer::one, as<inner_old>>,
                                            field<&outer::two, as<inner_new>>, field<&outer::after>);
static_assert(loads<outer_new, outer_old>);
static_assert(loads<outer_new, outer_new>);
static_assert(loads<outer_new, outer_half>);
static_assert(loads<outer_half, outer_old>);
static_assert(!loads<outer_old, outer_new>);
static_assert(!loads<outer_half, outer_new>);

// A field removed needs something in its place.
constexpr auto removed = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial, field<&s::a>, field<&s::c, since<2>>);
constexpr auto replaced = describe<s>({.name = "s", .version_id = 2, .minimum_version_id = 1}, partial,
                                      field<&s::a>, unused<2>, field<&s::c, since<2>>);
static_assert(!loads<removed, v1>);
static_assert(loads<replaced, v1>);
static_assert(loads<replaced, v2>, "skipped bytes may have been anything");

// What was unused is used again: an old stream has zeros there.
constexpr auto with_hole = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, unused<2>);
static_assert(loads<v1, with_hole>);

// Names of members don't matter, widths do.
struct renamed {
    std::int32_t first = 0;
    std::int16_t second = 0;
};
constexpr auto other_names = describe<renamed>({.name = "s", .version_id = 1}, field<&renamed::first>, field<&renamed::second>);
static_assert(loads<other_names, v1>);
static_assert(loads<v1, other_names>);
struct widened {
    std::uint64_t a = 0;
    std::uint16_t b = 0;
};
constexpr auto wider = describe<widened>({.name = "s", .version_id = 1}, field<&widened::a>, field<&widened::b>);
static_assert(!loads<wider, v1>);
static_assert(!loads<v1, wider>);
// Six bytes as they come are not a u32 and a u16.
struct six_bytes {
    std::uint8_t bytes[6]{};
};
constexpr auto as_bytes = describe<six_bytes>({.name = "s", .version_id = 1}, field<&six_bytes::bytes>);
static_assert(!loads<as_bytes, v1>);

// Subsections.
constexpr auto sub = describe<s>({.name = "s/sub", .version_id = 1}, needed<p>, field<&s::n>);
constexpr auto sub_2 = describe<s>({.name = "s/sub", .version_id = 2, .minimum_version_id = 1}, needed<p>,
                                   field<&s::n>, field<&s::c, since<2>>);
constexpr auto sub_2_only = describe<s>({.name = "s/sub", .version_id = 2}, needed<p>, field<&s::n>);
constexpr auto another = describe<s>({.name = "s/another", .version_id = 1}, needed<q>, field<&s::buffer>);
constexpr auto v1_sub = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>, subsection<sub>);
constexpr auto v1_sub_2 = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>, subsection<sub_2>);
constexpr auto v1_sub_2_only = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>, subsection<sub_2_only>);
constexpr auto v1_both = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>, subsection<sub, another>);
constexpr auto v1_both_turned = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b>, subsection<another, sub>);
static_assert(loads<v1_sub, v1>, "a new subsection is absent from an old stream");
static_assert(!loads<v1, v1_sub>, "a subsection that nobody knows");
static_assert(loads<v1_sub_2, v1_sub>);
static_assert(!loads<v1_sub, v1_sub_2>);
static_assert(!loads<v1_sub_2_only, v1_sub>);
static_assert(loads<v1_both, v1_sub>);
static_assert(!loads<v1_sub, v1_both>);
static_assert(loads<v1_both, v1_both_turned>, "any order is accepted");

// Another device altogether.
constexpr auto stranger = describe<s>({.name = "stranger", .version_id = 1}, partial, field<&s::a>, field<&s::b>);
static_assert(!loads<v1, stranger>);

// Predicates: the same ones are needed on both sides.
constexpr auto maybe = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b, when<p>>);
constexpr auto maybe_too = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::a>, field<&s::b, when<p>>);
static_assert(loads<maybe, maybe_too>);
static_assert(!loads<maybe, v1>, "what was always sent may be expected or not");
static_assert(!loads<v1, maybe>);

// Lengths.
constexpr auto counted = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::n>, field<&s::v, length<&s::n>>);
constexpr auto counted_too = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::n>, field<&s::v, length<&s::n>>);
constexpr auto counted_twice = describe<s>({.name = "s", .version_id = 1}, partial, field<&s::n>, field<&s::v, length<&s::n>, multiply<2>>);
static_assert(loads<counted, counted_too>);
static_assert(!loads<counted, counted_twice>);

// Nested descriptions at their own version, whatever the parent's.
struct holder {
    point at;
};
constexpr auto point_3 = describe<point>({.name = "point", .version_id = 3, .minimum_version_id = 0},
                                         field<&point::x>, field<&point::y, since<2>>, unused<1, since<3>>);
constexpr auto holds = describe<holder>({.name = "h", .version_id = 1}, field<&holder::at, as<vmstate_point>>);
constexpr auto holds_newer = describe<holder>({.name = "h", .version_id = 2, .minimum_version_id = 1}, field<&holder::at, as<point_3>>);
constexpr auto holds_pinned = describe<holder>({.name = "h", .version_id = 2, .minimum_version_id = 1}, field<&holder::at, as<point_3, 2>>);
static_assert(!loads<holds_newer, holds>, "changing a child changes every parent");
static_assert(loads<holds_pinned, holds>);

} // namespace compatible

// A test of its own for what the compiler has said already, so that there is something to run.
TEST_CASE("what loads<New, Old> promises, a load keeps") {
    const compatible::s state{.a = 1, .b = 2, .c = 3, .n = 4, .v = {}};
    compatible::s other;
    const auto old = to_bytes<compatible::v1>(state);
    REQUIRE(old.has_value());
    CHECK(outcome(from_bytes<compatible::v2>(*old, other, 1)) == "ok");
    CHECK(outcome(from_bytes<compatible::v2_in_front>(*old, other, 1)) == "ok");
    CHECK(outcome(from_bytes<compatible::replaced>(*old, other, 1)) == "ok");
    CHECK(from_bytes<compatible::forgot_since>(*old, other, 1).has_error());
    CHECK(from_bytes<compatible::removed>(*old, other, 1).has_error());
    const auto with_subsection = to_bytes<compatible::v1_sub>(state);
    REQUIRE(with_subsection.has_value());
    CHECK(outcome(from_bytes<compatible::v1_sub_2>(*with_subsection, other, 1)) == "ok");
    CHECK(outcome(from_bytes<compatible::v1_both_turned>(*with_subsection, other, 1)) == "ok");
    CHECK(from_bytes<compatible::v1>(*with_subsection, other, 1).has_error());
    CHECK(from_bytes<compatible::v1_sub_2_only>(*with_subsection, other, 1).has_error());
}

TEST_CASE("the fingerprint is the same in every run") {
    // A fingerprint may be kept in a file: whatever changes it changes what was kept.
    CHECK(fingerprint_of<fingerprints::base>() == fingerprint_of<fingerprints::same>());
    INFO("the description of everything: " << fingerprint_of<vmstate_everything>());
    CHECK(fingerprint_of<vmstate_everything>() != fingerprint_of<vmstate_everything_extra>());
}
