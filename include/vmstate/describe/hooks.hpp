// SPDX-License-Identifier: BSL-1.0
//
// Predicates and hooks: which functions fit, and how they are called. A function fits when it takes the described
// struct (a member function: has it as its object), and for some the version. Depends on support/.
#pragma once

#include <concepts>
#include <string>
#include <type_traits>
#include <utility>

#include <vmstate/support/result.hpp>

namespace vmstate {
class reader;
class writer;
} // namespace vmstate

namespace vmstate::detail {

template <class Function, class S, class... Extra>
concept callable_on =
    requires(Function f, S& state, Extra... extra) { f(state, std::forward<Extra>(extra)...); } ||
    requires(Function f, S& state, Extra... extra) { (state.*f)(std::forward<Extra>(extra)...); };

template <auto Function, class S, class... Extra>
constexpr decltype(auto) call(S& state, Extra&&... extra) {
    if constexpr (std::is_member_function_pointer_v<decltype(Function)>)
        return (state.*Function)(std::forward<Extra>(extra)...);
    else return Function(state, std::forward<Extra>(extra)...);
}

template <auto Function, class S, class... Extra>
using result_of_call = decltype(detail::call<Function>(std::declval<S&>(), std::declval<Extra>()...));

/// `bool f(const S&)` or `bool f(const S&, int)`.
template <auto Predicate, class S>
consteval bool is_predicate() {
    using function = decltype(Predicate);
    if constexpr (callable_on<function, const S>) return std::convertible_to<result_of_call<Predicate, const S>, bool>;
    else if constexpr (callable_on<function, const S, int>)
        return std::convertible_to<result_of_call<Predicate, const S, int>, bool>;
    else return false;
}
template <auto Predicate, class S>
constexpr bool holds(const S& state, int version_id) {
    if constexpr (callable_on<decltype(Predicate), const S>) return static_cast<bool>(detail::call<Predicate>(state));
    else return static_cast<bool>(detail::call<Predicate>(state, version_id));
}

template <class Result>
inline constexpr bool is_hook_result =
    std::is_void_v<Result> || std::same_as<Result, bool> || std::same_as<Result, result<void>> ||
    std::same_as<Result, error>;

/// A plain function whose parameter is the struct itself (or its base), not a reference to it.
template <class Function, class S>
inline constexpr bool takes_copy = false;
template <class Result, class... Parameters, class S>
inline constexpr bool takes_copy<Result (*)(Parameters...), S> = (false || ... || std::is_base_of_v<Parameters, S>);
template <class Result, class... Parameters, class S>
inline constexpr bool takes_copy<Result (*)(Parameters...) noexcept, S> = (false || ... || std::is_base_of_v<Parameters, S>);

/// What a hook returned, as an error or none.
template <class Call>
error outcome_of(std::string_view hook, Call&& call) {
    using outcome = decltype(call());
    if constexpr (std::is_void_v<outcome>) {
        call();
        return {};
    } else if constexpr (std::same_as<outcome, bool>) {
        if (call()) return {};
        return error(errc::hook_failed, std::string(hook) + " to return true", "false");
    } else if constexpr (std::same_as<outcome, error>) {
        return call();
    } else {
        outcome returned = call();
        if (returned.has_value()) return {};
        return std::move(returned).error();
    }
}

template <auto Hook, class S>
error run_hook(std::string_view hook, S& state, int version_id) {
    if constexpr (callable_on<decltype(Hook), S>)
        return outcome_of(hook, [&]() -> decltype(auto) { return detail::call<Hook>(state); });
    else return outcome_of(hook, [&]() -> decltype(auto) { return detail::call<Hook>(state, version_id); });
}

} // namespace vmstate::detail
