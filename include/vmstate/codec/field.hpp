// SPDX-License-Identifier: BSL-1.0
//
// Fields: how an item of a description moves between the state and the wire. One specialisation for each form that is
// more than a single element. Depends on codec/rooms.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include <vmstate/codec/rooms.hpp>

namespace vmstate::detail {

/// The entry of a field as it stands in the JSON description, size left open.
template <class Item>
constexpr field_event event_of() {
    return {Item::name(), type_schema<std::remove_const_t<typename Item::type>, typename Item::attributes>.type, 0, 1,
            field_event::no_index, field_event::no_index};
}

/// A field whose value is one element.
template <class Item, wire_form Form = form_of<std::remove_const_t<typename Item::type>, typename Item::attributes>()>
struct field_codec {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    using one = element<M, A, Form>;
    static constexpr std::size_t flat = one::flat <= max_flat ? one::flat : 0;
    static constexpr std::size_t minimum = one::minimum;

    template <class S>
    [[gnu::always_inline]] static std::byte* encode(std::byte* p, const S& state) {
        return one::encode(p, Item::of(state));
    }
    template <class S>
    [[gnu::always_inline]] static const std::byte* decode(reader& r, const std::byte* p, S& state) {
        return one::decode(r, p, Item::of(state));
    }
    // Of constant size and yet not in a run: a predicate decides whether it is there.
    template <class S>
    static bool save(writer& w, S& state) {
        if constexpr (flat != 0) {
            std::byte* p = w.reserve(flat);
            if (p == nullptr) return false;
            w.commit(one::encode(p, Item::of(state)));
            return true;
        } else return one::save(w, Item::of(state));
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        if constexpr (flat != 0) {
            const std::byte* p = r.need(flat);
            if (p == nullptr || (p = one::decode(r, p, Item::of(state))) == nullptr) return false;
            r.seek(p);
            return true;
        } else return one::load(r, Item::of(state));
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        return one::measure(Item::of(state));
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        visitor.begin_field(entry);
        if constexpr (Form == wire_form::structure) one::walk(Item::of(state), visitor);
        else if constexpr (Form == wire_form::pointer) {
            using pointee = typename one::plain;
            if constexpr (element_form<pointee, A>() == wire_form::structure)
                if (Item::of(state) != nullptr) one::pointee::walk(*Item::of(state), visitor);
        }
        visitor.end_field();
    }
};

/// A fixed number of elements, or a slice of them.
template <class Item>
struct field_codec<Item, wire_form::array> {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    using shape = array_shape<M>;
    using E = typename shape::element;
    using elements = row<E, A>;
    static constexpr std::size_t first = [] {
        if constexpr (A::slice_t::present) return A::slice_t::low * shape::inner_count;
        else return 0;
    }();
    static constexpr std::size_t count = [] {
        if constexpr (A::slice_t::present) return A::slice_t::high * shape::inner_count;
        else return shape::count;
    }();
    static constexpr std::size_t flat = elements::flat * count <= max_flat ? elements::flat * count : 0;
    static constexpr std::size_t minimum = elements::minimum * count;

    template <class S>
    [[gnu::always_inline]] static std::byte* encode(std::byte* p, const S& state) {
        return elements::template encode<count>(p, shape::first(Item::of(state)) + first);
    }
    template <class S>
    [[gnu::always_inline]] static const std::byte* decode(reader& r, const std::byte* p, S& state) {
        return elements::template decode<count>(r, p, shape::first(Item::of(state)) + first);
    }
    template <class S>
    static bool save(writer& w, S& state) {
        return elements::save(w, shape::first(Item::of(state)) + first, count);
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        return elements::load(r, shape::first(Item::of(state)) + first, count);
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        if constexpr (elements::flat != 0) return elements::flat * count;
        else return elements::measure(shape::first(Item::of(state)) + first, count);
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        elements::walk(shape::first(Item::of(state)) + first, count, entry, A::when_t::present, visitor);
    }
};

/// As many elements as another member says.
template <class Item>
struct field_codec<Item, wire_form::sequence> {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    using store = storage<M>;
    using E = std::remove_const_t<typename store::E>;
    using elements = row<E, A>;
    static constexpr auto length = A::length_t::value;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = 0;
    static constexpr std::size_t factor = [] {
        if constexpr (A::multiply_t::present) return A::multiply_t::value;
        else return std::size_t{1};
    }();

