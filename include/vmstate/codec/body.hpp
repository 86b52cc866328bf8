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
template <const auto& D, std::size_t I>
using item_of = typename decltype(pick_item<I>(static_cast<const items_of<D>*>(nullptr)))::type;
template <const auto& D>
inline constexpr std::size_t item_count = std::remove_cvref_t<decltype(D)>::item_count;

/// A run asks once for all its bytes; what a reader or writer can promise in one piece bounds it.
inline constexpr std::size_t max_run = 2048;

/// Present in every stream of this version, and of constant size.
template <class Item, int Version>
consteval std::size_t flat_bytes() {
    if constexpr (is_wire_item<Item>) {
        if constexpr (Item::attributes::when_t::present || Item::attributes::since > Version) return 0;
        else return codec_of<Item>::type::flat;
    } else return 0;
}
template <class Item, int Version>
consteval bool is_sent() {
    if constexpr (Item::kind == item_kind::validation) return true;
    else if constexpr (is_wire_item<Item>) return Item::attributes::when_t::present || Item::attributes::since <= Version;
    else return false;
}

template <class Items, int Version>
struct plan;
template <std::size_t... I, class... Items, int Version>
struct plan<item_index<std::index_sequence<I...>, Items...>, Version> {
    using indexes = std::index_sequence<I...>;
    static constexpr std::array<std::size_t, sizeof...(Items) + 1> flat{flat_bytes<Items, Version>()..., 0};
    static constexpr std::array<bool, sizeof...(Items) + 1> sent{is_sent<Items, Version>()..., false};
    /// At the first field of a run, the bytes of the whole run; elsewhere 0.
    static constexpr auto run = [] {
        std::array<std::size_t, sizeof...(Items) + 1> bytes{};
        std::size_t head = 0;
        for (std::size_t i = 0; i != sizeof...(Items); ++i) {
            if (!sent[i]) continue;
            if (flat[i] == 0) head = sizeof...(Items);
            else if (head == sizeof...(Items) || bytes[head] == 0 || bytes[head] + flat[i] > max_run) bytes[head = i] = flat[i];
            else bytes[head] += flat[i];
        }
        bytes[sizeof...(Items)] = 0;
        return bytes;
    }();
};
template <const auto& D, int Version>
using plan_of = plan<items_of<D>, Version>;

/// The newest `since` that a stream of `version` has: streams with the same one have the same fields.
constexpr int layout_version(const schema& body, int version) {
    int newest = 0;
    for (const schema_field& field : body.fields)
        if (!field.conditional && field.since <= version && field.since > newest) newest = field.since;
    return newest;
}

template <const auto& D, item_kind Kind, std::size_t... I>
consteval std::size_t find_item(std::index_sequence<I...>) {
    std::size_t found = item_count<D>;
    ((found = item_of<D, I>::kind == Kind ? I : found), ...);
    return found;
}
template <const auto& D, item_kind Kind>
inline constexpr std::size_t item_index_of = find_item<D, Kind>(std::make_index_sequence<item_count<D>>{});
template <const auto& D, item_kind Kind>
inline constexpr bool has_item = item_index_of<D, Kind> != item_count<D>;
template <const auto& D, item_kind Kind>
using the_item = item_of<D, item_index_of<D, Kind>>;

template <const auto& D>
inline constexpr bool has_hooks = has_item<D, item_kind::pre_load> || has_item<D, item_kind::post_load> ||
                                  has_item<D, item_kind::pre_save> || has_item<D, item_kind::post_save>;
template <const auto& D>
inline constexpr bool has_subsections = has_item<D, item_kind::subsections>;

/// The constant size of a body that is nothing but flat fields, else 0.
template <const auto& D, int Version>
consteval std::size_t flat_size() {
    if constexpr (has_hooks<D> || has_subsections<D>) return 0;
    else {
        using body = plan_of<D, Version>;
        std::size_t size = 0;
        for (std::size_t i = 0; i != item_count<D>; ++i) {
            if (!body::sent[i]) continue;
            if (body::flat[i] == 0) return 0;
            size += body::flat[i];
        }
        return size <= max_flat ? size : 0;
    }
}

