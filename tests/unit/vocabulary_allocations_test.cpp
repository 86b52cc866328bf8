// SPDX-License-Identifier: BSL-1.0
// What a stream can make the loader allocate: operator new is replaced here and remembers the largest piece and the sum
// of all pieces asked for. A length that the bytes don't back up must be refused before it costs memory.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "vocabulary_support.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

std::size_t largest_asked = 0;
std::size_t all_asked = 0;

void* remember(std::size_t size) {
    largest_asked = size > largest_asked ? size : largest_asked;
    all_asked += size;
    // Not really given, so that a test of a library that asks for it ends at once instead of filling the machine.
    if (size > std::size_t{1} << 30) return nullptr;
    return std::malloc(size != 0 ? size : 1);
}

} // namespace

// Not inlined: g++ would see free() called on what operator new returned, and warn.
[[gnu::noinline]] void* operator new(std::size_t size) {
    if (void* memory = remember(size)) return memory;
    throw std::bad_alloc();
}
[[gnu::noinline]] void* operator new[](std::size_t size) { return operator new(size); }
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return remember(size); }
[[gnu::noinline]] void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return remember(size); }
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

namespace {

struct measured {
    result<void> outcome;
    std::size_t largest;
    std::size_t all;
};

template <const auto& Description, class S>
measured load_measured(std::string_view text, S& state) {
    const auto bytes = wire(text);
    largest_asked = all_asked = 0;
    auto r = from_bytes<Description>(bytes, state);
    return {std::move(r), largest_asked, all_asked};
}
template <const auto& Description, class S>
measured load_trickling(std::string_view text, S& state) {
    trickling_reader reader(wire(text));
    largest_asked = all_asked = 0;
    result<void> r = {};
    try {
        r = load<Description>(reader, state, Description.version_id);
    } catch (const std::bad_alloc&) {
        r = error(errc::unsupported, "no exception", "std::bad_alloc");
    }
    return {std::move(r), largest_asked, all_asked};
}

/// Room for an error's texts, and for starting a container.
constexpr std::size_t small = 4096;
/// What a reader of unknown length may try at once.
constexpr std::size_t one_step = 256 * 1024;

template <const auto& Description, class S>
void check_refused(std::string_view text) {
    {
        S state;
        const measured m = load_measured<Description>(text, state);
        CHECK(m.outcome.has_error());
        CHECK(m.largest <= small);
        CHECK(m.all <= 4 * small);
    }
    {
        S state;
        const measured m = load_trickling<Description>(text, state);
        REQUIRE(m.outcome.has_error());
        CHECK(m.outcome.error().code() != errc::unsupported);
        CHECK(m.largest <= one_step);
        CHECK(m.all <= 4 * one_step);
    }
}

struct item {
    std::uint64_t a = 0;
    std::uint32_t b = 0;
};
constexpr auto vmstate_item = describe<item>({.name = "item"}, field<&item::a>, field<&item::b>);

struct vectors {
    std::uint32_t count = 0;
    std::vector<std::uint32_t> values;
};
constexpr auto vmstate_vectors = describe<vectors>(
    {.name = "vectors"}, field<&vectors::count>, field<&vectors::values, length<&vectors::count>>);

struct byte_vectors {
    std::uint64_t count = 0;
    std::vector<std::uint8_t> values;
};
constexpr auto vmstate_byte_vectors = describe<byte_vectors>(
    {.name = "byte-vectors"}, field<&byte_vectors::count>, field<&byte_vectors::values, length<&byte_vectors::count>>);

struct owned {
    std::uint32_t count = 0;
    std::unique_ptr<std::uint64_t[]> values;
};
constexpr auto vmstate_owned =
    describe<owned>({.name = "owned"}, field<&owned::count>, field<&owned::values, length<&owned::count>>);

struct borrowed {
    borrowed() = default;
    borrowed(const borrowed&) = delete;
    borrowed& operator=(const borrowed&) = delete;
    ~borrowed() { delete[] values; }
    std::uint32_t count = 0;
    std::uint16_t* values = nullptr;
};
constexpr auto vmstate_borrowed =
    describe<borrowed>({.name = "borrowed"}, field<&borrowed::count>, field<&borrowed::values, length<&borrowed::count>>);

struct structs {
    std::uint32_t count = 0;
    std::vector<item> items;
};
constexpr auto vmstate_structs = describe<structs>(
    {.name = "structs"}, field<&structs::count>, field<&structs::items, as<vmstate_item>, length<&structs::count>>);

struct owned_structs {
    std::uint32_t count = 0;
    std::unique_ptr<item[]> items;
};
constexpr auto vmstate_owned_structs = describe<owned_structs>(
    {.name = "owned-structs"}, field<&owned_structs::count>, field<&owned_structs::items, as<vmstate_item>, length<&owned_structs::count>>);

struct texts {
    std::int32_t size = 0;
    std::string text;
};
constexpr auto vmstate_texts =
    describe<texts>({.name = "texts"}, field<&texts::size>, field<&texts::text, length<&texts::size>>);

struct bitmaps {
    std::int64_t bits = 0;
    std::vector<std::uint64_t> words;
};
constexpr auto vmstate_bitmaps =
    describe<bitmaps>({.name = "bitmaps"}, field<&bitmaps::bits>, field<&bitmaps::words, bitmap<&bitmaps::bits>>);

struct pointer_vectors {
    std::uint32_t count = 0;
    std::vector<std::unique_ptr<item>> items;
};
constexpr auto vmstate_pointer_vectors = describe<pointer_vectors>(
    {.name = "pointer-vectors"}, field<&pointer_vectors::count>,
    field<&pointer_vectors::items, as<vmstate_item>, length<&pointer_vectors::count>>);

struct maps {
    std::map<std::uint32_t, item> tree;
};
constexpr auto vmstate_maps = describe<maps>({.name = "maps"}, field<&maps::tree, as<vmstate_item>>);

} // namespace

