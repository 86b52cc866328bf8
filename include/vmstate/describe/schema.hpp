// SPDX-License-Identifier: BSL-1.0
//
// The wire schema of a description as a tree of constants: what is sent, in which order, of which type, under which
// gate. From it follow the fingerprint, the compatibility of two descriptions, and several of the rules. Depends on
// describe/wire_form.hpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <type_traits>
#include <vector>

#include <vmstate/describe/items.hpp>
#include <vmstate/describe/wire_form.hpp>

namespace vmstate {

struct schema;

/// How often an entry's element is on the wire.
enum class repetition {
    once,      ///< one element
    array,     ///< `count` elements
    by_length, ///< as many as the member `length_name` says, times `count`
    bits,      ///< be64 words for as many bits as `length_name` says (std::bitset: `count` words)
    list,      ///< 0x01 + element, ended by 0x00 (QTAILQ, QLIST)
    map,       ///< be32 count, then 0x01 + key + element, ended by 0x00 (GTREE)
};

/// One entry of a body.
struct schema_field {
    std::string_view name;              ///< the member's name
    std::string_view type;              ///< QEMU's type string
    repetition repeat = repetition::once;
    std::size_t size = 0;               ///< bytes of one element; 0 where they vary or follow from `nested`
    std::size_t unit = 1;               ///< bytes per big-endian unit inside an element: 4 for "uint32", 1 for "buffer"
    std::size_t count = 1;              ///< elements of an array; factor of a length
    std::string_view length_name;       ///< the member that holds the length
    std::size_t limit = 0;              ///< the most elements accepted; 0 where nothing is said
    int since = 0;                      ///< first version that has it
    bool conditional = false;           ///< a predicate decides (`when`), not the version
    const void* condition = nullptr;    ///< which predicate: the same object for the same one
    bool null_markers = false;          ///< elements behind pointers: a null one is the byte '0'
    bool behind_pointer = false;        ///< a single element behind a pointer
    const schema* nested = nullptr;     ///< the description of an element
    int nested_version = 0;             ///< the version at which it is saved
    const schema* key = nullptr;        ///< the description of a map's keys; none for an integer key

