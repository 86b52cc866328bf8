// SPDX-License-Identifier: BSL-1.0
//
// `loads<New, Old>`: decides at compile time whether a description still reads what an older one wrote. Depends on
// describe/description.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <vmstate/describe/description.hpp>

namespace vmstate {
namespace detail {

constexpr bool knows_subsections(const schema& reading, const schema& written);

/// Two rows of units, eaten from the front: integers meet integers of their width, skipped bytes meet anything fixed. The
/// reader may know subsections of a nested body that the writer doesn't have.
class unit_match {
public:
    constexpr unit_match(const std::vector<wire_unit>& reading, const std::vector<wire_unit>& written)
        : a_(reading), b_(written) {}

    constexpr bool all() {
        for (;;) {
            skip_subsections();
            if (!fill(a_, i_, left_a_) || !fill(b_, j_, left_b_)) break;
            const wire_unit& a = a_[i_];
            const wire_unit& b = b_[j_];
            if (b.what == wire_unit::tag::subsections) return false;
            const bool bytes_a = is_bytes(a);
            const bool bytes_b = is_bytes(b);
            if (bytes_a != bytes_b) return false;
            if (!bytes_a) {
                if (a.what != b.what || a.size != b.size || a.count != b.count || a.condition != b.condition) return false;
                if (a.what == wire_unit::tag::custom && a.text != b.text) return false;
                left_a_ = left_b_ = 0;
                ++i_;
                ++j_;
                continue;
            }
            if (a.what == wire_unit::tag::integer && b.what == wire_unit::tag::integer) {
                if (a.size != b.size || left_a_ % a.size != 0 || left_b_ % b.size != 0) return false;
            }
            const std::uint64_t eaten = left_a_ < left_b_ ? left_a_ : left_b_;
            left_a_ -= eaten;
            left_b_ -= eaten;
            if (left_a_ == 0) ++i_;
            if (left_b_ == 0) ++j_;
        }
        return i_ == a_.size() && j_ == b_.size();
    }

private:
    constexpr void skip_subsections() {
        using tag = wire_unit::tag;
        while (left_a_ == 0 && i_ != a_.size() && a_[i_].what == tag::subsections) {
            if (left_b_ == 0 && j_ != b_.size() && b_[j_].what == tag::subsections && knows_subsections(*a_[i_].body, *b_[j_].body))
                ++j_;
            ++i_;
        }
    }
    static constexpr bool is_bytes(const wire_unit& unit) {
        return unit.what == wire_unit::tag::integer || unit.what == wire_unit::tag::anything;
    }
    static constexpr bool fill(const std::vector<wire_unit>& list, std::size_t at, std::uint64_t& left) {
        if (at == list.size()) return false;
        if (left == 0) left = list[at].size * list[at].count;
        return true;
    }

    const std::vector<wire_unit>& a_;
    const std::vector<wire_unit>& b_;
    std::size_t i_ = 0;
    std::size_t j_ = 0;
    std::uint64_t left_a_ = 0;
    std::uint64_t left_b_ = 0;
};

constexpr bool loads_schema(const schema& reading, const schema& written);

/// The fields of both at one version, without their subsections.
constexpr bool same_fields(const schema& reading, const schema& written, int version) {
    schema a = reading;
    schema b = written;
    a.subsections = {};
    b.subsections = {}; // compared by their names, whatever their order
    unit_list units_a;
    unit_list units_b;
    units_of(a, version, units_a);
    units_of(b, version, units_b);
    return unit_match(units_a.list(), units_b.list()).all();
}

/// What `written` may send after its fields, `reading` knows.
constexpr bool knows_subsections(const schema& reading, const schema& written) {
    for (const schema* sent : written.subsections) {
        bool known = false;
        for (const schema* one : reading.subsections) known = known || (one->name == sent->name && loads_schema(*one, *sent));
        if (!known) return false;
    }
    return true;
}

/// Every version of `written` that `reading` accepts, and at least the one that it writes.
constexpr bool loads_schema(const schema& reading, const schema& written) {
    if (written.version_id > reading.version_id || written.version_id < reading.minimum_version_id) return false;
    for (int version = written.version_id; version >= reading.minimum_version_id && version >= written.minimum_version_id;
         --version)
        if (!same_fields(reading, written, version)) return false;
    return knows_subsections(reading, written);
}

} // namespace detail

/// Whether `New` reads the streams of `Old`, in every version of it that `New` accepts: the same widths in the same order,
/// and every subsection that may come. What predicates decide is not known here: a conditional field is taken to be there
/// under the same condition on both sides.
template <const auto& New, const auto& Old>
inline constexpr bool loads = New.name == Old.name && detail::loads_schema(detail::schema_for<New>(), detail::schema_for<Old>());

} // namespace vmstate
