// SPDX-License-Identifier: BSL-1.0
//
// What a description is made of. An item is a value (`field<&S::m, since<2>>`, `needed<f>`), empty, and known by its
// type. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <string_view>
#include <type_traits>

#include <vmstate/describe/attributes.hpp>
#include <vmstate/describe/member.hpp>

namespace vmstate {

/// A string literal as a template argument.
template <std::size_t Size>
struct fixed_string {
    char text[Size]{};
    consteval fixed_string(const char (&literal)[Size]) {
        for (std::size_t i = 0; i != Size; ++i) text[i] = literal[i];
    }
    constexpr std::string_view view() const { return {text, Size - 1}; }
};

namespace detail {

/// What an item is: `decltype(item)::kind`, for who walks a description.
enum class item_kind {
    field,
    unused,
    temporary,
    validation,
    needed,
    pre_load,
    post_load,
    pre_save,
    post_save,
    subsections,
    load_old,
    priority,
    unmigratable,
    transient,
    partial,
    historic_name,
};

// An attribute given twice is refused by a rule; until the rule speaks, the field counts as one without attributes.
template <class>
inline constexpr int attribute_kind = 0;
template <int V>
inline constexpr int attribute_kind<vmstate::since<V>> = 1;
template <auto F>
inline constexpr int attribute_kind<vmstate::when<F>> = 2;
template <>
inline constexpr int attribute_kind<vmstate::equal> = 3;
template <>
inline constexpr int attribute_kind<vmstate::at_most_current> = 4;
template <auto L, auto H>
inline constexpr int attribute_kind<vmstate::between<L, H>> = 5;
template <std::size_t F, std::size_t C>
inline constexpr int attribute_kind<vmstate::slice<F, C>> = 6;
template <auto M>
inline constexpr int attribute_kind<vmstate::length<M>> = std::is_member_object_pointer_v<decltype(M)> ? 7 : 0;
template <std::size_t K>
inline constexpr int attribute_kind<vmstate::multiply<K>> = 8;
template <std::size_t K>
inline constexpr int attribute_kind<vmstate::limit<K>> = 9;
template <const auto& D, int... V>
inline constexpr int attribute_kind<vmstate::as<D, V...>> = 10;
template <const auto& D>
inline constexpr int attribute_kind<vmstate::key_as<D>> = 11;
template <auto M>
inline constexpr int attribute_kind<vmstate::bitmap<M>> = std::is_member_object_pointer_v<decltype(M)> ? 12 : 0;
template <>
inline constexpr int attribute_kind<vmstate::as_timer> = 13;
template <class C>
inline constexpr int attribute_kind<vmstate::coded<C>> = 14;

template <class... List>
consteval bool distinct_attributes() {
    [[maybe_unused]] unsigned seen = 0;
    bool distinct = true;
    ((distinct = distinct && (seen & (1u << attribute_kind<List>)) == 0, seen |= 1u << attribute_kind<List>), ...);
    return distinct;
}
/// Attributes that exist, with arguments that they can have.
template <class... List>
consteval bool known_attributes() {
    return (true && ... && (attribute_kind<List> != 0));
}
template <bool Usable, class... List>
struct usable_attributes {
    using type = attributes<List...>;
};
template <class... List>
struct usable_attributes<false, List...> {
    using type = attributes<>;
};

/// What all items that stand for bytes on the wire share.
template <item_kind Kind, class... List>
struct wire_item {
    static constexpr item_kind kind = Kind;
    static constexpr bool plain = sizeof...(List) == 0;
    static constexpr bool attributes_known = known_attributes<List...>();
    static constexpr bool attributes_distinct = distinct_attributes<List...>();
    using attributes = typename usable_attributes<attributes_known && attributes_distinct, List...>::type;
};

/// A member, by a pointer to it.
template <auto Member, class... List>
struct field_item : wire_item<item_kind::field, List...> {
    static constexpr auto pointer = Member;
    using owner = owner_of<Member>;
    using type = type_of<Member>;
    static constexpr std::string_view name() {
        constexpr std::string_view text = last_identifier(spelling<Member>()); // clang 16 calls it at run time otherwise
        return text;
    }
    template <class S>
    static constexpr auto& of(S& state) {
        return state.*Member;
    }
};

template <std::size_t Size, class... List>
struct unused_item : wire_item<item_kind::unused, List...> {
    static constexpr std::size_t size = Size;
    static constexpr std::string_view name() { return "unused"; }
};

template <const auto& Description, class... List>
struct temporary_item : wire_item<item_kind::temporary, List...> {
    static constexpr const auto& description = Description;
    static constexpr std::string_view name() { return "tmp"; }
};

template <fixed_string Text, auto Predicate>
struct validation_item : wire_item<item_kind::validation> {
    static constexpr std::string_view name() { return Text.view(); }
    static constexpr auto predicate = Predicate;
};

template <item_kind Kind, auto Function>
struct hook_item {
    static constexpr item_kind kind = Kind;
    static constexpr auto function = Function;
};

template <const auto&... Descriptions>
struct subsections_item {
    static constexpr item_kind kind = item_kind::subsections;
};

template <auto Function, int Minimum>
struct load_old_item {
    static constexpr item_kind kind = item_kind::load_old;
    static constexpr auto function = Function;
    static constexpr int minimum = Minimum;
};

template <int Value>
struct priority_item {
    static constexpr item_kind kind = item_kind::priority;
    static constexpr int value = Value;
};

struct unmigratable_item {
    static constexpr item_kind kind = item_kind::unmigratable;
};

template <auto... Members>
struct transient_item {
    static constexpr item_kind kind = item_kind::transient;
};

struct partial_item {
    static constexpr item_kind kind = item_kind::partial;
};

struct historic_name_item {
    static constexpr item_kind kind = item_kind::historic_name;
};

} // namespace detail

using detail::item_kind;

/// A member on the wire. Its encoding follows from its type and the attributes, see the guide's table.
template <auto Member, class... Attributes>
inline constexpr detail::field_item<Member, Attributes...> field{};

/// `Size` bytes that once meant something: written as zeros, skipped on load (QEMU: `VMSTATE_UNUSED*`).
template <std::size_t Size, class... Attributes>
inline constexpr detail::unused_item<Size, Attributes...> unused{};

/// A scratch struct, made from the state, that has the wire form; its hooks convert (QEMU: `VMSTATE_WITH_TMP`).
template <const auto& Description, class... Attributes>
inline constexpr detail::temporary_item<Description, Attributes...> with_temporary{};

/// No bytes; on load, a predicate that says no fails the load with `Text` (QEMU: `VMSTATE_VALIDATE`). On save it fails
/// the save.
template <fixed_string Text, auto Predicate>
inline constexpr detail::validation_item<Text, Predicate> validate{};

/// The description is sent only where the predicate says so: a subsection, or a whole device.
template <auto Predicate>
inline constexpr detail::hook_item<detail::item_kind::needed, Predicate> needed{};

/// Called before the first field is loaded: the place for the defaults of absent subsections.
template <auto Function>
inline constexpr detail::hook_item<detail::item_kind::pre_load, Function> pre_load{};
/// Called after fields and subsections are loaded, `f(S&)` or `f(S&, int version_id)` with the version received.
template <auto Function>
inline constexpr detail::hook_item<detail::item_kind::post_load, Function> post_load{};
/// Called before the first field is saved.
template <auto Function>
inline constexpr detail::hook_item<detail::item_kind::pre_save, Function> pre_save{};
/// Called after saving, also after a failed field, not after a failed pre_save.
template <auto Function>
inline constexpr detail::hook_item<detail::item_kind::post_save, Function> post_save{};

/// Descriptions that follow the fields where they are `needed`.
template <const auto&... Descriptions>
inline constexpr detail::subsections_item<Descriptions...> subsection{};

/// Loads versions from `Minimum` up to below minimum_version_id by hand: `f(reader&, S&, int version_id)` (QEMU before
/// 7.0: load_state_old, minimum_version_id_old).
template <auto Function, int Minimum>
inline constexpr detail::load_old_item<Function, Minimum> load_old{};

/// QEMU's MigrationPriority: sections of a higher one are sent first. The order, not the numbers, is on the wire.
enum class migration_priority : int {
    standard = 0, ///< MIG_PRI_DEFAULT
    iommu,
    pci_bus,
    virtio_mem,
    gicv3_its,
    gicv3,
};

/// Where the device's section stands among the others.
template <auto Priority>
inline constexpr detail::priority_item<static_cast<int>(Priority)> priority{};

/// As long as such a device is registered, saving a machine fails and names it.
inline constexpr detail::unmigratable_item unmigratable{};

/// Members that are deliberately not on the wire.
template <auto... Members>
inline constexpr detail::transient_item<Members...> transient{};

/// This description is one view of its struct among several: it need not cover every member.
inline constexpr detail::partial_item partial{};

/// In a subsection whose name QEMU fixed before names began with "parent/": "pckbd_outport". Its name has to begin with
/// the parent's all the same, since QEMU's reader looks for that.
inline constexpr detail::historic_name_item historic_name{};

} // namespace vmstate