TEST_CASE("a length that the bytes don't back up costs nothing: vector") {
    check_refused<vmstate_vectors, vectors>("ffffffff 00000001 00000002");
    check_refused<vmstate_vectors, vectors>("00100000 00000001 00000002");
    check_refused<vmstate_vectors, vectors>("7fffffff 00000001");
    check_refused<vmstate_byte_vectors, byte_vectors>("ffffffffffffffff 00");
    check_refused<vmstate_byte_vectors, byte_vectors>("7fffffffffffffff 00");
    check_refused<vmstate_byte_vectors, byte_vectors>("0000000100000000 00");
    check_refused<vmstate_texts, texts>("7fffffff 'a'");
}

TEST_CASE("a length that the bytes don't back up costs nothing: pointers") {
    check_refused<vmstate_owned, owned>("ffffffff 0000000000000001");
    check_refused<vmstate_owned, owned>("20000001 0000000000000001");
    check_refused<vmstate_borrowed, borrowed>("ffffffff 0001");
    check_refused<vmstate_borrowed, borrowed>("80000001 0001");
}

TEST_CASE("a length that the bytes don't back up costs nothing: structs, bitmaps, trees") {
    check_refused<vmstate_structs, structs>("ffffffff 0000000000000001 00000001");
    check_refused<vmstate_owned_structs, owned_structs>("ffffffff 0000000000000001 00000001");
    check_refused<vmstate_bitmaps, bitmaps>("7fffffffffffffff 0000000000000001");
    check_refused<vmstate_bitmaps, bitmaps>("ffffffffffffffff 0000000000000001");
    check_refused<vmstate_bitmaps, bitmaps>("0000010000000000 0000000000000001");
    check_refused<vmstate_pointer_vectors, pointer_vectors>("ffffffff 30 30 30");
    check_refused<vmstate_maps, maps>("ffffffff 01 0000000000000001 0000000000000001 00000001 00");
}

