// SPDX-License-Identifier: BSL-1.0
//
// Generated code against hand-written big-endian code for the same bytes and against a plain table-driven interpreter of
// the same fields: save and load of the keyboard (4 bytes), a cpu-like struct (966), 65,536 u32 by length, a 64 KiB buffer.
// Every round runs all contenders one after the other, so that a machine whose speed drifts treats them alike; compare
// medians of one run: the counter `ratio` is time over the hand-written code's. The limit is 1.2.
#include <benchmark/benchmark.h>

#include <vmstate/describe.hpp>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

using vmstate::detail::load_big;
using vmstate::detail::store_big;

// --- the structs -----------------------------------------------------------------------------------------------------

struct keyboard {
    std::uint8_t write_cmd, status, mode, pending;
};
constexpr auto keyboard_description = vmstate::describe<keyboard>(
    {.name = "pckbd", .version_id = 3, .minimum_version_id = 3}, vmstate::field<&keyboard::write_cmd>,
    vmstate::field<&keyboard::status>, vmstate::field<&keyboard::mode>, vmstate::field<&keyboard::pending>);

struct segment {
    std::uint32_t selector;
    std::uint64_t base;
    std::uint32_t limit;
    std::uint32_t flags;
};
constexpr auto segment_description = vmstate::describe<segment>(
    {.name = "segment"}, vmstate::field<&segment::selector>, vmstate::field<&segment::base>,
    vmstate::field<&segment::limit>, vmstate::field<&segment::flags>);

struct cpu {
    std::array<std::uint64_t, 16> regs;
    std::uint64_t rip, flags;
    std::array<segment, 6> segs;
    std::array<std::uint64_t, 64> xmm;
    std::array<std::uint64_t, 8> cr;
    std::uint32_t a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9;
    std::array<std::uint64_t, 4> msrs;
    std::array<std::uint64_t, 4> debug;
};
bool msrs_needed(const cpu& s) { return s.msrs[0] != 0; }
bool debug_needed(const cpu& s) { return s.debug[0] != 0; }
constexpr auto msrs_description = vmstate::describe<cpu>({.name = "cpu/msrs", .version_id = 1},
                                                         vmstate::needed<msrs_needed>, vmstate::field<&cpu::msrs>);
constexpr auto debug_description = vmstate::describe<cpu>({.name = "cpu/debug", .version_id = 1},
                                                          vmstate::needed<debug_needed>, vmstate::field<&cpu::debug>);
constexpr auto cpu_description = vmstate::describe<cpu>(
    {.name = "cpu", .version_id = 12, .minimum_version_id = 12}, vmstate::field<&cpu::regs>, vmstate::field<&cpu::rip>,
    vmstate::field<&cpu::flags>, vmstate::field<&cpu::segs, vmstate::as<segment_description>>, vmstate::field<&cpu::xmm>,
    vmstate::field<&cpu::cr>, vmstate::field<&cpu::a0>, vmstate::field<&cpu::a1>, vmstate::field<&cpu::a2>,
    vmstate::field<&cpu::a3>, vmstate::field<&cpu::a4>, vmstate::field<&cpu::a5>, vmstate::field<&cpu::a6>,
    vmstate::field<&cpu::a7>, vmstate::field<&cpu::a8>, vmstate::field<&cpu::a9>, vmstate::field<&cpu::b0>,
    vmstate::field<&cpu::b1>, vmstate::field<&cpu::b2>, vmstate::field<&cpu::b3>, vmstate::field<&cpu::b4>,
    vmstate::field<&cpu::b5>, vmstate::field<&cpu::b6>, vmstate::field<&cpu::b7>, vmstate::field<&cpu::b8>,
    vmstate::field<&cpu::b9>, vmstate::subsection<msrs_description, debug_description>);

constexpr std::uint32_t row_length = 65536;
struct row {
    std::uint32_t count;
    std::vector<std::uint32_t> values;
};
constexpr auto row_description = vmstate::describe<row>(
    {.name = "row"}, vmstate::field<&row::count>,
    vmstate::field<&row::values, vmstate::length<&row::count>, vmstate::limit<row_length>>);

