// SPDX-License-Identifier: BSL-1.0
//
// Members of a struct at compile time: what a pointer to member points to, and the name its author gave it. Depends on
// the standard library alone.
#pragma once

#include <cstddef>
#include <string_view>
#include <type_traits>

namespace vmstate::detail {

template <class Pointer>
struct member_pointer_traits;
template <class Owner, class Type>
struct member_pointer_traits<Type Owner::*> {
    using owner = Owner;
    using type = Type;
};

// g++ 14 keeps the const of a constant that is passed on as an `auto` argument.
template <auto Pointer>
using owner_of = typename member_pointer_traits<std::remove_cv_t<decltype(Pointer)>>::owner;
template <auto Pointer>
using type_of = typename member_pointer_traits<std::remove_cv_t<decltype(Pointer)>>::type;

/// The compiler's spelling of `Value`, somewhere near the end of this function's own signature.
template <auto Value>
consteval auto spelling() {
    return std::string_view(__PRETTY_FUNCTION__);
}

template <class Type>
consteval auto type_spelling() {
    return std::string_view(__PRETTY_FUNCTION__);
}

/// The last identifier in `text`: `x` of `&S::x]` and of `{(& fake<S>.holder<S>::value.S::x)}]`.
consteval std::string_view last_identifier(std::string_view text) {
    const auto is_identifier = [](char c) {
        return c == '_' || (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
               static_cast<unsigned char>(c) >= 0x80;
    };
    std::size_t end = text.size();
    while (end != 0 && !is_identifier(text[end - 1])) --end;
    std::size_t begin = end;
    while (begin != 0 && is_identifier(text[begin - 1])) --begin;
    return text.substr(begin, end - begin);
}

/// The name of the member that `Pointer` points to, in static storage.
template <auto Pointer>
inline constexpr std::string_view member_name = last_identifier(spelling<Pointer>());

/// One object per type: their addresses tell types apart without naming them.
template <class>
inline constexpr char type_id = 0;

/// A pointer to member, a function: as a type.
template <auto Value>
struct constant {};

/// An object of any type, without linkage to anything: only its members' addresses are looked at, and only by the
/// compiler, so that it is never defined.
template <class T>
struct unevaluated_object {
    T value;
};
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wundefined-var-template"
#pragma clang diagnostic ignored "-Wundefined-internal"
#endif
template <class T>
extern const unevaluated_object<T> unevaluated;
#if defined(__clang__)
#pragma clang diagnostic pop
#endif

/// A pointer to a part of an object as a template argument: clang before 18 takes it only inside a class.
template <class Pointer>
struct part_pointer {
    Pointer pointer;
};

} // namespace vmstate::detail
