// SPDX-License-Identifier: BSL-1.0
//
// Rows of elements: moved in bulk where they are integers, in stretches where they are flat, one by one otherwise; and
// the containers that grow while a row is loaded, never ahead of the bytes that are there. Depends on codec/element.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>

#include <vmstate/codec/element.hpp>

namespace vmstate::detail {

/// Rows of integers that differ from their wire form in byte order only.
template <class E, class A>
consteval bool is_bulk() {
    if constexpr (element_form<E, A>() != wire_form::scalar || A::is_checked) return false;
    else return !atomic_value<E>::is_atomic && !is_chrono<E> && !std::is_same_v<E, bool>;
}

template <class E, class A>
struct row {
    using one = element<E, A>;
    static constexpr bool bulk = is_bulk<E, A>();
    static constexpr bool marked = element_form<E, A>() == wire_form::pointer;
    static constexpr std::size_t flat = one::flat;
    static constexpr std::size_t minimum = one::minimum;

    template <std::size_t Count>
    [[gnu::always_inline]] static std::byte* encode(std::byte* p, const E* elements) {
        if constexpr (bulk) copy_units<flat, Count>(p, reinterpret_cast<const std::byte*>(elements));
        else
            for (std::size_t i = 0; i != Count; ++i) one::encode(p + i * flat, elements[i]);
        return p + Count * flat;
    }
    template <std::size_t Count>
    [[gnu::always_inline]] static const std::byte* decode(reader& r, const std::byte* p, E* elements) {
        if constexpr (bulk) copy_units<flat, Count>(reinterpret_cast<std::byte*>(elements), p);
        else
            for (std::size_t i = 0; i != Count; ++i)
                if (one::decode(r, p + i * flat, elements[i]) == nullptr) {
                    r.failure().at_index(i);
                    return nullptr;
                }
        return p + Count * flat;
    }