template <class Item, int Version>
consteval std::size_t minimum_bytes() {
    if constexpr (is_wire_item<Item>) {
        if constexpr (Item::attributes::when_t::present || Item::attributes::since > Version) return 0;
        else return codec_of<Item>::type::minimum;
    } else return 0;
}
template <const auto& D, int Version>
consteval std::size_t minimum_size() {
    return []<std::size_t... I>(std::index_sequence<I...>) {
        return (std::size_t{0} + ... + minimum_bytes<item_of<D, I>, Version>());
    }(std::make_index_sequence<item_count<D>>{});
}

// --- flat bodies, inside somebody else's run -------------------------------------------------------------------------

template <class Item, int Version, class S>
[[gnu::always_inline]] inline std::byte* encode_item(std::byte* p, const S& state) {
    if constexpr (is_sent<Item, Version>()) return codec_of<Item>::type::encode(p, state);
    else return p;
}
template <class Item, int Version, class S>
[[gnu::always_inline]] inline const std::byte* decode_item(reader& r, const std::byte* p, S& state) {
    if constexpr (is_sent<Item, Version>()) {
        p = codec_of<Item>::type::decode(r, p, state);
        if (p == nullptr) [[unlikely]] r.failure().within(Item::name());
    }
    return p;
}

template <const auto& D, int Version, class S>
[[gnu::always_inline]] inline std::byte* encode_flat(std::byte* p, const S& state) {
    return [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
        std::byte* at = p;
        ((at = encode_item<item_of<D, I>, Version>(at, state)), ...);
        return at;
    }(std::make_index_sequence<item_count<D>>{});
}
template <const auto& D, int Version, class S>
[[gnu::always_inline]] inline const std::byte* decode_flat(reader& r, const std::byte* p, S& state) {
    return [&]<std::size_t... I>(std::index_sequence<I...>) __attribute__((always_inline)) {
        const std::byte* at = p;
        ((at = at == nullptr ? at : decode_item<item_of<D, I>, Version>(r, at, state)), ...);
        return at;
    }(std::make_index_sequence<item_count<D>>{});
}

// --- saving ----------------------------------------------------------------------------------------------------------

template <const auto& D, item_kind Kind, class S>
error hook(std::string_view name, S& state, [[maybe_unused]] int version_id) {
    if constexpr (has_item<D, Kind>) return run_hook<the_item<D, Kind>::function>(name, state, version_id);
    else return {};
}

template <const auto& D, class S>
bool needed_by(const S& state) {
    if constexpr (has_item<D, item_kind::needed>)
        return holds<the_item<D, item_kind::needed>::function>(state, D.version_id);
    else return true;
}

/// Whether a field with a predicate is there.
template <class Item, class S>
[[gnu::always_inline]] inline bool field_exists(const S& state, [[maybe_unused]] int version_id) {
    if constexpr (Item::attributes::when_t::present) return holds<Item::attributes::when_t::value>(state, version_id);
    else return true;
}

/// One item at the cursor `p`; the cursor behind it, or null. By value, so that it stays in a register: through a
/// reference every store of a byte might change it.
template <const auto& D, int Version, std::size_t I, class S>
[[gnu::always_inline]] inline std::byte* save_item(writer& w, std::byte* p, S& state) {
    using Item = item_of<D, I>;
    using body = plan_of<D, Version>;
    if constexpr (Item::kind == item_kind::validation) {
        if (holds<Item::predicate>(state, Version)) return p;
        w.commit(p);
        w.fail(error(errc::validation_failed, std::string(Item::name()), "otherwise"));
        return nullptr;
    } else if constexpr (!body::sent[I]) {
        return p;
    } else if constexpr (body::flat[I] != 0) {
        if constexpr (body::run[I] != 0) {
            if (static_cast<std::size_t>(w.window_end() - p) < body::run[I]) [[unlikely]] {
                w.commit(p);
                p = w.reserve(body::run[I]);
                if (p == nullptr) {
                    w.failure().within(Item::name());
                    return nullptr;
                }
            }
        }
        return codec_of<Item>::type::encode(p, std::as_const(state));
    } else {
        if (!field_exists<Item>(state, Version)) return p;
        w.commit(p);
        if (!codec_of<Item>::type::save(w, state)) {
            w.failure().within(Item::name());
            return nullptr;
        }
        return w.cursor();
    }
}

