// SPDX-License-Identifier: BSL-1.0
//
// Arrays of the stream's length: the containers that they are loaded into, and how much memory stands behind a pointer,
// which only its length tells, found out before a stream changes that length. Depends on codec/rows.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include <vmstate/codec/rows.hpp>

namespace vmstate::detail {

/// The value of a length member; negative, too, where it doesn't fit.
template <auto Member, class S>
constexpr std::int64_t length_of(const S& state) {
    return static_cast<std::int64_t>(state.*Member);
}

/// Memory behind a pointer, in elements (words of a bitmap).
struct room {
    /// Nothing is there: the loader allocates.
    static constexpr std::int64_t none = -1;

    std::int64_t elements = none;
    const void* memory = nullptr; // which memory that is said of
};

/// A container whose length another member tells.
template <class M, bool IsArray = array_shape<M>::is_array>
struct storage {
    static constexpr container kind = sequence_shape<M>::kind;
    static constexpr bool is_raw = kind == container::pointer;
    using E = typename sequence_shape<M>::element;

    static auto data(auto& member) {
        if constexpr (kind == container::vector) return member.data();
        else if constexpr (kind == container::unique_array) return member.get();
        else return member;
    }
    static bool is_null(const M& member) {
        if constexpr (kind == container::vector) return false;
        else return data(member) == nullptr;
    }
    /// Elements that may be read from the member, as far as it says.
    static std::uint64_t readable(const M& member) {
        if constexpr (kind == container::vector) return member.size();
        else return data(member) == nullptr ? 0 : std::numeric_limits<std::uint64_t>::max();
    }
    /// Elements that may be written to it.
    static std::uint64_t writable(const room* space) {
        if constexpr (is_raw)
            if (space->elements != room::none) return static_cast<std::uint64_t>(space->elements);
        return std::numeric_limits<std::uint64_t>::max();
    }

    /// Loads `count` elements over those that are there. Memory for a raw pointer is made for `limit` elements where it
    /// isn't 0: a later load counts on them, see `room_of`.
    template <class Elements, class A>
    static bool load(reader& r, M& member, std::size_t count, room* space, [[maybe_unused]] std::size_t limit) {
        if constexpr (kind == container::vector) {
            if (member.size() > count) member.resize(count);
            return load_growing<E, A>(r, count, [&](std::size_t, std::size_t next) {
                if (member.size() < next) member.resize(next);
                return member.data();
            });
        } else {
            const std::size_t in_the_end = is_raw ? std::max(count, limit) : count;
            if (space->elements >= 0 && count <= static_cast<std::uint64_t>(space->elements))
                return Elements::load(r, const_cast<std::remove_const_t<E>*>(data(member)), count);
            const bool loaded = load_growing<std::remove_const_t<E>, A>(r, count, [&](std::size_t have, std::size_t next) {
                return move_to(member, have, next == count ? in_the_end : next);
            });
            if (loaded && count != 0)
                *space = {static_cast<std::int64_t>(in_the_end), data(member)};
            else if (!loaded) give_back(member, *space);
            return loaded;
        }
    }

private:
    /// Memory for `count` elements that begin with the first `have` of those that are there.
    static std::remove_const_t<E>* move_to(M& member, std::size_t have, std::size_t count) {
        auto* const larger = new std::remove_const_t<E>[count]();
        auto* const old = const_cast<std::remove_const_t<E>*>(data(member));
        for (std::size_t i = 0; i != have; ++i) larger[i] = std::move(old[i]);
        if constexpr (kind == container::unique_array) member.reset(larger);
        else {
            if (have != 0) delete[] old;
            member = larger;
        }
        return larger;
    }
    /// After a failed load there is less behind the pointer than its length says: null, then.
    static void give_back(M& member, room& space) {
        if constexpr (kind == container::unique_array) member.reset();
        else {
            delete[] member;
            member = nullptr;
        }
        space = {};
    }
};
template <class M>
struct storage<M, true> {
    using shape = array_shape<M>;
    using E = typename shape::element;
    static constexpr container kind = container::none;
    static auto data(auto& member) { return shape::first(member); }
    static constexpr bool is_null(const M&) { return false; }
    static std::uint64_t readable(const M&) { return shape::count; }
    static std::uint64_t writable(const room*) { return shape::count; }