struct buffer {
    std::array<std::uint8_t, 65536> bytes;
};
constexpr auto buffer_description = vmstate::describe<buffer>({.name = "buffer"}, vmstate::field<&buffer::bytes>);

// --- by hand: one bounds check, then stores and loads; against the same writers and readers ----------------------------

bool save_by_hand(vmstate::writer& w, const keyboard& s) {
    std::byte* p = w.reserve(4);
    if (p == nullptr) return false;
    p = store_big(p, s.write_cmd);
    p = store_big(p, s.status);
    p = store_big(p, s.mode);
    p = store_big(p, s.pending);
    w.commit(p);
    return true;
}
bool load_by_hand(vmstate::reader& r, keyboard& s) {
    const std::byte* p = r.need(4);
    if (p == nullptr) return false;
    s.write_cmd = load_big<std::uint8_t>(p);
    s.status = load_big<std::uint8_t>(p + 1);
    s.mode = load_big<std::uint8_t>(p + 2);
    s.pending = load_big<std::uint8_t>(p + 3);
    r.seek(p + 4);
    return r.peek(1) == 0; // like the generated code, looks whether a subsection follows
}

bool save_by_hand(vmstate::writer& w, const cpu& s) {
    std::byte* p = w.reserve(966);
    if (p == nullptr) return false;
    for (const std::uint64_t v : s.regs) p = store_big(p, v);
    p = store_big(p, s.rip);
    p = store_big(p, s.flags);
    for (const segment& one : s.segs) {
        p = store_big(p, one.selector);
        p = store_big(p, one.base);
        p = store_big(p, one.limit);
        p = store_big(p, one.flags);
    }
    for (const std::uint64_t v : s.xmm) p = store_big(p, v);
    for (const std::uint64_t v : s.cr) p = store_big(p, v);
    for (const std::uint32_t v : {s.a0, s.a1, s.a2, s.a3, s.a4, s.a5, s.a6, s.a7, s.a8, s.a9, s.b0, s.b1, s.b2, s.b3, s.b4,
                                  s.b5, s.b6, s.b7, s.b8, s.b9})
        p = store_big(p, v);
    if (s.msrs[0] != 0) {
        std::memcpy(p, "\x05\x08" "cpu/msrs", 10);
        p = store_big(p + 10, std::uint32_t{1});
        for (const std::uint64_t v : s.msrs) p = store_big(p, v);
    }
    w.commit(p);
    return true;
}
bool load_by_hand(vmstate::reader& r, cpu& s) {
    const std::byte* p = r.need(966);
    if (p == nullptr) return false;
    const auto u64 = [&] { return p += 8, load_big<std::uint64_t>(p - 8); };
    const auto u32 = [&] { return p += 4, load_big<std::uint32_t>(p - 4); };
    for (std::uint64_t& v : s.regs) v = u64();
    s.rip = u64();
    s.flags = u64();
    for (segment& one : s.segs) {
        one.selector = u32();
        one.base = u64();
        one.limit = u32();
        one.flags = u32();
    }
    for (std::uint64_t& v : s.xmm) v = u64();
    for (std::uint64_t& v : s.cr) v = u64();
    for (std::uint32_t* v : {&s.a0, &s.a1, &s.a2, &s.a3, &s.a4, &s.a5, &s.a6, &s.a7, &s.a8, &s.a9, &s.b0, &s.b1, &s.b2, &s.b3,
                             &s.b4, &s.b5, &s.b6, &s.b7, &s.b8, &s.b9})
        *v = u32();
    if (std::memcmp(p, "\x05\x08" "cpu/msrs", 10) != 0 || load_big<std::uint32_t>(p + 10) != 1) return false;
    p += 14;
    for (std::uint64_t& v : s.msrs) v = u64();
    r.seek(p);
    return r.peek(1) == 0;
}

