// SPDX-License-Identifier: BSL-1.0
//
// Bodies: the fields of a description in order, then its subsections, with the hooks around them. Neighbouring fields of
// constant size form a run: one question whether there is room, then stores and loads at constant offsets. Which fields a
// run has is decided per version at compile time. Depends on codec/field.hpp.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include <vmstate/codec/field.hpp>

namespace vmstate::detail {

// --- the plan of a body ----------------------------------------------------------------------------------------------

template <const auto& D>
using items_of = typename std::remove_cvref_t<decltype(D)>::item_types;
template <const auto& D>
inline constexpr std::size_t item_count = std::remove_cvref_t<decltype(D)>::item_count;

template <const auto& D, item_kind Kind>
inline constexpr bool has_item = std::remove_cvref_t<decltype(D)>::has(Kind);
template <const auto& D, item_kind Kind>
using the_item = typename decltype(pick_item<std::remove_cvref_t<decltype(D)>::find(Kind)>(
    static_cast<const items_of<D>*>(nullptr)))::type;

/// A run asks once for all its bytes; what a reader or writer can promise in one piece bounds it.
inline constexpr std::size_t max_run = 2048;

/// What is done with an item in a stream of one version.
struct planned_item {
    bool sent = false;     // perhaps: a predicate may decide
    std::size_t flat = 0;  // bytes, of an item that is part of a run
    std::size_t run = 0;   // bytes of the whole run, at its first item
};

template <std::size_t Count>
consteval std::array<planned_item, Count + 1> make_plan(std::span<const item_facts> items, int version) {
    std::array<planned_item, Count + 1> plan{};
    planned_item* head = nullptr;
    for (std::size_t i = 0; i != Count; ++i) {
        if (!items[i].is_wire) {
            // A predicate looks at what is there: the run ends before it.
            if (items[i].kind == item_kind::validation) head = nullptr;
            continue;
        }
        plan[i].sent = items[i].wire.conditional || items[i].wire.since <= version;
        if (!plan[i].sent) continue;
        plan[i].flat = flat_size(items[i].wire, version);
        if (plan[i].flat == 0) {
            head = nullptr;
            continue;
        }
        if (head == nullptr || head->run + plan[i].flat > max_run) head = &plan[i];
        head->run += plan[i].flat;
    }
    return plan;
}
template <const auto& D, int Version>
inline constexpr auto plan_of = make_plan<item_count<D>>(std::remove_cvref_t<decltype(D)>::facts(), Version);

// --- flat bodies, inside somebody else's run -------------------------------------------------------------------------

// One for each type of member, not for each member: most fields of a device are plain scalars.
template <class E>
[[gnu::always_inline]] inline std::byte* encode_scalar(std::byte* p, const E& member) {
    return store_big(p, to_wire(member));
}
template <class E>
[[gnu::always_inline]] inline const std::byte* decode_scalar(const std::byte* p, E& member) {
    using wire = typename wire_integer<E>::type;
    take(member, load_big<wire>(p));
    return p + sizeof(wire);
}

template <class Item, class S>
[[gnu::always_inline]] inline const std::byte* decode_field(reader& r, const std::byte* p, S& state) {
    p = codec_of<Item>::type::decode(r, p, state);
    if (p == nullptr) [[unlikely]] r.failure().within(Item::name());
    return p;
}

template <const auto& D, int Version, std::size_t I, class Item, class S>
[[gnu::always_inline]] inline std::byte* encode_item(std::byte* p, const S& state) {
    if constexpr (!plan_of<D, Version>[I].sent) return p;
    else if constexpr (is_plain_scalar<Item>) return encode_scalar(p, Item::of(state));
    else return codec_of<Item>::type::encode(p, state);
}
template <const auto& D, int Version, std::size_t I, class Item, class S>
[[gnu::always_inline]] inline const std::byte* decode_item(reader& r, const std::byte* p, S& state) {
    if constexpr (!plan_of<D, Version>[I].sent) return p;
    else if constexpr (is_plain_scalar<Item>) return decode_scalar(p, Item::of(state));
    else return decode_field<Item>(r, p, state);
}

template <const auto& D, int Version, class S, std::size_t... I, class... Items>
[[gnu::always_inline]] inline std::byte* encode_items(std::byte* p, const S& state,
                                                      const item_index<std::index_sequence<I...>, Items...>*) {
    ((p = encode_item<D, Version, I, Items>(p, state)), ...);
    return p;
}
template <const auto& D, int Version, class S, std::size_t... I, class... Items>
[[gnu::always_inline]] inline const std::byte* decode_items(reader& r, const std::byte* p, S& state,
                                                            const item_index<std::index_sequence<I...>, Items...>*) {
    ((p = p == nullptr ? p : decode_item<D, Version, I, Items>(r, p, state)), ...);
    return p;
}

template <const auto& D, int Version, class S>
[[gnu::always_inline]] inline std::byte* encode_flat(std::byte* p, const S& state) {
    return encode_items<D, Version>(p, state, static_cast<const items_of<D>*>(nullptr));
}
template <const auto& D, int Version, class S>
[[gnu::always_inline]] inline const std::byte* decode_flat(reader& r, const std::byte* p, S& state) {
    return decode_items<D, Version>(r, p, state, static_cast<const items_of<D>*>(nullptr));
}

// --- saving ----------------------------------------------------------------------------------------------------------

template <const auto& D, item_kind Kind, class S>
error hook(std::string_view name, S& state, [[maybe_unused]] int version_id) {
    if constexpr (has_item<D, Kind>) {
        constexpr auto function = the_item<D, Kind>::function;
        static_assert(callable_on<decltype(function), S> || callable_on<decltype(function), S, int>,
                      "a const state can't be saved: a hook of its description has to change it");
        return run_hook<function>(name, state, version_id);
    } else return {};
}

template <const auto& D, class S>
constexpr bool needed_by(const S& state) {
    if constexpr (has_item<D, item_kind::needed>)
        return holds<the_item<D, item_kind::needed>::function>(state, D.version_id);
    else return true;
}

/// Whether a field with a predicate is there.
template <class Item, class S>
[[gnu::always_inline]] constexpr bool field_exists(const S& state, [[maybe_unused]] int version_id) {
    if constexpr (Item::attributes::when_t::present) return holds<Item::attributes::when_t::value>(state, version_id);
    else return true;
}

/// One item at the cursor `p`; the cursor behind it, or null. By value, so that it stays in a register: through a
/// reference every store of a byte might change it.
template <const auto& D, int Version, std::size_t I, class Item, class S>
[[gnu::always_inline]] inline std::byte* save_item(writer& w, std::byte* p, S& state, [[maybe_unused]] int version_id) {
    constexpr planned_item plan = plan_of<D, Version>[I];
    if constexpr (Item::kind == item_kind::validation) {
        if (holds<Item::predicate>(state, version_id)) return p;
        w.commit(p);
        w.fail(error(errc::validation_failed, std::string(Item::name()), "otherwise"));
        return nullptr;
    } else if constexpr (!plan.sent) {
        return p;
    } else if constexpr (plan.flat != 0) {
        if constexpr (plan.run != 0) {
            if (static_cast<std::size_t>(w.window_end() - p) < plan.run) [[unlikely]] {
                w.commit(p);
                p = w.reserve(plan.run);
                if (p == nullptr) {
                    w.failure().within(Item::name());
                    return nullptr;
                }
            }
        }
        if constexpr (is_plain_scalar<Item>) return encode_scalar(p, Item::of(state));
        else return codec_of<Item>::type::encode(p, std::as_const(state));
    } else {
        if (!field_exists<Item>(state, version_id)) return p;
        w.commit(p);
        if (!codec_of<Item>::type::save(w, state)) {
            w.failure().within(Item::name());
            return nullptr;
        }
        return w.cursor();
    }
}

template <const auto& D, int Version, class S, std::size_t... I, class... Items>
[[gnu::always_inline]] inline bool save_fields(writer& w, S& state, [[maybe_unused]] int version_id,
                                               const item_index<std::index_sequence<I...>, Items...>*) {
    std::byte* p = w.cursor();
    // An empty window has no address; its first reserve will give one.
    [[maybe_unused]] bool going = true;
    ((going = going && (p = save_item<D, Version, I, Items>(w, p, state, version_id), p != nullptr || !w.failed())), ...);
    if (!going) return false;
    w.commit(p);
    return true;
}

template <const auto& Sub, class S>
bool save_subsection(writer& w, S& state) {
    if (!needed_by<Sub>(state)) return true;
    w.put_u8(0x05);
    w.put_counted_string(Sub.name);
    w.put_be32(static_cast<std::uint32_t>(Sub.version_id));
    using base = std::conditional_t<std::is_const_v<S>, const struct_of<Sub>, struct_of<Sub>>;
    if (save_body<Sub, Sub.version_id>(w, static_cast<base&>(state))) return true;
    w.failure().within(Sub.name.substr(Sub.name.rfind('/') + 1));
    return false;
}
template <class S, const auto&... Subs>
bool save_subsections(writer& w, S& state, const subsections_item<Subs...>&) {
    return (true && ... && save_subsection<Subs>(w, state));
}
/// Calls `visit` with the items that are subsections: most are not, and cost nothing.
template <class... Items, class Visit>
constexpr void for_subsections(Visit visit) {
    ((void)[&] {
        if constexpr (Items::kind == item_kind::subsections) visit(Items{});
    }(), ...);
}
template <class S, class... Items, std::size_t... I>
bool save_all_subsections(writer& w, S& state, const item_index<std::index_sequence<I...>, Items...>*) {
    bool saved = true;
    for_subsections<Items...>([&](const auto& subsections) { saved = saved && save_subsections(w, state, subsections); });
    return saved;
}

/// pre_save, fields, subsections, post_save (QEMU: vmstate_save_state_v).
template <const auto& D, int Version, class S>
bool save_body(writer& w, S& state) {
    if constexpr (has_item<D, item_kind::pre_save>) {
        if (error failure = hook<D, item_kind::pre_save>("pre_save", state, Version)) {
            w.fail(std::move(failure));
            return false;
        }
    }
    bool saved = save_fields<D, layout_version(schema_for<D>(), Version)>(w, state, Version,
                                                                          static_cast<const items_of<D>*>(nullptr));
    if constexpr (has_item<D, item_kind::subsections>)
        saved = saved && save_all_subsections(w, state, static_cast<const items_of<D>*>(nullptr));
    if constexpr (has_item<D, item_kind::post_save>) {
        error failure = hook<D, item_kind::post_save>("post_save", state, Version);
        if (saved && failure) {
            w.fail(std::move(failure));
            return false;
        }
    }
    return saved && !w.failed();
}

// --- loading ---------------------------------------------------------------------------------------------------------

/// Where a stream ends inside flat fields: what is left of it, and how much of them came before.
struct truncation {
    std::size_t there;
    std::size_t before = 0;