    template <class S>
    static bool save(writer& w, S& state) {
        std::size_t count = 0;
        auto& member = Item::of(state);
        const std::uint64_t readable = store::readable(member);
        if (store::is_null(member) && length_of<length>(state) > 0) return refuse_null(w);
        if (!checked_count<A, length>(w, state, factor, readable, count)) return false;
        return elements::save(w, store::data(member), count);
    }
    template <class S>
    static bool load(reader& r, S& state, room* space) {
        std::size_t count = 0;
        if (!checked_count<A, length>(r, state, factor, store::writable(space), count)) return false;
        return store::template load<elements, A>(r, Item::of(state), count, space, limit_in_elements<A>());
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        const auto& member = Item::of(state);
        const std::int64_t said = std::max<std::int64_t>(0, length_of<length>(state));
        const auto count = static_cast<std::size_t>(
            std::min<std::uint64_t>(static_cast<std::uint64_t>(said) * factor, store::readable(member)));
        return elements::measure(store::data(member), count);
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        auto& member = Item::of(state);
        const auto count = static_cast<std::size_t>(
            std::min<std::uint64_t>(static_cast<std::uint64_t>(std::max<std::int64_t>(0, length_of<length>(state))) * factor,
                                    store::readable(member)));
        if (is_byte<E> || count != 0) elements::walk(store::data(member), count, entry, A::when_t::present, visitor);
    }
};

/// Words of a bitmap: bit i is bit i % 64 of word i / 64 (QEMU: VMSTATE_BITMAP).
template <class Item>
struct field_codec<Item, wire_form::words> {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    using store = storage<M>;
    using E = std::remove_const_t<typename store::E>;
    using words = row<E, attributes<>>;
    static constexpr auto length = A::bitmap_t::value;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = 0;

    static constexpr std::size_t words_for(std::size_t bits) { return bits / 64 + (bits % 64 != 0); }

    template <class S>
    static bool save(writer& w, S& state) {
        std::size_t bits = 0;
        const auto& member = Item::of(state);
        if (store::is_null(member) && length_of<length>(state) > 0) return refuse_null(w);
        if (!checked_count<A, length>(w, state, 1, bits_in(store::readable(member)), bits)) return false;
        return words::save(w, store::data(member), words_for(bits));
    }
    template <class S>
    static bool load(reader& r, S& state, room* space) {
        std::size_t bits = 0;
        if (!checked_count<A, length>(r, state, 1, bits_in(store::writable(space)), bits)) return false;
        return store::template load<words, attributes<>>(r, Item::of(state), words_for(bits), space, limit_in_elements<A>());
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        const auto said = static_cast<std::uint64_t>(std::max<std::int64_t>(0, length_of<length>(state)));
        return 8 * words_for(static_cast<std::size_t>(std::min(said, bits_in(store::readable(Item::of(state))))));
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        visitor.begin_field(entry);
        visitor.end_field();
    }

private:
    static constexpr std::uint64_t bits_in(std::uint64_t words) {
        return words > std::numeric_limits<std::uint64_t>::max() / 64 ? std::numeric_limits<std::uint64_t>::max() : words * 64;
    }
};

/// std::bitset, and std::vector<bool> in the size that it has.
template <class Item>
struct field_codec<Item, wire_form::bits> {
    using M = std::remove_const_t<typename Item::type>;
    static constexpr std::size_t fixed_words = [] {
        if constexpr (is_bitset<M>) return (M().size() + 63) / 64;
        else return std::size_t{0};
    }();
    static constexpr std::size_t flat = fixed_words * 8 <= max_flat ? fixed_words * 8 : 0;
    static constexpr std::size_t minimum = fixed_words * 8;

