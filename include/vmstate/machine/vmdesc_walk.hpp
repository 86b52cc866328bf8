// SPDX-License-Identifier: BSL-1.0
//
// Walks the body of a section by the stream's own JSON description: every field with its bytes, headers of subsections,
// list markers and sizes checked. For sections that nobody described to us: to show them, or to carry them through.
// Depends on codec/reader.hpp and vmdesc.hpp, not on Boost.JSON.
#pragma once

#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/vmdesc.hpp>

#include <boost/endian/conversion.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vmstate {

/// How the bytes of a field are to be understood, by its type string.
enum class vmdesc_kind {
    boolean,          ///< "bool"
    signed_integer,   ///< "int8" ... "int64", also "... equal" and "... le"
    unsigned_integer, ///< "uint8" ... "uint64"
    floating,         ///< "CPU_Double_U"
    timer,            ///< "timer": ns of its clock, all ones where it isn't pending
    buffer,           ///< "buffer"
    unused,           ///< "unused_buffer"
    bitmap,           ///< "bitmap": 64-bit words, bit i in word i / 64
    marker, ///< the byte in place of an element of an array of pointers: '0' null, '1' an element follows
    opaque, ///< the private layout of a device model ("pci config", "virtio", ...)
};

/// The kind of a type string, and the bytes one element has; 0 where that is the field's own affair.
struct vmdesc_type {
    vmdesc_kind kind;
    std::uint8_t width;
};
constexpr vmdesc_type type_of_vmdesc(std::string_view name) noexcept;

/// A field without fields of its own, or an array of such.
struct vmdesc_value {
    const vmdesc_field& field;
    vmdesc_kind kind;
    std::uint64_t offset;             ///< of the first byte, in the stream
    std::span<const std::byte> bytes; ///< all elements; valid during the visit

    std::size_t element_size() const noexcept { return static_cast<std::size_t>(field.size); }
    std::size_t count() const noexcept { return element_size() == 0 ? 0 : bytes.size() / element_size(); }
    /// Element `i` of boolean, integer, floating, timer and marker values: its bytes as a number.
    std::uint64_t as_unsigned(std::size_t i = 0) const noexcept {
        return load(i * element_size(), element_size());
    }
    std::int64_t as_signed(std::size_t i = 0) const noexcept {
        const auto unused_bits = static_cast<unsigned>(64 - 8 * element_size());
        return static_cast<std::int64_t>(as_unsigned(i) << unused_bits) >> unused_bits;
    }
    double as_double(std::size_t i = 0) const noexcept { return std::bit_cast<double>(as_unsigned(i)); }
    /// Bit `i` of a bitmap.
    bool bit(std::size_t i) const noexcept { return (load(i / 64 * 8, 8) >> i % 64 & 1) != 0; }

private:
    std::uint64_t load(std::size_t position, std::size_t size) const noexcept {
        std::uint64_t value = 0;
        for (const std::byte byte : bytes.subspan(position, size))
            value = value << 8 | std::to_integer<std::uint64_t>(byte);
        return value;
    }
};

/// What a nested body is to the field that has it.
enum class vmdesc_role { structure, temporary, list_element, tree_key, tree_value };

/// Where a nested body begins.
struct vmdesc_nested {
    const vmdesc_field& field;
    const vmdesc_body& body;
    vmdesc_role role;
    std::optional<std::uint64_t> index; ///< element of an array, list or tree
    std::uint64_t offset;
};

/// Called in the order of the stream; every begin has its end unless the walk fails in between.
class vmdesc_visitor {
public:
    vmdesc_visitor() = default;
    vmdesc_visitor(const vmdesc_visitor&) = delete;
    vmdesc_visitor& operator=(const vmdesc_visitor&) = delete;
    virtual ~vmdesc_visitor() = default;

    virtual void value(const vmdesc_value& value) = 0;
    virtual void begin_nested(const vmdesc_nested& /*place*/) {}
    virtual void end_nested() {}
    /// A "qtailq", "qlist" or "gtree", around its elements.
    virtual void begin_list(
        const vmdesc_field& /*field*/, std::uint64_t /*elements*/, std::uint64_t /*offset*/) {}
    virtual void end_list() {}
    /// The key of a tree's node where it is a number and not a body.
    virtual void tree_key(const vmdesc_field& /*field*/, std::uint64_t /*index*/, std::uint64_t /*key*/,
        std::uint64_t /*offset*/) {}
    /// A subsection; `offset` is its header's.
    virtual void begin_subsection(const vmdesc_body& /*body*/, std::uint64_t /*offset*/) {}
    virtual void end_subsection() {}
};

