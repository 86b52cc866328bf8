// SPDX-License-Identifier: BSL-1.0
//
// How generated code tells what it puts on the wire, field by field, to whoever wants to print it: the writer of the
// JSON description, a hex dump with names. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <string_view>

namespace vmstate {

/// One entry of a body as the JSON description lists it.
struct field_event {
    static constexpr std::size_t no_index = static_cast<std::size_t>(-1);

    std::string_view name;           ///< the member's name
    std::string_view type;           ///< QEMU's type string: "uint32", "buffer", "struct", "qtailq", ...
    std::size_t size = 0;            ///< bytes on the wire; of one element where array_len is above 1
    std::size_t array_len = 1;       ///< elements that this one entry stands for
    std::size_t index = no_index;    ///< which element of an array this entry is, where each has its own
    std::size_t number = no_index;   ///< which of the description's entries of this name: QEMU calls it `name[number]`
};

/// Called in wire order. A field without a description of its own is `begin_field, end_field`; one with a description
/// has, between them, `begin_nested`, its fields and subsections, `end_nested` (as often as it has elements where it is
/// a list or a map).
class field_visitor {
public:
    field_visitor() = default;
    field_visitor(const field_visitor&) = delete;
    field_visitor& operator=(const field_visitor&) = delete;
    virtual ~field_visitor() = default;

    virtual void begin_field(const field_event& field) = 0;
    virtual void end_field() {}
    /// A nested description's body begins; `name` and `version_id` are the description's.
    virtual void begin_nested(std::string_view /*name*/, int /*version_id*/) {}
    virtual void end_nested() {}
    /// A subsection that is needed: 1 + 1 + name + 4 bytes of header, then its body.
    virtual void begin_subsection(std::string_view /*name*/, int /*version_id*/) {}
    virtual void end_subsection() {}
};

} // namespace vmstate