    template <class S>
    static std::byte* encode(std::byte* p, const S& state) {
        const M& bits = Item::of(state);
        for (std::size_t first = 0; first < bits.size(); first += 64) p = store_big(p, word_at(bits, first));
        return p;
    }
    template <class S>
    static const std::byte* decode(reader&, const std::byte* p, S& state) {
        M& bits = Item::of(state);
        for (std::size_t first = 0; first < bits.size(); first += 64, p += 8) set_word(bits, first, load_big<std::uint64_t>(p));
        return p;
    }
    template <class S>
    static bool save(writer& w, S& state) {
        const M& bits = Item::of(state);
        for (std::size_t first = 0; first < bits.size(); first += 64) w.put_be64(word_at(bits, first));
        return !w.failed();
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        M& bits = Item::of(state);
        for (std::size_t first = 0; first < bits.size() && !r.failed(); first += 64) set_word(bits, first, r.get_be64());
        return !r.failed();
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        if constexpr (fixed_words != 0) return fixed_words * 8;
        else return (Item::of(state).size() + 63) / 64 * 8;
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        visitor.begin_field(entry);
        visitor.end_field();
    }

private:
    static std::uint64_t word_at(const M& bits, std::size_t first) {
        std::uint64_t word = 0;
        for (std::size_t i = 0; i != std::min<std::size_t>(64, bits.size() - first); ++i)
            word |= static_cast<std::uint64_t>(bits[first + i]) << i;
        return word;
    }
    static void set_word(M& bits, std::size_t first, std::uint64_t word) {
        for (std::size_t i = 0; i != std::min<std::size_t>(64, bits.size() - first); ++i)
            bits[first + i] = ((word >> i) & 1) != 0;
    }
};

/// The most elements of a list or map: its `limit`; without one as many as there are bytes.
template <class A>
consteval std::uint64_t element_limit() {
    if constexpr (A::limit_t::present) return A::limit_t::value;
    else return std::numeric_limits<std::uint64_t>::max();
}

inline constexpr std::byte list_element{1};
inline constexpr std::byte list_end{0};

/// The byte before each element of a list or map: 1 goes on, 0 ends.
inline bool next_element(reader& r, bool& more) {
    const std::byte* p = r.need(1);
    if (p == nullptr) return false;
    more = *p == list_element;
    if (!more && *p != list_end)
        return r.fail(error(errc::bad_marker, "1 before an element or 0 at the end", std::to_string(std::to_integer<int>(*p))));
    r.seek(p + 1);
    return true;
}

/// QTAILQ and QLIST (QEMU: put_qtailq, get_qtailq): elements are saved at their description's version and loaded at the
/// field's.
template <class Item>
struct field_codec<Item, wire_form::queue> {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    using E = typename queue_shape<M>::element;
    using one = element<E, A>;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = 1;