/// Walks a section's body (from behind its header to before its footer) and tells `visitor` what there is. The error's
/// path begins with the field's name; its offset is the stream's.
result<void> walk_body(const vmdesc_body& description, reader& in, vmdesc_visitor& visitor);

/// The same without telling anyone: leaves `in` behind the body, with every marker, header and size checked.
result<void> skip_body(const vmdesc_body& description, reader& in);

constexpr vmdesc_type type_of_vmdesc(std::string_view name) noexcept {
    // "uint8 equal", "int32 le": a rule for loading, the same bytes.
    for (const std::string_view rule : {" equal", " le"})
        if (name.ends_with(rule))
            name.remove_suffix(rule.size());
    struct row {
        std::string_view name;
        vmdesc_type type;
    };
    constexpr row rows[] = {
        {"uint8", {vmdesc_kind::unsigned_integer, 1}},
        {"uint16", {vmdesc_kind::unsigned_integer, 2}},
        {"uint32", {vmdesc_kind::unsigned_integer, 4}},
        {"uint64", {vmdesc_kind::unsigned_integer, 8}},
        {"int8", {vmdesc_kind::signed_integer, 1}},
        {"int16", {vmdesc_kind::signed_integer, 2}},
        {"int32", {vmdesc_kind::signed_integer, 4}},
        {"int64", {vmdesc_kind::signed_integer, 8}},
        {"bool", {vmdesc_kind::boolean, 1}},
        {"timer", {vmdesc_kind::timer, 8}},
        {"CPU_Double_U", {vmdesc_kind::floating, 8}},
        {"ptr-marker", {vmdesc_kind::marker, 1}},
        {"buffer", {vmdesc_kind::buffer, 0}},
        {"unused_buffer", {vmdesc_kind::unused, 0}},
        {"bitmap", {vmdesc_kind::bitmap, 0}},
    };
    for (const row& known : rows)
        if (known.name == name)
            return known.type;
    return {vmdesc_kind::opaque, 0};
}

namespace detail {

/// One walk. Each function returns false after an error, which the reader has latched; paths are added on the way out.
class vmdesc_walker {
public:
    vmdesc_walker(reader& in, vmdesc_visitor* visitor) noexcept : in_(in), visitor_(visitor) {}

    bool walk(const vmdesc_body& body) {
        for (const vmdesc_field& field : body.fields)
            if (!walk(field)) {
                in_.failure().within(segment(field));
                return false;
            }
        for (const vmdesc_body& subsection : body.subsections)
            if (!walk_subsection(subsection)) {
                in_.failure().within(subsection.vmsd_name);
                return false;
            }
        return true;
    }

private:
    static constexpr std::byte subsection_type{0x05};
    static constexpr std::byte null_pointer{0x30};
    static constexpr std::byte valid_pointer{0x31};
    /// A "buffer" is read in pieces of this size where its end isn't in sight, so that a wrong size costs nothing.
    static constexpr std::size_t piece_size = 64 * 1024;

    static std::string segment(const vmdesc_field& field) {
        return field.index ? field.name + '[' + std::to_string(*field.index) + ']' : field.name;
    }
    bool fail(errc code, std::string expected, std::string found, std::uint64_t offset) {
        return in_.fail(std::move(error(code, std::move(expected), std::move(found)).at_offset(offset)));
    }
    static std::string bytes_text(std::uint64_t count) {
        return std::to_string(count) + (count == 1 ? " byte" : " bytes");
    }
    static std::string hex_text(std::byte byte) {
        constexpr std::string_view digits = "0123456789abcdef";
        const auto value = std::to_integer<std::size_t>(byte);
        return {'0', 'x', digits[value >> 4], digits[value & 15]};
    }
    bool expect_byte(std::byte expected, const char* what) {
        const std::uint64_t offset = in_.offset();
        const std::byte found{in_.get_u8()};
        if (in_.failed())
            return false;
        return found == expected ||
               fail(errc::bad_marker, std::string(what) + ' ' + hex_text(expected), hex_text(found), offset);
    }

    bool walk_subsection(const vmdesc_body& subsection) {
        const std::uint64_t offset = in_.offset();
        const std::byte type{in_.get_u8()};
        if (in_.failed())
            return false;
        if (type != subsection_type)
            return fail(errc::bad_section, "a subsection (0x05)", hex_text(type), offset);
        const std::string name = in_.get_counted_string();
        const std::uint32_t version = in_.get_be32();
        if (in_.failed())
            return false;
        if (name != subsection.vmsd_name)
            return fail(errc::bad_section, "this subsection's name", '"' + name + '"', offset + 1);
        if (version != static_cast<std::uint64_t>(subsection.version))
            return fail(errc::bad_section, "version " + std::to_string(subsection.version),
                std::to_string(version), offset + 2 + name.size());
        if (visitor_ != nullptr)
            visitor_->begin_subsection(subsection, offset);
        if (!walk(subsection))
            return false;
        if (visitor_ != nullptr)
            visitor_->end_subsection();
        return true;
    }