    bool has(std::size_t bytes) {
        if (bytes > there) return false;
        there -= bytes;
        before += bytes;
        return true;
    }
};
/// The path below `field` of what the stream ends in, and how many bytes that has.
[[gnu::cold, gnu::noinline]] inline std::size_t end_inside(error& failure, const schema_field& field, int version, truncation& end) {
    const std::size_t whole = flat_size(field, version);
    if (!field.has_nested) return whole;
    const std::size_t elements = field.repeat == repetition::once ? 1 : field.count;
    std::size_t index = 0;
    while (end.has(whole / elements)) ++index;
    std::size_t wanted = 0;
    for (const schema_field& inner : field.nested->fields) {
        if (inner.since > field.nested_version || end.has(flat_size(inner, field.nested_version))) continue;
        wanted = end_inside(failure, inner, field.nested_version, end);
        failure.within(inner.name);
        break;
    }
    if (field.repeat != repetition::once) failure.at_index(index);
    return wanted;
}
/// The stream has ended in the run that begins with item `i`: names the field that it ends in.
[[gnu::cold, gnu::noinline]] inline void truncated_run(reader& r, const item_facts* items, const planned_item* plan, std::size_t i,
                                                       int version) {
    if (r.failed() && r.failure().code() != errc::truncated) return;
    truncation end{r.window()};
    while (plan[i].flat == 0 || end.has(plan[i].flat)) ++i;
    error path(errc::truncated);
    const std::size_t wanted = end_inside(path, items[i].wire, version, end);
    error failure(errc::truncated, std::to_string(wanted) + (wanted == 1 ? " byte" : " bytes"), std::to_string(end.there));
    failure.at_offset(r.offset() + end.before).within(path.path()).within(items[i].wire.name);
    r.failure() = std::move(failure);
}

// --- room for arrays of the stream's length --------------------------------------------------------------------------
// Taken when a load enters an object, for its description and all subsections: later the stream has changed the lengths.

template <const auto& D>
inline constexpr std::size_t own_rooms = [] {
    for (const item_facts& one : std::remove_cvref_t<decltype(D)>::facts())
        if (one.has_room) return item_count<D>;
    return std::size_t{0};
}();
template <const auto& D>
consteval std::size_t count_rooms();
template <const auto&... Subs>
consteval std::size_t count_rooms_of(const subsections_item<Subs...>*) {
    return (std::size_t{0} + ... + count_rooms<Subs>());
}
consteval std::size_t count_rooms_of(const void*) { return 0; }
template <class... Items, std::size_t... I>
consteval std::size_t count_rooms_in(const item_index<std::index_sequence<I...>, Items...>*) {
    return (std::size_t{0} + ... + count_rooms_of(static_cast<const Items*>(nullptr)));
}
/// How many there are, subsections' behind a description's own.
template <const auto& D>
consteval std::size_t count_rooms() {
    if constexpr (!has_item<D, item_kind::subsections>) return own_rooms<D>;
    else return own_rooms<D> + count_rooms_in(static_cast<const items_of<D>*>(nullptr));
}

template <const auto& D, class S, class Visit>
void visit_rooms(S& state, room* rooms, Visit visit);

/// Calls `visit.operator()<Item>(state, room)` for each array of `D` itself that has one.
template <const auto& D, class S, class Visit, std::size_t... I, class... Items>
void visit_own_rooms(S& state, room* rooms, Visit visit, const item_index<std::index_sequence<I...>, Items...>*) {
    [[maybe_unused]] const auto look = [&]<class Item>(const Item&, room& space) {
        if constexpr (Item::kind == item_kind::field)
            if constexpr (has_room<Item>()) visit.template operator()<Item>(state, space);
    };
    if constexpr (own_rooms<D> != 0) (look(Items{}, rooms[I]), ...);
}
template <const auto& Sub, class S, class Visit>
room* visit_rooms_behind(S& state, room* rooms, Visit visit) {
    if constexpr (count_rooms<Sub>() != 0) visit_rooms<Sub>(static_cast<struct_of<Sub>&>(state), rooms, visit);
    return rooms + count_rooms<Sub>();
}
template <class... Items, std::size_t... I, class S, class Visit>
void visit_subsections_rooms(S& state, room* rooms, Visit visit, const item_index<std::index_sequence<I...>, Items...>*) {
    for_subsections<Items...>([&]<const auto&... Subs>(const subsections_item<Subs...>&) {
        ((rooms = visit_rooms_behind<Subs>(state, rooms, visit)), ...);
    });
}
template <const auto& D, class S, class Visit>
void visit_rooms(S& state, room* rooms, Visit visit) {
    visit_own_rooms<D>(state, rooms, visit, static_cast<const items_of<D>*>(nullptr));
    if constexpr (count_rooms<D>() != own_rooms<D>)
        visit_subsections_rooms(state, rooms + own_rooms<D>, visit, static_cast<const items_of<D>*>(nullptr));
}

template <const auto& D, int Version, std::size_t I, class Item, class S>
[[gnu::always_inline]] inline const std::byte* load_item(reader& r, const std::byte* p, S& state, [[maybe_unused]] room* rooms,
                                                         [[maybe_unused]] int version_id) {
    constexpr planned_item plan = plan_of<D, Version>[I];
    if constexpr (Item::kind == item_kind::validation) {
        if (holds<Item::predicate>(state, version_id)) return p;
        r.seek(p);
        r.fail(error(errc::validation_failed, std::string(Item::name()), "otherwise"));
        return nullptr;
    } else if constexpr (!plan.sent) {
        return p;
    } else if constexpr (plan.flat != 0) {
        if constexpr (plan.run != 0) {
            if (static_cast<std::size_t>(r.window_end() - p) < plan.run) [[unlikely]] {
                r.seek(p);
                p = r.need(plan.run);
                if (p == nullptr) {
                    truncated_run(r, std::remove_cvref_t<decltype(D)>::facts().data(), plan_of<D, Version>.data(), I, Version);
                    return nullptr;
                }
            }
        }
        if constexpr (is_plain_scalar<Item>) return decode_scalar(p, Item::of(state));
        else return decode_field<Item>(r, p, state);
    } else {
        if (!field_exists<Item>(state, version_id)) return p;
        r.seek(p);
        if (!codec_of<Item>::type::load(r, state, own_rooms<D> == 0 ? nullptr : rooms + I)) {
            r.failure().within(Item::name());
            return nullptr;
        }
        return r.cursor();
    }
}

template <const auto& D, int Version, class S, std::size_t... I, class... Items>
[[gnu::always_inline]] inline bool load_fields(reader& r, S& state, [[maybe_unused]] int version_id, [[maybe_unused]] room* rooms,
                                               const item_index<std::index_sequence<I...>, Items...>*) {
    const std::byte* p = r.cursor();
    ((p = p == nullptr ? p : load_item<D, Version, I, Items>(r, p, state, rooms, version_id)), ...);
    if (p == nullptr) return false;
    r.seek(p);
    return true;
}

/// Fields of a stream of version `layout`, on the path made for it; `Below` bounds the layouts still to try. Predicates
/// are told `version_id`.
template <const auto& D, int Below, class S>
bool load_layout(reader& r, S& state, int version_id, int layout, room* rooms) {
    constexpr int path = layout_version(schema_for<D>(), Below);
    if constexpr (path > 0) {
        if (layout < path && path > D.minimum_version_id) return load_layout<D, path - 1>(r, state, version_id, layout, rooms);
    }
    return load_fields<D, path>(r, state, version_id, rooms, static_cast<const items_of<D>*>(nullptr));
}

/// "expected 3 to 5, found 6".
inline bool refuse_version(reader& r, int version_id, int oldest, int newest) {
    return r.fail(error(version_id > newest ? errc::version_too_new : errc::version_too_old,
                        oldest == newest ? "version " + std::to_string(newest)
                                         : "version " + std::to_string(oldest) + " to " + std::to_string(newest),
                        std::to_string(version_id)));
}

template <const auto& D, class S>
bool load_versioned(reader& r, S& state, int version_id, room* rooms);

template <const auto& Sub, class S>
bool load_subsection(reader& r, S& state, int version_id, room* rooms) {
    if (load_versioned<Sub>(r, static_cast<struct_of<Sub>&>(state), version_id, rooms)) return true;
    r.failure().within(Sub.name.substr(Sub.name.rfind('/') + 1));
    return false;
}

enum class lookup { unknown, loaded, failed };
/// `rooms` moves on from subsection to subsection.
template <class S, const auto&... Subs>
lookup load_named(reader& r, S& state, std::string_view name, const std::byte* body, room*& rooms, const subsections_item<Subs...>&) {
    lookup found = lookup::unknown;
    const auto try_one = [&]<const auto& Sub>(const subsections_item<Sub>&) {
        if (found != lookup::unknown) return;
        if (name == Sub.name) {
            r.seek(body);
            // QEMU keeps a subsection's version in 8 bits: what it accepts, this accepts.
            const auto version_id = static_cast<int>(r.get_be32() & 0xff);
            if (r.failed()) r.failure().within(Sub.name.substr(Sub.name.rfind('/') + 1));
            found = !r.failed() && load_subsection<Sub>(r, state, version_id, rooms) ? lookup::loaded : lookup::failed;
        }
        if constexpr (count_rooms<Sub>() != 0) rooms += count_rooms<Sub>();
    };
    (try_one(subsections_item<Subs>{}), ...);
    return found;
}
template <class S, class... Items, std::size_t... I>
lookup load_any_named(reader& r, S& state, std::string_view name, const std::byte* body, room* rooms,
                      const item_index<std::index_sequence<I...>, Items...>*) {
    lookup found = lookup::unknown;
    const auto look = [&]<class Item>(const Item& subsections) {
        if (found == lookup::unknown) found = load_named(r, state, name, body, rooms, subsections);
    };
    for_subsections<Items...>(look);
    return found;
}

/// A subsection header for a description called `parent` at the cursor: its name, and where its version stands. Empty
/// where there is none (QEMU: vmstate_subsection_load).
inline std::string_view peek_subsection(reader& r, std::string_view parent, const std::byte*& behind_name) {
    // One byte first: behind the last body of a channel that stays open there may be no second one.
    if (r.peek(1) < 1 || *r.cursor() != std::byte{0x05} || r.peek(2) < 2) return {};
    const auto size = std::to_integer<std::size_t>(r.cursor()[1]);
    if (size < parent.size() + 1 || r.peek(2 + size) < 2 + size) return {};
    const std::string_view name(reinterpret_cast<const char*>(r.cursor()) + 2, size);
    if (name.substr(0, parent.size()) != parent) return {};
    behind_name = r.cursor() + 2 + size;
    return name;
}

/// In any order, as often as they come.
template <const auto& D, class S>
bool load_subsections(reader& r, S& state, [[maybe_unused]] room* rooms) {
    for (;;) {
        const std::byte* behind_name = nullptr;
        // The name stands in the window: compared before anything moves on.
        const std::string_view name = peek_subsection(r, D.name, behind_name);
        if (name.empty()) [[likely]] return !r.failed();
        lookup found = lookup::unknown;
        if constexpr (has_item<D, item_kind::subsections>)
            found = load_any_named(r, state, name, behind_name, own_rooms<D> == 0 ? rooms : rooms + own_rooms<D>,
                                   static_cast<const items_of<D>*>(nullptr));
        switch (found) {
        case lookup::loaded: break;
        case lookup::failed: return false;
        case lookup::unknown:
            return r.fail(error(errc::unknown_subsection, "a subsection of " + std::string(D.name), std::string(name)));
        }
    }
}

template <const auto& D, item_kind Kind, class S>
bool run_loading_hook(reader& r, std::string_view name, S& state, int version_id) {
    if constexpr (has_item<D, Kind>) {
        if (error failure = hook<D, Kind>(name, state, version_id)) return r.fail(std::move(failure));
    }
    return true;
}
/// Fields, subsections, post_load; `Version` bounds the layouts, `version_id` is what hooks and predicates are told.
template <const auto& D, int Version, class S>
bool load_contents(reader& r, S& state, int version_id, int layout, room* rooms) {
    return load_layout<D, Version>(r, state, version_id, layout, rooms) && load_subsections<D>(r, state, rooms) &&
           run_loading_hook<D, item_kind::post_load>(r, "post_load", state, version_id);
}

/// An object of its own: pre_load and what comes after it. A length that comes from the stream never says more than there
/// is, loaded or not, whatever becomes of the load.
template <const auto& D, int Version, class S>
bool load_entered(reader& r, S& state, int version_id, int layout) {
    if (!run_loading_hook<D, item_kind::pre_load>(r, "pre_load", state, version_id)) return false;
    if constexpr (count_rooms<D>() == 0) return load_contents<D, Version>(r, state, version_id, layout, nullptr);
    else {
        room rooms[count_rooms<D>()];
        visit_rooms<D>(state, rooms, []<class Item>(const auto& object, room& space) { space = room_of<Item>(object); });
        bool loaded = load_contents<D, Version>(r, state, version_id, layout, rooms);
        if (loaded)
            visit_rooms<D>(state, rooms, [&]<class Item>(const auto& object, room& space) {
                if (!loaded || !says_too_much<Item>(object, space)) return;
                using A = typename Item::attributes;
                loaded = r.fail(error(errc::out_of_range, "a length of at most " + std::to_string(length_for<A>(space.elements)),
                                      std::to_string(object.*length_member<A>()))
                                    .within(Item::name()));
            });
        if (!loaded) visit_rooms<D>(state, rooms, []<class Item>(auto& object, room& space) { restore_length<Item>(object, space); });
        return loaded;
    }
}
/// A subsection: its object has been entered. What its pre_load puts behind a pointer is as large as it says then.
template <const auto& D, int Version, class S>
bool load_within(reader& r, S& state, int version_id, int layout, room* rooms) {
    if (!run_loading_hook<D, item_kind::pre_load>(r, "pre_load", state, version_id)) return false;
    if constexpr (has_item<D, item_kind::pre_load> && count_rooms<D>() != 0)
        visit_rooms<D>(state, rooms, []<class Item>(const auto& object, room& space) {
            if (memory_of<Item>(object) != space.memory) space = room_of<Item>(object);
        });
    return load_contents<D, Version>(r, state, version_id, layout, rooms);
}

/// A nested body: the stream has no version for it, so it is that of this side's description.
template <const auto& D, int Version, class S>
bool load_body(reader& r, S& state, int version_id) {
    return load_entered<D, Version>(r, state, version_id, Version);
}

/// A body that comes with its version: a section's, or a subsection's of an object that was entered, `rooms` not null.
template <const auto& D, bool Entered, class S>
bool load_with_version(reader& r, S& state, int version_id, [[maybe_unused]] room* rooms) {
    if constexpr (has_item<D, item_kind::load_old>) {
        using old = the_item<D, item_kind::load_old>;
        if (version_id < D.minimum_version_id && version_id >= old::minimum) {
            if (error failure = outcome_of("load_old", [&]() -> decltype(auto) {
                    if constexpr (std::is_member_function_pointer_v<decltype(old::function)>)
                        return (state.*old::function)(r, version_id);
                    else return old::function(r, state, version_id);
                }))
                return r.fail(std::move(failure));
            return !r.failed();
        }
    }
    if (version_id > D.version_id || version_id < D.minimum_version_id)
        return refuse_version(r, version_id, D.oldest_version_id(), D.version_id);
    if constexpr (Entered) return load_within<D, D.version_id>(r, state, version_id, version_id, rooms);
    else return load_entered<D, D.version_id>(r, state, version_id, version_id);
}
template <const auto& D, class S>
bool load_versioned(reader& r, S& state, int version_id, room* rooms) {
    return load_with_version<D, true>(r, state, version_id, rooms);
}

// --- measuring and walking -------------------------------------------------------------------------------------------

template <class Item, class S>
constexpr std::size_t measure_item(const S& state, const planned_item& plan, [[maybe_unused]] int version) {
    if constexpr (!is_wire_item<Item>) return 0;
    else if (plan.flat != 0) return plan.flat;
    else if (plan.sent && field_exists<Item>(state, version)) return codec_of<Item>::type::measure(state);
    else return 0;
}
template <const auto& Sub, class S>
constexpr std::size_t measure_subsection(const S& state) {
    if (!needed_by<Sub>(state)) return 0;
    return 1 + 1 + Sub.name.size() + 4 + measure_body<Sub, Sub.version_id>(static_cast<const struct_of<Sub>&>(state));
}
template <class S, const auto&... Subs>
constexpr std::size_t measure_subsections(const S& state, const subsections_item<Subs...>&) {
    return (std::size_t{0} + ... + measure_subsection<Subs>(state));
}
template <const auto& D, int Version, class S, std::size_t... I, class... Items>
constexpr std::size_t measure_items(const S& state, const item_index<std::index_sequence<I...>, Items...>*) {
    std::size_t size = (std::size_t{0} + ... + measure_item<Items>(state, plan_of<D, Version>[I], Version));
    if constexpr (has_item<D, item_kind::subsections>)
        for_subsections<Items...>([&](const auto& subsections) { size += measure_subsections(state, subsections); });
    return size;
}
template <const auto& D, int Version, class S>
constexpr std::size_t measure_body(const S& state) {
    if constexpr (flat_size(schema_for<D>(), Version) != 0) return flat_size(schema_for<D>(), Version);
    else return measure_items<D, Version>(state, static_cast<const items_of<D>*>(nullptr));
}

/// Several entries of a body may have one name: unused bytes, slices of one member, forms of it under several predicates.
/// QEMU numbers them as they stand in the description, whether this stream has them or not.
template <class Item>
consteval bool may_share_its_name() {
    if constexpr (Item::kind == item_kind::field && !is_plain_field<Item>)
        return Item::attributes::slice_t::present || Item::attributes::when_t::present;
    else return Item::kind == item_kind::unused || Item::kind == item_kind::temporary;
}
inline std::size_t number_among_namesakes(std::span<const item_facts> items, std::size_t i) noexcept {
    std::size_t number = 0;
    std::size_t namesakes = 0;
    for (std::size_t other = 0; other != items.size(); ++other) {
        if (!items[other].is_wire || items[other].wire.name != items[i].wire.name) continue;
        ++namesakes;
        if (other < i) ++number;
    }
    return namesakes > 1 ? number : field_event::no_index;
}
/// Passes on what one item tells, with its number in the entries that are its own.
class numbering_visitor final : public field_visitor {
public:
    numbering_visitor(field_visitor& to, std::size_t number) noexcept : to_(to), number_(number) {}