    template <class S>
    static bool save(writer& w, S& state) {
        std::size_t i = 0;
        for (auto& member : Item::of(state)) {
            w.put_u8(1);
            if (!save_body<one::description, one::version>(w, member)) {
                w.failure().at_index(i);
                return false;
            }
            ++i;
        }
        w.put_u8(0);
        return !w.failed();
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        M& list = Item::of(state);
        list.clear();
        [[maybe_unused]] auto last = [&] {
            if constexpr (requires { list.before_begin(); }) return list.before_begin();
            else return 0;
        }();
        for (std::uint64_t i = 0;; ++i) {
            bool more = false;
            if (!next_element(r, more)) return false;
            if (!more) return true;
            if (i == element_limit<A>())
                return r.fail(error(errc::out_of_range, "at most " + std::to_string(i) + " elements", "more"));
            E* member;
            if constexpr (requires { list.before_begin(); }) {
                last = list.emplace_after(last);
                member = &*last;
            } else member = &list.emplace_back();
            if (!load_body<one::description, one::version>(r, *member, A::since)) {
                r.failure().at_index(i);
                return false;
            }
        }
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        std::size_t size = 1;
        for (const E& member : Item::of(state)) size += 1 + one::measure(member);
        return size;
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        visitor.begin_field(entry);
        for (auto& member : Item::of(state)) one::walk(member, visitor);
        visitor.end_field();
    }
};

/// GTREE (QEMU: put_gtree, get_gtree): be32 count, then 1 + key + value for each, then 0.
template <class Item>
struct field_codec<Item, wire_form::tree> {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    using K = typename tree_shape<M>::key;
    using one = element<typename tree_shape<M>::element, A>;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = 5;
    static constexpr bool direct_key = !A::key_as_t::present;

    template <class S>
    static bool save(writer& w, S& state) {
        auto& map = Item::of(state);
        w.put_be32(static_cast<std::uint32_t>(map.size()));
        std::size_t i = 0;
        for (auto& [key, value] : map) {
            w.put_u8(1);
            bool saved = true;
            if constexpr (direct_key) w.put_be64(static_cast<std::uint64_t>(key));
            else saved = save_body<A::key_as_t::description, A::key_as_t::description.version_id>(w, key);
            if (!saved || !save_body<one::description, one::version>(w, value)) {
                w.failure().at_index(i);
                return false;
            }
            ++i;
        }
        w.put_u8(0);
        return !w.failed();
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        M& map = Item::of(state);
        map.clear();
        const std::uint32_t nodes = r.get_be32();
        if (r.failed()) return false;
        if (nodes > element_limit<A>())
            return r.fail(error(errc::out_of_range, "at most " + std::to_string(element_limit<A>()) + " nodes", std::to_string(nodes)));
        for (std::uint32_t i = 0;; ++i) {
            bool more = false;
            if (!next_element(r, more)) return false;
            if (more != (i < nodes))
                return r.fail(error(errc::bad_marker, std::to_string(nodes) + " nodes", more ? "more" : std::to_string(i)));
            if (!more) return true;
            K key{};
            typename tree_shape<M>::element value{};
            bool loaded = true;
            if constexpr (direct_key) {
                const std::uint64_t sent = r.get_be64();
                key = static_cast<K>(sent);
                if (static_cast<std::uint64_t>(key) != sent)
                    loaded = r.fail(error(errc::out_of_range, "a key of at most " + std::to_string(8 * sizeof(K)) + " bits",
                                          std::to_string(sent)));
            }
            else loaded = load_body<A::key_as_t::description, A::key_as_t::description.version_id>(r, key, A::since);
            loaded = loaded && !r.failed() && load_body<one::description, one::version>(r, value, A::since);
            if (loaded && !map.emplace(std::move(key), std::move(value)).second)
                loaded = r.fail(error(errc::bad_marker, "keys that differ", "a key twice"));
            if (!loaded) {
                r.failure().at_index(i);
                return false;
            }
        }
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        std::size_t size = 4 + 1;
        for (const auto& [key, value] : Item::of(state)) {
            size += 1 + one::measure(value);
            if constexpr (direct_key) size += 8;
            else size += measure_body<A::key_as_t::description, A::key_as_t::description.version_id>(key);
        }
        return size;
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        field_event entry = event_of<Item>();
        entry.size = measure(state);
        visitor.begin_field(entry);
        for (auto& [key, value] : Item::of(state)) {
            if constexpr (!direct_key) {
                constexpr const auto& description = A::key_as_t::description;
                visitor.begin_nested(description.name, description.version_id);
                walk_body<A::key_as_t::description, A::key_as_t::description.version_id>(key, visitor);
                visitor.end_nested();
            }
            one::walk(value, visitor);
        }
        visitor.end_field();
    }
};

/// Bytes without a meaning any more; with a length, so many for each.
template <class Item>
struct unused_codec {
    using A = typename Item::attributes;
    static constexpr bool counted = A::length_t::present;
    static constexpr std::size_t flat = !counted && Item::size <= max_flat ? Item::size : 0;
    static constexpr std::size_t minimum = counted ? 0 : Item::size;

