// SPDX-License-Identifier: BSL-1.0
//
// Which form a member takes on the wire: decided by its type and its attributes, at compile time. Where there is none,
// the reason is known by name. Depends on describe/ items and Boost headers alone.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>

#include <vmstate/describe/attributes.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

class reader;
class writer;

/// Specialise it beside a struct to make `field<&S::m>` find the description of an `M` without `as`:
/// `template <> inline constexpr auto vmstate::description_of<M> = vmstate::describe<M>(...);`
template <class T>
inline constexpr auto description_of = nullptr;

/// A wire form by hand (QEMU: VMStateInfo). `type` is the type string in the JSON description, `size` what `save` will
/// write.
template <class Codec, class T>
concept wire_codec = requires(writer& w, reader& r, T& value, const T& saved) {
    { Codec::type } -> std::convertible_to<std::string_view>;
    { Codec::save(w, saved) } -> std::same_as<result<void>>;
    { Codec::load(r, value) } -> std::same_as<result<void>>;
    { Codec::size(saved) } -> std::convertible_to<std::size_t>;
};

namespace detail {

/// The first rule that a field breaks, if any. Each has a function of the sentence's name in rules.hpp.
enum class refusal {
    none,
    long_double_has_no_wire_form,
    wchar_t_has_no_wire_form,
    a_pointer_to_a_scalar_must_have_length,
    a_struct_member_must_have_a_description,
    a_union_has_no_wire_form,
    a_reference_has_no_wire_form,
    a_function_has_no_wire_form,
    a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient,
    a_const_member_can_not_be_loaded,
    an_optional_has_a_wire_form_only_with_as_timer,
    a_vector_string_or_unique_ptr_to_array_must_have_length,
    a_list_or_map_must_have_as,
    elements_of_a_list_or_map_must_be_structs_with_a_description,
    a_key_of_a_map_must_be_an_integer_or_have_key_as,
    elements_of_a_list_or_map_can_not_have_a_version_in_as,
    this_type_has_no_wire_form,
    a_predicate_must_take_the_described_struct_and_return_bool,
    a_hook_must_take_the_described_struct,
    a_hook_must_take_its_struct_by_reference_not_a_copy,
    a_hook_must_return_nothing_bool_or_result,
    the_description_in_as_must_describe_the_elements_type,
    a_slice_must_lie_inside_its_array,
    between_bounds_must_fit_the_members_type,
    the_version_in_as_must_not_be_above_its_descriptions_version_id,
    an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see,
    an_attribute_must_not_be_given_twice,
    an_attribute_must_fit_its_member,
    a_member_must_belong_to_the_described_struct,
    a_codec_must_model_wire_codec,
    a_length_must_be_an_integer,
    a_length_must_come_before_its_array,
    a_length_must_be_present_whenever_its_array_is,
    a_member_must_not_be_described_twice,
    two_fields_must_not_have_one_wire_name,
    a_subsection_must_not_be_given_twice,
    two_subsections_must_not_have_one_name,
    a_subsection_must_have_needed,
    a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name,
    every_member_must_be_in_a_field_or_a_subsection_or_transient,
    an_item_must_not_be_given_twice,
    a_temporary_must_be_constructible_from_the_described_struct,
};

/// What a value is on the wire. The first group are single elements, the second are made of elements.
enum class wire_form {
    none,
    scalar,    ///< an integer in its width, big-endian
    timer,     ///< be64 ns, -1 when not pending
    custom,    ///< the author's codec
    structure, ///< a nested description
    pointer,   ///< what it points to
    array,     ///< a fixed number of elements
    sequence,  ///< as many elements as another member says
    words,     ///< bitmap<> over words
    bits,      ///< std::bitset, std::vector<bool>
    queue,     ///< QTAILQ, QLIST
    tree,      ///< GTREE
};

// --- type shapes -----------------------------------------------------------------------------------------------------

// Types of the standard library are known by what they have, so that their headers are paid for by who uses them.

template <class T>
concept atomic_type = requires(T& a, const T& c, typename T::value_type v) {
    { c.load() } -> std::same_as<typename T::value_type>;
    a.compare_exchange_strong(v, v);
};
template <class T>
struct atomic_value {
    static constexpr bool is_atomic = false;
    using type = T;
};
template <atomic_type T>
struct atomic_value<T> {
    static constexpr bool is_atomic = true;
    using type = typename T::value_type;
};

template <class T>
concept duration_type = requires(const T& d) {
    typename T::rep;
    { T::period::num * T::period::den } -> std::convertible_to<std::intmax_t>;
    { d.count() } -> std::same_as<typename T::rep>;
};
template <class T>
concept time_point_type = requires(const T& t) {
    typename T::clock;
    { t.time_since_epoch() } -> std::same_as<typename T::duration>;
} && duration_type<typename T::duration>;
template <class T>
inline constexpr bool is_chrono = duration_type<T> || time_point_type<T>;

template <class T>
concept optional_type = requires(T& o) {
    typename T::value_type;
    { o.has_value() } -> std::same_as<bool>;
    o.reset();
    o.value();
};
template <class T>
struct optional_value {
    static constexpr bool is_optional = false;
    using type = T;
};
template <optional_type T>
struct optional_value<T> {
    static constexpr bool is_optional = true;
    using type = typename T::value_type;
};

/// Integers, bool, enums, float, double, durations and time points, and atomics of these.
template <class T>
consteval bool is_scalar() {
    using value = typename atomic_value<T>::type;
    if constexpr (std::is_integral_v<value> || std::is_enum_v<value> || std::is_floating_point_v<value>)
        return !std::is_same_v<value, long double> && !std::is_same_v<value, wchar_t> && sizeof(value) <= 8;
    else return is_chrono<value> && !atomic_value<T>::is_atomic;
}

/// C arrays and std::array, nested or not, as one row of elements. `Depth` limits how far a slice flattens.
template <class T>
struct array_shape {
    static constexpr bool is_array = false;
    using element = T;
    static constexpr std::size_t count = 1;
    static constexpr T* first(T& value) { return &value; }
    static constexpr const T* first(const T& value) requires(!std::is_const_v<T>) { return &value; }
};
template <class T, std::size_t N>
struct array_shape<T[N]> {
    static constexpr bool is_array = true;
    using inner = array_shape<T>;
    using element = typename inner::element;
    static constexpr std::size_t count = N * inner::count;
    static constexpr std::size_t inner_count = inner::count;
    static constexpr std::size_t rows = N;
    static constexpr element* first(T (&value)[N]) { return inner::first(value[0]); }
    static constexpr const element* first(const T (&value)[N]) { return inner::first(value[0]); }
};
template <class T, std::size_t N>
struct array_shape<std::array<T, N>> {
    static constexpr bool is_array = true;
    using inner = array_shape<T>;
    using element = typename inner::element;
    static constexpr std::size_t count = N * inner::count;
    static constexpr std::size_t inner_count = inner::count;
    static constexpr std::size_t rows = N;
    static constexpr element* first(std::array<T, N>& value) { return inner::first(*value.data()); }
    static constexpr const element* first(const std::array<T, N>& value) { return inner::first(*value.data()); }
};

/// std::unique_ptr and what is like it.
template <class T>
concept owning_pointer = requires(T& p) {
    typename T::element_type;
    typename T::deleter_type;
    p.reset(p.get());
    p.release();
};
template <class T>
concept owning_array = owning_pointer<T> && requires(const T& p) { p[0]; };

enum class container { none, pointer, unique_array, vector };

/// What `length` can be put on, other than an array: a pointer, std::unique_ptr<T[]>, std::vector, std::string.
template <class T>
struct sequence_shape {
    static constexpr container kind = container::none;
    using element = void;
};
template <class T>
struct sequence_shape<T*> {
    static constexpr container kind = container::pointer;
    using element = T;
};
template <owning_array T>
struct sequence_shape<T> {
    static constexpr container kind = container::unique_array;
    using element = typename T::element_type;
};
template <class T>
    requires requires(T& c) {
        typename T::allocator_type;
        c.resize(c.size());
        { c.data() } -> std::same_as<typename T::value_type*>;
    }
struct sequence_shape<T> {
    static constexpr container kind = container::vector;
    using element = typename T::value_type;
};

template <class T>
struct pointer_shape {
    static constexpr bool is_pointer = false;
    static constexpr bool owns = false;
    using pointee = void;
};
template <class T>
struct pointer_shape<T*> {
    static constexpr bool is_pointer = true;
    static constexpr bool owns = false;
    using pointee = T;
};
template <owning_pointer T>
    requires(!owning_array<T>)
struct pointer_shape<T> {
    static constexpr bool is_pointer = true;
    static constexpr bool owns = true;
    using pointee = typename T::element_type;
};

/// std::list, std::deque, std::forward_list.
template <class T>
concept queue_type = requires(T& c) {
    typename T::allocator_type;
    c.front();
    c.clear();
    c.begin() != c.end();
} && !requires(T& c) { c.data(); } && !requires { typename T::key_type; } &&
    (requires(T& c) { c.emplace_back(); } || requires(T& c) { c.emplace_after(c.before_begin()); }) &&
    !std::is_same_v<typename T::value_type, bool>;
template <class T>
struct queue_shape {
    static constexpr bool is_queue = false;
    using element = void;
};
template <queue_type T>
struct queue_shape<T> {
    static constexpr bool is_queue = true;
    static constexpr std::string_view type = requires(T& c) { c.before_begin(); } ? "qlist" : "qtailq";
    using element = typename T::value_type;
};

/// std::map.
template <class T>
struct tree_shape {
    static constexpr bool is_tree = false;
    using key = void;
    using element = void;
};
template <class T>
    requires requires {
        typename T::key_compare;
        typename T::mapped_type;
        typename T::allocator_type;
    }
struct tree_shape<T> {
    static constexpr bool is_tree = true;
    using key = typename T::key_type;
    using element = typename T::mapped_type;
};

/// std::bitset.
template <class T>
concept is_bitset = requires(T& b) {
    b.to_ullong();
    b.flip(b.size());
    { b.test(0) } -> std::same_as<bool>;
};
/// std::vector<bool>.
template <class T>
concept is_bit_vector = requires(T& c) {
    typename T::allocator_type;
    c.flip();
    c.resize(c.size());
} && std::is_same_v<typename T::value_type, bool>;

template <class T>
consteval bool is_timer() {
    using value = typename optional_value<T>::type;
    if constexpr (std::is_integral_v<value>) return sizeof(value) == 8; // else it may be incomplete
    else return is_chrono<value>;
}

// --- descriptions of nested things -----------------------------------------------------------------------------------

template <class E, class A>
consteval bool has_description() {
    if constexpr (A::as_t::present) return true;
    else if constexpr (std::is_class_v<E>) return !std::is_same_v<decltype(description_of<E>), const std::nullptr_t>;
    else return false;
}

/// The description of an `E` in a field with attributes `A`.
template <class E, class A>
struct nested {
    static constexpr const auto& description = description_of<E>;
    static constexpr int version = description_of<E>.version_id;
    static constexpr bool versioned = false;
};
template <class E, class A>
    requires A::as_t::present
struct nested<E, A> {
    static constexpr const auto& description = A::as_t::description;
    static constexpr int version = A::as_t::version;
    static constexpr bool versioned = A::as_t::versioned;
};

/// The struct that a description describes.
template <const auto& Description>
using struct_of = typename std::remove_cvref_t<decltype(Description)>::struct_type;

template <const auto& Description, class E>
inline constexpr bool describes = std::is_same_v<struct_of<Description>, E> ||
                                  std::is_base_of_v<struct_of<Description>, E>;

// --- the form --------------------------------------------------------------------------------------------------------

template <class E, class A>
consteval bool codec_fits() {
    if constexpr (A::coded_t::present) return wire_codec<typename A::coded_t::type, E>;
    else return false;
}

template <class E, class A>
consteval wire_form element_form() {
    if constexpr (A::coded_t::present) return codec_fits<E, A>() ? wire_form::custom : wire_form::none;
    else if constexpr (A::is_timer && is_timer<E>()) return wire_form::timer;
    else if constexpr (is_scalar<E>()) return wire_form::scalar;
    else if constexpr (pointer_shape<E>::is_pointer) return wire_form::pointer;
    else if constexpr (std::is_class_v<E> && has_description<E, A>()) return wire_form::structure;
    else return wire_form::none;
}

template <class M, class A>
consteval wire_form form_of() {
    if constexpr (std::is_function_v<M>) return wire_form::none;
    else if constexpr (codec_fits<M, A>()) return wire_form::custom;
    else if constexpr (A::bitmap_t::present) return wire_form::words;
    else if constexpr (A::length_t::present) return wire_form::sequence;
    else if constexpr (array_shape<M>::is_array) return wire_form::array;
    else if constexpr (is_bitset<M> || is_bit_vector<M>) return wire_form::bits;
    else if constexpr (queue_shape<M>::is_queue) return wire_form::queue;
    else if constexpr (tree_shape<M>::is_tree) return wire_form::tree;
    else return element_form<M, A>();
}

/// The words of a bitmap: an array, a pointer, a vector or a unique_ptr of them.
template <class M>
consteval bool is_word_holder() {
    using element = std::conditional_t<array_shape<M>::is_array, typename array_shape<M>::element,
                                       typename sequence_shape<M>::element>;
    if constexpr (std::is_integral_v<element>) return std::is_unsigned_v<element> && sizeof(element) == 8;
    else return false;
}

/// The element type of an array or a sequence.
template <class M>
struct element_of {
    using type = std::conditional_t<array_shape<M>::is_array, typename array_shape<M>::element,
                                    typename sequence_shape<M>::element>;
};

// --- why not ---------------------------------------------------------------------------------------------------------

/// Not of a type that is only declared so far.
template <class T>
concept complete_type = requires { sizeof(T); };

/// std::function and its relatives.
template <class>
inline constexpr bool wraps_function = false;
template <template <class> class Wrapper, class Result, class... Arguments>
inline constexpr bool wraps_function<Wrapper<Result(Arguments...)>> = true;

template <class E, class A, bool Alone>
consteval refusal why_no_element() {
    using value = typename atomic_value<E>::type;
    if constexpr (std::is_function_v<E>) return refusal::a_function_has_no_wire_form;
    else if constexpr (A::coded_t::present)
        return codec_fits<E, A>() ? refusal::none : refusal::a_codec_must_model_wire_codec;
    else if constexpr (A::is_timer) return is_timer<E>() ? refusal::none : refusal::an_attribute_must_fit_its_member;
    else if constexpr (std::is_same_v<value, long double>) return refusal::long_double_has_no_wire_form;
    else if constexpr (std::is_same_v<value, wchar_t>) return refusal::wchar_t_has_no_wire_form;
    else if constexpr (is_scalar<E>())
        return A::as_t::present ? refusal::the_description_in_as_must_describe_the_elements_type : refusal::none;
    else if constexpr (std::is_union_v<E>) return refusal::a_union_has_no_wire_form;
    else if constexpr (std::is_function_v<E> || std::is_member_pointer_v<E>) return refusal::a_function_has_no_wire_form;
    else if constexpr (std::is_reference_v<E>) return refusal::a_reference_has_no_wire_form;
    else if constexpr (pointer_shape<E>::is_pointer) {
        using pointee = typename pointer_shape<E>::pointee;
        if constexpr (std::is_function_v<pointee>) return refusal::a_function_has_no_wire_form;
        else if constexpr (std::is_void_v<pointee> || (std::is_class_v<pointee> && !complete_type<pointee>))
            return refusal::a_pointer_to_an_incomplete_type_has_no_wire_form_is_it_transient;
        else if constexpr (std::is_class_v<pointee> && std::is_const_v<pointee>)
            return refusal::a_const_member_can_not_be_loaded;
        else if constexpr (Alone && is_scalar<pointee>() && !A::as_t::present)
            return refusal::a_pointer_to_a_scalar_must_have_length;
        else if constexpr (pointer_shape<pointee>::is_pointer) return refusal::this_type_has_no_wire_form;
        else return why_no_element<std::remove_const_t<pointee>, A, false>();
    } else if constexpr (std::is_class_v<E>) {
        if constexpr (!has_description<E, A>())
            return wraps_function<E>  ? refusal::a_function_has_no_wire_form
                   : optional_type<E> ? refusal::an_optional_has_a_wire_form_only_with_as_timer
                                      : refusal::a_struct_member_must_have_a_description;
        else if constexpr (!describes<nested<E, A>::description, E>)
            return refusal::the_description_in_as_must_describe_the_elements_type;
        else if constexpr (nested<E, A>::version > nested<E, A>::description.version_id)
            return refusal::the_version_in_as_must_not_be_above_its_descriptions_version_id;
        else return refusal::none;
    } else return refusal::this_type_has_no_wire_form;
}

template <class M, class A>
consteval refusal why_no_form() {
    constexpr wire_form form = form_of<M, A>();
    if constexpr (form == wire_form::custom) return refusal::none;
    else if constexpr (form == wire_form::words)
        return is_word_holder<M>() ? refusal::none : refusal::an_attribute_must_fit_its_member;
    else if constexpr (form == wire_form::sequence) {
        if constexpr (is_bit_vector<M>) return refusal::an_attribute_must_fit_its_member;
        else if constexpr (!array_shape<M>::is_array && sequence_shape<M>::kind == container::none)
            return refusal::an_attribute_must_fit_its_member;
        else return why_no_element<typename element_of<M>::type, A, false>();
    } else if constexpr (form == wire_form::array) {
        if constexpr (std::is_const_v<typename array_shape<M>::element>) return refusal::a_const_member_can_not_be_loaded;
        else return why_no_element<typename array_shape<M>::element, A, false>();
    } else if constexpr (form == wire_form::bits) return refusal::none;
    else if constexpr (form == wire_form::queue || form == wire_form::tree) {
        using element = std::conditional_t<form == wire_form::queue, typename queue_shape<M>::element,
                                           typename tree_shape<M>::element>;
        using key = typename tree_shape<M>::key;
        if constexpr (!std::is_class_v<element>)
            return refusal::elements_of_a_list_or_map_must_be_structs_with_a_description;
        else if constexpr (!has_description<element, A>()) return refusal::a_list_or_map_must_have_as;
        else if constexpr (!describes<nested<element, A>::description, element>)
            return refusal::the_description_in_as_must_describe_the_elements_type;
        else if constexpr (nested<element, A>::versioned)
            return refusal::elements_of_a_list_or_map_can_not_have_a_version_in_as;
        else if constexpr (form == wire_form::queue) return refusal::none;
        else if constexpr (A::key_as_t::present)
            return describes<A::key_as_t::description, key> ? refusal::none
                                                            : refusal::the_description_in_as_must_describe_the_elements_type;
        else
            return std::is_integral_v<key> || std::is_enum_v<key>
                       ? refusal::none
                       : refusal::a_key_of_a_map_must_be_an_integer_or_have_key_as;
    } else if constexpr (sequence_shape<M>::kind == container::vector ||
                         sequence_shape<M>::kind == container::unique_array)
        return refusal::a_vector_string_or_unique_ptr_to_array_must_have_length;
    else return why_no_element<M, A, true>();
}

/// Behind a pointer there is as much room as its length says before a load.
template <class Item>
consteval bool has_room() {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    return (A::length_t::present || A::bitmap_t::present) && !array_shape<M>::is_array &&
           (sequence_shape<M>::kind == container::pointer || sequence_shape<M>::kind == container::unique_array);
}
/// The member that holds the length.
template <class A>
consteval auto length_member() {
    if constexpr (A::length_t::present) return A::length_t::value;
    else return A::bitmap_t::value;
}

// --- names and sizes -------------------------------------------------------------------------------------------------

/// The unsigned integer that carries a scalar.
template <class E>
struct wire_integer {
    using value = typename atomic_value<E>::type;
    static constexpr std::size_t size = is_chrono<value> ? 8 : sizeof(value);
    using type = std::conditional_t<
        size == 1, std::uint8_t,
        std::conditional_t<size == 2, std::uint16_t, std::conditional_t<size == 4, std::uint32_t, std::uint64_t>>>;
};

template <class E, bool = std::is_enum_v<E>>
struct arithmetic_of {
    using type = E;
};
template <class E>
struct arithmetic_of<E, true> {
    using type = std::underlying_type_t<E>;
};

/// Bytes as such, rather than small integers: an array of them is a "buffer".
template <class E>
inline constexpr bool is_byte =
    std::is_same_v<E, unsigned char> || std::is_same_v<E, char> || std::is_same_v<E, std::byte>;

template <class E, class A>
consteval std::string_view scalar_type_name() {
    using value = typename atomic_value<E>::type;
    if constexpr (is_chrono<value>) return A::is_equal ? "int64 equal" : "int64";
    else if constexpr (std::is_same_v<value, double>) return "CPU_Double_U";
    else {
        using integer = typename arithmetic_of<value>::type;
        constexpr bool is_signed = std::is_signed_v<integer> && std::is_integral_v<integer>;
        if constexpr (std::is_same_v<integer, bool>) return "bool";
        else if constexpr (sizeof(integer) == 1)
            return A::is_equal ? (is_signed ? "int8 equal" : "uint8 equal") : (is_signed ? "int8" : "uint8");
        else if constexpr (sizeof(integer) == 2)
            return A::is_equal ? (is_signed ? "int16 equal" : "uint16 equal") : (is_signed ? "int16" : "uint16");
        else if constexpr (sizeof(integer) == 4) {
            if (A::is_at_most_current && is_signed) return "int32 le";
            return A::is_equal ? (is_signed ? "int32 equal" : "uint32 equal") : (is_signed ? "int32" : "uint32");
        } else if (A::is_equal) return "int64 equal"; // QEMU's own name for its uint64 too
        else return is_signed ? "int64" : "uint64";
    }
}

/// QEMU's type string of an element.
template <class E, class A>
consteval std::string_view element_type_name() {
    constexpr wire_form form = element_form<E, A>();
    if constexpr (form == wire_form::custom) return A::coded_t::type::type;
    else if constexpr (form == wire_form::timer) return "timer";
    else if constexpr (form == wire_form::scalar) return scalar_type_name<E, A>();
    else if constexpr (form == wire_form::pointer)
        return element_type_name<std::remove_const_t<typename pointer_shape<E>::pointee>, A>();
    else if constexpr (form == wire_form::structure) return nested<E, A>::versioned ? "vstruct" : "struct";
    else return "";
}

} // namespace detail
} // namespace vmstate
