// SPDX-License-Identifier: BSL-1.0
//
// How many members an aggregate has and what they are, C arrays counted as the one member that they are. Nothing of the
// struct is ever constructed. Macros write out what templates can't: lists of empty braces and structured bindings of
// each length. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <string_view>
#include <type_traits>

#include <vmstate/describe/member.hpp>

namespace vmstate::detail {

/// Structs with more members can be described, but not checked for forgotten members ...
inline constexpr int max_counted_members = 130;
/// ... and not reflected. (Boost.PFR stops at 100, too.)
inline constexpr int max_bound_members = 100;
inline constexpr int unknown_count = -1;

template <int Count>
struct member_count {};

void take_addresses(...);

/// The size that members of these types have side by side: another one than the struct's means bit-fields.
template <class T, class... Members>
consteval bool laid_out_like() {
    std::size_t end = 0;
    ((end = (end + alignof(Members) - 1) / alignof(Members) * alignof(Members) + sizeof(Members)), ...);
    return (end + alignof(T) - 1) / alignof(T) * alignof(T) == sizeof(T);
}

// A number of members is written as tens t and units u = 1 ... 10: 10 * t + u. The lists: `{}` so many times; and the
// names mt0, mt1, ... each inside an operation.
// clang-format off
#define VMSTATE_B1 {}
#define VMSTATE_B2 VMSTATE_B1, {}
#define VMSTATE_B3 VMSTATE_B2, {}
#define VMSTATE_B4 VMSTATE_B3, {}
#define VMSTATE_B5 VMSTATE_B4, {}
#define VMSTATE_B6 VMSTATE_B5, {}
#define VMSTATE_B7 VMSTATE_B6, {}
#define VMSTATE_B8 VMSTATE_B7, {}
#define VMSTATE_B9 VMSTATE_B8, {}
#define VMSTATE_B10 VMSTATE_B9, {}
#define VMSTATE_BT0
#define VMSTATE_BT1 VMSTATE_BT0 VMSTATE_B10,
#define VMSTATE_BT2 VMSTATE_BT1 VMSTATE_B10,
#define VMSTATE_BT3 VMSTATE_BT2 VMSTATE_B10,
#define VMSTATE_BT4 VMSTATE_BT3 VMSTATE_B10,
#define VMSTATE_BT5 VMSTATE_BT4 VMSTATE_B10,
#define VMSTATE_BT6 VMSTATE_BT5 VMSTATE_B10,
#define VMSTATE_BT7 VMSTATE_BT6 VMSTATE_B10,
#define VMSTATE_BT8 VMSTATE_BT7 VMSTATE_B10,
#define VMSTATE_BT9 VMSTATE_BT8 VMSTATE_B10,
#define VMSTATE_BT10 VMSTATE_BT9 VMSTATE_B10,
#define VMSTATE_BT11 VMSTATE_BT10 VMSTATE_B10,
#define VMSTATE_BT12 VMSTATE_BT11 VMSTATE_B10,
#define VMSTATE_M1(op, t) op(m##t##0)
#define VMSTATE_M2(op, t) VMSTATE_M1(op, t), op(m##t##1)
#define VMSTATE_M3(op, t) VMSTATE_M2(op, t), op(m##t##2)
#define VMSTATE_M4(op, t) VMSTATE_M3(op, t), op(m##t##3)
#define VMSTATE_M5(op, t) VMSTATE_M4(op, t), op(m##t##4)
#define VMSTATE_M6(op, t) VMSTATE_M5(op, t), op(m##t##5)
#define VMSTATE_M7(op, t) VMSTATE_M6(op, t), op(m##t##6)
#define VMSTATE_M8(op, t) VMSTATE_M7(op, t), op(m##t##7)
#define VMSTATE_M9(op, t) VMSTATE_M8(op, t), op(m##t##8)
#define VMSTATE_M10(op, t) VMSTATE_M9(op, t), op(m##t##9)
#define VMSTATE_MT0(op)
#define VMSTATE_MT1(op) VMSTATE_MT0(op) VMSTATE_M10(op, 0),
#define VMSTATE_MT2(op) VMSTATE_MT1(op) VMSTATE_M10(op, 1),
#define VMSTATE_MT3(op) VMSTATE_MT2(op) VMSTATE_M10(op, 2),
#define VMSTATE_MT4(op) VMSTATE_MT3(op) VMSTATE_M10(op, 3),
#define VMSTATE_MT5(op) VMSTATE_MT4(op) VMSTATE_M10(op, 4),
#define VMSTATE_MT6(op) VMSTATE_MT5(op) VMSTATE_M10(op, 5),
#define VMSTATE_MT7(op) VMSTATE_MT6(op) VMSTATE_M10(op, 6),
#define VMSTATE_MT8(op) VMSTATE_MT7(op) VMSTATE_M10(op, 7),
#define VMSTATE_MT9(op) VMSTATE_MT8(op) VMSTATE_M10(op, 8),
#define VMSTATE_UNITS(macro, t) macro(t, 1) macro(t, 2) macro(t, 3) macro(t, 4) macro(t, 5) macro(t, 6) macro(t, 7) macro(t, 8) macro(t, 9) macro(t, 10)
// clang-format on
#define VMSTATE_NAMES(op, t, u) VMSTATE_MT##t(op) VMSTATE_M##u(op, t)
#define VMSTATE_NAME(member) member
#define VMSTATE_ADDRESS(member) &member
#define VMSTATE_TYPE(member) decltype(member)

// `T{{}, {}, {}}`: one pair of braces initialises one member, whatever its type: a C array too.
#define VMSTATE_FITS(t, u)                                                                                             \
    template <class T>                                                                                                 \
    consteval bool fits(member_count<10 * t + u>) {                                                                    \
        return requires { T{VMSTATE_BT##t VMSTATE_B##u}; };                                                            \
    }

// The address of a bit-field can't be taken. clang before 16 can't ask a binding for that in a requires-expression, so
// the layout has to tell; a lone bit-field as wide as its type escapes it.
#if defined(__clang__) && __clang_major__ < 16
#define VMSTATE_NO_BIT_FIELD(t, u) laid_out_like<T, VMSTATE_NAMES(VMSTATE_TYPE, t, u)>()
#else
#define VMSTATE_NO_BIT_FIELD(t, u) requires { take_addresses(VMSTATE_NAMES(VMSTATE_ADDRESS, t, u)); }
#endif

#define VMSTATE_BIND(t, u)                                                                                             \
    template <class T>                                                                                                 \
    consteval bool has_bit_field(member_count<10 * t + u>) {                                                           \
        [[maybe_unused]] auto& [VMSTATE_NAMES(VMSTATE_NAME, t, u)] = unevaluated<T>.value;                             \
        return !VMSTATE_NO_BIT_FIELD(t, u);                                                                            \
    }                                                                                                                  \
    template <class T, class Visit>                                                                                    \
    constexpr decltype(auto) visit_members(member_count<10 * t + u>, T& object, Visit visit) {                         \
        auto& [VMSTATE_NAMES(VMSTATE_NAME, t, u)] = object;                                                            \
        return visit(VMSTATE_NAMES(VMSTATE_NAME, t, u));                                                               \
    }

template <class T>
consteval bool fits(member_count<0>) {
    return requires { T{}; };
}
// clang-format off
VMSTATE_UNITS(VMSTATE_FITS, 0)
VMSTATE_UNITS(VMSTATE_FITS, 1)
VMSTATE_UNITS(VMSTATE_FITS, 2)
VMSTATE_UNITS(VMSTATE_FITS, 3)
VMSTATE_UNITS(VMSTATE_FITS, 4)
VMSTATE_UNITS(VMSTATE_FITS, 5)
VMSTATE_UNITS(VMSTATE_FITS, 6)
VMSTATE_UNITS(VMSTATE_FITS, 7)
VMSTATE_UNITS(VMSTATE_FITS, 8)
VMSTATE_UNITS(VMSTATE_FITS, 9)
VMSTATE_UNITS(VMSTATE_FITS, 10)
VMSTATE_UNITS(VMSTATE_FITS, 11)
VMSTATE_UNITS(VMSTATE_FITS, 12)
// clang looks for the definition of `unevaluated` where it is used: it has none on purpose.
#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wundefined-var-template"
#endif
VMSTATE_UNITS(VMSTATE_BIND, 0)
VMSTATE_UNITS(VMSTATE_BIND, 1)
VMSTATE_UNITS(VMSTATE_BIND, 2)
VMSTATE_UNITS(VMSTATE_BIND, 3)
VMSTATE_UNITS(VMSTATE_BIND, 4)
VMSTATE_UNITS(VMSTATE_BIND, 5)
VMSTATE_UNITS(VMSTATE_BIND, 6)
VMSTATE_UNITS(VMSTATE_BIND, 7)
VMSTATE_UNITS(VMSTATE_BIND, 8)
VMSTATE_UNITS(VMSTATE_BIND, 9)
#if defined(__clang__)
#pragma clang diagnostic pop
#endif
// clang-format on
#undef VMSTATE_B1
#undef VMSTATE_M1
#undef VMSTATE_B2
#undef VMSTATE_M2
#undef VMSTATE_B3
#undef VMSTATE_M3
#undef VMSTATE_B4
#undef VMSTATE_M4
#undef VMSTATE_B5
#undef VMSTATE_M5
#undef VMSTATE_B6
#undef VMSTATE_M6
#undef VMSTATE_B7
#undef VMSTATE_M7
#undef VMSTATE_B8
#undef VMSTATE_M8
#undef VMSTATE_B9
#undef VMSTATE_M9
#undef VMSTATE_B10
#undef VMSTATE_M10
#undef VMSTATE_BT0
#undef VMSTATE_BT1
#undef VMSTATE_BT2
#undef VMSTATE_BT3
#undef VMSTATE_BT4
#undef VMSTATE_BT5
#undef VMSTATE_BT6
#undef VMSTATE_BT7
#undef VMSTATE_BT8
#undef VMSTATE_BT9
#undef VMSTATE_BT10
#undef VMSTATE_BT11
#undef VMSTATE_BT12
#undef VMSTATE_MT0
#undef VMSTATE_MT1
#undef VMSTATE_MT2
#undef VMSTATE_MT3
#undef VMSTATE_MT4
#undef VMSTATE_MT5
#undef VMSTATE_MT6
#undef VMSTATE_MT7
#undef VMSTATE_MT8
#undef VMSTATE_MT9
#undef VMSTATE_UNITS
#undef VMSTATE_NAMES
#undef VMSTATE_NAME
#undef VMSTATE_ADDRESS
#undef VMSTATE_TYPE
#undef VMSTATE_FITS
#undef VMSTATE_NO_BIT_FIELD
#undef VMSTATE_BIND

template <class T, int Low, int High>
consteval int count_between() {
    // Low members fit, High + 1 don't.
    if constexpr (Low == High) return Low;
    else {
        constexpr int middle = (Low + High + 1) / 2;
        if constexpr (fits<T>(member_count<middle>{})) return count_between<T, middle, High>();
        else return count_between<T, Low, middle - 1>();
    }
}

/// Converts to the bases of `T` only: an aggregate whose first initializer it can be has a base class.
template <class T>
struct base_of {
    template <class Base>
        requires(std::is_base_of_v<Base, T> && !std::is_same_v<Base, T>)
    constexpr operator Base() const noexcept;
};
template <class T>
concept has_base = requires { T{base_of<T>{}}; };

/// Whether members can be counted at all: not where the struct is no aggregate, has a base class, or a member that can't
/// be made from nothing.
template <class T>
consteval bool is_countable() {
    if constexpr (!std::is_aggregate_v<T> || std::is_array_v<T> || std::is_union_v<T>) return false;
    else return fits<T>(member_count<0>{}) && !has_base<T>;
}

/// No more members than `Count`.
template <class T, int Count>
consteval bool has_at_most() {
    if constexpr (Count >= max_counted_members) return false;
    else return !fits<T>(member_count<Count + 1>{});
}

/// The members of an aggregate, or unknown_count: not countable, or too many.
template <class T>
consteval int count_members() {
    if constexpr (!is_countable<T>()) return unknown_count;
    else if constexpr (fits<T>(member_count<max_counted_members>{})) return unknown_count;
    else return count_between<T, 0, max_counted_members - 1>();
}

/// Whether a pointer to each of the `Count` members can be formed: not to a bit-field. Asked only where fewer members
/// are listed than there are, since it is the expensive question.
template <class T, int Count>
consteval bool all_members_can_be_listed() {
    if constexpr (Count > max_bound_members) return false; // it can't be asked
    else if constexpr (Count <= 0) return true;
    else return !has_bit_field<T>(member_count<Count>{});
}

/// The `I`th of a binding's names.
template <std::size_t I, class First, class... Rest>
constexpr auto& nth_of(First& first, Rest&... rest) {
    if constexpr (I == 0) return first;
    else return nth_of<I - 1>(rest...);
}

/// The address of the `I`th member of an aggregate, C arrays counted as one.
template <class S, std::size_t I>
constexpr auto& bound_member(S& state) {
    return visit_members(member_count<count_members<std::remove_const_t<S>>()>{}, state,
                         [](auto&... members) -> auto& { return nth_of<I>(members...); });
}

template <auto Part>
inline constexpr std::string_view part_name = last_identifier(spelling<Part>());

#if defined(__clang__)
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wundefined-var-template"
#endif
template <class S, std::size_t I>
consteval std::string_view bound_name() {
    constexpr auto* member = &bound_member<const S, I>(unevaluated<S>.value);
    return part_name<part_pointer<std::remove_const_t<decltype(member)>>{member}>;
}
#if defined(__clang__)
#pragma clang diagnostic pop
#endif

} // namespace vmstate::detail
