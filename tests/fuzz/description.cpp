// SPDX-License-Identifier: BSL-1.0
// Any bytes as the body of a struct with a field of every kind. The first byte is the version of the stream. What loads
// must measure and walk as what is saved, and load again as the same.
#include <vmstate/describe.hpp>

#include <array>
#include <atomic>
#include <bitset>
#include <chrono>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <forward_list>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace vmstate;

enum class phase : std::int8_t { idle, busy };

struct point {
    std::uint16_t x = 0;
    std::int16_t y = 0;
    std::uint8_t mark = 0;
};
bool mark_needed(const point& p) { return p.mark != 0; }
void point_pre_load(point& p) { p.mark = 0; }
constexpr auto vmstate_point_mark =
    describe<point>({.name = "point/mark", .version_id = 1}, needed<mark_needed>, field<&point::mark>);
constexpr auto vmstate_point = describe<point>({.name = "point", .version_id = 2, .minimum_version_id = 0},
    pre_load<point_pre_load>, field<&point::x>, field<&point::y, since<2>>, subsection<vmstate_point_mark>);

/// Has no subsections, so that arrays of it are all of one size.
struct pair {
    std::uint32_t first = 0;
    std::uint8_t second = 0;
    auto operator<=>(const pair&) const = default;
};
constexpr auto vmstate_pair = describe<pair>(
    {.name = "pair", .version_id = 0}, field<&pair::first>, field<&pair::second, between<0, 200>>);

struct bcd {
    std::uint8_t digits = 0;
};
struct bcd_codec {
    static constexpr std::string_view type = "bcd";
    static result<void> save(writer& w, const bcd& v) {
        w.put_u8(static_cast<std::uint8_t>(v.digits / 10 << 4 | v.digits % 10));
        return w.status();
    }
    static result<void> load(reader& r, bcd& v) {
        const unsigned byte = r.get_u8();
        if (r.failed()) return r.status();
        if (byte >> 4 > 9 || (byte & 15) > 9)
            return error(errc::hook_failed, "two decimal digits", std::to_string(byte));
        v.digits = static_cast<std::uint8_t>((byte >> 4) * 10 + (byte & 15));
        return {};
    }
    static std::size_t size(const bcd&) { return 1; }
};

struct everything {
    // One element.
    bool flag = false;
    std::int8_t s8 = 0;
    std::uint16_t u16 = 0;
    std::int32_t s32 = 0;
    std::uint64_t u64 = 0;
    std::atomic<std::uint32_t> atomic{0};
    double real = 0;
    phase state = phase::idle;
    std::uint32_t configured = 0x5a;
    std::int32_t used = 16;
    std::int16_t bounded = 0;
    bcd coded_number;

    // Arrays, of one size and of many.
    std::uint16_t table[2][3] = {};
    std::array<std::int64_t, 2> wide = {};
    std::uint8_t buffer[16] = {};
    std::uint8_t count8 = 0;
    std::uint16_t count16 = 0;
    std::int32_t count32 = 0;
    std::uint32_t fixed[8] = {};
    std::vector<std::uint32_t> values;
    std::vector<std::uint8_t> bytes;
    std::unique_ptr<std::uint16_t[]> owned;
    std::vector<pair> pairs;
    std::vector<point> points;

    // Structs and pointers.
    point origin;
    point corners[3];
    pair versioned;
    std::unique_ptr<point> far;
    std::unique_ptr<pair> some[3];

    // Bits, time, containers.
    std::bitset<70> set;
    std::vector<bool> flags = std::vector<bool>(67);
    std::uint32_t bits = 0;
    std::vector<std::uint64_t> words;
    std::int64_t expiry = -1;
    std::optional<std::chrono::nanoseconds> maybe;
    std::chrono::milliseconds delay{};
    std::list<pair> queue;
    std::deque<pair> deque;
    std::forward_list<pair> chain;
    std::map<std::uint32_t, pair> tree;
    std::map<pair, pair> keyed;

    // What decides, what comes besides.
    std::uint8_t odd = 0;
    std::uint32_t baud = 9600;
    std::uint32_t extra = 0;
    std::vector<std::uint16_t> late;
    std::uint8_t late_count = 0;
};

bool odd_there(const everything& s) { return (s.u16 & 1) != 0; }
bool extra_needed(const everything& s) { return s.extra != 0; }
bool late_needed(const everything& s) { return s.late_count != 0; }
bool is_consistent(const everything& s) { return s.s8 != 127; }
void everything_pre_load(everything& s) {
    s.extra = 0;
    s.late_count = 0;
    s.late.clear();
}
result<void> everything_post_load(everything& s, int version_id) {
    if (s.s8 == 126) return error(errc::hook_failed, "another number", std::to_string(version_id));
    return {};
}
result<void> load_ancient(reader& in, everything& s, int) {
    s.u64 = in.get_be16();
    return in.status();
}

