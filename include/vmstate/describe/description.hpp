// SPDX-License-Identifier: BSL-1.0
//
// `describe`: makes a description from a header and items, and checks it. Depends on describe/ alone.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>

#include <vmstate/describe/aggregate.hpp>
#include <vmstate/describe/hooks.hpp>
#include <vmstate/describe/items.hpp>
#include <vmstate/describe/rules.hpp>
#include <vmstate/describe/schema.hpp>
#include <vmstate/describe/wire_form.hpp>

namespace vmstate {

/// How a description begins: its name on the wire, the version it writes, the oldest it reads (QEMU:
/// VMStateDescription's name, version_id, minimum_version_id).
struct description_header {
    std::string_view name;
    int version_id = 0;
    int minimum_version_id = version_id;
};

namespace detail {

// --- what the checks need to know of an item -------------------------------------------------------------------------

/// All that is known of an item: asked of its type once, then plain data for plain functions.
struct item_facts {
    item_kind kind = item_kind::field;
    bool is_wire = false;
    schema_field wire{};           // what it is on the wire
    refusal why = refusal::none;   // the first rule that it breaks on its own
    const void* owner = nullptr;   // which struct the member is of: a base class may have one of the same name
    const void* when = nullptr;    // which predicate
    std::string_view predicate;    // and how it is spelled: with -fsanitize=undefined g++ can't tell two addresses apart
    bool has_room = false;         // behind a pointer: as much as its length says before a load
    bool sliced = false;
    std::size_t first = 0;
    std::size_t count = 0;
};

/// A member that a description lists, in a field or as transient.
struct member_facts {
    std::string_view name;
    std::uint64_t key = 0;
    const void* owner = nullptr;
    std::size_t item = 0;
    const item_facts* field = nullptr;
    bool is_field = false;
};

struct subsection_facts {
    const schema* body = nullptr;
    std::span<const member_facts> members;
    std::span<const subsection_facts> subsections;
    bool has_needed = false;
    bool has_historic_name = false;
    std::size_t item = 0;
};

// --- rules about one item --------------------------------------------------------------------------------------------

template <class Value, auto Bound>
consteval bool bound_fits() {
    if constexpr (std::is_floating_point_v<Value>) return std::is_arithmetic_v<decltype(Bound)>;
    else if constexpr (std::is_enum_v<Value>) {
        if constexpr (std::is_same_v<decltype(Bound), Value>) return true;
        else return bound_fits<std::underlying_type_t<Value>, Bound>();
    } else if constexpr (std::is_same_v<Value, bool> || std::is_same_v<decltype(Bound), bool>)
        return std::is_same_v<decltype(Bound), Value>;
    else if constexpr (std::is_integral_v<Value> && std::is_integral_v<decltype(Bound)>)
        return std::in_range<std::conditional_t<sizeof(Value) == 1,
                                                std::conditional_t<std::is_signed_v<Value>, signed char, unsigned char>,
                                                std::make_signed_t<Value>>>(0) &&
               (std::is_signed_v<Value>
                    ? std::cmp_less_equal(Bound, std::numeric_limits<Value>::max()) &&
                          std::cmp_greater_equal(Bound, std::numeric_limits<Value>::min())
                    : std::cmp_greater_equal(Bound, 0) && std::cmp_less_equal(Bound, std::numeric_limits<Value>::max()));
    else return false;
}

/// The scalar that checks like `equal` and `between` look at, void where there is none.
template <class M, class A>
struct checked_value {
    static constexpr wire_form form = form_of<M, A>();
    using element = std::conditional_t<form == wire_form::array || form == wire_form::sequence,
                                       typename element_of<M>::type, M>;
    static constexpr bool is_scalar = detail::is_scalar<element>() && !A::is_timer && !A::coded_t::present;
    using type = std::conditional_t<is_scalar, typename atomic_value<element>::type, void>;
};

/// What is wrong with a member of type `M` with attributes `A` in `S`.
template <class S, class M, class A>
consteval refusal why_no_field() {
    if constexpr (why_no_form<M, A>() != refusal::none) return why_no_form<M, A>();
    else {
        constexpr wire_form form = form_of<M, A>();
        if constexpr (A::is_checked && !checked_value<M, A>::is_scalar) return refusal::an_attribute_must_fit_its_member;
        if constexpr (A::slice_t::present) {
            if constexpr (form != wire_form::array) return refusal::an_attribute_must_fit_its_member;
            else if constexpr (A::slice_t::low >= array_shape<M>::rows || A::slice_t::high == 0 ||
                               A::slice_t::high > array_shape<M>::rows - A::slice_t::low)
                return refusal::a_slice_must_lie_inside_its_array;
        }
        if constexpr (A::multiply_t::present) {
            if constexpr (form != wire_form::sequence || A::multiply_t::value == 0)
                return refusal::an_attribute_must_fit_its_member;
        }
        if constexpr (A::limit_t::present && form != wire_form::sequence && form != wire_form::queue &&
                      form != wire_form::tree && form != wire_form::words)
            return refusal::an_attribute_must_fit_its_member;
        if constexpr (A::key_as_t::present && form != wire_form::tree) return refusal::an_attribute_must_fit_its_member;
        if constexpr (A::length_t::present) {
            using L = type_of<A::length_t::value>;
            if constexpr (!std::is_base_of_v<owner_of<A::length_t::value>, S>)
                return refusal::a_member_must_belong_to_the_described_struct;
            else if constexpr (!std::is_integral_v<L> || std::is_same_v<L, bool>)
                return refusal::a_length_must_be_an_integer;
        }
        if constexpr (A::bitmap_t::present) {
            using L = type_of<A::bitmap_t::value>;
            if constexpr (!std::is_base_of_v<owner_of<A::bitmap_t::value>, S>)
                return refusal::a_member_must_belong_to_the_described_struct;
            else if constexpr (!std::is_integral_v<L> || std::is_same_v<L, bool>)
                return refusal::a_length_must_be_an_integer;
        }
        if constexpr (A::between_t::present && checked_value<M, A>::is_scalar) {
            using V = typename checked_value<M, A>::type;
            if constexpr (!bound_fits<V, A::between_t::low>() || !bound_fits<V, A::between_t::high>())
                return refusal::between_bounds_must_fit_the_members_type;
            else if constexpr (A::between_t::low > A::between_t::high)
                return refusal::between_bounds_must_fit_the_members_type;
        }
        return refusal::none;
    }
}

template <class M>
inline constexpr refusal why_no_plain_field = why_no_form<M, attributes<>>();
template <class M>
inline constexpr refusal why_no_plain_field<const M> = refusal::a_const_member_can_not_be_loaded;

/// A codec may load what a const member refers to.
template <class M, class A>
consteval bool loads_const() {
    if constexpr (!std::is_const_v<M>) return true;
    else if constexpr (A::coded_t::present) return requires(reader& r, M& value) { A::coded_t::type::load(r, value); };
    else return false;
}

/// `f(S&)`, and for `post_load` also `f(S&, int)`; returns nothing, bool or `result<void>`.
template <auto Hook, class S, bool MayTakeVersion>
consteval refusal why_no_hook() {
    using function = std::remove_cv_t<decltype(Hook)>;
    if constexpr (takes_copy<function, S>) return refusal::a_hook_must_take_its_struct_by_reference_not_a_copy;
    else if constexpr (callable_on<function, S>)
        return is_hook_result<result_of_call<Hook, S>> ? refusal::none
                                                       : refusal::a_hook_must_return_nothing_bool_or_result;
    else if constexpr (MayTakeVersion && callable_on<function, S, int>)
        return is_hook_result<result_of_call<Hook, S, int>> ? refusal::none
                                                            : refusal::a_hook_must_return_nothing_bool_or_result;
    else return refusal::a_hook_must_take_the_described_struct;
}
/// `f(reader&, S&, int)`.
template <auto Hook, class S>
consteval refusal why_no_load_old() {
    using function = std::remove_cv_t<decltype(Hook)>;
    if constexpr (takes_copy<function, S>) return refusal::a_hook_must_take_its_struct_by_reference_not_a_copy;
    else if constexpr (requires(reader& r, S& s) { Hook(r, s, 0); })
        return is_hook_result<decltype(Hook(std::declval<reader&>(), std::declval<S&>(), 0))>
                   ? refusal::none
                   : refusal::a_hook_must_return_nothing_bool_or_result;
    else if constexpr (requires(reader& r, S& s) { (s.*Hook)(r, 0); })
        return is_hook_result<decltype((std::declval<S&>().*Hook)(std::declval<reader&>(), 0))>
                   ? refusal::none
                   : refusal::a_hook_must_return_nothing_bool_or_result;
    else return refusal::a_hook_must_take_the_described_struct;
}

/// Fields that an element's saver (at the element's own version) and loader (at the field's) would see differently.
constexpr bool gated_differently(const schema& element, int loaded_version) {
    for (const schema_field& field : element.fields)
        if (!field.conditional && field.since > loaded_version && field.since <= element.version_id) return true;
    return false;
}

/// Subsections describe the same struct as their parent (or a base of it), transient members belong to it.
template <class S, class Item>
consteval bool belongs(const Item&) {
    return true;
}
template <class S, const auto&... D>
consteval bool belongs(const subsections_item<D...>&) {
    return (true && ... && describes<D, S>);
}
template <class S, auto... Members>
consteval bool belongs(const transient_item<Members...>&) {
    return (true && ... && std::is_base_of_v<owner_of<Members>, S>);
}

/// What is wrong with an item that has attributes, or is no field.
template <class S, class Item>
consteval refusal why_no_item(const schema_field& wire) {
    if constexpr (is_wire_item<Item>) {
        using A = typename Item::attributes;
        if constexpr (!Item::attributes_known) return refusal::an_attribute_must_fit_its_member;
        else if constexpr (!Item::attributes_distinct) return refusal::an_attribute_must_not_be_given_twice;
        if constexpr (A::when_t::present) {
            if constexpr (!is_predicate<A::when_t::value, S>())
                return refusal::a_predicate_must_take_the_described_struct_and_return_bool;
        }
    }
    if constexpr (Item::kind == item_kind::field) {
        constexpr refusal why = why_no_field<S, std::remove_const_t<typename Item::type>, typename Item::attributes>();
        if constexpr (why != refusal::none) return why;
        else if constexpr (!loads_const<typename Item::type, typename Item::attributes>())
            return refusal::a_const_member_can_not_be_loaded;
        else if (wire.repeat == repetition::list || wire.repeat == repetition::map)
            return gated_differently(*wire.nested, Item::attributes::since) ||
                           (wire.has_key && gated_differently(*wire.key, Item::attributes::since))
                       ? refusal::an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see
                       : refusal::none;
        else return refusal::none;
    } else if constexpr (Item::kind == item_kind::temporary) {
        if constexpr (!std::is_constructible_v<struct_of<Item::description>, S&> &&
                      !requires(S& s) { struct_of<Item::description>{s}; })
            return refusal::a_temporary_must_be_constructible_from_the_described_struct;
        else
            return gated_differently(*wire.nested, Item::attributes::since)
                       ? refusal::an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see
                       : refusal::none;
    } else if constexpr (Item::kind == item_kind::unused) {
        using A = typename Item::attributes;
        if constexpr (A::length_t::present) {
            if constexpr (!std::is_base_of_v<owner_of<A::length_t::value>, S>)
                return refusal::a_member_must_belong_to_the_described_struct;
            else if constexpr (!std::is_integral_v<type_of<A::length_t::value>> || std::is_same_v<type_of<A::length_t::value>, bool>)
                return refusal::a_length_must_be_an_integer;
        }
        return A::is_checked || A::slice_t::present || A::as_t::present || A::coded_t::present ||
                       A::bitmap_t::present || A::is_timer || A::limit_t::present || A::key_as_t::present
                   ? refusal::an_attribute_must_fit_its_member
                   : refusal::none;
    } else if constexpr (Item::kind == item_kind::validation) {
        return is_predicate<Item::predicate, S>() ? refusal::none
                                                  : refusal::a_predicate_must_take_the_described_struct_and_return_bool;
    } else if constexpr (Item::kind == item_kind::needed) {
        return is_predicate<Item::function, S>() ? refusal::none
                                                 : refusal::a_predicate_must_take_the_described_struct_and_return_bool;
    } else if constexpr (Item::kind == item_kind::pre_load || Item::kind == item_kind::pre_save ||
                         Item::kind == item_kind::post_save) {
        return why_no_hook<Item::function, S, false>();
    } else if constexpr (Item::kind == item_kind::post_load) {
        return why_no_hook<Item::function, S, true>();
    } else if constexpr (Item::kind == item_kind::load_old) {
        return why_no_load_old<Item::function, S>();
    } else if constexpr (Item::kind == item_kind::subsections || Item::kind == item_kind::transient)
        return belongs<S>(Item{}) ? refusal::none : refusal::a_member_must_belong_to_the_described_struct;
    else return refusal::none;
}

/// A name as a number: names with different ones differ.
constexpr std::uint64_t key_of(std::string_view name) {
    std::uint64_t key = name.size();
    for (std::size_t i = name.size() > 7 ? name.size() - 7 : 0; i != name.size(); ++i)
        key = key << 8 | static_cast<unsigned char>(name[i]);
    return key;
}

template <class S, class Item>
consteval item_facts facts_of() {
    item_facts facts;
    facts.kind = Item::kind;
    if constexpr (is_wire_item<Item>) facts.is_wire = true;
    if constexpr (is_plain_field<Item>) {
        // The quick way for most fields: nothing here depends on the member but its name.
        using M = std::remove_const_t<typename Item::type>;
        if constexpr (std::is_base_of_v<typename Item::owner, S>) {
            facts.why = why_no_plain_field<typename Item::type>;
            facts.wire = type_schema<M, attributes<>>;
            facts.wire.name = Item::name();
            facts.owner = &type_id<typename Item::owner>;
        } else facts.why = refusal::a_member_must_belong_to_the_described_struct;
    } else {
        if constexpr (is_wire_item<Item>) {
            using A = typename Item::attributes;
            facts.wire = describe_item<Item>();
            if constexpr (A::when_t::present) {
                facts.when = &type_id<constant<A::when_t::value>>;
                facts.predicate = type_spelling<constant<A::when_t::value>>();
            }
            if constexpr (Item::kind == item_kind::field) facts.has_room = has_room<Item>();
            if constexpr (A::slice_t::present) {
                facts.sliced = true;
                facts.first = A::slice_t::low;
                facts.count = A::slice_t::high;
            }
        }
        facts.why = why_no_item<S, Item>(facts.wire);
        if constexpr (Item::kind == item_kind::field) {
            facts.owner = &type_id<typename Item::owner>;
            if (!std::is_base_of_v<typename Item::owner, S>)
                facts.why = refusal::a_member_must_belong_to_the_described_struct;
        }
    }
    return facts;
}

// --- rules about the items together ----------------------------------------------------------------------------------

/// The items of a description of `S`, as data.
template <class S, class... Items>
inline constexpr std::array<item_facts, sizeof...(Items)> facts_list{facts_of<S, Items>()...};

template <class Item>
inline constexpr std::size_t listed_members = Item::kind == item_kind::field ? 1 : 0;
template <auto... Members>
inline constexpr std::size_t listed_members<transient_item<Members...>> = sizeof...(Members);

/// The names of transient members.
constexpr member_facts* add_transient(member_facts* next, std::size_t, const auto&) { return next; }
template <auto... Members>
constexpr member_facts* add_transient(member_facts* next, std::size_t item, const transient_item<Members...>&) {
    ((next->name = member_name<Members>, next->key = key_of(member_name<Members>), next->owner = &type_id<owner_of<Members>>, next->item = item, ++next), ...);
    return next;
}

/// All members that the items list.
template <class S, class... Items>
consteval auto make_member_list() {
    std::array<member_facts, (std::size_t{0} + ... + listed_members<Items>)> all{};
    member_facts* next = all.data();
    std::size_t item = 0;
    for (const item_facts& one : facts_list<S, Items...>) {
        if (one.kind == item_kind::field) *next++ = {one.wire.name, key_of(one.wire.name), one.owner, item, &one, true};
        ++item;
    }
    if constexpr ((false || ... || (Items::kind == item_kind::transient))) {
        item = 0;
        ((next = add_transient(next, item++, Items{})), ...);
    }
    return all;
}
template <class S, class... Items>
inline constexpr auto member_list = make_member_list<S, Items...>();

template <class Item>
inline constexpr std::size_t listed_subsections = 0;
template <const auto&... D>
inline constexpr std::size_t listed_subsections<subsections_item<D...>> = sizeof...(D);

constexpr subsection_facts* add_subsections(subsection_facts* next, std::size_t, const auto&) { return next; }
template <const auto&... D>
constexpr subsection_facts* add_subsections(subsection_facts* next, std::size_t item, const subsections_item<D...>&) {
    ((*next++ = subsection_facts{&schema_for<D>(), std::remove_cvref_t<decltype(D)>::members(),
                                 std::remove_cvref_t<decltype(D)>::subsections(),
                                 std::remove_cvref_t<decltype(D)>::has_needed,
                                 std::remove_cvref_t<decltype(D)>::has_historic_name, item}),
     ...);
    return next;
}

template <class... Items>
consteval auto make_subsection_list() {
    std::array<subsection_facts, (std::size_t{0} + ... + listed_subsections<Items>)> all{};
    if constexpr ((std::size_t{0} + ... + listed_subsections<Items>) != 0) {
        subsection_facts* next = all.data();
        std::size_t item = 0;
        ((next = add_subsections(next, item++, Items{})), ...);
    }
    return all;
}
template <class... Items>
inline constexpr auto subsection_list = make_subsection_list<Items...>();

template <class S, class... Items>
consteval auto make_schema_fields() {
    std::array<schema_field, (std::size_t{0} + ... + (is_wire_item<Items> ? 1 : 0))> all{};
    schema_field* next = all.data();
    for (const item_facts& one : facts_list<S, Items...>)
        if (one.is_wire) *next++ = one.wire;
    return all;
}
template <class S, class... Items>
inline constexpr auto schema_fields = make_schema_fields<S, Items...>();

template <class... Items>
consteval auto make_schema_subsections() {
    std::array<const schema*, subsection_list<Items...>.size()> all{};
    for (std::size_t i = 0; i != all.size(); ++i) all[i] = subsection_list<Items...>[i].body;
    return all;
}
template <class... Items>
inline constexpr auto schema_subsections = make_schema_subsections<Items...>();

struct broken_rule {
    refusal rule = refusal::none;
    std::size_t item = 0;
};

constexpr bool overlap(const item_facts& a, const item_facts& b) {
    if (!a.sliced || !b.sliced) return true;
    return a.first < b.first + b.count && b.first < a.first + a.count;
}

constexpr bool same_predicate(const item_facts& a, const item_facts& b) {
    return a.predicate == b.predicate && a.when == b.when;
}
/// Two ways to send one member are alternatives where predicates tell them apart.
constexpr bool alternatives(const item_facts& a, const item_facts& b) {
    return a.wire.conditional && b.wire.conditional && !same_predicate(a, b);
}

constexpr broken_rule check_members(std::span<const member_facts> members) {
    for (std::size_t j = 1; j < members.size(); ++j) {
        for (std::size_t i = 0; i != j; ++i) {
            const member_facts& a = members[i];
            const member_facts& b = members[j];
            if (a.key != b.key || a.name != b.name) continue;
            if (a.owner != b.owner) return {refusal::two_fields_must_not_have_one_wire_name, b.item};
            if (!a.is_field || !b.is_field || (overlap(*a.field, *b.field) && !alternatives(*a.field, *b.field)))
                return {refusal::a_member_must_not_be_described_twice, b.item};
        }
    }
    return {};
}

constexpr std::size_t total_members(std::span<const member_facts> members, std::span<const subsection_facts> subsections) {
    std::size_t total = members.size();
    for (const subsection_facts& sub : subsections) total += total_members(sub.members, sub.subsections);
    return total;
}
constexpr const member_facts** collect_members(const member_facts** next, std::span<const member_facts> members,
                                               std::span<const subsection_facts> subsections) {
    for (const member_facts& one : members) *next++ = &one;
    for (const subsection_facts& sub : subsections) next = collect_members(next, sub.members, sub.subsections);
    return next;
}
/// How many different members are listed, subsections included.
template <std::size_t Total>
constexpr std::size_t distinct_members(std::span<const member_facts> members,
                                       std::span<const subsection_facts> subsections) {
    std::array<const member_facts*, Total + 1> all{};
    collect_members(all.data(), members, subsections);
    std::size_t distinct = 0;
    for (std::size_t i = 0; i != Total; ++i) {
        bool seen = false;
        for (std::size_t j = 0; j != i && !seen; ++j) seen = all[j]->key == all[i]->key && all[j]->name == all[i]->name;
        distinct += seen ? 0 : 1;
    }
    return distinct;
}

/// For minimum_version_id: no stream is too old for any `since`.
inline constexpr int max_version = std::numeric_limits<int>::max();

/// A length that is itself described: before its array, and there whenever the array is.
constexpr broken_rule check_lengths(std::span<const member_facts> members,
                                    std::span<const subsection_facts> subsections, int minimum_version_id) {
    for (const member_facts& array : members) {
        if (!array.is_field || array.field->wire.length_name.empty()) continue;
        const std::string_view name = array.field->wire.length_name;
        for (const member_facts& length : members) {
            if (!length.is_field || length.name != name) continue;
            if (length.item > array.item) return {refusal::a_length_must_come_before_its_array, array.item};
            const schema_field& l = length.field->wire;
            const schema_field& a = array.field->wire;
            const bool always = !l.conditional && l.since <= minimum_version_id;
            const bool together = l.conditional ? a.conditional && same_predicate(*length.field, *array.field)
                                                : !a.conditional && l.since <= a.since;
            if (!always && !together) return {refusal::a_length_must_be_present_whenever_its_array_is, array.item};
        }
        // Subsections come after all fields.
        for (const subsection_facts& sub : subsections)
            for (const member_facts& length : sub.members)
                if (length.is_field && length.name == name)
                    return {refusal::a_length_must_come_before_its_array, array.item};
    }
    return {};
}

constexpr broken_rule check_subsections(std::span<const subsection_facts> subsections,
                                        std::span<const schema_field> fields,
                                        std::span<const schema* const> bodies) {
    for (std::size_t i = 0; i != subsections.size(); ++i) {
        const subsection_facts& one = subsections[i];
        if (!one.has_needed) return {refusal::a_subsection_must_have_needed, one.item};
        for (std::size_t j = 0; j != i; ++j) {
            if (subsections[j].body->name != one.body->name) continue;
            return {subsections[j].body == one.body ? refusal::a_subsection_must_not_be_given_twice
                                                    : refusal::two_subsections_must_not_have_one_name,
                    one.item};
        }
        const std::string_view name = one.body->name;
        const auto takes_it = [&](const schema& nested) {
            return name.size() >= nested.name.size() && name.substr(0, nested.name.size()) == nested.name;
        };
        bool taken = any_nested(fields, bodies, takes_it);
        // A subsection is nested, too: after its own body it looks for subsections of its own.
        for (const subsection_facts& other : subsections)
            taken = taken || (&other != &one && name.size() > other.body->name.size() && takes_it(*other.body));
        if (taken)
            return {refusal::a_nested_description_name_must_not_be_a_prefix_of_an_ancestors_subsection_name, one.item};
    }
    return {};
}

/// The first rule that an item breaks on its own, or by standing there a second time.
constexpr broken_rule check_items(std::span<const item_facts> items) {
    for (std::size_t i = 0; i != items.size(); ++i)
        if (items[i].why != refusal::none) return {items[i].why, i};
    constexpr item_kind single[] = {item_kind::needed,   item_kind::pre_load,  item_kind::post_load,
                                    item_kind::pre_save, item_kind::post_save, item_kind::load_old,
                                    item_kind::priority, item_kind::unmigratable, item_kind::partial,
                                    item_kind::historic_name};
    for (const item_kind kind : single) {
        bool seen = false;
        for (std::size_t i = 0; i != items.size(); ++i) {
            if (items[i].kind != kind) continue;
            if (seen) return {refusal::an_item_must_not_be_given_twice, i};
            seen = true;
        }
    }
    return {};
}

/// Where a rule is broken: shown in the compiler's message.
template <class Struct, class Item>
struct in_description_of {};
/// How an item is shown there.
template <class Item>
struct shown_item {
    using type = Item;
};
template <class Struct, class Item>
using where_in = in_description_of<Struct, typename shown_item<Item>::type>;

template <std::size_t I, class Item>
struct indexed_item {
    using type = Item;
};
template <class Indexes, class... Items>
struct item_index;
template <std::size_t... I, class... Items>
struct item_index<std::index_sequence<I...>, Items...> : indexed_item<I, Items>... {};
template <std::size_t I, class Item>
indexed_item<I, Item> pick_item(const indexed_item<I, Item>*);

/// The `I`th of `Items`.
template <std::size_t I, class... Items>
using nth_item = typename decltype(pick_item<I>(
    static_cast<const item_index<std::index_sequence_for<Items...>, Items...>*>(nullptr)))::type;

template <class... Items>
inline constexpr bool has_item_partial = (false || ... || (Items::kind == item_kind::partial));
template <class... Items>
inline constexpr bool has_item_needed = (false || ... || (Items::kind == item_kind::needed));

/// Whether forgotten members can be found.
enum class completeness { complete, incomplete, not_checked };

template <class S, class... Items>
consteval completeness check_completeness() {
    if constexpr (has_item_partial<Items...> || has_item_needed<Items...> || !is_countable<S>()) return completeness::not_checked;
    else {
        constexpr std::size_t total = total_members(member_list<S, Items...>, subsection_list<Items...>);
        constexpr auto listed = static_cast<int>(distinct_members<total>(member_list<S, Items...>, subsection_list<Items...>));
        // Counting takes seven questions, confirming a number one or two.
        if constexpr (has_at_most<S, listed>()) return completeness::complete;
        else {
            constexpr int count = count_members<S>();
            if constexpr (count == unknown_count) return completeness::not_checked;
            else if constexpr (!all_members_can_be_listed<S, count>()) return completeness::not_checked;
            else return completeness::incomplete;
        }
    }
}

/// The first rule that the types alone break.
template <class S, class... Items>
consteval broken_rule first_broken_rule() {
    constexpr broken_rule alone = check_items(facts_list<S, Items...>);
    if constexpr (alone.rule != refusal::none) return alone;
    else return check_members(member_list<S, Items...>);
}

/// The place of the first item of a kind; the number of items where there is none.
constexpr std::size_t find_kind(std::span<const item_kind> kinds, item_kind kind) {
    for (std::size_t i = 0; i != kinds.size(); ++i)
        if (kinds[i] == kind) return i;
    return kinds.size();
}

} // namespace detail

/// What `describe` returns: a constant, passed on as a template argument (`save<vmstate_kbd>`).
template <class S, class... Items>
struct description {
    using struct_type = S;
    using item_types = detail::item_index<std::index_sequence_for<Items...>, Items...>;
    static constexpr std::size_t item_count = sizeof...(Items);
    static constexpr bool has_needed = detail::has_item_needed<Items...>;
    static constexpr bool has_historic_name = (false || ... || (Items::kind == detail::item_kind::historic_name));

