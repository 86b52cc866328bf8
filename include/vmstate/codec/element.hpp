// SPDX-License-Identifier: BSL-1.0
//
// Single elements on the wire: scalars, timers, nested descriptions, what pointers point to, custom codecs. An element
// of constant size has `flat` bytes and is encoded and decoded at a cursor passed by value, without asking whether there
// is room: its run has asked. The others write to and read from the stream themselves. Depends on describe/ and
// codec/{reader,writer,byte_order}.hpp.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/codec/field_visitor.hpp>
#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/describe/description.hpp>

namespace vmstate::detail {

// The bodies of nested descriptions; in body.hpp. `Version` is the version whose fields exist.
template <const auto& D, int Version, class S>
std::byte* encode_flat(std::byte* p, const S& state);
template <const auto& D, int Version, class S>
const std::byte* decode_flat(reader& r, const std::byte* p, S& state);
template <const auto& D, int Version, class S>
bool save_body(writer& w, S& state);
template <const auto& D, int Version, class S>
bool load_body(reader& r, S& state, int version_id);
template <const auto& D, int Version, class S>
constexpr std::size_t measure_body(const S& state);
template <const auto& D, int Version, class S>
void walk_body(S& state, field_visitor& visitor);

/// A hook's or a codec's outcome, latched.
inline bool keep(writer& w, const result<void>& outcome) {
    if (outcome.has_error()) w.fail(outcome.error());
    return !w.failed();
}
inline bool keep(reader& r, const result<void>& outcome) {
    if (outcome.has_error()) r.fail(outcome.error());
    return !r.failed();
}

// --- scalars ---------------------------------------------------------------------------------------------------------

template <class E>
[[gnu::always_inline]] constexpr auto value_of(const E& member) {
    if constexpr (atomic_value<E>::is_atomic) return member.load();
    else return member;
}

__extension__ using wide_integer = __int128;

/// Durations and time points travel as nanoseconds; what 64 bits can't hold wraps.
template <class Chrono>
constexpr std::uint64_t nanoseconds_of(const Chrono& value) {
    if constexpr (time_point_type<Chrono>) return nanoseconds_of(value.time_since_epoch());
    else {
        using period = typename Chrono::period;
        if constexpr (std::is_floating_point_v<typename Chrono::rep>) {
            const long double ns = static_cast<long double>(value.count()) * (period::num * 1e9L) / period::den;
            if (!(ns > -0x1p63L && ns < 0x1p63L)) return ns > 0 ? 0x7fffffffffffffff : 0x8000000000000000; // NaN, too
            return static_cast<std::uint64_t>(static_cast<std::int64_t>(ns));
        } else
            return static_cast<std::uint64_t>(static_cast<wide_integer>(value.count()) * (period::num * 1'000'000'000) / period::den);
    }
}
template <class Chrono>
constexpr Chrono chrono_from(std::uint64_t nanoseconds) {
    if constexpr (time_point_type<Chrono>) return Chrono(chrono_from<typename Chrono::duration>(nanoseconds));
    else {
        using period = typename Chrono::period;
        if constexpr (std::is_floating_point_v<typename Chrono::rep>)
            return Chrono(static_cast<typename Chrono::rep>(static_cast<long double>(static_cast<std::int64_t>(nanoseconds)) *
                                                            period::den / (period::num * 1e9L)));
        else return Chrono(static_cast<typename Chrono::rep>(static_cast<wide_integer>(static_cast<std::int64_t>(nanoseconds)) *
                                                        period::den / (period::num * 1'000'000'000)));
    }
}

template <class E>
[[gnu::always_inline]] inline std::underlying_type_t<E> underlying_of(const E& member) {
    std::underlying_type_t<E> held;
    std::memcpy(&held, &member, sizeof held);
    return held;
}

template <class E>
[[gnu::always_inline]] constexpr auto to_wire(const E& member) {
    using wire = typename wire_integer<E>::type;
    using value = typename atomic_value<E>::type;
    // Not by its value: an enum without a fixed underlying type may hold what is no value of it.
    if constexpr (std::is_enum_v<E>) return static_cast<wire>(underlying_of(member));
    else {
        const value v = value_of(member);
        if constexpr (is_chrono<value>) return nanoseconds_of(v);
        else if constexpr (std::is_floating_point_v<value>) return std::bit_cast<wire>(v);
        else return static_cast<wire>(v);
    }
}

template <class E>
[[gnu::always_inline]] constexpr auto from_wire(typename wire_integer<E>::type wire) {
    using value = typename atomic_value<E>::type;
    if constexpr (is_chrono<value>) return chrono_from<value>(wire);
    else if constexpr (std::is_floating_point_v<value>) return std::bit_cast<value>(wire);
    else if constexpr (std::is_same_v<value, bool>) return wire != 0;
    else return static_cast<value>(wire);
}

template <class E>
[[gnu::always_inline]] constexpr void assign(E& member, const typename atomic_value<E>::type& value) {
    if constexpr (atomic_value<E>::is_atomic) member.store(value);
    else member = value;
}

/// What came from the wire into the member.
template <class E>
[[gnu::always_inline]] constexpr void take(E& member, typename wire_integer<E>::type wire) {
    if constexpr (std::is_enum_v<E>) {
        const auto held = static_cast<std::underlying_type_t<E>>(wire);
        std::memcpy(&member, &held, sizeof held);
    } else assign(member, from_wire<E>(wire));
}

template <class Value>
std::string printed(const Value& value) {
    if constexpr (std::is_enum_v<Value>) return printed(static_cast<std::underlying_type_t<Value>>(value));
    else if constexpr (is_chrono<Value>) return std::to_string(static_cast<std::int64_t>(to_wire(value))) + " ns";
    else if constexpr (std::is_same_v<Value, bool>) return value ? "true" : "false";
    else if constexpr (std::is_floating_point_v<Value>) return std::to_string(value);
    else if constexpr (std::is_signed_v<Value>) return std::to_string(static_cast<long long>(value));
    else return std::to_string(static_cast<unsigned long long>(value));
}

template <class A, class Value>
constexpr bool acceptable(const Value& loaded, const Value& current) {
    bool fine = true;
    if constexpr (A::is_equal) fine = loaded == current;
    if constexpr (A::is_at_most_current) {
        if constexpr (std::is_signed_v<Value>) fine = fine && loaded >= Value(0);
        fine = fine && !(current < loaded);
    }
    if constexpr (A::between_t::present)
        fine = fine && !(loaded < static_cast<Value>(A::between_t::low)) &&
               !(static_cast<Value>(A::between_t::high) < loaded);
    return fine;
}

template <class A, class Value>
BOOST_NOINLINE bool refuse_value(reader& r, const Value& loaded, const Value& current) {
    if constexpr (A::is_equal)
        if (!(loaded == current)) return r.fail(error(errc::value_mismatch, printed(current), printed(loaded)));
    if constexpr (A::is_at_most_current)
        if (current < loaded || loaded < Value())
            return r.fail(error(errc::out_of_range, "0 to " + printed(current), printed(loaded)));
    if constexpr (A::between_t::present)
        return r.fail(error(errc::out_of_range,
                            printed(static_cast<Value>(A::between_t::low)) + " to " +
                                printed(static_cast<Value>(A::between_t::high)),
                            printed(loaded)));
    return false;
}

/// A scalar without attributes: needs nothing that is made per field.
template <class Item>
inline constexpr bool is_plain_scalar = false;
template <class Item>
    requires(is_plain_field<Item>)
inline constexpr bool is_plain_scalar<Item> = is_scalar<std::remove_const_t<typename Item::type>>();

/// What all elements of constant size share; `flat` is 0 for the others.
template <class E, class A, wire_form Form = element_form<E, A>()>
struct element;

template <class E, class A>
struct element<E, A, wire_form::scalar> {
    static constexpr std::size_t flat = wire_integer<E>::size;
    static constexpr std::size_t minimum = flat;

    [[gnu::always_inline]] static std::byte* encode(std::byte* p, const E& member) { return store_big(p, to_wire(member)); }
    [[gnu::always_inline]] static const std::byte* decode(reader& r, const std::byte* p, E& member) {
        const auto wire = load_big<typename wire_integer<E>::type>(p);
        if constexpr (A::is_checked) {
            const auto loaded = from_wire<typename arithmetic_of<E>::type>(wire);
            const auto current = [&] {
                if constexpr (std::is_enum_v<E>) return underlying_of(member);
                else return value_of(member);
            }();
            if (!acceptable<A>(loaded, current)) [[unlikely]] {
                r.seek(p);
                refuse_value<A>(r, loaded, current);
                return nullptr;
            }
        }
        take(member, wire);
        return p + flat;
    }
    static constexpr std::size_t measure(const E&) { return flat; }
};

template <class E, class A>
struct element<E, A, wire_form::timer> {
    static constexpr std::size_t flat = 8;
    static constexpr std::size_t minimum = flat;
    using value = typename optional_value<E>::type;

    static std::byte* encode(std::byte* p, const E& member) {
        if constexpr (optional_value<E>::is_optional)
            return store_big(p, member ? static_cast<std::uint64_t>(to_wire(*member)) : ~std::uint64_t{0});
        else return store_big(p, static_cast<std::uint64_t>(to_wire(member)));
    }
    static const std::byte* decode(reader&, const std::byte* p, E& member) {
        const auto expiry = load_big<std::uint64_t>(p);
        if constexpr (optional_value<E>::is_optional) {
            if (expiry == ~std::uint64_t{0}) member.reset();
            else member = from_wire<value>(expiry);
        } else member = from_wire<value>(expiry);
        return p + flat;
    }
    static constexpr std::size_t measure(const E&) { return flat; }
};

template <class E, class A>
struct element<E, A, wire_form::structure> {
    static constexpr const auto& description = nested<E, A>::description;
    static constexpr int version = nested<E, A>::version;
    static constexpr std::size_t flat = flat_size(schema_for<description>(), version);
    static constexpr std::size_t minimum = minimum_size(schema_for<description>(), version);
    using base = struct_of<description>;

    [[gnu::always_inline]] static std::byte* encode(std::byte* p, const E& member) {
        return encode_flat<description, version>(p, static_cast<const base&>(member));
    }
    [[gnu::always_inline]] static const std::byte* decode(reader& r, const std::byte* p, E& member) {
        return decode_flat<description, version>(r, p, static_cast<base&>(member));
    }
    template <class Member>
    static bool save(writer& w, Member& member) {
        return save_body<description, version>(w, as_base(member));
    }
    static bool load(reader& r, E& member) {
        return load_body<description, version>(r, static_cast<base&>(member), version);
    }
    static constexpr std::size_t measure(const E& member) {
        if constexpr (flat != 0) return flat;
        else return measure_body<description, version>(static_cast<const base&>(member));
    }
    template <class Member>
    static void walk(Member& member, field_visitor& visitor) {
        visitor.begin_nested(description.name, version);
        walk_body<description, version>(as_base(member), visitor);
        visitor.end_nested();
    }

private:
    static const base& as_base(const E& member) { return member; }
    static base& as_base(E& member) { return member; }
};

template <class E, class A>
struct element<E, A, wire_form::custom> {
    using codec = typename A::coded_t::type;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = 0;

    static bool save(writer& w, const E& member) { return keep(w, codec::save(w, member)); }
    static bool load(reader& r, E& member) { return keep(r, codec::load(r, member)); }
    static constexpr std::size_t measure(const E& member) { return static_cast<std::size_t>(codec::size(member)); }
};

/// What a pointer points to. In an array of pointers a null one is the byte '0', and the receiver's own pointers must be
/// null at the same places (QEMU: vmstate_load_state with VMS_ARRAY_OF_POINTER).
template <class E, class A>
struct element<E, A, wire_form::pointer> {
    using pointee_type = typename pointer_shape<E>::pointee;
    using plain = std::remove_const_t<pointee_type>;
    using pointee = element<plain, A>;
    static constexpr std::size_t flat = 0;
    static constexpr std::size_t minimum = 1;
    static constexpr std::byte null_marker{0x30};

    /// A lone pointer: it has to point to something. One that owns makes itself an object to load into.
    template <class P>
    static bool save(writer& w, const P& member) {
        if (member == nullptr) {
            w.fail(error(errc::null_pointer, "a pointer to something", "null"));
            return false;
        }
        return save_one(w, *member);
    }
    static bool load(reader& r, E& member) {
        if (member == nullptr) {
            if constexpr (pointer_shape<E>::owns && std::is_default_constructible_v<plain>) member.reset(new plain());
            else return r.fail(error(errc::null_pointer, "a pointer to something", "null"));
        }
        return load_one(r, *member);
    }
    static std::size_t measure(const E& member) { return member == nullptr ? 0 : pointee::measure(*member); }

    /// One of an array of pointers.
    template <class P>
    static bool save_marked(writer& w, const P& member) {
        if (member != nullptr) return save_one(w, *member);
        w.put_u8(std::to_integer<std::uint8_t>(null_marker));
        return !w.failed();
    }
    static bool load_marked(reader& r, E& member) {
        if (member != nullptr) return load_one(r, *member);
        const std::byte* p = r.need(1);
        if (p == nullptr) return false;
        if (*p != null_marker)
            return r.fail(error(errc::bad_marker, "the null marker 0x30, since this pointer is null",
                                std::to_string(std::to_integer<int>(*p))));
        r.seek(p + 1);
        return true;
    }
    static std::size_t measure_marked(const E& member) { return member == nullptr ? 1 : pointee::measure(*member); }

    template <class T>
    static bool save_one(writer& w, T& object) {
        if constexpr (pointee::flat != 0 && pointee::flat <= writer::max_reserve) {
            std::byte* p = w.reserve(pointee::flat);
            if (p == nullptr) return false;
            w.commit(pointee::encode(p, object));
            return true;
        } else return pointee::save(w, object);
    }
    static bool load_one(reader& r, plain& object) {
        if constexpr (pointee::flat != 0 && pointee::flat <= reader::max_window) {
            const std::byte* p = r.need(pointee::flat);
            if (p == nullptr || (p = pointee::decode(r, p, object)) == nullptr) return false;
            r.seek(p);
            return true;
        } else return pointee::load(r, object);
    }
};

} // namespace vmstate::detail