    template <class S>
    [[gnu::always_inline]] static std::byte* encode(std::byte* p, const S&) {
        std::memset(p, 0, Item::size);
        return p + Item::size;
    }
    template <class S>
    [[gnu::always_inline]] static const std::byte* decode(reader&, const std::byte* p, S&) {
        return p + Item::size;
    }
    template <class S>
    static bool save(writer& w, S& state) {
        std::size_t bytes = Item::size;
        if (!count(w, state, bytes)) return false;
        w.fill(std::byte{0}, bytes);
        return !w.failed();
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        std::size_t bytes = Item::size;
        if (!count(r, state, bytes)) return false;
        r.skip(bytes);
        return !r.failed();
    }
    template <class S>
    static constexpr std::size_t measure(const S& state) {
        if constexpr (counted) return static_cast<std::size_t>(std::max<std::int64_t>(0, length_of<A::length_t::value>(state))) * Item::size;
        else return Item::size;
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        visitor.begin_field({"unused", "unused_buffer", measure(state), 1, field_event::no_index});
        visitor.end_field();
    }

private:
    template <class Stream, class S>
    static bool count(Stream& stream, const S& state, std::size_t& bytes) {
        if constexpr (counted)
            return checked_count<A, A::length_t::value>(stream, state, Item::size, std::numeric_limits<std::uint64_t>::max(), bytes);
        else return true;
    }
};

/// A scratch struct made from the state (QEMU: put_tmp, get_tmp): saved at its own version, loaded at the field's.
template <class Item>
struct temporary_codec {
    static constexpr const auto& description = Item::description;
    using T = struct_of<Item::description>;
    static constexpr int version = Item::description.version_id;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = minimum_size(schema_for<Item::description>(), version);

    template <class S>
    static T make(S& state) {
        if constexpr (std::is_constructible_v<T, S&>) return T(state);
        else return T{state};
    }
    template <class S>
    static bool save(writer& w, S& state) {
        // It refers back to the state, and what a save does to that is for hooks to say.
        T scratch = make(const_cast<std::remove_const_t<S>&>(state));
        return save_body<Item::description, version>(w, scratch);
    }
    template <class S>
    static bool load(reader& r, S& state, room*) {
        T scratch = make(state);
        return load_body<Item::description, version>(r, scratch, Item::attributes::since);
    }
    template <class S>
    static constexpr std::size_t measure(S& state) {
        if constexpr (flat_size(schema_for<Item::description>(), version) != 0)
            return flat_size(schema_for<Item::description>(), version);
        else {
            const T scratch = make(const_cast<std::remove_const_t<S>&>(state)); // it refers back, and changes nothing here
            return measure_body<Item::description, version>(scratch);
        }
    }
    template <class S>
    static void walk(S& state, field_visitor& visitor) {
        visitor.begin_field({"tmp", "tmp", measure(state), 1, field_event::no_index});
        T scratch = make(const_cast<std::remove_const_t<S>&>(state));
        visitor.begin_nested(description.name, description.version_id);
        walk_body<Item::description, version>(scratch, visitor);
        visitor.end_nested();
        visitor.end_field();
    }
};

template <class Item, item_kind Kind = Item::kind>
struct codec_of;
template <class Item>
struct codec_of<Item, item_kind::field> {
    using type = field_codec<Item>;
};
template <class Item>
struct codec_of<Item, item_kind::unused> {
    using type = unused_codec<Item>;
};
template <class Item>
struct codec_of<Item, item_kind::temporary> {
    using type = temporary_codec<Item>;
};

} // namespace vmstate::detail