bool save_by_hand(vmstate::writer& w, const row& s) {
    w.put_be32(s.count);
    for (std::size_t done = 0; done != s.count;) {
        std::byte* p = w.reserve(4);
        if (p == nullptr) return false;
        const std::size_t stretch = std::min<std::size_t>(s.count - done, w.room() / 4);
        for (std::size_t i = 0; i != stretch; ++i) p = store_big(p, s.values[done + i]);
        w.commit(p);
        done += stretch;
    }
    return true;
}
bool load_by_hand(vmstate::reader& r, row& s) {
    s.count = r.get_be32();
    if (s.count > row_length || r.remaining() < std::uint64_t{s.count} * 4) return false;
    s.values.resize(s.count);
    for (std::size_t done = 0; done != s.count;) {
        const std::byte* p = r.need(4);
        if (p == nullptr) return false;
        const std::size_t stretch = std::min<std::size_t>(s.count - done, r.window() / 4);
        for (std::size_t i = 0; i != stretch; ++i, p += 4) s.values[done + i] = load_big<std::uint32_t>(p);
        r.seek(p);
        done += stretch;
    }
    return r.peek(1) == 0;
}

bool save_by_hand(vmstate::writer& w, const buffer& s) {
    w.write(s.bytes.data(), s.bytes.size());
    return !w.failed();
}
bool load_by_hand(vmstate::reader& r, buffer& s) { return r.read(s.bytes.data(), s.bytes.size()) && r.peek(1) == 0; }

// --- a plain interpreter: a table walked at run time, a function pointer per type, a check per element ------------------

struct entry {
    std::size_t offset;
    std::size_t size;
    std::size_t count;
    bool (*put)(vmstate::writer&, const void*);
    bool (*get)(vmstate::reader&, void*);
    const std::vector<entry>* nested = nullptr;
    bool vector = false; // a std::vector<std::uint32_t> of as many as the u32 at offset 0 says
};

template <class T>
bool put_integer(vmstate::writer& w, const void* member) {
    std::byte* p = w.reserve(sizeof(T));
    if (p == nullptr) return false;
    T value;
    std::memcpy(&value, member, sizeof value);
    w.commit(store_big(p, value));
    return true;
}
template <class T>
bool get_integer(vmstate::reader& r, void* member) {
    const std::byte* p = r.need(sizeof(T));
    if (p == nullptr) return false;
    const T value = load_big<T>(p);
    std::memcpy(member, &value, sizeof value);
    r.seek(p + sizeof(T));
    return true;
}
template <class T>
entry integers(std::size_t offset, std::size_t count = 1) {
    return {offset, sizeof(T), count, put_integer<T>, get_integer<T>};
}

bool interpret_save(vmstate::writer& w, const std::vector<entry>& table, const std::byte* state) {
    for (const entry& one : table) {
        const std::byte* member = state + one.offset;
        std::size_t count = one.count;
        if (one.vector) {
            const auto& values = *reinterpret_cast<const std::vector<std::uint32_t>*>(member);
            count = *reinterpret_cast<const std::uint32_t*>(state);
            member = reinterpret_cast<const std::byte*>(values.data());
        }
        for (std::size_t i = 0; i != count; ++i, member += one.size)
            if (!(one.nested != nullptr ? interpret_save(w, *one.nested, member) : one.put(w, member))) return false;
    }
    return true;
}
bool interpret_load(vmstate::reader& r, const std::vector<entry>& table, std::byte* state) {
    for (const entry& one : table) {
        std::byte* member = state + one.offset;
        std::size_t count = one.count;
        if (one.vector) {
            auto& values = *reinterpret_cast<std::vector<std::uint32_t>*>(member);
            count = *reinterpret_cast<const std::uint32_t*>(state);
            if (count > row_length) return false;
            values.resize(count);
            member = reinterpret_cast<std::byte*>(values.data());
        }
        for (std::size_t i = 0; i != count; ++i, member += one.size)
            if (!(one.nested != nullptr ? interpret_load(r, *one.nested, member) : one.get(r, member))) return false;
    }
    return true;
}