// Elements that need not be on the wire: bytes can't back up their number.
namespace {

struct elusive {
    bool there = false;
    std::uint64_t padding[8]{};
};
bool is_there(const elusive& s) { return s.there; }
constexpr auto vmstate_elusive = describe<elusive>(
    {.name = "elusive"}, transient<&elusive::there>, field<&elusive::padding, when<is_there>>);

struct elusive_vector {
    std::uint32_t count = 0;
    std::vector<elusive> items;
};
constexpr auto vmstate_elusive_vector = describe<elusive_vector>(
    {.name = "elusive-vector"}, field<&elusive_vector::count>,
    field<&elusive_vector::items, as<vmstate_elusive>, length<&elusive_vector::count>>);
constexpr auto vmstate_limited_elusive_vector = describe<elusive_vector>(
    {.name = "elusive-vector"}, field<&elusive_vector::count>,
    field<&elusive_vector::items, as<vmstate_elusive>, length<&elusive_vector::count>, limit<8>>);

} // namespace

TEST_CASE("elements that may take no bytes don't come by the million for four bytes") {
    check_refused<vmstate_elusive_vector, elusive_vector>("00ffffff");
    check_refused<vmstate_limited_elusive_vector, elusive_vector>("00000009");
    elusive_vector state;
    CHECK(load_measured<vmstate_limited_elusive_vector>("00000008", state).outcome.has_value());
    CHECK(state.items.size() == 8);
}

namespace {

struct limited {
    std::uint32_t count = 0;
    std::vector<std::uint8_t> values;
};
constexpr auto vmstate_limited = describe<limited>(
    {.name = "limited"}, field<&limited::count>, field<&limited::values, length<&limited::count>, limit<3>>);

struct lists {
    std::list<item> queue;
};
constexpr auto vmstate_lists = describe<lists>({.name = "lists"}, field<&lists::queue, as<vmstate_item>>);

struct fixed {
    std::uint64_t a = 0;
    std::uint32_t b[32]{};
    std::uint8_t count = 0;
    std::uint16_t c[8]{};
    item d[4];
};
constexpr auto vmstate_fixed = describe<fixed>(
    {.name = "fixed"}, field<&fixed::a>, field<&fixed::b>, field<&fixed::count>,
    field<&fixed::c, length<&fixed::count>>, field<&fixed::d, as<vmstate_item>>);

} // namespace

TEST_CASE("limit is asked before the bytes are counted") {
    limited state;
    const measured m = load_measured<vmstate_limited>("00000004 01020304", state);
    CHECK(outcome(m.outcome) == failure(errc::out_of_range, "limited/values", 4));
    CHECK(load_measured<vmstate_limited>("00000003 010203", state).outcome.has_value());
}

TEST_CASE("what the bytes do back up is loaded from a stream of unknown length, too") {
    std::string text = "00002710";
    for (int i = 0; i != 10000; ++i) text += "0000002a";
    vectors state;
    const measured m = load_trickling<vmstate_vectors>(text, state);
    REQUIRE(m.outcome.has_value());
    CHECK(state.values == std::vector<std::uint32_t>(10000, 42));
    // A small multiple of what came.
    CHECK(m.all <= 8 * 40000 + one_step);

    owned other;
    std::string words = "000003e8";
    for (int i = 0; i != 1000; ++i) words += "000000000000002b";
    REQUIRE(load_trickling<vmstate_owned>(words, other).outcome.has_value());
    CHECK(other.values[999] == 43);

    structs third;
    std::string items = "000003e8";
    for (int i = 0; i != 1000; ++i) items += "000000000000002b 0000002c";
    REQUIRE(load_trickling<vmstate_structs>(items, third).outcome.has_value());
    REQUIRE(third.items.size() == 1000);
    CHECK(third.items[999].a == 43);
    CHECK(third.items[999].b == 44);
}

TEST_CASE("a list has as many elements as the stream has bytes for, and no more") {
    lists state;
    const measured m = load_measured<vmstate_lists>("01 0000000000000001 00000001 01 0000000000000002 00000002 01", state);
    CHECK(m.outcome.has_error());
    CHECK(m.largest <= small);
}

TEST_CASE("loading what is there already allocates nothing") {
    fixed state;
    state.count = 5;
    std::byte memory[512];
    memory_writer w(memory);
    largest_asked = all_asked = 0;
    const bool saved_well = save<vmstate_fixed>(w, state).has_value();
    memory_reader r(w.written());
    const bool loaded_well = load<vmstate_fixed>(r, state, 0).has_value();
    const std::size_t asked = all_asked;
    CHECK(saved_well);
    CHECK(loaded_well);
    CHECK(asked == 0);
}