    template <class Elements, class A>
    static bool load(reader& r, M& member, std::size_t count, room*, std::size_t) {
        return Elements::load(r, data(member), count);
    }
};

/// A length as a number of elements, if it can be one.
template <class A, auto Length, class Stream, class S>
bool checked_count(Stream& stream, const S& state, std::size_t factor, std::uint64_t maximum, std::size_t& count) {
    const std::int64_t length = length_of<Length>(state);
    const auto refuse = [&](std::uint64_t most) {
        stream.fail(error(errc::out_of_range, "a length of at most " + std::to_string(most / factor), std::to_string(state.*Length)));
        return false;
    };
    if constexpr (A::limit_t::present) maximum = std::min<std::uint64_t>(maximum, A::limit_t::value);
    if (length < 0 || static_cast<std::uint64_t>(length) > std::numeric_limits<std::size_t>::max() / 64 / factor)
        return refuse(std::min<std::uint64_t>(maximum, std::numeric_limits<std::size_t>::max() / 64));
    count = static_cast<std::size_t>(length) * factor;
    return count <= maximum || refuse(maximum);
}

inline bool refuse_null(writer& w) {
    w.fail(error(errc::null_pointer, "a pointer to as many elements as the length says", "null"));
    return false;
}

// --- the room behind a pointer ---------------------------------------------------------------------------------------

/// Elements that a length of `length` stands for.
template <class A>
constexpr std::int64_t elements_of(std::int64_t length) {
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    if (length <= 0) return 0;
    if constexpr (A::bitmap_t::present) return length / 64 + (length % 64 != 0);
    else if constexpr (A::multiply_t::present) {
        constexpr auto factor = static_cast<std::int64_t>(A::multiply_t::value);
        return length > most / factor ? most : length * factor;
    } else return length;
}
/// The largest length that `elements` are enough for.
template <class A>
constexpr std::int64_t length_for(std::int64_t elements) {
    constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
    if constexpr (A::bitmap_t::present) return elements > most / 64 ? most : elements * 64;
    else if constexpr (A::multiply_t::present) return elements / static_cast<std::int64_t>(A::multiply_t::value);
    else return elements;
}
/// `limit` in elements; 0 without one.
template <class A>
constexpr std::size_t limit_in_elements() {
    if constexpr (!A::limit_t::present) return 0;
    else if constexpr (A::bitmap_t::present) return A::limit_t::value / 64 + (A::limit_t::value % 64 != 0);
    else return A::limit_t::value;
}

template <class Item, class S>
const void* memory_of(const S& state) {
    return storage<std::remove_const_t<typename Item::type>>::data(Item::of(state));
}

/// The room behind the pointer of `Item` as the state stands: what its length says, or for a raw pointer its `limit`.
template <class Item, class S>
room room_of(const S& state) {
    using A = typename Item::attributes;
    const void* const memory = memory_of<Item>(state);
    if (memory == nullptr) return {};
    if constexpr (A::limit_t::present && storage<std::remove_const_t<typename Item::type>>::is_raw)
        return {static_cast<std::int64_t>(limit_in_elements<A>()), memory};
    else return {elements_of<A>(length_of<length_member<A>()>(state)), memory};
}
/// Whether the length of `Item` says more than there is. Nothing is known of memory that a hook has put there since.
template <class Item, class S>
bool says_too_much(const S& state, const room& space) {
    const void* const memory = memory_of<Item>(state);
    if (memory == nullptr || memory != space.memory) return false;
    const std::int64_t length = length_of<length_member<typename Item::attributes>()>(state);
    return length < 0 || elements_of<typename Item::attributes>(length) > space.elements;
}
/// After a failed load: the length says what there is, for the next save or load to trust.
template <class Item, class S>
void restore_length(S& state, const room& space) {
    constexpr auto length = length_member<typename Item::attributes>();
    if (says_too_much<Item>(state, space))
        state.*length = static_cast<type_of<length>>(length_for<typename Item::attributes>(space.elements));
}

} // namespace vmstate::detail
