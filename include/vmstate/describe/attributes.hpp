// SPDX-License-Identifier: BSL-1.0
//
// What can be said of a field: attributes are empty types, listed after the member in any order, as in
// `field<&S::m, as<d>, length<&S::n>, since<2>>`. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <type_traits>

namespace vmstate {

/// The field exists from this version on (QEMU: `VMSTATE_*_V`, the field's version_id).
template <int Version>
struct since {};

/// The field exists where the predicate says so, whatever the version (QEMU: `VMSTATE_*_TEST`, field_exists).
/// `bool f(const S&)` or `bool f(const S&, int version_id)`, free or member function.
template <auto Predicate>
struct when {};

/// Loading another value than the one that is there is an error (QEMU: `VMSTATE_*_EQUAL`).
struct equal {};

/// Loading a negative value, or one above what the member holds, is an error (QEMU: `VMSTATE_INT32_POSITIVE_LE`).
struct at_most_current {};

/// Loading a value below `Low` or above `High` is an error.
template <auto Low, auto High>
struct between {};

/// Only `Count` elements of an array, from `First` on (QEMU: `VMSTATE_SUB_ARRAY`, `PARTIAL_BUFFER`,
/// `BUFFER_START_MIDDLE`).
template <std::size_t First, std::size_t Count>
struct slice {};

/// The number of elements is in another member, described earlier or not sent at all (QEMU: `VMSTATE_VARRAY_*`,
/// `VBUFFER`, `_ALLOC`).
template <auto Member>
struct length {};

/// The length counts in units of `Factor` elements (QEMU: `VMSTATE_VARRAY_MULTIPLY`).
template <std::size_t Factor>
struct multiply {};

/// The most elements that a stream may ask for; more is an error before anything is allocated.
template <std::size_t Maximum>
struct limit {};

/// The description of the member, or of its elements (QEMU: `VMSTATE_STRUCT`); with a version, both sides use that one
/// (QEMU: `VMSTATE_VSTRUCT`).
template <const auto& Description, int... Version>
struct as {
    static_assert(sizeof...(Version) <= 1, "as<description, version> takes one version");
};

/// The description of the keys of a map (QEMU: `VMSTATE_GTREE`).
template <const auto& Description>
struct key_as {};

/// Words of 64 bits that hold as many bits as the member says (QEMU: `VMSTATE_BITMAP`).
template <auto Member>
struct bitmap {};

/// The expiry time of a timer, in ns of its clock; -1 is "not pending" (QEMU: `VMSTATE_TIMER_PTR`).
struct as_timer {};

/// A wire form of the author's own (QEMU: a custom `VMStateInfo`). `Codec` models `wire_codec`.
template <class Codec>
struct coded {};

namespace detail {

template <class... Attributes>
struct attribute_set : Attributes... {};

// Looking an attribute up is overload resolution on the set's bases: no recursion, one instantiation per field.
struct attribute_absent {
    static constexpr bool present = false;
};
attribute_absent find_since(...);
attribute_absent find_when(...);
attribute_absent find_equal(...);
attribute_absent find_at_most_current(...);
attribute_absent find_between(...);
attribute_absent find_slice(...);
attribute_absent find_length(...);
attribute_absent find_multiply(...);
attribute_absent find_limit(...);
attribute_absent find_as(...);
attribute_absent find_key_as(...);
attribute_absent find_bitmap(...);
attribute_absent find_timer(...);
attribute_absent find_coded(...);

struct attribute_given {
    static constexpr bool present = true;
};
template <auto Value>
struct present_value : attribute_given {
    static constexpr auto value = Value;
};
template <auto Low, auto High>
struct present_range : attribute_given {
    static constexpr auto low = Low;
    static constexpr auto high = High;
};
template <class Type>
struct present_type : attribute_given {
    using type = Type;
};
template <const auto& Description, int... Version>
struct present_description : attribute_given {
    static constexpr const auto& description = Description;
    static constexpr bool versioned = sizeof...(Version) != 0;
    static constexpr int version = [] {
        if constexpr (versioned) return (Version, ...);
        else return Description.version_id;
    }();
};

template <int V>
present_value<V> find_since(const since<V>*);
template <auto F>
present_value<F> find_when(const when<F>*);
attribute_given find_equal(const equal*);
attribute_given find_at_most_current(const at_most_current*);
template <auto L, auto H>
present_range<L, H> find_between(const between<L, H>*);
template <std::size_t F, std::size_t C>
present_range<F, C> find_slice(const slice<F, C>*);
template <auto M>
present_value<M> find_length(const length<M>*);
template <std::size_t K>
present_value<K> find_multiply(const multiply<K>*);
template <std::size_t K>
present_value<K> find_limit(const limit<K>*);
template <const auto& D, int... V>
present_description<D, V...> find_as(const as<D, V...>*);
template <const auto& D>
present_description<D> find_key_as(const key_as<D>*);
template <auto M>
present_value<M> find_bitmap(const bitmap<M>*);
attribute_given find_timer(const as_timer*);
template <class C>
present_type<C> find_coded(const coded<C>*);

/// The attributes of one field, looked up once.
template <class... List>
struct attributes {
    using set = attribute_set<List...>;
    template <class... Other>
    using plus = attributes<List..., Other...>;

    using since_t = decltype(find_since(static_cast<set*>(nullptr)));
    using when_t = decltype(find_when(static_cast<set*>(nullptr)));
    using between_t = decltype(find_between(static_cast<set*>(nullptr)));
    using slice_t = decltype(find_slice(static_cast<set*>(nullptr)));
    using length_t = decltype(find_length(static_cast<set*>(nullptr)));
    using multiply_t = decltype(find_multiply(static_cast<set*>(nullptr)));
    using limit_t = decltype(find_limit(static_cast<set*>(nullptr)));
    using as_t = decltype(find_as(static_cast<set*>(nullptr)));
    using key_as_t = decltype(find_key_as(static_cast<set*>(nullptr)));
    using bitmap_t = decltype(find_bitmap(static_cast<set*>(nullptr)));
    using coded_t = decltype(find_coded(static_cast<set*>(nullptr)));
    static constexpr bool is_equal = decltype(find_equal(static_cast<set*>(nullptr)))::present;
    static constexpr bool is_at_most_current = decltype(find_at_most_current(static_cast<set*>(nullptr)))::present;
    static constexpr bool is_timer = decltype(find_timer(static_cast<set*>(nullptr)))::present;
    static constexpr bool is_checked = is_equal || is_at_most_current || between_t::present;

    static constexpr int since = [] {
        if constexpr (since_t::present) return since_t::value;
        else return 0;
    }();
};
/// Most fields have none: nothing to look up.
template <>
struct attributes<> {
    using since_t = attribute_absent;
    using when_t = attribute_absent;
    using between_t = attribute_absent;
    using slice_t = attribute_absent;
    using length_t = attribute_absent;
    using multiply_t = attribute_absent;
    using limit_t = attribute_absent;
    using as_t = attribute_absent;
    using key_as_t = attribute_absent;
    using bitmap_t = attribute_absent;
    using coded_t = attribute_absent;
    static constexpr bool is_equal = false;
    static constexpr bool is_at_most_current = false;
    static constexpr bool is_timer = false;
    static constexpr bool is_checked = false;
    static constexpr int since = 0;
};

} // namespace detail
} // namespace vmstate