    std::string_view name;
    int version_id;
    int minimum_version_id;

    /// MigrationPriority of the device's section.
    static constexpr int priority() {
        int value = 0;
        [[maybe_unused]] const auto look = [&]<class Item>(const Item&) {
            if constexpr (Item::kind == detail::item_kind::priority) value = Item::value;
        };
        (look(Items{}), ...);
        return value;
    }
    static constexpr bool is_unmigratable() {
        return (false || ... || (Items::kind == detail::item_kind::unmigratable));
    }
    /// The oldest version that loads, by fields or by `load_old`.
    constexpr int oldest_version_id() const {
        int value = minimum_version_id;
        [[maybe_unused]] const auto look = [&]<class Item>(const Item&) {
            if constexpr (Item::kind == detail::item_kind::load_old)
                value = Item::minimum < value ? Item::minimum : value;
        };
        (look(Items{}), ...);
        return value;
    }

    static constexpr std::array<item_kind, sizeof...(Items) + 1> kinds{Items::kind..., item_kind::transient};
    static constexpr std::size_t find(item_kind kind) {
        return detail::find_kind(std::span<const item_kind>(kinds.data(), sizeof...(Items)), kind);
    }
    static constexpr bool has(item_kind kind) { return find(kind) != sizeof...(Items); }