    // Not `nested != nullptr`: with -fsanitize=undefined g++ doesn't take that for a constant expression.
    bool has_nested = false;
    bool has_key = false;
};

/// A description's body.
struct schema {
    std::string_view name;
    int version_id = 0;
    int minimum_version_id = 0;
    std::span<const schema_field> fields;
    std::span<const schema* const> subsections;
    bool has_hooks = false;             ///< pre_load, post_load, pre_save, post_save or validate
    bool has_validate = false;
};

namespace detail {

template <const auto& Description>
constexpr const schema& schema_for();

/// A pointer to the schema of what an element contains, if that is a description.
template <class E, class A>
consteval const schema* nested_schema() {
    constexpr wire_form form = element_form<E, A>();
    if constexpr (form == wire_form::structure) return &schema_for<nested<E, A>::description>();
    else if constexpr (form == wire_form::pointer)
        return nested_schema<std::remove_const_t<typename pointer_shape<E>::pointee>, A>();
    else return nullptr;
}
template <class E, class A>
consteval bool has_nested_schema() {
    constexpr wire_form form = element_form<E, A>();
    if constexpr (form == wire_form::pointer)
        return has_nested_schema<std::remove_const_t<typename pointer_shape<E>::pointee>, A>();
    else return form == wire_form::structure;
}
template <class E, class A>
consteval int nested_version() {
    constexpr wire_form form = element_form<E, A>();
    if constexpr (form == wire_form::structure) return nested<E, A>::version;
    else if constexpr (form == wire_form::pointer)
        return nested_version<std::remove_const_t<typename pointer_shape<E>::pointee>, A>();
    else return 0;
}

template <class E, class A>
consteval std::size_t element_size() {
    constexpr wire_form form = element_form<E, A>();
    if constexpr (form == wire_form::scalar) return wire_integer<E>::size;
    else if constexpr (form == wire_form::timer) return 8;
    else if constexpr (form == wire_form::pointer)
        return element_size<std::remove_const_t<typename pointer_shape<E>::pointee>, A>();
    else return 0;
}

template <class E, class A>
consteval void describe_element(schema_field& entry) {
    entry.type = element_type_name<E, A>();
    entry.size = element_size<E, A>();
    entry.unit = entry.size == 0 ? 1 : entry.size;
    entry.nested = nested_schema<E, A>();
    entry.nested_version = nested_version<E, A>();
    entry.has_nested = has_nested_schema<E, A>();
    entry.null_markers = pointer_shape<E>::is_pointer;
    if (is_byte<E> && entry.repeat != repetition::once) entry.type = "buffer";
}

/// The entry of a member of type `M`, but for what its item says: made once per type, not per field.
template <class M, class A>
consteval schema_field describe_type() {
    schema_field entry;
    constexpr wire_form form = form_of<M, A>();
    if constexpr (form == wire_form::sequence) {
        entry.repeat = repetition::by_length;
        if constexpr (A::multiply_t::present) entry.count = A::multiply_t::value;
        describe_element<typename element_of<M>::type, A>(entry);
    } else if constexpr (form == wire_form::array) {
        entry.repeat = repetition::array;
        if constexpr (A::slice_t::present) entry.count = A::slice_t::high * array_shape<M>::inner_count;
        else entry.count = array_shape<M>::count;
        describe_element<typename array_shape<M>::element, A>(entry);
    } else if constexpr (form == wire_form::words || form == wire_form::bits) {
        entry.type = "bitmap";
        entry.repeat = repetition::bits;
        entry.size = entry.unit = 8;
        entry.count = 0;
        if constexpr (form == wire_form::bits)
            if constexpr (is_bitset<M>) entry.count = (M().size() + 63) / 64;
    } else if constexpr (form == wire_form::queue) {
        using E = typename queue_shape<M>::element;
        entry.type = queue_shape<M>::type;
        entry.repeat = repetition::list;
        if constexpr (has_description<E, A>()) {
            entry.nested = &schema_for<nested<E, A>::description>();
            entry.has_nested = true;
            entry.nested_version = nested<E, A>::version;
        }
    } else if constexpr (form == wire_form::tree) {
        using E = typename tree_shape<M>::element;
        entry.type = "gtree";
        entry.repeat = repetition::map;
        if constexpr (has_description<E, A>()) {
            entry.nested = &schema_for<nested<E, A>::description>();
            entry.has_nested = true;
            entry.nested_version = nested<E, A>::version;
        }
        entry.has_key = A::key_as_t::present;
        if constexpr (A::key_as_t::present) entry.key = &schema_for<A::key_as_t::description>();
    } else if constexpr (form == wire_form::custom) {
        entry.type = A::coded_t::type::type;
    } else if constexpr (form != wire_form::none) {
        describe_element<M, A>(entry);
        if constexpr (form == wire_form::pointer) {
            entry.null_markers = false;
            entry.behind_pointer = true;
        }
    }
    return entry;
}
template <class M, class A>
inline constexpr schema_field type_schema = describe_type<M, A>();

/// The entry of an item that stands for bytes.
template <class Item>
consteval schema_field describe_item() {
    using A = typename Item::attributes;
    schema_field entry;
    if constexpr (Item::kind == item_kind::field) {
        entry = type_schema<std::remove_const_t<typename Item::type>, A>;
        if constexpr (A::length_t::present) entry.length_name = member_name<A::length_t::value>;
        if constexpr (A::bitmap_t::present) entry.length_name = member_name<A::bitmap_t::value>;
    } else if constexpr (Item::kind == item_kind::unused) {
        entry.type = "unused_buffer";
        entry.repeat = repetition::array;
        entry.size = 1;
        entry.count = Item::size;
        if constexpr (A::length_t::present) {
            entry.repeat = repetition::by_length;
            entry.length_name = member_name<A::length_t::value>;
        }
    } else if constexpr (Item::kind == item_kind::temporary) {
        entry.type = "tmp";
        entry.nested = &schema_for<Item::description>();
        entry.has_nested = true;
        entry.nested_version = Item::description.version_id;
    }
    entry.name = Item::name();
    entry.since = A::since;
    entry.conditional = A::when_t::present;
    if constexpr (A::when_t::present) entry.condition = &type_id<constant<A::when_t::value>>;
    if constexpr (A::limit_t::present) entry.limit = A::limit_t::value;
    return entry;
}

template <class Item>
inline constexpr bool is_wire_item =
    Item::kind == item_kind::field || Item::kind == item_kind::unused || Item::kind == item_kind::temporary;

template <class Item>
inline constexpr bool is_plain_field = false;
template <class Item>
    requires(Item::kind == item_kind::field)
inline constexpr bool is_plain_field<Item> = Item::plain;

// --- sizes that are the same for every state -------------------------------------------------------------------------

/// Larger things are not part of a run: they write and read for themselves.
inline constexpr std::size_t max_flat = 1024;

constexpr std::size_t flat_size(const schema& body, int version);

/// The bytes of a field that is there in every stream of `version` and of constant size, at most max_flat; else 0.
constexpr std::size_t flat_size(const schema_field& field, int version) {
    if (field.conditional || field.since > version || field.null_markers || field.behind_pointer) return 0;
    std::size_t one = field.size;
    if (field.has_nested) one = field.type == "tmp" ? 0 : flat_size(*field.nested, field.nested_version);
    std::size_t bytes = 0;
    switch (field.repeat) {
    case repetition::once: bytes = one; break;
    case repetition::array:
    case repetition::bits: bytes = field.count > max_flat ? 0 : one * field.count; break;
    default: break;
    }
    return bytes <= max_flat ? bytes : 0;
}
/// The bytes of a body that is nothing but such fields; else 0.
constexpr std::size_t flat_size(const schema& body, int version) {
    if (body.has_hooks || !body.subsections.empty()) return 0;
    std::size_t bytes = 0;
    for (const schema_field& field : body.fields) {
        if (!field.conditional && field.since > version) continue;
        const std::size_t one = flat_size(field, version);
        if (one == 0) return 0;
        bytes += one;
    }
    return bytes <= max_flat ? bytes : 0;
}
/// The newest `since` that a stream of `version` has: streams with the same one have the same fields.
constexpr int layout_version(const schema& body, int version) {
    int newest = 0;
    for (const schema_field& field : body.fields)
        if (!field.conditional && field.since <= version && field.since > newest) newest = field.since;
    return newest;
}

/// The fewest bytes that a body of `version` can have.
constexpr std::size_t minimum_size(const schema& body, int version) {
    std::size_t bytes = 0;
    for (const schema_field& field : body.fields) {
        if (field.conditional || field.since > version) continue;
        std::size_t one = field.null_markers ? 1 : field.size;
        if (field.has_nested && !field.null_markers) one = minimum_size(*field.nested, field.nested_version);
        switch (field.repeat) {
        case repetition::once: bytes += one; break;
        case repetition::array:
        case repetition::bits: bytes += one * field.count; break;
        case repetition::by_length: break;
        case repetition::list: bytes += 1; break;
        case repetition::map: bytes += 5; break;
        }
    }
    return bytes;
}

/// Walks the names of everything nested below `fields`.
template <class Visit>
constexpr bool any_nested(std::span<const schema_field> fields, std::span<const schema* const> subsections, Visit visit) {
    const auto below = [&](const schema& one) { return visit(one) || any_nested(one.fields, one.subsections, visit); };
    for (const schema_field& field : fields)
        if ((field.has_nested && below(*field.nested)) || (field.has_key && below(*field.key))) return true;
    for (const schema* one : subsections)
        if (any_nested(one->fields, one->subsections, visit)) return true;
    return false;
}

// --- what is on the wire, as a sequence of units ---------------------------------------------------------------------

/// One kind of thing on the wire: `size` times `count`, neighbours merged. Two descriptions with the same sequence write
/// the same bytes for the same values.
struct wire_unit {
    enum class tag : std::uint8_t {
        integer,    // big-endian, `size` bytes each
        anything,   // skipped bytes
        markers,    // array of pointers: elements with null markers
        sized,      // as many as a length says
        bitmap,
        list,
        map,
        custom,
        condition,  // what follows is there or not
        group,      // begin of the units of a repeated or conditional element
        end,        // its end
        version,    // what follows comes with a version
        subsection,
        subsections, // those of a nested body may follow (unit_list)
    };
    tag what = tag::integer;
    std::uint64_t size = 0;
    std::uint64_t count = 0;
    std::string_view text{};
    const void* condition = nullptr;
    const schema* body = nullptr;
};

/// Feeds the units of a body to `sink`, which merges neighbours. A sink that compares bodies takes subsections as such.
template <class Sink>
constexpr void units_of(const schema& body, int version, Sink& sink);

/// Which of a body's fields is the length called `name`: names aren't on the wire, but which field counts is.
constexpr std::uint64_t place_of(const schema& body, std::string_view name) {
    for (std::size_t i = 0; i != body.fields.size(); ++i)
        if (body.fields[i].name == name) return i;
    return body.fields.size();
}

template <class Sink>
constexpr void units_of_field(const schema& body, const schema_field& field, Sink& sink) {
    using tag = wire_unit::tag;
    const auto element = [&] {
        if (field.has_nested) units_of(*field.nested, field.nested_version, sink);
        else if (field.type == "unused_buffer") sink.add({tag::anything, 1, 1, {}});
        else if (field.size == 0) sink.add({tag::custom, 0, 1, field.type});
        else sink.add({tag::integer, field.unit, field.size / field.unit, {}});
    };
    const auto group = [&](wire_unit head) {
        sink.add(head);
        element();
        sink.add({tag::end, 0, 0, {}});
    };
    switch (field.repeat) {
    case repetition::once: element(); break;
    case repetition::array:
        if (field.null_markers) group({tag::markers, 0, field.count, {}});
        else if (!field.has_nested && field.size != 0)
            sink.add({field.type == "unused_buffer" ? tag::anything : tag::integer, field.unit,
                      field.size / field.unit * field.count, {}});
        else if (field.count != 0) group({tag::group, 0, field.count, {}});
        break;
    case repetition::by_length:
        group({tag::sized, place_of(body, field.length_name) * 2 + (field.null_markers ? 1 : 0), field.count, {}});
        break;
    case repetition::bits:
        // The words of a fixed number of bits are integers like any other.
        if (field.count != 0) sink.add({tag::integer, 8, field.count, {}});
        else sink.add({tag::bitmap, field.length_name.empty() ? 0 : 1 + place_of(body, field.length_name), 1, {}});
        break;
    case repetition::list: group({tag::list, 0, 1, {}}); break;
    case repetition::map:
        sink.add({tag::map, 0, 1, {}});
        if (field.has_key) units_of(*field.key, field.key->version_id, sink);
        else sink.add({tag::integer, 8, 1, {}});
        element();
        sink.add({tag::end, 0, 0, {}});
        break;
    }
}

template <class Sink>
constexpr void units_of(const schema& body, int version, Sink& sink) {
    using tag = wire_unit::tag;
    for (const schema_field& field : body.fields) {
        if (field.conditional) {
            sink.add({tag::condition, 0, 0, {}, field.condition});
            units_of_field(body, field, sink);
            sink.add({tag::end, 0, 0, {}});
        } else if (field.since <= version) {
            units_of_field(body, field, sink);
        }
    }
    if constexpr (Sink::keeps_subsections_apart) {
        if (!body.subsections.empty()) sink.add({tag::subsections, 0, 0, {}, nullptr, &body});
        return;
    }
    for (const schema* one : body.subsections) {
        sink.add({tag::subsection, static_cast<std::uint64_t>(one->version_id), 0, one->name});
        units_of(*one, one->version_id, sink);
        sink.add({tag::end, 0, 0, {}});
    }
}

/// Hashes units (FNV-1a), neighbours of one kind merged.
class unit_hash {
public:
    static constexpr bool keeps_subsections_apart = false;

