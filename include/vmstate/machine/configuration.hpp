// SPDX-License-Identifier: BSL-1.0
//
// The configuration section: which machine a stream comes from, written and compared as QEMU does. Depends on codec/.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/options.hpp>
#include <vmstate/machine/wire.hpp>

namespace vmstate {

namespace detail {

inline constexpr std::string_view target_page_bits_name = "configuration/target-page-bits";
inline constexpr std::string_view capabilities_name = "configuration/capabilities";
inline constexpr std::string_view uuid_name = "configuration/uuid";

inline void put_subsection_header(writer& out, std::string_view name, std::uint32_t version) {
    out.put_u8(static_cast<std::uint8_t>(section_type::subsection));
    out.put_counted_string(name);
    out.put_be32(version);
}

/// "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
inline std::string uuid_text(const std::array<std::uint8_t, 16>& uuid) {
    constexpr std::string_view digits = "0123456789abcdef";
    std::string text;
    for (std::size_t i = 0; i < uuid.size(); ++i) {
        if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
        text += digits[uuid[i] >> 4];
        text += digits[uuid[i] & 15];
    }
    return text;
}

/// Reads and compares; one object per stream.
class configuration_loader {
public:
    configuration_loader(const machine_options& local, reader& in) : local_(local), in_(in) {}

    result<void> load() {
        const std::uint64_t position = in_.offset();
        const std::uint32_t length = in_.get_be32();
        // QEMU would take any length; no machine has a name of that size.
        if (!in_.failed() && length > max_name_size)
            return error(
                errc::bad_configuration, "a machine's name of at most 255 bytes", std::to_string(length))
                .within("name")
                .at_offset(position);
        std::string name(in_.failed() ? 0 : length, '\0');
        in_.read(name.data(), name.size());
        if (in_.failed()) return error(in_.failure()).within("name");
        result<void> loaded = load_subsections();
        if (!loaded) return loaded;

        // A stream's name that ours begins with will do: QEMU compares as much as it has received.
        if (!std::string_view(local_.name).starts_with(name))
            return error(errc::bad_configuration, local_.name, name).within("name").at_offset(position);
        if (local_.target_page_bits && !page_bits_)
            return error(errc::bad_configuration,
                "target page bits " + std::to_string(*local_.target_page_bits), "none");
        return compare_capabilities();
    }

private:
    result<void> load_subsections() {
        for (;;) {
            // What doesn't look like one of our subsections is the next item of the stream.
            constexpr std::string_view prefix = "configuration";
            if (in_.peek(2) < 2 || in_.cursor()[0] != std::byte{0x05}) return {};
            const auto size = std::to_integer<std::size_t>(in_.cursor()[1]);
            if (size < prefix.size() + 1 || in_.peek(2 + size) < 2 + size) return {};
            const std::string name(reinterpret_cast<const char*>(in_.cursor()) + 2, size);
            if (!name.starts_with(prefix)) return {};
            const std::uint64_t position = in_.offset();
            in_.skip(2 + size);
            result<void> loaded = load_subsection(name);
            if (!loaded)
                return loaded.error()
                    .within(std::string_view(name).substr(prefix.size() + 1))
                    .at_offset(position);
        }
    }
    result<void> load_subsection(std::string_view name) {
        const bool known = name == target_page_bits_name || name == capabilities_name || name == uuid_name;
        if (!known) return error(errc::unknown_subsection, {}, std::string(name));
        // QEMU keeps the low 8 bits of a subsection's version.
        const std::uint32_t version = in_.get_be32() & 0xff;
        if (in_.failed()) return in_.failure();
        if (version > 1) return error(errc::version_too_new, "version 1", std::to_string(version));
        if (version < 1) return error(errc::version_too_old, "version 1", std::to_string(version));
        if (name == target_page_bits_name) return load_page_bits();
        if (name == capabilities_name) return load_capabilities();
        return load_uuid();
    }
    result<void> load_page_bits() {
        page_bits_ = in_.get_be32();
        if (in_.failed()) return in_.failure();
        const auto local = static_cast<std::uint32_t>(std::countr_zero(local_.guest_page_size()));
        if (*page_bits_ != local)
            return error(errc::bad_configuration, std::to_string(local), std::to_string(*page_bits_));
        return {};
    }
    result<void> load_capabilities() {
        const std::uint32_t count = in_.get_be32();
        if (in_.failed()) return in_.failure();
        capabilities_.clear();
        for (std::uint32_t i = 0; i < count; ++i) {
            std::string capability = in_.get_counted_string();
            if (in_.failed()) return in_.failure();
            // One that is given twice, or that we lack, ends the list: a count in the stream makes nothing grow.
            if (!local_.has_capability(capability.c_str()))
                return error(errc::bad_configuration, capability + " off", "on");
            if (std::find(capabilities_.begin(), capabilities_.end(), capability) != capabilities_.end())
                return error(errc::bad_configuration, "each capability once", capability);
            capabilities_.push_back(std::move(capability));
        }
        return {};
    }
    result<void> load_uuid() {
        std::array<std::uint8_t, 16> uuid{};
        if (!in_.read(uuid.data(), uuid.size())) return in_.failure();
        if (local_.uuid && *local_.uuid != uuid)
            return error(errc::bad_configuration, uuid_text(*local_.uuid), uuid_text(uuid));
        return {};
    }
    result<void> compare_capabilities() const {
        for (const std::string& wanted : local_.capabilities)
            if (std::find(capabilities_.begin(), capabilities_.end(), wanted) == capabilities_.end())
                return error(errc::bad_configuration, wanted + " on", "off").within("capabilities");
        return {};
    }

    const machine_options& local_;
    reader& in_;
    std::optional<std::uint32_t> page_bits_;
    std::vector<std::string> capabilities_;
};

} // namespace detail

/// Writes the section from its type byte on.
inline void save_configuration(const machine_options& machine, writer& out) {
    out.put_u8(static_cast<std::uint8_t>(section_type::configuration));
    out.put_be32(static_cast<std::uint32_t>(machine.name.size()));
    out.write(machine.name.data(), machine.name.size());
    if (machine.target_page_bits) {
        detail::put_subsection_header(out, detail::target_page_bits_name, 1);
        out.put_be32(*machine.target_page_bits);
    }
    if (!machine.capabilities.empty()) {
        detail::put_subsection_header(out, detail::capabilities_name, 1);
        out.put_be32(static_cast<std::uint32_t>(machine.capabilities.size()));
        for (const std::string& capability : machine.capabilities) out.put_counted_string(capability);
    }
    if (machine.uuid) {
        detail::put_subsection_header(out, detail::uuid_name, 1);
        out.write(machine.uuid->data(), machine.uuid->size());
    }
}

/// Reads the section from behind its type byte and compares it with `machine`. Fails with `errc::bad_configuration` and
/// the path of what differs.
inline result<void> load_configuration(const machine_options& machine, reader& in) {
    result<void> loaded = detail::configuration_loader(machine, in).load();
    if (!loaded) return loaded.error().within("configuration").at_offset(in.offset());
    return {};
}

} // namespace vmstate