    template <class Element>
    static bool save(writer& w, Element* elements, std::size_t count) {
        if constexpr (bulk && flat == 1) {
            w.write(elements, count);
            return !w.failed();
        } else if constexpr (bulk || (flat != 0 && flat <= max_flat)) {
            for (std::size_t done = 0; done != count;) {
                std::byte* p = w.reserve(flat);
                if (p == nullptr) return false;
                const std::size_t stretch = std::min(count - done, w.room() / flat);
                if constexpr (bulk) copy_units<flat>(p, reinterpret_cast<const std::byte*>(elements + done), stretch);
                else
                    for (std::size_t i = 0; i != stretch; ++i) one::encode(p + i * flat, elements[done + i]);
                w.commit(p + stretch * flat);
                done += stretch;
            }
            return true;
        } else {
            for (std::size_t i = 0; i != count; ++i) {
                bool saved;
                if constexpr (marked) saved = one::save_marked(w, elements[i]);
                else saved = one::save(w, elements[i]);
                if (!saved) {
                    w.failure().at_index(i);
                    return false;
                }
            }
            return true;
        }
    }
    /// `first` is the index of elements[0], for messages.
    static bool load(reader& r, E* elements, std::size_t count, std::size_t first = 0) {
        if constexpr (bulk && flat == 1) {
            return r.read(elements, count);
        } else if constexpr (bulk || (flat != 0 && flat <= max_flat)) {
            for (std::size_t done = 0; done != count;) {
                const std::byte* p = r.need(flat);
                if (p == nullptr) {
                    r.failure().at_index(first + done);
                    return false;
                }
                const std::size_t stretch = std::min(count - done, r.window() / flat);
                if constexpr (bulk) copy_units<flat>(reinterpret_cast<std::byte*>(elements + done), p, stretch);
                else
                    for (std::size_t i = 0; i != stretch; ++i)
                        if (one::decode(r, p + i * flat, elements[done + i]) == nullptr) {
                            r.failure().at_index(first + done + i);
                            return false;
                        }
                r.seek(p + stretch * flat);
                done += stretch;
            }
            return true;
        } else {
            for (std::size_t i = 0; i != count; ++i) {
                bool loaded;
                if constexpr (marked) loaded = one::load_marked(r, elements[i]);
                else loaded = one::load(r, elements[i]);
                if (!loaded) {
                    r.failure().at_index(first + i);
                    return false;
                }
            }
            return true;
        }
    }
    static constexpr std::size_t measure(const E* elements, std::size_t count) {
        if constexpr (flat != 0) return flat * count;
        else {
            std::size_t size = 0;
            for (std::size_t i = 0; i != count; ++i) {
                if constexpr (marked) size += one::measure_marked(elements[i]);
                else size += one::measure(elements[i]);
            }
            return size;
        }
    }
    template <class Element>
    static void walk(Element* elements, std::size_t count, field_event entry, bool conditional, field_visitor& visitor) {
        const std::size_t array_size = entry.size;
        if (is_byte<E> && !marked) { // a buffer is one thing
            entry.array_len = 1;
            visitor.begin_field(entry);
            visitor.end_field();
            return;
        }
        // QEMU lists an array as one entry where its elements are sure to look alike: no predicate, and not behind
        // pointers that may be null (migration/vmstate.c, vmsd_can_compress).
        if (!conditional && !marked && can_compress() && count > 1) {
            entry.array_len = count;
            entry.size = array_size / count;
            visitor.begin_field(entry);
            if constexpr (element_form<E, A>() == wire_form::structure) one::walk(elements[0], visitor);
            visitor.end_field();
            return;
        }
        for (std::size_t i = 0; i != count; ++i) {
            if (count > 1) entry.index = i;
            walk_one(elements[i], entry, visitor);
        }
    }

private:
    template <class Element>
    static void walk_one(Element& member, field_event entry, field_visitor& visitor) {
        if constexpr (marked) {
            if (member == nullptr) {
                entry.size = 1;
                entry.type = "ptr-marker"; // as the newest QEMU calls it
                visitor.begin_field(entry);
                visitor.end_field();
            } else {
                using pointee = typename one::pointee;
                entry.size = one::measure_marked(member);
                visitor.begin_field(entry);
                if constexpr (element_form<typename one::plain, A>() == wire_form::structure) pointee::walk(*member, visitor);
                visitor.end_field();
            }
        } else {
            entry.size = one::measure(member);
            visitor.begin_field(entry);
            if constexpr (element_form<E, A>() == wire_form::structure) one::walk(member, visitor);
            visitor.end_field();
        }
    }
    static constexpr bool can_compress() {
        if constexpr (element_form<E, A>() == wire_form::structure) return compressible(schema_for<one::description>());
        else return true;
    }

public:
    static constexpr bool compressible(const schema& body) {
        for (const schema_field& field : body.fields) {
            if (field.conditional) return false;
            if (field.has_nested && field.type == "struct" && !compressible(*field.nested)) return false;
        }
        return body.subsections.empty() && !body.has_validate;
    }
};

// --- memory for a row whose length the stream says -------------------------------------------------------------------

/// The most elements that are accepted without bytes of their own behind them: where an element may be empty on the
/// wire and no `limit` is given.
inline constexpr std::uint64_t max_empty_elements = 65536;

/// Bytes that are asked for in one step because the stream has as many left.
inline constexpr std::size_t max_at_once = std::size_t{1} << 20;

/// Grows `container` to `count` elements in steps that the bytes already read, or surely there, pay for, and loads each
/// step before the next.
template <class E, class A, class Resize>
bool load_growing(reader& r, std::size_t count, Resize resize) {
    constexpr std::size_t minimum = row<E, A>::minimum;
    constexpr std::size_t step = std::max<std::size_t>(1, 65536 / sizeof(E));
    const std::uint64_t remaining = r.remaining();
    if constexpr (minimum == 0) {
        if (!A::limit_t::present && count > max_empty_elements)
            return r.fail(error(errc::out_of_range, "at most " + std::to_string(max_empty_elements) + " elements without a limit",
                                std::to_string(count)));
    } else if (count > remaining / minimum) {
        return r.fail(error(errc::truncated, std::to_string(count) + " elements of at least " + std::to_string(minimum) + " bytes",
                            std::to_string(remaining) + " bytes"));
    }
    // Where the end is known the bytes are there; elsewhere they come first, then the memory for more. A file may have
    // holes, and an element may be larger here than on the wire.
    const bool sure = remaining != ~std::uint64_t{0} && row<E, A>::flat != 0 && count <= max_at_once / sizeof(E);
    std::size_t have = 0;
    while (have != count) {
        const std::size_t next = sure ? count : have + std::min(count - have, std::max(step, have));
        E* elements = resize(have, next);
        if (!row<E, A>::load(r, elements + have, next - have, have)) return false;
        have = next;
    }
    return true;
}

} // namespace vmstate::detail