    constexpr void add(wire_unit next) {
        if (mergeable(next)) {
            pending_.count += next.count;
            return;
        }
        flush();
        pending_ = next;
    }
    constexpr std::uint64_t finish() {
        flush();
        pending_ = {};
        return state_;
    }
    constexpr void mix(std::uint64_t value) {
        for (int i = 0; i != 8; ++i) byte(static_cast<std::uint8_t>(value >> (8 * i)));
    }
    constexpr void mix(std::string_view text) {
        mix(text.size());
        for (const char c : text) byte(static_cast<std::uint8_t>(c));
    }

private:
    constexpr bool mergeable(const wire_unit& next) const {
        return (next.what == wire_unit::tag::integer || next.what == wire_unit::tag::anything) &&
               next.what == pending_.what && next.size == pending_.size;
    }
    constexpr void byte(std::uint8_t value) { state_ = (state_ ^ value) * 0x100000001b3u; }
    constexpr void flush() {
        const bool counts = pending_.what == wire_unit::tag::integer || pending_.what == wire_unit::tag::anything;
        if (counts && pending_.count == 0) return;
        mix(static_cast<std::uint64_t>(pending_.what));
        mix(pending_.size);
        mix(pending_.count);
        // A subsection's name is on the wire; a codec's is what tells it from another.
        if (pending_.what == wire_unit::tag::subsection || pending_.what == wire_unit::tag::custom) mix(pending_.text);
    }

    std::uint64_t state_ = 0xcbf29ce484222325u;
    wire_unit pending_{};
};

/// Collects units, neighbours of one kind merged.
class unit_list {
public:
    static constexpr bool keeps_subsections_apart = true;

    constexpr void add(wire_unit next) {
        if (!list_.empty()) {
            wire_unit& last = list_.back();
            if ((next.what == wire_unit::tag::integer || next.what == wire_unit::tag::anything) &&
                next.what == last.what && next.size == last.size) {
                last.count += next.count;
                return;
            }
        }
        if ((next.what == wire_unit::tag::integer || next.what == wire_unit::tag::anything) && next.count == 0) return;
        list_.push_back(next);
    }
    constexpr const std::vector<wire_unit>& list() const { return list_; }

private:
    std::vector<wire_unit> list_;
};

} // namespace detail
} // namespace vmstate