    static constexpr std::span<const detail::item_facts> facts() { return detail::facts_list<S, Items...>; }
    static constexpr std::span<const detail::member_facts> members() { return detail::member_list<S, Items...>; }
    static constexpr std::span<const detail::subsection_facts> subsections() {
        return detail::subsection_list<Items...>;
    }
    static constexpr std::span<const schema_field> fields() { return detail::schema_fields<S, Items...>; }
    static constexpr std::span<const schema* const> bodies() { return detail::schema_subsections<Items...>; }
    static constexpr bool completeness_was_checked() {
        return detail::check_completeness<S, Items...>() != detail::completeness::not_checked;
    }
};

namespace detail {

template <const auto& Description>
inline constexpr schema schema_storage{
    Description.name,     Description.version_id, Description.minimum_version_id,
    Description.fields(), Description.bodies(),
    Description.has(item_kind::pre_load) || Description.has(item_kind::post_load) ||
        Description.has(item_kind::pre_save) || Description.has(item_kind::post_save) ||
        Description.has(item_kind::validation),
    Description.has(item_kind::validation)};

template <const auto& Description>
constexpr const schema& schema_for() {
    return schema_storage<Description>;
}

template <class S, const auto& Subsection>
consteval void check_subsection_name(std::string_view parent) {
    constexpr bool is_historic = std::remove_cvref_t<decltype(Subsection)>::has_historic_name;
    const std::string_view name = Subsection.name;
    if (name.size() <= parent.size() + (is_historic ? 0 : 1) || name.substr(0, parent.size()) != parent ||
        (name[parent.size()] != '/' && !is_historic))
        rules::a_subsection_name_must_start_with_its_parents_name_and_a_slash<
            in_description_of<S, subsections_item<Subsection>>>();
}
template <class S, const auto&... Subsections>
consteval void check_subsection_names(std::string_view parent, const subsections_item<Subsections...>&) {
    (check_subsection_name<S, Subsections>(parent), ...);
}

/// What is wrong with an item in view of the header.
template <class S, class Item>
consteval void check_in_header([[maybe_unused]] const description_header& header, [[maybe_unused]] bool length_may_be_absent) {
    if constexpr (Item::kind == item_kind::subsections) check_subsection_names<S>(header.name, Item{});
    else if constexpr (is_wire_item<Item>) {
        using A = typename Item::attributes;
        if constexpr (A::since_t::present)
            if (A::since > header.version_id) rules::since_must_not_be_above_version_id<where_in<S, Item>>();
        if constexpr (A::length_t::present || A::bitmap_t::present)
            if (length_may_be_absent) rules::a_length_must_be_present_whenever_its_array_is<where_in<S, Item>>();
    }
}

/// The name of a member that is in no field, for the message.
template <std::size_t Size>
struct member_text {
    char text[Size + 1]{};
};
template <class S, member_text Name>
struct forgotten_member {};

template <class S, int Count, class... Items>
consteval int first_forgotten() {
    int found = 0;
    const auto is_listed = [](std::string_view name) {
        for (const member_facts& one : member_list<S, Items...>)
            if (one.name == name) return true;
        for (const subsection_facts& sub : subsection_list<Items...>)
            for (const member_facts& one : sub.members)
                if (one.name == name) return true;
        return false;
    };
    [&]<std::size_t... I>(std::index_sequence<I...>) {
        static_cast<void>((... || (is_listed(bound_name<S, I>()) ? false : (found = static_cast<int>(I), true))));
    }(std::make_index_sequence<static_cast<std::size_t>(Count)>{});
    return found;
}
template <std::size_t Size>
consteval auto text_of(std::string_view name) {
    member_text<Size> copy;
    for (std::size_t i = 0; i != Size; ++i) copy.text[i] = name[i];
    return copy;
}
template <class S, std::size_t I>
consteval auto text_of_member() {
    constexpr std::string_view name = bound_name<S, I>();
    return text_of<name.size()>(name);
}
template <class S, class... Items>
consteval void refuse_incomplete() {
    constexpr int count = count_members<S>();
    if constexpr (count <= max_bound_members) {
        constexpr auto index = static_cast<std::size_t>(first_forgotten<S, count, Items...>());
        rules::every_member_must_be_in_a_field_or_a_subsection_or_transient<
            forgotten_member<S, text_of_member<S, index>()>>();
    } else rules::every_member_must_be_in_a_field_or_a_subsection_or_transient<S>();
}

/// Everything that is checked; a broken rule makes this no constant expression.
template <class S, class... Items>
consteval void check_description(const description_header& header) {
    constexpr broken_rule by_types = first_broken_rule<S, Items...>();
    if constexpr (by_types.rule != refusal::none) {
        refuse<by_types.rule, where_in<S, nth_item<by_types.item, Items...>>>();
    } else {
        if (header.name.empty()) rules::a_description_must_have_a_name<S>();
        if (header.name.size() > 255) rules::a_name_must_have_at_most_255_bytes<S>();
        if (header.version_id < 0 || header.minimum_version_id < 0) rules::version_ids_must_not_be_negative<S>();
        if (header.minimum_version_id > header.version_id)
            rules::minimum_version_id_must_not_be_above_version_id<S>();

        constexpr broken_rule in_subsections =
            check_subsections(subsection_list<Items...>, schema_fields<S, Items...>, schema_subsections<Items...>);
        if constexpr (in_subsections.rule != refusal::none)
            refuse<in_subsections.rule, where_in<S, nth_item<in_subsections.item, Items...>>>();

        constexpr broken_rule length_order = check_lengths(member_list<S, Items...>, subsection_list<Items...>, max_version);
        if constexpr (length_order.rule != refusal::none)
            refuse<length_order.rule, where_in<S, nth_item<length_order.item, Items...>>>();
        const broken_rule in_lengths = check_lengths(member_list<S, Items...>, subsection_list<Items...>, header.minimum_version_id);
        [[maybe_unused]] std::size_t item = 0;
        [[maybe_unused]] const std::size_t with_absent_length =
            in_lengths.rule == refusal::a_length_must_be_present_whenever_its_array_is ? in_lengths.item : sizeof...(Items);
        (check_in_header<S, Items>(header, item++ == with_absent_length), ...);

        if constexpr (check_completeness<S, Items...>() == completeness::incomplete)
            refuse_incomplete<S, Items...>();
    }
}

} // namespace detail

/// Describes `S`: which members go on the wire, in which order, under which conditions. Every mistake that can be seen
/// in the description itself stops the compiler with the name of a rule (rules.hpp).
template <class S, class... Items>
consteval auto describe(description_header header, Items...) {
    detail::check_description<S, Items...>(header);
    return description<S, Items...>{header.name, header.version_id, header.minimum_version_id};
}

/// What goes on the wire, as a tree of constants.
template <const auto& Description>
constexpr const schema& schema_of() {
    return detail::schema_for<Description>();
}

/// Changes when, and only when, the wire changes: name, version, order and width of what is sent, its gates (in the
/// versions that are accepted), which field is a length, subsections. Names of fields aren't on the wire. That a
/// predicate decides is seen, which one it is isn't: what a function answers is no constant.
template <const auto& Description>
constexpr std::uint64_t fingerprint_of() {
    constexpr std::uint64_t value = [] {
        detail::unit_hash hash;
        hash.mix(Description.name);
        hash.mix(static_cast<std::uint64_t>(Description.version_id));
        // What it writes, and what it reads of older versions.
        const schema& body = detail::schema_for<Description>();
        for (int version = Description.version_id;; --version) {
            detail::units_of(body, version, hash);
            const int layout = detail::layout_version(body, version);
            if (layout <= Description.minimum_version_id) break;
            version = layout;
            hash.mix(static_cast<std::uint64_t>(layout));
        }
        return hash.finish();
    }();
    return value;
}

/// Whether forgotten members would have been found: `static_assert(completeness_checked<D>)`. They are not where the
/// struct is no aggregate, has a base class, a bit-field, or where the description is `partial` or has `needed`.
template <const auto& Description>
inline constexpr bool completeness_checked = std::remove_cvref_t<decltype(Description)>::completeness_was_checked();

} // namespace vmstate