class wire_clock {
public:
    explicit wire_clock(everything& s) : parent_(s) {}
    void pre_save() { divider = parent_.baud == 0 ? 0 : 115200 / parent_.baud; }
    bool post_load(int) {
        if (divider == 0 || divider > 115200) return false;
        parent_.baud = 115200 / divider;
        return true;
    }
    std::uint32_t divider = 0;

private:
    everything& parent_;
};
constexpr auto vmstate_wire_clock = describe<wire_clock>({.name = "wire-clock"},
    pre_save<&wire_clock::pre_save>, post_load<&wire_clock::post_load>, field<&wire_clock::divider>);

constexpr auto vmstate_late = describe<everything>(
    {.name = "everything/extra/late", .version_id = 3, .minimum_version_id = 1}, needed<late_needed>,
    field<&everything::late_count>, field<&everything::late, length<&everything::late_count>>);
constexpr auto vmstate_extra = describe<everything>({.name = "everything/extra", .version_id = 1},
    needed<extra_needed>, field<&everything::extra>, subsection<vmstate_late>);

constexpr auto vmstate_everything =
    describe<everything>({.name = "everything", .version_id = 3, .minimum_version_id = 1},
        load_old<load_ancient, 0>, pre_load<everything_pre_load>, post_load<everything_post_load>,
        field<&everything::flag>, field<&everything::s8>, field<&everything::u16>, field<&everything::s32>,
        field<&everything::u64, since<2>>, field<&everything::atomic>, field<&everything::real>,
        field<&everything::state>, field<&everything::configured, equal>,
        field<&everything::used, at_most_current>, field<&everything::bounded, between<-3, 300>>,
        field<&everything::coded_number, coded<bcd_codec>>, validate<"s8 is not 127", is_consistent>,
        field<&everything::table>, field<&everything::wide>, field<&everything::buffer, slice<4, 8>>,
        field<&everything::count8>, field<&everything::count16>, field<&everything::count32>,
        field<&everything::fixed, length<&everything::count8>>,
        field<&everything::values, length<&everything::count32>, multiply<2>>,
        field<&everything::bytes, length<&everything::count16>>,
        field<&everything::owned, length<&everything::count8>, limit<100>>,
        field<&everything::pairs, as<vmstate_pair>, length<&everything::count16>>,
        field<&everything::points, as<vmstate_point>, length<&everything::count8>, since<2>>,
        field<&everything::origin, as<vmstate_point>>, field<&everything::corners, as<vmstate_point, 1>>,
        field<&everything::versioned, as<vmstate_pair>, since<3>>, field<&everything::far, as<vmstate_point>>,
        field<&everything::some, as<vmstate_pair>>, field<&everything::set>, field<&everything::flags>,
        field<&everything::bits>, field<&everything::words, bitmap<&everything::bits>>,
        field<&everything::expiry, as_timer>, field<&everything::maybe, as_timer>, field<&everything::delay>,
        field<&everything::queue, as<vmstate_pair>>, field<&everything::deque, as<vmstate_pair>>,
        field<&everything::chain, as<vmstate_pair>>, field<&everything::tree, as<vmstate_pair>>,
        field<&everything::keyed, as<vmstate_pair>, key_as<vmstate_pair>>, unused<5>,
        field<&everything::odd, when<odd_there>>, transient<&everything::baud>,
        with_temporary<vmstate_wire_clock>, subsection<vmstate_extra>);

void prepare(everything& s) {
    s.far = std::make_unique<point>();
    s.some[0] = std::make_unique<pair>();
    s.some[2] = std::make_unique<pair>();
}

/// Adds up what the walk says, which is what the JSON description is made of.
class size_counter final : public field_visitor {
public:
    void begin_field(const field_event& field) override {
        if (depth_++ == 0) size += field.size * field.array_len;
    }
    void end_field() override { --depth_; }
    void begin_subsection(std::string_view name, int) override {
        if (depth_ == 0) size += 1 + 1 + name.size() + 4;
    }
    std::size_t size = 0;

private:
    std::size_t depth_ = 0;
};

std::vector<std::byte> save_all(everything& s) {
    auto bytes = to_bytes<vmstate_everything>(s);
    if (!bytes || bytes->size() != wire_size<vmstate_everything>(s)) std::abort();
    size_counter counter;
    walk<vmstate_everything>(s, counter);
    if (counter.size != bytes->size()) std::abort();
    return std::move(*bytes);
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto input = std::as_bytes(std::span(data, size));
    const int version_id = size == 0 ? 3 : static_cast<std::int8_t>(data[0]);
    const auto body = input.subspan(size == 0 ? 0 : 1);

    everything first;
    prepare(first);
    const auto outcome = from_bytes<vmstate_everything>(body, first, version_id);
    if (!outcome) {
        // An error says what, and where in the description.
        if (outcome.error().code() == errc::ok || !outcome.error().path().starts_with("everything"))
            std::abort();
        return 0;
    }
    // `at_most_current` measures against what is there.
    const std::vector<std::byte> saved = save_all(first);
    everything second;
    prepare(second);
    if (const auto again = from_bytes<vmstate_everything>(saved, second); !again) std::abort();
    if (save_all(second) != saved) std::abort();
    return 0;
}