    bool walk(const vmdesc_field& field) {
        const std::uint64_t offset = in_.offset();
        if (field.total_size() > in_.remaining())
            return fail(
                errc::truncated, bytes_text(field.total_size()), std::to_string(in_.remaining()), offset);
        const bool is_tree = field.type == "gtree";
        if (is_tree || field.type == "qtailq" || field.type == "qlist") {
            if (field.array_len > 1)
                return fail(errc::unsupported, "one list to an entry", "an array of lists", offset);
            return (is_tree ? walk_tree(field) : walk_list(field)) && check_size(field, offset);
        }
        if (!field.bodies.empty())
            return walk_nested(field);
        return walk_value(field);
    }
    bool check_size(const vmdesc_field& field, std::uint64_t offset) {
        const std::uint64_t size = in_.offset() - offset;
        return size == field.size || fail(errc::bad_description_json, bytes_text(field.size),
                                         bytes_text(size) + " by its fields", offset);
    }
    bool nested(const vmdesc_field& field, const vmdesc_body& body, vmdesc_role role,
        std::optional<std::uint64_t> index) {
        if (visitor_ != nullptr)
            visitor_->begin_nested({field, body, role, index, in_.offset()});
        if (!walk(body))
            return false;
        if (visitor_ != nullptr)
            visitor_->end_nested();
        return true;
    }

    bool walk_nested(const vmdesc_field& field) {
        const vmdesc_body& body = field.bodies.front();
        if (field.bodies.size() > 1)
            return fail(errc::bad_description_json, "one body in a " + field.type,
                std::to_string(field.bodies.size()), in_.offset());
        const vmdesc_role role = field.type == "tmp" ? vmdesc_role::temporary : vmdesc_role::structure;
        if (field.array_len == 1) {
            const std::uint64_t offset = in_.offset();
            return nested(field, body, role, field.index) && check_size(field, offset);
        }
        // All elements are described by the first. A long array of elements that take few bytes and have many entries
        // would cost far more time than the stream has bytes; no real one is like that.
        if (field.size != 0 && entries_of(body) / 64 > field.size)
            return fail(errc::bad_description_json, "elements with fields of one byte and more",
                bytes_text(field.size), in_.offset());
        // Elements without bytes are all alike.
        const std::uint64_t count = field.size == 0 ? 1 : field.array_len;
        for (std::uint64_t i = 0; i < count; ++i) {
            const std::uint64_t offset = in_.offset();
            if (nested(field, body, role, i) && check_size(field, offset))
                continue;
            in_.failure().at_index(i);
            return false;
        }
        return true;
    }
    static std::uint64_t entries_of(const vmdesc_body& body) noexcept {
        std::uint64_t entries = body.fields.size() + body.subsections.size();
        for (const vmdesc_field& field : body.fields)
            for (const vmdesc_body& inner : field.bodies)
                entries += entries_of(inner);
        for (const vmdesc_body& subsection : body.subsections)
            entries += entries_of(subsection);
        return entries;
    }

    /// Per element 0x01 and its body, then 0x00.
    bool walk_list(const vmdesc_field& field) {
        if (visitor_ != nullptr)
            visitor_->begin_list(field, field.bodies.size(), in_.offset());
        for (std::size_t i = 0; i < field.bodies.size(); ++i) {
            if (expect_byte(std::byte{1}, "an element's marker") &&
                nested(field, field.bodies[i], vmdesc_role::list_element, i))
                continue;
            in_.failure().at_index(i);
            return false;
        }
        if (!expect_byte(std::byte{0}, "the list's end"))
            return false;
        if (visitor_ != nullptr)
            visitor_->end_list();
        return true;
    }