template <class S>
const std::vector<entry>& table_of();
template <>
const std::vector<entry>& table_of<keyboard>() {
    static const std::vector<entry> table{integers<std::uint8_t>(0), integers<std::uint8_t>(1), integers<std::uint8_t>(2),
                                          integers<std::uint8_t>(3)};
    return table;
}
template <>
const std::vector<entry>& table_of<cpu>() {
    static const std::vector<entry> segment_table{
        integers<std::uint32_t>(offsetof(segment, selector)), integers<std::uint64_t>(offsetof(segment, base)),
        integers<std::uint32_t>(offsetof(segment, limit)), integers<std::uint32_t>(offsetof(segment, flags))};
    static const std::vector<entry> table = [] {
        std::vector<entry> fields{integers<std::uint64_t>(offsetof(cpu, regs), 16), integers<std::uint64_t>(offsetof(cpu, rip)),
                                  integers<std::uint64_t>(offsetof(cpu, flags)),
                                  {offsetof(cpu, segs), sizeof(segment), 6, nullptr, nullptr, &segment_table},
                                  integers<std::uint64_t>(offsetof(cpu, xmm), 64), integers<std::uint64_t>(offsetof(cpu, cr), 8)};
        for (std::size_t i = 0; i != 20; ++i) fields.push_back(integers<std::uint32_t>(offsetof(cpu, a0) + 4 * i));
        return fields;
    }();
    return table;
}
template <>
const std::vector<entry>& table_of<row>() {
    static const std::vector<entry> table{integers<std::uint32_t>(offsetof(row, count)),
                                          {offsetof(row, values), 4, 1, put_integer<std::uint32_t>,
                                           get_integer<std::uint32_t>, nullptr, true}};
    return table;
}
template <>
const std::vector<entry>& table_of<buffer>() {
    static const std::vector<entry> table{
        {0, 65536, 1,
         [](vmstate::writer& w, const void* member) { return w.write(member, 65536), !w.failed(); },
         [](vmstate::reader& r, void* member) { return r.read(member, 65536); }}};
    return table;
}

// The subsection of the cpu: the table has none, a plain interpreter does it beside the table.
template <class S>
bool save_by_table(vmstate::writer& w, const S& s) {
    if (!interpret_save(w, table_of<S>(), reinterpret_cast<const std::byte*>(&s))) return false;
    if constexpr (std::is_same_v<S, cpu>) {
        w.put_u8(5);
        w.put_counted_string("cpu/msrs");
        w.put_be32(1);
        for (const std::uint64_t& v : s.msrs) put_integer<std::uint64_t>(w, &v);
    }
    return !w.failed();
}
template <class S>
bool load_by_table(vmstate::reader& r, S& s) {
    if (!interpret_load(r, table_of<S>(), reinterpret_cast<std::byte*>(&s))) return false;
    if constexpr (std::is_same_v<S, cpu>) {
        if (r.get_u8() != 5 || r.get_counted_string() != "cpu/msrs" || r.get_be32() != 1) return false;
        for (std::uint64_t& v : s.msrs) get_integer<std::uint64_t>(r, &v);
    }
    return !r.failed();
}

// --- the runs ----------------------------------------------------------------------------------------------------------

keyboard sample(keyboard*) { return {1, 2, 3, 4}; }
cpu sample(cpu*) {
    cpu s{};
    std::uint64_t v = 0x0123456789abcdefu;
    for (auto* list : {s.regs.data(), s.cr.data()})
        for (std::size_t i = 0; i != 8; ++i) list[i] = v *= 3;
    for (auto& one : s.xmm) one = v *= 5;
    for (auto& one : s.segs) one = {1, v *= 7, 2, 3};
    s.a0 = 1;
    s.b9 = 2;
    s.msrs = {1, 2, 3, 4};
    return s;
}
row sample(row*) {
    row s{row_length, std::vector<std::uint32_t>(row_length)};
    for (std::uint32_t i = 0; i != row_length; ++i) s.values[i] = i * 2654435761u;
    return s;
}
buffer sample(buffer*) {
    buffer s{};
    for (std::size_t i = 0; i != s.bytes.size(); ++i) s.bytes[i] = static_cast<std::uint8_t>(i * 7);
    return s;
}