template <const auto& D, int Version, class S, std::size_t... I>
[[gnu::always_inline]] inline bool save_fields(writer& w, S& state, std::index_sequence<I...>) {
    std::byte* p = w.cursor();
    // An empty window has no address; its first reserve will give one.
    [[maybe_unused]] bool going = true;
    ((going = going && (p = save_item<D, Version, I>(w, p, state), p != nullptr || !w.failed())), ...);
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
template <class S, class Item>
bool save_subsections(writer&, S&, const Item&) {
    return true;
}
template <class S, class... Items, std::size_t... I>
bool save_all_subsections(writer& w, S& state, const item_index<std::index_sequence<I...>, Items...>*) {
    return (true && ... && save_subsections(w, state, Items{}));
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
    bool saved = save_fields<D, layout_version(schema_for<D>(), Version)>(w, state, std::make_index_sequence<item_count<D>>{});
    if constexpr (has_subsections<D>)
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

/// What a run's fields are called and how long they are: only looked at when the stream ends inside one.
struct run_entry {
    std::string_view name;
    std::size_t size;
    bool sent;
};
template <const auto& D, int Version, std::size_t... I>
consteval auto make_run_entries(std::index_sequence<I...>) {
    const auto name = []<class Item>(const Item&) -> std::string_view {
        if constexpr (is_wire_item<Item>) return Item::name();
        else return {};
    };
    return std::array<run_entry, sizeof...(I) + 1>{
        run_entry{name(item_of<D, I>{}), plan_of<D, Version>::flat[I], plan_of<D, Version>::sent[I]}..., run_entry{}};
}
template <const auto& D, int Version>
inline constexpr auto run_entries = make_run_entries<D, Version>(std::make_index_sequence<item_count<D>>{});

/// The stream has ended in the run that begins with `entries`: names the field that it ends in.
[[gnu::cold, gnu::noinline]] inline void truncated_run(reader& r, const run_entry* entries) {
    if (r.failed() && r.failure().code() != errc::truncated) return;
    std::size_t there = r.window();
    std::size_t before = 0;
    while (!entries->sent || entries->size <= there) {
        if (entries->sent) {
            there -= entries->size;
            before += entries->size;
        }
        ++entries;
    }
    error failure(errc::truncated, std::to_string(entries->size) + (entries->size == 1 ? " byte" : " bytes"),
                  std::to_string(there));
    failure.at_offset(r.offset() + before).within(entries->name);
    r.failure() = std::move(failure);
}

template <const auto& D, int Version, std::size_t I, class S>
[[gnu::always_inline]] inline const std::byte* load_item(reader& r, const std::byte* p, S& state, const std::int64_t* capacities,
                                                         int version_id) {
    using Item = item_of<D, I>;
    using body = plan_of<D, Version>;
    if constexpr (Item::kind == item_kind::validation) {
        if (holds<Item::predicate>(state, version_id)) return p;
        r.seek(p);
        r.fail(error(errc::validation_failed, std::string(Item::name()), "otherwise"));
        return nullptr;
    } else if constexpr (!body::sent[I]) {
        return p;
    } else if constexpr (body::flat[I] != 0) {
        if constexpr (body::run[I] != 0) {
            if (static_cast<std::size_t>(r.window_end() - p) < body::run[I]) [[unlikely]] {
                r.seek(p);
                p = r.need(body::run[I]);
                if (p == nullptr) {
                    truncated_run(r, &run_entries<D, Version>[I]);
                    return nullptr;
                }
            }
        }
        p = codec_of<Item>::type::decode(r, p, state);
        if constexpr (requires { Item::attributes::is_checked; })
            if (p == nullptr) [[unlikely]] r.failure().within(Item::name());
        return p;
    } else {
        if (!field_exists<Item>(state, version_id)) return p;
        r.seek(p);
        if (!codec_of<Item>::type::load(r, state, capacities[I])) {
            r.failure().within(Item::name());
            return nullptr;
        }
        return r.cursor();
    }
}

/// Room behind arrays of the stream's length, before the stream can change the length.
template <class Item, class S>
std::int64_t capacity_before(const S& state) {
    if constexpr (Item::kind == item_kind::field) {
        using A = typename Item::attributes;
        if constexpr (A::length_t::present) return capacity_of<Item, A::length_t::value>(state);
        else if constexpr (A::bitmap_t::present) return capacity_of<Item, A::bitmap_t::value>(state);
    }
    return allocates;
}
template <class Item>
inline constexpr bool has_length = false;
template <auto M, class... A>
inline constexpr bool has_length<field_item<M, A...>> =
    field_item<M, A...>::attributes::length_t::present || field_item<M, A...>::attributes::bitmap_t::present;

template <const auto& D, int Version, class S, std::size_t... I>
[[gnu::always_inline]] inline bool load_fields(reader& r, S& state, int version_id, std::index_sequence<I...>) {
    const std::int64_t* capacities = nullptr;
    static constexpr std::int64_t none[sizeof...(I) + 1] = {};
    capacities = none;
    [[maybe_unused]] std::int64_t taken[sizeof...(I) + 1];
    if constexpr ((false || ... || has_length<item_of<D, I>>)) {
        ((taken[I] = capacity_before<item_of<D, I>>(state)), ...);
        capacities = taken;
    }
    const std::byte* p = r.cursor();
    ((p = p == nullptr ? p : load_item<D, Version, I>(r, p, state, capacities, version_id)), ...);
    if (p == nullptr) return false;
    r.seek(p);
    return true;
}

/// Fields of a stream of `version_id`, on the path made for its layout; `Below` bounds the layouts still to try.
template <const auto& D, int Below, class S>
bool load_layout(reader& r, S& state, int version_id) {
    constexpr int layout = layout_version(schema_for<D>(), Below);
    if constexpr (layout > 0) {
        if (version_id < layout && layout > D.minimum_version_id) return load_layout<D, layout - 1>(r, state, version_id);
    }
    return load_fields<D, layout>(r, state, version_id, std::make_index_sequence<item_count<D>>{});
}

/// "expected 3 to 5, found 6".
inline bool refuse_version(reader& r, int version_id, int oldest, int newest) {
    return r.fail(error(version_id > newest ? errc::version_too_new : errc::version_too_old,
                        oldest == newest ? "version " + std::to_string(newest)
                                         : "version " + std::to_string(oldest) + " to " + std::to_string(newest),
                        std::to_string(version_id)));
}

template <const auto& D, class S>
bool load_versioned(reader& r, S& state, int version_id);

template <const auto& Sub, class S>
bool load_subsection(reader& r, S& state, int version_id) {
    if (load_versioned<Sub>(r, static_cast<struct_of<Sub>&>(state), version_id)) return true;
    r.failure().within(Sub.name.substr(Sub.name.rfind('/') + 1));
    return false;
}

enum class lookup { unknown, loaded, failed };
template <class S, const auto&... Subs>
lookup load_named(reader& r, S& state, std::string_view name, const std::byte* body, const subsections_item<Subs...>&) {
    lookup found = lookup::unknown;
    const auto try_one = [&]<const auto& Sub>(const subsections_item<Sub>&) {
        if (found != lookup::unknown || name != Sub.name) return;
        r.seek(body);
        const auto version_id = static_cast<int>(r.get_be32());
        if (r.failed()) r.failure().within(Sub.name.substr(Sub.name.rfind('/') + 1));
        found = !r.failed() && load_subsection<Sub>(r, state, version_id) ? lookup::loaded : lookup::failed;
    };
    (try_one(subsections_item<Subs>{}), ...);
    return found;
}
template <class S, class Item>
lookup load_named(reader&, S&, std::string_view, const std::byte*, const Item&) {
    return lookup::unknown;
}
template <class S, class... Items, std::size_t... I>
lookup load_any_named(reader& r, S& state, std::string_view name, const std::byte* body,
                      const item_index<std::index_sequence<I...>, Items...>*) {
    lookup found = lookup::unknown;
    ((found = found == lookup::unknown ? load_named(r, state, name, body, Items{}) : found), ...);
    return found;
}

/// A subsection header for a description called `parent` at the cursor: its name, and where its version stands. Empty
/// where there is none (QEMU: vmstate_subsection_load).
inline std::string_view peek_subsection(reader& r, std::string_view parent, const std::byte*& behind_name) {
    if (r.peek(2) < 2 || *r.cursor() != std::byte{0x05}) return {};
    const auto size = std::to_integer<std::size_t>(r.cursor()[1]);
    if (size < parent.size() + 1 || r.peek(2 + size) < 2 + size) return {};
    const std::string_view name(reinterpret_cast<const char*>(r.cursor()) + 2, size);
    if (name.substr(0, parent.size()) != parent) return {};
    behind_name = r.cursor() + 2 + size;
    return name;
}

/// In any order, as often as they come.
template <const auto& D, class S>
bool load_subsections(reader& r, S& state) {
    for (;;) {
        const std::byte* behind_name = nullptr;
        // The name stands in the window: compared before anything moves on.
        const std::string_view name = peek_subsection(r, D.name, behind_name);
        if (name.empty()) [[likely]] return !r.failed();
        switch (load_any_named(r, state, name, behind_name, static_cast<const items_of<D>*>(nullptr))) {
        case lookup::loaded: break;
        case lookup::failed: return false;
        case lookup::unknown:
            return r.fail(error(errc::unknown_subsection, "a subsection of " + std::string(D.name), std::string(name)));
        }
    }
}

/// pre_load, fields, subsections, post_load; `Version` bounds the layouts, `version_id` is what hooks are told.
template <const auto& D, int Version, class S>
bool load_hooked(reader& r, S& state, int version_id, int layout) {
    if constexpr (has_item<D, item_kind::pre_load>) {
        if (error failure = hook<D, item_kind::pre_load>("pre_load", state, version_id)) return r.fail(std::move(failure));
    }
    if (!load_layout<D, Version>(r, state, layout)) return false;
    if (!load_subsections<D>(r, state)) return false;
    if constexpr (has_item<D, item_kind::post_load>) {
        if (error failure = hook<D, item_kind::post_load>("post_load", state, version_id)) return r.fail(std::move(failure));
    }
    return true;
}

/// A nested body: the stream has no version for it, so it is that of this side's description.
template <const auto& D, int Version, class S>
bool load_body(reader& r, S& state, int version_id) {
    return load_hooked<D, Version>(r, state, version_id, Version);
}

/// A body that comes with its version: a section's or a subsection's.
template <const auto& D, class S>
bool load_versioned(reader& r, S& state, int version_id) {
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
    return load_hooked<D, D.version_id>(r, state, version_id, version_id);
}

// --- measuring and walking -------------------------------------------------------------------------------------------

template <const auto& D, int Version, std::size_t I, class S>
constexpr std::size_t measure_item(const S& state) {
    using Item = item_of<D, I>;
    if constexpr (!is_wire_item<Item> || !is_sent<Item, Version>()) return 0;
    else if constexpr (flat_bytes<Item, Version>() != 0) return flat_bytes<Item, Version>();
    else if (field_exists<Item>(state, Version)) return codec_of<Item>::type::measure(state);
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
template <class S, class Item>
constexpr std::size_t measure_subsections(const S&, const Item&) {
    return 0;
}
template <const auto& D, int Version, class S>
constexpr std::size_t measure_body(const S& state) {
    return [&]<std::size_t... I>(std::index_sequence<I...>) {
        return (std::size_t{0} + ... +
                (measure_item<D, Version, I>(state) + measure_subsections(state, item_of<D, I>{})));
    }(std::make_index_sequence<item_count<D>>{});
}

template <const auto& D, int Version, std::size_t I, class S>
void walk_item(S& state, field_visitor& visitor) {
    using Item = item_of<D, I>;
    if constexpr (is_wire_item<Item> && is_sent<Item, Version>()) {
        if (!field_exists<Item>(std::as_const(state), Version)) return;
        codec_of<Item>::type::walk(state, visitor);
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
template <class S, class Item>
void walk_subsections(S&, field_visitor&, const Item&) {}

template <const auto& D, int Version, class S>
void walk_body(S& state, field_visitor& visitor) {
    [&]<std::size_t... I>(std::index_sequence<I...>) {
        (walk_item<D, Version, I>(state, visitor), ...);
        (walk_subsections(state, visitor, item_of<D, I>{}), ...);
    }(std::make_index_sequence<item_count<D>>{});
}

} // namespace vmstate::detail
