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

/// A description's member, listed in a field or as transient.
struct member_facts {
    std::string_view name;
    bool is_field = false;
    const void* pointer = nullptr; // which member: a base class may have one of the same name
    bool has_when = false;
    const void* when = nullptr; // which predicate
    std::string_view length;    // the member that says how many
    bool sliced = false;
    std::size_t first = 0;
    std::size_t count = 0;
    int since = 0;
    std::size_t item = 0;
};

template <class A>
consteval const void* when_id() {
    if constexpr (A::when_t::present) return &type_id<constant<A::when_t::value>>;
    else return nullptr;
}

template <class Item>
consteval member_facts facts_of_field() {
    using A = typename Item::attributes;
    member_facts facts;
    facts.name = Item::name();
    facts.is_field = true;
    facts.pointer = Item::identity();
    facts.has_when = A::when_t::present;
    facts.when = when_id<A>();
    if constexpr (A::length_t::present) facts.length = member_name<A::length_t::value>;
    if constexpr (A::bitmap_t::present) facts.length = member_name<A::bitmap_t::value>;
    facts.since = A::since;
    if constexpr (A::slice_t::present) {
        facts.sliced = true;
        facts.first = A::slice_t::low;
        facts.count = A::slice_t::high;
    }
    return facts;
}

template <class Item>
inline constexpr std::size_t listed_members = Item::kind == item_kind::field ? 1 : 0;
template <auto... Members>
inline constexpr std::size_t listed_members<transient_item<Members...>> = sizeof...(Members);

/// All members that the items list, in order.
template <class... Items>
consteval auto make_member_list() {
    std::array<member_facts, (std::size_t{0} + ... + listed_members<Items>)> all{};
    [[maybe_unused]] std::size_t next = 0;
    [[maybe_unused]] std::size_t item = 0;
    const auto add = [&]<class Item>(const Item&) {
        if constexpr (Item::kind == item_kind::field) {
            all[next] = facts_of_field<Item>();
            all[next++].item = item;
        } else if constexpr (Item::kind == item_kind::transient) {
            const auto each = [&]<auto... Members>(const transient_item<Members...>&) {
                ((all[next].name = member_name<Members>, all[next].pointer = &type_id<constant<Members>>,
                  all[next++].item = item),
                 ...);
            };
            each(Item{});
        }
        ++item;
    };
    (add(Items{}), ...);
    return all;
}
template <class... Items>
inline constexpr auto member_list = make_member_list<Items...>();

struct subsection_facts {
    const schema* body = nullptr;
    std::span<const member_facts> members;
    std::span<const subsection_facts> subsections;
    bool has_needed = false;
    bool has_historic_name = false;
    std::size_t item = 0;
};

template <class Item>
inline constexpr std::size_t listed_subsections = 0;
template <const auto&... D>
inline constexpr std::size_t listed_subsections<subsections_item<D...>> = sizeof...(D);

template <class... Items>
consteval auto make_subsection_list() {
    std::array<subsection_facts, (std::size_t{0} + ... + listed_subsections<Items>)> all{};
    [[maybe_unused]] std::size_t next = 0;
    [[maybe_unused]] std::size_t item = 0;
    const auto add = [&]<class Item>(const Item&) {
        if constexpr (Item::kind == item_kind::subsections) {
            const auto each = [&]<const auto&... D>(const subsections_item<D...>&) {
                ((all[next++] = subsection_facts{&schema_for<D>(), std::remove_cvref_t<decltype(D)>::members(),
                                                 std::remove_cvref_t<decltype(D)>::subsections(),
                                                 std::remove_cvref_t<decltype(D)>::has_needed,
                                                 std::remove_cvref_t<decltype(D)>::has_historic_name, item}),
                 ...);
            };
            each(Item{});
        }
        ++item;
    };
    (add(Items{}), ...);
    return all;
}
template <class... Items>
inline constexpr auto subsection_list = make_subsection_list<Items...>();

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