double seconds(auto&& work, std::size_t rounds) {
    const auto begin = std::chrono::steady_clock::now();
    for (std::size_t i = 0; i != rounds; ++i) work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count() / static_cast<double>(rounds);
}
double median(std::vector<double>& times) {
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
    return times[times.size() / 2];
}

/// Runs the three contenders in turn, many times; the medians go into the counters.
template <class Generated, class ByHand, class Table>
void contend(benchmark::State& state, std::size_t bytes, std::size_t rounds, Generated generated, ByHand by_hand, Table table) {
    std::vector<double> times[3];
    for (auto _ : state) {
        times[0].push_back(seconds(generated, rounds));
        times[1].push_back(seconds(by_hand, rounds));
        times[2].push_back(seconds(table, std::max<std::size_t>(1, rounds / 8)));
    }
    const double ns = 1e9;
    state.counters["generated_ns"] = median(times[0]) * ns;
    state.counters["by_hand_ns"] = median(times[1]) * ns;
    state.counters["table_ns"] = median(times[2]) * ns;
    state.counters["ratio"] = median(times[0]) / median(times[1]);
    state.counters["table_ratio"] = median(times[2]) / median(times[1]);
    state.counters["GB/s"] = static_cast<double>(bytes) / median(times[0]) / 1e9;
}

template <class S, const auto& Description>
void save(benchmark::State& state) {
    auto s = std::make_unique<S>(sample(static_cast<S*>(nullptr)));
    std::vector<std::byte> memory(vmstate::wire_size<Description>(*s));
    const auto run = [&](auto&& body) {
        return [&, body] {
            vmstate::memory_writer w{memory};
            benchmark::DoNotOptimize(s.get());
            if (!body(w)) state.SkipWithError("save failed");
            benchmark::ClobberMemory();
        };
    };
    contend(state, memory.size(), std::max<std::size_t>(4, 2'000'000 / (memory.size() + 100)),
            run([&](vmstate::writer& w) { return vmstate::save<Description>(w, std::as_const(*s)).has_value(); }),
            run([&](vmstate::writer& w) { return save_by_hand(w, *s); }),
            run([&](vmstate::writer& w) { return save_by_table(w, *s); }));
}

template <class S, const auto& Description>
void load(benchmark::State& state) {
    auto s = std::make_unique<S>(sample(static_cast<S*>(nullptr)));
    const std::vector<std::byte> memory = vmstate::to_bytes<Description>(*s).value();
    const auto run = [&](auto&& body) {
        return [&, body] {
            vmstate::memory_reader r{memory};
            benchmark::DoNotOptimize(s.get());
            if (!body(r)) state.SkipWithError("load failed");
            benchmark::ClobberMemory();
        };
    };
    contend(state, memory.size(), std::max<std::size_t>(4, 2'000'000 / (memory.size() + 100)),
            run([&](vmstate::reader& r) { return vmstate::load<Description>(r, *s, Description.version_id).has_value(); }),
            run([&](vmstate::reader& r) { return load_by_hand(r, *s); }),
            run([&](vmstate::reader& r) { return load_by_table(r, *s); }));
}

BENCHMARK(save<keyboard, keyboard_description>)->Name("save/keyboard")->Iterations(51);
BENCHMARK(load<keyboard, keyboard_description>)->Name("load/keyboard")->Iterations(51);
BENCHMARK(save<cpu, cpu_description>)->Name("save/cpu_966_bytes")->Iterations(51);
BENCHMARK(load<cpu, cpu_description>)->Name("load/cpu_966_bytes")->Iterations(51);
BENCHMARK(save<row, row_description>)->Name("save/65536_u32_by_length")->Iterations(51);
BENCHMARK(load<row, row_description>)->Name("load/65536_u32_by_length")->Iterations(51);
BENCHMARK(save<buffer, buffer_description>)->Name("save/64_KiB_buffer")->Iterations(51);
BENCHMARK(load<buffer, buffer_description>)->Name("load/64_KiB_buffer")->Iterations(51);

} // namespace
