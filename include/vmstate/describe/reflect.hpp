// SPDX-License-Identifier: BSL-1.0
//
// `reflect`: describes a whole aggregate without listing its members. Their number and addresses come from Boost.PFR,
// for structs with C arrays (whose elements PFR takes for members) from describe/aggregate.hpp; their names from the
// compiler. How a struct is taken apart is a customisation point: describe/hana.hpp adds Hana-adapted structs.
#pragma once

#include <boost/pfr/core.hpp>
#include <boost/pfr/tuple_size.hpp>

#include <cstddef>
#include <string_view>
#include <type_traits>
#include <utility>

#include <vmstate/describe/description.hpp>

namespace vmstate {
namespace detail {

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wundefined-var-template"
#endif
/// Whether an aggregate has C arrays: where it has none, Boost.PFR counts right.
template <class S>
consteval bool has_c_array() {
    constexpr int count = count_members<S>();
    if constexpr (count <= 0) return false;
    else
        return visit_members(member_count<count>{}, unevaluated<S>.value, [](auto&... members) {
            return (false || ... || std::is_array_v<std::remove_reference_t<decltype(members)>>);
        });
}
#if defined(__clang__)
#pragma clang diagnostic pop
#endif

} // namespace detail

/// How a struct is taken apart by `reflect`: `count`, `get<I>(s)`, `name<I>()`.
template <class S>
struct reflection {
    static_assert(std::is_aggregate_v<S>, "reflect<S> takes an aggregate or a Hana-adapted struct; describe others with field<>");
    static constexpr int counted = detail::count_members<S>();
    static_assert(counted >= 0 && counted <= detail::max_bound_members,
                  "reflect<S> takes structs without base classes, of at most 100 members that have defaults");
    static constexpr std::size_t count = static_cast<std::size_t>(counted);

    template <std::size_t I, class State>
    static constexpr auto& get(State& state) {
        if constexpr (detail::has_c_array<S>()) return detail::bound_member<State, I>(state);
        else {
            static_assert(boost::pfr::tuple_size_v<S> == count, "Boost.PFR counts the members differently");
            return boost::pfr::get<I>(state);
        }
    }
    template <std::size_t I>
    static constexpr std::string_view name() {
        constexpr std::string_view text = detail::bound_name<S, I>(); // clang 16 calls it at run time otherwise
        return text;
    }
};

namespace detail {

/// A member known by its place.
template <class S, std::size_t I, class... List>
struct reflected_item : wire_item<item_kind::field, List...> {
    using owner = S;
    using type = std::remove_reference_t<decltype(reflection<S>::template get<I>(std::declval<S&>()))>;
    static constexpr std::string_view name() { return reflection<S>::template name<I>(); }
    template <class State>
    static constexpr auto& of(State& state) {
        return reflection<S>::template get<I>(state);
    }
};

/// Where a rule is broken, such a member is shown by its name.
template <class S, member_text Name>
struct reflected_member {};
template <class S, std::size_t I>
consteval auto text_of_reflected() {
    constexpr std::string_view name = reflection<S>::template name<I>();
    return text_of<name.size()>(name);
}
template <class S, std::size_t I, class... List>
struct shown_item<reflected_item<S, I, List...>> {
    using type = reflected_member<S, text_of_reflected<S, I>()>;
};

/// The last identifier in the name of a type, for nested structs without a description of their own.
template <class T>
inline constexpr std::string_view type_name = last_identifier(type_spelling<T>());

template <class S, class... Items>
consteval auto reflect_items(description_header header, Items... items);

/// Nested structs that have no description are reflected in their turn.
template <class S>
inline constexpr auto reflected = reflect_items<S>({.name = type_name<S>});

/// A reference can't be made from nothing, and a struct that has one can't be assigned.
template <class S>
consteval bool has_reference() {
    if constexpr (std::is_aggregate_v<S>) return !fits<S>(member_count<0>{}) && !std::is_copy_assignable_v<S>;
    else return false;
}

template <class Element>
consteval bool reflects() {
    return std::is_class_v<Element> && std::is_aggregate_v<Element> &&
           std::is_same_v<decltype(description_of<Element>), const std::nullptr_t> && !is_scalar<Element>() &&
           !array_shape<Element>::is_array;
}

template <class S, std::size_t I>
consteval auto item_for() {
    using M = std::remove_const_t<typename reflected_item<S, I>::type>;
    using E = typename array_shape<M>::element;
    if constexpr (reflects<E>()) return reflected_item<S, I, as<reflected<E>>>{};
    else return reflected_item<S, I>{};
}

template <auto... Members>
constexpr bool names_member(std::string_view name, const transient_item<Members...>&) {
    return (false || ... || (member_name<Members> == name));
}
constexpr bool names_member(std::string_view, const auto&) { return false; }

/// The members that no `transient` among the items names.
template <class S, class... Items>
consteval auto reflected_members() {
    struct {
        std::size_t size = 0;
        std::size_t at[reflection<S>::count + 1]{};
    } kept;
    [&]<std::size_t... I>(std::index_sequence<I...>) {
        const auto look = [&](std::size_t i, std::string_view name) {
            if (!(false || ... || names_member(name, Items{}))) kept.at[kept.size++] = i;
        };
        (look(I, reflection<S>::template name<I>()), ...);
    }(std::make_index_sequence<reflection<S>::count>{});
    return kept;
}

template <class S, class... Items, std::size_t... K>
consteval auto reflected_indexes(std::index_sequence<K...>) {
    constexpr auto kept = reflected_members<S, Items...>();
    return std::index_sequence<kept.at[K]...>{};
}

template <class S, std::size_t... I, class... Items>
consteval auto reflect_all(description_header header, std::index_sequence<I...>, Items... items) {
    return describe<S>(header, item_for<S, I>()..., items...);
}

template <class S, class... Items>
consteval auto reflect_items(description_header header, Items... items) {
    if constexpr (has_reference<S>()) {
        rules::a_reference_has_no_wire_form<S>();
        return describe<S>(header, partial);
    } else if constexpr ((false || ... || (Items::kind == item_kind::transient))) {
        constexpr std::size_t kept = reflected_members<S, Items...>().size;
        return reflect_all<S>(header, reflected_indexes<S, Items...>(std::make_index_sequence<kept>{}), items...);
    } else return reflect_all<S>(header, std::make_index_sequence<reflection<S>::count>{}, items...);
}

} // namespace detail

/// Describes all members of `S` in their order; `items` may add hooks, subsections and the like. A nested struct uses
/// `description_of` where there is one, and is reflected otherwise.
template <class S, class... Items>
consteval auto reflect(description_header header, Items... items) {
    return detail::reflect_items<S>(header, items...);
}

} // namespace vmstate
