// SPDX-License-Identifier: BSL-1.0
//
// The JSON description that follows QEMU's stream, as a tree: which devices the stream has, field by field, and how many
// bytes each entry takes. The text is read by vmdesc_parse.hpp (Boost.JSON), a section's body is walked by it in
// vmdesc_walk.hpp. Depends on support/.
#pragma once

#include <vmstate/support/result.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vmstate {

struct vmdesc_body;

/// One entry of a "fields" array: a field, or one element of a field that QEMU could not compress (`index`), or all
/// elements of one that it could (`array_len`).
struct vmdesc_field {
    std::string name;
    std::string type;            ///< QEMU's type string: "uint32", "timer", "struct", "pci config", ...
    std::uint64_t size = 0;      ///< bytes in the stream; of one element where `array_len` is above 1
    std::uint64_t array_len = 1; ///< elements that this one entry stands for
    std::optional<std::uint64_t> index; ///< which element of an array this entry is
    /// What is described inside: one for a struct ("struct" object), vstruct or tmp, one per element of a qtailq or
    /// qlist, one or two (key, value) per node of a gtree. QEMU writes those of all but "struct" as repeated keys of the
    /// field's own object.
    std::vector<vmdesc_body> bodies;

    /// Bytes of the whole entry, all elements together; the largest value where that does not fit.
    std::uint64_t total_size() const noexcept {
        if (size != 0 && array_len > std::numeric_limits<std::uint64_t>::max() / size)
            return std::numeric_limits<std::uint64_t>::max();
        return size * array_len;
    }
};

/// The fields and subsections of one VMStateDescription as they are in this stream.
struct vmdesc_body {
    std::string vmsd_name;
    std::int64_t version = 0;
    std::vector<vmdesc_field> fields;
    std::vector<vmdesc_body> subsections;
};

/// One FULL section of the stream. `vmsd_name` is empty where an old-style save function wrote it: then `fields` is a
/// single buffer.
struct vmdesc_device : vmdesc_body {
    std::string name; ///< the section's idstr
    std::uint32_t instance_id = 0;
    std::string raw_json; ///< this device's object as it stands in the text
};

/// The whole description.
struct vmdesc {
    std::uint64_t page_size = 0;                ///< 0 where the text has none
    std::vector<vmdesc_device> devices;         ///< in the order of the stream
    std::optional<vmdesc_device> configuration; ///< QEMU 8.2 and newer; no name, no instance id

    /// The device of that id; of several with the same id (isapc's two "isa-ide" 0) the one that comes `nth` in the
    /// stream, from 0. Null if there is none.
    const vmdesc_device* find(
        std::string_view idstr, std::uint32_t instance_id, std::size_t nth = 0) const noexcept {
        for (const vmdesc_device& device : devices)
            if (device.instance_id == instance_id && device.name == idstr && nth-- == 0)
                return &device;
        return nullptr;
    }
};

/// Bytes in the stream of a body, its subsections with their headers included, as the description's sizes add up; the
/// largest value where they don't fit.
inline std::uint64_t body_size(const vmdesc_body& body) noexcept {
    constexpr std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
    std::uint64_t sum = 0;
    const auto add = [&](std::uint64_t size) { sum = size > most - sum ? most : sum + size; };
    for (const vmdesc_field& field : body.fields)
        add(field.total_size());
    for (const vmdesc_body& subsection : body.subsections) {
        add(1 + 1 + subsection.vmsd_name.size() + 4);
        add(body_size(subsection));
    }
    return sum;
}

/// Where in a stream the description's text is.
struct vmdesc_location {
    std::uint64_t offset =
        0; ///< of the text's first byte; the type byte and the length are the 5 bytes before it
    std::uint64_t size = 0;

    std::string_view text_in(std::span<const std::byte> stream) const noexcept {
        return {reinterpret_cast<const char*>(stream.data()) + offset, static_cast<std::size_t>(size)};
    }
};

/// Finds the description at the end of a whole stream, without having read what is before it: 0x00 (end of the
/// sections), 0x06, be32 length, text. The text reaches to the stream's end; if nothing there fits, the last place
/// where such a text is followed by something else is taken. `errc::bad_description_json` if there is none: QEMU writes
/// none in postcopy or with suppress-vmdesc=on.
inline result<vmdesc_location> find_vmdesc(std::span<const std::byte> whole_stream);

namespace detail {

inline std::uint32_t vmdesc_length_at(std::span<const std::byte> stream, std::size_t position) noexcept {
    std::uint32_t length = 0;
    for (std::size_t i = 0; i < 4; ++i)
        length = length << 8 | std::to_integer<std::uint32_t>(stream[position + i]);
    return length;
}

} // namespace detail

inline result<vmdesc_location> find_vmdesc(std::span<const std::byte> whole_stream) {
    std::optional<vmdesc_location> followed;
    // From the end: text holds no control characters, so the first fit is the description itself.
    for (std::size_t before = whole_stream.size(); before > 1;) {
        const void* found = ::memrchr(whole_stream.data(), 0x06, before);
        if (found == nullptr)
            break;
        const auto type =
            static_cast<std::size_t>(static_cast<const std::byte*>(found) - whole_stream.data());
        before = type;
        const std::size_t behind = whole_stream.size() - type - 1;
        if (type == 0 || behind < 4 || whole_stream[type - 1] != std::byte{0})
            continue;
        const vmdesc_location place{type + 5, detail::vmdesc_length_at(whole_stream, type + 1)};
        if (place.size > behind - 4)
            continue;
        const std::string_view text = place.text_in(whole_stream);
        if (!text.starts_with('{') || !text.ends_with('}'))
            continue;
        if (place.size == behind - 4)
            return place;
        if (!followed && (text.starts_with("{\"page_size\"") || text.starts_with("{\"configuration\"")))
            followed = place;
    }
    if (followed)
        return *followed;
    return error(errc::bad_description_json, "a JSON description after the last section", "none");
}

} // namespace vmstate