    /// be32 number of nodes, per node 0x01, key and value, then 0x00. The number tells whether keys have bodies.
    bool walk_tree(const vmdesc_field& field) {
        const std::uint64_t offset = in_.offset();
        const std::uint64_t nodes = in_.get_be32();
        if (in_.failed())
            return false;
        const bool direct = field.bodies.size() == nodes;
        if (!direct && field.bodies.size() != 2 * nodes)
            return fail(errc::bad_description_json, std::to_string(field.bodies.size()) + " keys and values",
                std::to_string(nodes) + " nodes", offset);
        if (visitor_ != nullptr)
            visitor_->begin_list(field, nodes, offset);
        for (std::size_t i = 0; i < nodes; ++i) {
            if (walk_node(field, i, direct))
                continue;
            in_.failure().at_index(i);
            return false;
        }
        if (!expect_byte(std::byte{0}, "the tree's end"))
            return false;
        if (visitor_ != nullptr)
            visitor_->end_list();
        return true;
    }
    bool walk_node(const vmdesc_field& field, std::size_t i, bool direct) {
        if (!expect_byte(std::byte{1}, "a node's marker"))
            return false;
        if (!direct)
            return nested(field, field.bodies[2 * i], vmdesc_role::tree_key, i) &&
                   nested(field, field.bodies[2 * i + 1], vmdesc_role::tree_value, i);
        const std::uint64_t offset = in_.offset();
        const std::uint64_t key = in_.get_be64();
        if (in_.failed())
            return false;
        if (visitor_ != nullptr)
            visitor_->tree_key(field, i, key, offset);
        return nested(field, field.bodies[i], vmdesc_role::tree_value, i);
    }

    bool walk_value(const vmdesc_field& field) {
        const std::uint64_t offset = in_.offset();
        vmdesc_type type = type_of_vmdesc(field.type);
        // A null element of an array of pointers goes by the type of its siblings, a struct's without a body.
        const bool is_struct = field.type == "struct" || field.type == "vstruct";
        if (field.size == 1 && (is_struct || type.width > 1))
            type = {vmdesc_kind::marker, 1};
        else if (is_struct && field.size != 0)
            return fail(errc::bad_description_json, "a body of " + bytes_text(field.size), "none", offset);
        if (type.width != 0 && field.size != type.width)
            return fail(errc::bad_description_json, bytes_text(type.width) + " for a " + field.type,
                bytes_text(field.size), offset);
        if (type.kind == vmdesc_kind::bitmap && field.size % 8 != 0)
            return fail(
                errc::bad_description_json, "a bitmap of 8-byte words", bytes_text(field.size), offset);
        if (visitor_ == nullptr && type.kind != vmdesc_kind::marker)
            return skip(field.total_size());
        std::span<const std::byte> bytes;
        if (!take(field.total_size(), bytes))
            return false;
        if (type.kind == vmdesc_kind::marker)
            for (std::size_t i = 0; i < bytes.size(); ++i)
                if (bytes[i] != null_pointer && (bytes[i] != valid_pointer || field.type != "ptr-marker"))
                    return fail(
                        errc::bad_marker, "a null pointer's marker 0x30", hex_text(bytes[i]), offset + i);
        if (visitor_ != nullptr)
            visitor_->value({field, type.kind, offset, bytes});
        return true;
    }
    bool skip(std::uint64_t size) {
        while (size != 0) {
            const auto piece = static_cast<std::size_t>(std::min<std::uint64_t>(size, std::size_t{1} << 30));
            in_.skip(piece);
            if (in_.failed())
                return false;
            size -= piece;
        }
        return true;
    }
    /// `size` bytes in one piece: in the reader's window where they fit, else collected in `scratch_`.
    bool take(std::uint64_t size, std::span<const std::byte>& bytes) {
        if (size <= std::max(in_.window(), reader::max_window)) {
            const auto count = static_cast<std::size_t>(size);
            const std::byte* begin = in_.need(count);
            if (begin == nullptr)
                return false;
            in_.seek(begin + count);
            bytes = {begin, count};
            return true;
        }
        scratch_.clear();
        while (scratch_.size() < size) {
            const std::size_t have = scratch_.size();
            const auto piece =
                static_cast<std::size_t>(std::min<std::uint64_t>(size - have, std::max(piece_size, have)));
            scratch_.resize(have + piece);
            if (!in_.read(scratch_.data() + have, piece))
                return false;
        }
        bytes = scratch_;
        return true;
    }

    reader& in_;
    vmdesc_visitor* visitor_;
    std::vector<std::byte> scratch_;
};

} // namespace detail

inline result<void> walk_body(const vmdesc_body& description, reader& in, vmdesc_visitor& visitor) {
    if (!in.failed())
        detail::vmdesc_walker(in, &visitor).walk(description);
    return in.status();
}

inline result<void> skip_body(const vmdesc_body& description, reader& in) {
    if (!in.failed())
        detail::vmdesc_walker(in, nullptr).walk(description);
    return in.status();
}

} // namespace vmstate