template <class S, class Item>
consteval refusal why_no_field() {
    using A = typename Item::attributes;
    using M = std::remove_const_t<typename Item::type>;
    if constexpr (!std::is_base_of_v<typename Item::owner, S> && !std::is_same_v<typename Item::owner, S>)
        return refusal::a_member_must_belong_to_the_described_struct;
    else if constexpr (why_no_form<M, A>() != refusal::none) return why_no_form<M, A>();
    else {
        constexpr wire_form form = form_of<M, A>();
        if constexpr (A::is_checked && !checked_value<M, A>::is_scalar) return refusal::an_attribute_must_fit_its_member;
        if constexpr (A::slice_t::present) {
            if constexpr (form != wire_form::array) return refusal::an_attribute_must_fit_its_member;
            else if constexpr (A::slice_t::low + A::slice_t::high > array_shape<M>::rows || A::slice_t::high == 0)
                return refusal::a_slice_must_lie_inside_its_array;
        }
        if constexpr (A::multiply_t::present && form != wire_form::sequence)
            return refusal::an_attribute_must_fit_its_member;
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

/// Fields that an element's saver (at the element's own version) and loader (at the field's) would see differently.
constexpr bool gated_differently(const schema& element, int loaded_version) {
    for (const schema_field& field : element.fields)
        if (!field.conditional && field.since > loaded_version && field.since <= element.version_id) return true;
    return false;
}

template <class S, class Item>
consteval refusal why_no_item() {
    if constexpr (requires { Item::attributes_distinct; }) {
        using A = typename Item::attributes;
        if constexpr (!Item::attributes_known) return refusal::an_attribute_must_fit_its_member;
        else if constexpr (!Item::attributes_distinct) return refusal::an_attribute_must_not_be_given_twice;
        if constexpr (A::when_t::present) {
            if constexpr (!is_predicate<A::when_t::value, S>())
                return refusal::a_predicate_must_take_the_described_struct_and_return_bool;
        }
    }
    if constexpr (Item::kind == item_kind::field) {
        constexpr refusal why = why_no_field<S, Item>();
        if constexpr (why != refusal::none) return why;
        else if constexpr (item_schema<Item>.repeat == repetition::list || item_schema<Item>.repeat == repetition::map)
            return gated_differently(*item_schema<Item>.nested, Item::attributes::since) ||
                           (item_schema<Item>.has_key &&
                            gated_differently(*item_schema<Item>.key, Item::attributes::since))
                       ? refusal::an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see
                       : refusal::none;
        else return refusal::none;
    } else if constexpr (Item::kind == item_kind::temporary) {
        if constexpr (!std::is_constructible_v<struct_of<Item::description>, S&> &&
                      !requires(S& s) { struct_of<Item::description>{s}; })
            return refusal::a_temporary_must_be_constructible_from_the_described_struct;
        else
            return gated_differently(*item_schema<Item>.nested, Item::attributes::since)
                       ? refusal::an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see
                       : refusal::none;
    } else if constexpr (Item::kind == item_kind::unused) {
        using A = typename Item::attributes;
        return A::is_checked || A::slice_t::present || A::length_t::present || A::as_t::present || A::coded_t::present ||
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
        return is_hook<Item::function, S, false>() ? refusal::none : refusal::a_hook_must_take_the_described_struct;
    } else if constexpr (Item::kind == item_kind::post_load) {
        return is_hook<Item::function, S, true>() ? refusal::none : refusal::a_hook_must_take_the_described_struct;
    } else if constexpr (Item::kind == item_kind::load_old) {
        if constexpr (requires(reader& r, S& s) { Item::function(r, s, 0); } ||
                      requires(reader& r, S& s) { (s.*Item::function)(r, 0); })
            return refusal::none;
        else return refusal::a_hook_must_take_the_described_struct;
    } else return refusal::none;
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

// --- rules about the items together ----------------------------------------------------------------------------------

struct broken_rule {
    refusal rule = refusal::none;
    std::size_t item = 0;
};

constexpr bool overlap(const member_facts& a, const member_facts& b) {
    if (!a.sliced || !b.sliced) return true;
    return a.first < b.first + b.count && b.first < a.first + a.count;
}

/// Two ways to send one member are alternatives where predicates tell them apart.
constexpr bool alternatives(const member_facts& a, const member_facts& b) {
    return a.has_when && b.has_when && a.when != b.when;
}

constexpr broken_rule check_members(std::span<const member_facts> members) {
    for (std::size_t j = 1; j < members.size(); ++j) {
        for (std::size_t i = 0; i != j; ++i) {
            const member_facts& a = members[i];
            const member_facts& b = members[j];
            if (a.name.size() != b.name.size() || a.name != b.name) continue;
            if (a.pointer != b.pointer) return {refusal::two_fields_must_not_have_one_wire_name, b.item};
            if (overlap(a, b) && !alternatives(a, b)) return {refusal::a_member_must_not_be_described_twice, b.item};
        }
    }
    return {};
}

constexpr std::size_t total_members(std::span<const member_facts> members, std::span<const subsection_facts> subsections) {
    std::size_t total = members.size();
    for (const subsection_facts& sub : subsections) total += total_members(sub.members, sub.subsections);
    return total;
}
constexpr std::string_view* collect_names(std::string_view* next, std::span<const member_facts> members,
                                          std::span<const subsection_facts> subsections) {
    for (const member_facts& one : members) *next++ = one.name;
    for (const subsection_facts& sub : subsections) next = collect_names(next, sub.members, sub.subsections);
    return next;
}
/// How many different members are listed, subsections included.
template <std::size_t Total>
constexpr std::size_t distinct_members(std::span<const member_facts> members,
                                       std::span<const subsection_facts> subsections) {
    std::array<std::string_view, Total + 1> names{};
    collect_names(names.data(), members, subsections);
    std::size_t distinct = 0;
    for (std::size_t i = 0; i != Total; ++i) {
        bool seen = false;
        for (std::size_t j = 0; j != i && !seen; ++j) seen = names[j].size() == names[i].size() && names[j] == names[i];
        distinct += seen ? 0 : 1;
    }
    return distinct;
}

/// A length that is itself described: before its array, and there whenever the array is.
constexpr broken_rule check_lengths(std::span<const member_facts> members,
                                    std::span<const subsection_facts> subsections, int minimum_version_id) {
    for (std::size_t i = 0; i != members.size(); ++i) {
        const member_facts& array = members[i];
        if (array.length.empty()) continue;
        for (std::size_t j = 0; j != members.size(); ++j) {
            const member_facts& length = members[j];
            if (!length.is_field || length.name != array.length) continue;
            if (j > i) return {refusal::a_length_must_come_before_its_array, array.item};
            const bool always = !length.has_when && length.since <= minimum_version_id;
            const bool together = length.has_when ? array.has_when && length.when == array.when
                                                  : !array.has_when && length.since <= array.since;
            if (!always && !together) return {refusal::a_length_must_be_present_whenever_its_array_is, array.item};
        }
        // Subsections come after all fields.
        for (const subsection_facts& sub : subsections)
            for (const member_facts& length : sub.members)
                if (length.is_field && length.name == array.length)
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
            if (subsections[j].body == one.body) return {refusal::a_subsection_must_not_be_given_twice, one.item};
            if (subsections[j].body->name == one.body->name)
                return {refusal::two_subsections_must_not_have_one_name, one.item};
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

/// What may stand only once in a description.
template <class... Items>
consteval broken_rule check_single_items() {
    constexpr item_kind single[] = {item_kind::needed,    item_kind::pre_load, item_kind::post_load,
                                    item_kind::pre_save,  item_kind::post_save, item_kind::load_old,
                                    item_kind::priority,  item_kind::unmigratable, item_kind::partial,
                                    item_kind::historic_name};
    constexpr std::array<item_kind, sizeof...(Items)> kinds{Items::kind...};
    for (std::size_t i = 0; i != kinds.size(); ++i)
        for (const item_kind kind : single)
            for (std::size_t j = 0; kinds[i] == kind && j != i; ++j)
                if (kinds[j] == kind) return {refusal::an_item_must_not_be_given_twice, i};
    return {};
}

/// Where a rule is broken: shown in the compiler's message.
template <class Struct, class Item>
struct in_description_of {};

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
    if constexpr (has_item_partial<Items...> || has_item_needed<Items...>) return completeness::not_checked;
    else {
        constexpr int count = count_members<S>();
        if constexpr (count == unknown_count) return completeness::not_checked;
        else {
            constexpr std::size_t total = total_members(member_list<Items...>, subsection_list<Items...>);
            constexpr std::size_t listed = distinct_members<total>(member_list<Items...>, subsection_list<Items...>);
            if constexpr (listed >= static_cast<std::size_t>(count)) return completeness::complete;
            else if constexpr (!all_members_can_be_listed<S, count>()) return completeness::not_checked;
            else return completeness::incomplete;
        }
    }
}

/// The first rule that the types alone break.
template <class S, class... Items>
consteval broken_rule first_broken_rule() {
    broken_rule broken = check_single_items<Items...>();
    std::size_t item = 0;
    const auto note = [&](refusal why) {
        if (broken.rule == refusal::none && why != refusal::none) broken = {why, item};
        ++item;
    };
    (note(why_no_item<S, Items>()), ...);
    item = 0;
    (note(belongs<S>(Items{}) ? refusal::none : refusal::a_member_must_belong_to_the_described_struct), ...);
    if (broken.rule != refusal::none) return broken;
    return check_members(member_list<Items...>);
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
        const auto look = [&]<class Item>(const Item&) {
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
        const auto look = [&]<class Item>(const Item&) {
            if constexpr (Item::kind == detail::item_kind::load_old)
                value = Item::minimum < value ? Item::minimum : value;
        };
        (look(Items{}), ...);
        return value;
    }

    static constexpr std::span<const detail::member_facts> members() { return detail::member_list<Items...>; }
    static constexpr std::span<const detail::subsection_facts> subsections() {
        return detail::subsection_list<Items...>;
    }
    static constexpr std::span<const schema_field> fields() { return detail::schema_fields<Items...>; }
    static constexpr std::span<const schema* const> bodies() { return detail::schema_subsections<Items...>; }
    static constexpr bool completeness_was_checked() {
        return detail::check_completeness<S, Items...>() != detail::completeness::not_checked;
    }
};

namespace detail {

template <const auto& Description>
inline constexpr schema schema_storage{Description.name, Description.version_id, Description.minimum_version_id,
                                       Description.fields(), Description.bodies()};

template <const auto& Description>
constexpr const schema& schema_for() {
    return schema_storage<Description>;
}

/// Everything that is checked; a broken rule makes this no constant expression.
template <class S, class... Items>
consteval void check_description(const description_header& header) {
    constexpr broken_rule by_types = first_broken_rule<S, Items...>();
    if constexpr (by_types.rule != refusal::none) {
        refuse<by_types.rule, in_description_of<S, nth_item<by_types.item, Items...>>>();
    } else {
        if (header.name.empty()) rules::a_description_must_have_a_name<S>();
        if (header.name.size() > 255) rules::a_name_must_have_at_most_255_bytes<S>();
        if (header.version_id < 0 || header.minimum_version_id < 0) rules::version_ids_must_not_be_negative<S>();
        if (header.minimum_version_id > header.version_id)
            rules::minimum_version_id_must_not_be_above_version_id<S>();
        const auto check_since = [&]<class Item>(const Item&) {
            if constexpr (requires { Item::attributes::since; }) {
                if constexpr (Item::attributes::since_t::present)
                    if (Item::attributes::since > header.version_id)
                        rules::since_must_not_be_above_version_id<in_description_of<S, Item>>();
            }
        };
        (check_since(Items{}), ...);

        constexpr broken_rule in_subsections =
            check_subsections(subsection_list<Items...>, schema_fields<Items...>, schema_subsections<Items...>);
        if constexpr (in_subsections.rule != refusal::none)
            refuse<in_subsections.rule, in_description_of<S, nth_item<in_subsections.item, Items...>>>();
        for (const subsection_facts& one : subsection_list<Items...>) {
            const std::string_view name = one.body->name;
            const std::size_t length = header.name.size();
            if (name.size() <= length + (one.has_historic_name ? 0 : 1) || name.substr(0, length) != header.name ||
                (name[length] != '/' && !one.has_historic_name))
                rules::a_subsection_name_must_start_with_its_parents_name_and_a_slash<S>();
        }

        const broken_rule in_lengths = check_lengths(member_list<Items...>, subsection_list<Items...>, header.minimum_version_id);
        if (in_lengths.rule == refusal::a_length_must_come_before_its_array)
            rules::a_length_must_come_before_its_array<S>();
        if (in_lengths.rule == refusal::a_length_must_be_present_whenever_its_array_is)
            rules::a_length_must_be_present_whenever_its_array_is<S>();

        if constexpr (check_completeness<S, Items...>() == completeness::incomplete)
            rules::every_member_must_be_in_a_field_or_a_subsection_or_transient<S>();
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

/// Changes when, and only when, the wire changes: name, version, order and width of what is sent, its gates,
/// subsections. Names of fields aren't on the wire.
template <const auto& Description>
constexpr std::uint64_t fingerprint_of() {
    constexpr std::uint64_t value = [] {
        detail::unit_hash hash;
        hash.mix(Description.name);
        hash.mix(static_cast<std::uint64_t>(Description.version_id));
        detail::units_of(detail::schema_for<Description>(), Description.version_id, hash);
        return hash.finish();
    }();
    return value;
}

/// Whether forgotten members would have been found: `static_assert(completeness_checked<D>)`. They are not where the
/// struct is no aggregate, has a base class, a bit-field, or where the description is `partial` or has `needed`.
template <const auto& Description>
inline constexpr bool completeness_checked = std::remove_cvref_t<decltype(Description)>::completeness_was_checked();

} // namespace vmstate
