// SPDX-License-Identifier: BSL-1.0
//
// Boost.Hana: `reflect` takes Hana-adapted structs apart by their accessors, and a description is a Hana sequence of its
// items: `hana::for_each(description, f)`, `hana::filter`, `hana::find_if`. Only who includes this pays for Hana.
#pragma once

#include <boost/hana/accessors.hpp>
#include <boost/hana/at.hpp>
#include <boost/hana/bool.hpp>
#include <boost/hana/concept/sequence.hpp>
#include <boost/hana/concept/struct.hpp>
#include <boost/hana/core/make.hpp>
#include <boost/hana/core/tag_of.hpp>
#include <boost/hana/core/to.hpp>
#include <boost/hana/drop_front.hpp>
#include <boost/hana/first.hpp>
#include <boost/hana/fwd/is_empty.hpp>
#include <boost/hana/integral_constant.hpp>
#include <boost/hana/length.hpp>
#include <boost/hana/second.hpp>
#include <boost/hana/string.hpp>
#include <boost/hana/tuple.hpp>
#include <boost/hana/unpack.hpp>

#include <cstddef>
#include <string_view>
#include <utility>

#include <vmstate/describe/reflect.hpp>

namespace vmstate {

/// A Hana-adapted struct, by its accessors.
template <class S>
    requires(boost::hana::Struct<S>::value)
struct reflection<S> {
    using accessors = decltype(boost::hana::accessors<S>());
    static constexpr std::size_t count = decltype(boost::hana::length(std::declval<accessors>()))::value;

    template <std::size_t I, class State>
    static constexpr auto& get(State& state) {
        return boost::hana::second(boost::hana::at_c<I>(boost::hana::accessors<S>()))(state);
    }
    template <std::size_t I>
    static constexpr std::string_view name() {
        return boost::hana::to<const char*>(boost::hana::first(boost::hana::at_c<I>(boost::hana::accessors<S>())));
    }
};

/// Hana's tag of descriptions: a sequence of items. What an algorithm makes of one is a hana::tuple.
struct description_tag {};

namespace detail {
template <class S, class... Items>
constexpr boost::hana::tuple<Items...> items_of_description(const description<S, Items...>&) {
    return {};
}
} // namespace detail

} // namespace vmstate

namespace boost::hana {

template <class S, class... Items>
struct tag_of<vmstate::description<S, Items...>> {
    using type = vmstate::description_tag;
};
template <>
struct Sequence<vmstate::description_tag> {
    static constexpr bool value = true;
};
template <>
struct make_impl<vmstate::description_tag> {
    template <class... X>
    static constexpr auto apply(X&&... x) {
        return hana::make<tuple_tag>(static_cast<X&&>(x)...);
    }
};
template <>
struct unpack_impl<vmstate::description_tag> {
    template <class Description, class F>
    static constexpr decltype(auto) apply(const Description& d, F&& f) {
        return hana::unpack(vmstate::detail::items_of_description(d), static_cast<F&&>(f));
    }
};
template <>
struct length_impl<vmstate::description_tag> {
    template <class Description>
    static constexpr auto apply(const Description&) {
        return size_c<Description::item_count>;
    }
};
template <>
struct at_impl<vmstate::description_tag> {
    template <class Description, class N>
    static constexpr auto apply(const Description& d, const N& n) {
        return hana::at(vmstate::detail::items_of_description(d), n);
    }
};
template <>
struct is_empty_impl<vmstate::description_tag> {
    template <class Description>
    static constexpr auto apply(const Description&) {
        return bool_c<Description::item_count == 0>;
    }
};
template <>
struct drop_front_impl<vmstate::description_tag> {
    template <class Description, class N>
    static constexpr auto apply(const Description& d, const N& n) {
        return hana::drop_front(vmstate::detail::items_of_description(d), n);
    }
};

} // namespace boost::hana