    void begin_field(const field_event& field) override {
        if (depth_++ != 0) return to_.begin_field(field);
        field_event numbered = field;
        numbered.number = number_;
        to_.begin_field(numbered);
    }
    void end_field() override {
        --depth_;
        to_.end_field();
    }
    void begin_nested(std::string_view name, int version_id) override { to_.begin_nested(name, version_id); }
    void end_nested() override { to_.end_nested(); }
    void begin_subsection(std::string_view name, int version_id) override { to_.begin_subsection(name, version_id); }
    void end_subsection() override { to_.end_subsection(); }

private:
    field_visitor& to_;
    std::size_t number_;
    std::size_t depth_ = 0;
};

template <const auto& D, std::size_t I, class Item, class S>
void walk_item(S& state, [[maybe_unused]] field_visitor& visitor, const planned_item& plan, [[maybe_unused]] int version) {
    if constexpr (is_wire_item<Item>) {
        if (!plan.sent || !field_exists<Item>(std::as_const(state), version)) return;
        if constexpr (may_share_its_name<Item>()) {
            numbering_visitor numbering(visitor, number_among_namesakes(std::remove_cvref_t<decltype(D)>::facts(), I));
            codec_of<Item>::type::walk(state, numbering);
        } else codec_of<Item>::type::walk(state, visitor);
    }
}
template <const auto& Sub, class S>
void walk_subsection(S& state, field_visitor& visitor) {
    if (!needed_by<Sub>(std::as_const(state))) return;
    using base = std::conditional_t<std::is_const_v<S>, const struct_of<Sub>, struct_of<Sub>>;
    visitor.begin_subsection(Sub.name, Sub.version_id);
    walk_body<Sub, Sub.version_id>(static_cast<base&>(state), visitor);
    visitor.end_subsection();
}
template <class S, const auto&... Subs>
void walk_subsections(S& state, field_visitor& visitor, const subsections_item<Subs...>&) {
    (walk_subsection<Subs>(state, visitor), ...);
}
template <const auto& D, int Version, class S, std::size_t... I, class... Items>
void walk_items(S& state, field_visitor& visitor, const item_index<std::index_sequence<I...>, Items...>*) {
    (walk_item<D, I, Items>(state, visitor, plan_of<D, Version>[I], Version), ...);
    if constexpr (has_item<D, item_kind::subsections>)
        for_subsections<Items...>([&](const auto& subsections) { walk_subsections(state, visitor, subsections); });
}
template <const auto& D, int Version, class S>
void walk_body(S& state, field_visitor& visitor) {
    walk_items<D, Version>(state, visitor, static_cast<const items_of<D>*>(nullptr));
}

} // namespace vmstate::detail
