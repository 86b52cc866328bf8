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

/// The configuration as a stream has it.
struct stream_configuration {
    std::string machine;
    std::optional<std::uint32_t> target_page_bits;
    std::optional<std::vector<std::string>> capabilities;
    std::optional<std::array<std::uint8_t, 16>> uuid;
    std::uint64_t offset = 0; ///< of its type byte
    std::uint64_t size = 0;   ///< with the type byte
    // Of the values in the subsections, where the stream has them.
    std::uint64_t target_page_bits_offset = 0;
    std::uint64_t capabilities_offset = 0; ///< of their number
    std::uint64_t uuid_offset = 0;

    bool has_capability(std::string_view name) const {
        return capabilities && std::find(capabilities->begin(), capabilities->end(), name) != capabilities->end();
    }
};

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

/// One pass over the section; what a stream says grows nothing beyond a few names.
class configuration_reader {
public:
    explicit configuration_reader(reader& in) : in_(in) {}

    result<stream_configuration> read() {
        const std::uint64_t position = in_.offset();
        const std::uint32_t length = in_.get_be32();
        // QEMU would take any length; no machine has a name of that size.
        if (!in_.failed() && length > max_name_size)
            return error(errc::bad_configuration, "a machine's name of at most 255 bytes", std::to_string(length))
                .within("name")
                .at_offset(position);
        read_.machine.resize(in_.failed() ? 0 : length);
        in_.read(read_.machine.data(), read_.machine.size());
        if (in_.failed()) return error(in_.failure()).within("name");
        for (;;) {
            // What doesn't look like one of our subsections is the next item of the stream.
            constexpr std::string_view prefix = "configuration";
            // A live channel may have only that item's first byte so far: ask for a second one only where it is needed.
            if (in_.peek(1) < 1 || in_.cursor()[0] != std::byte{0x05} || in_.peek(2) < 2) break;
            const auto size = std::to_integer<std::size_t>(in_.cursor()[1]);
            if (size < prefix.size() + 1 || in_.peek(2 + size) < 2 + size) break;
            const std::string name(reinterpret_cast<const char*>(in_.cursor()) + 2, size);
            if (!name.starts_with(prefix)) break;
            const std::uint64_t at = in_.offset();
            in_.skip(2 + size);
            result<void> subsection = read_subsection(name);
            if (!subsection) return subsection.error().within(std::string_view(name).substr(prefix.size() + 1)).at_offset(at);
        }
        read_.offset = position - 1;
        read_.size = 1 + in_.offset() - position;
        return std::move(read_);
    }

private:
    result<void> read_subsection(std::string_view name) {
        if (name == target_page_bits_name) return read_once(read_.target_page_bits.has_value(), &configuration_reader::read_page_bits);
        if (name == capabilities_name) return read_once(read_.capabilities.has_value(), &configuration_reader::read_capabilities);
        if (name == uuid_name) return read_once(read_.uuid.has_value(), &configuration_reader::read_uuid);
        return error(errc::unknown_subsection, {}, std::string(name));
    }
    result<void> read_once(bool again, result<void> (configuration_reader::*body)()) {
        if (again) return error(errc::bad_configuration, "each subsection once", "another");
        // QEMU keeps the low 8 bits of a subsection's version.
        const std::uint32_t version = in_.get_be32() & 0xff;
        if (in_.failed()) return in_.failure();
        if (version > 1) return error(errc::version_too_new, "version 1", std::to_string(version));
        if (version < 1) return error(errc::version_too_old, "version 1", std::to_string(version));
        return (this->*body)();
    }
    result<void> read_page_bits() {
        read_.target_page_bits_offset = in_.offset();
        const std::uint32_t bits = in_.get_be32();
        if (in_.failed()) return in_.failure();
        if (bits < 10 || bits > 16)
            return error(errc::bad_configuration, "10 to 16 target page bits", std::to_string(bits)).at_offset(read_.target_page_bits_offset);
        read_.target_page_bits = bits;
        return {};
    }
    result<void> read_capabilities() {
        read_.capabilities_offset = in_.offset();
        const std::uint32_t count = in_.get_be32();
        if (in_.failed()) return in_.failure();
        // QEMU has fewer than 40.
        if (count > 255)
            return error(errc::bad_configuration, "at most 255 capabilities", std::to_string(count)).at_offset(read_.capabilities_offset);
        std::vector<std::string>& capabilities = read_.capabilities.emplace();
        for (std::uint32_t i = 0; i < count; ++i) {
            const std::uint64_t at = in_.offset();
            std::string capability = in_.get_counted_string();
            if (in_.failed()) return in_.failure();
            if (capability.empty()) return error(errc::bad_configuration, "a capability's name", "none").at_offset(at);
            if (read_.has_capability(capability))
                return error(errc::bad_configuration, "each capability once", capability).at_offset(at);
            capabilities.push_back(std::move(capability));
        }
        return {};
    }
    result<void> read_uuid() {
        read_.uuid_offset = in_.offset();
        std::array<std::uint8_t, 16> uuid{};
        if (!in_.read(uuid.data(), uuid.size())) return in_.failure();
        read_.uuid = uuid;
        return {};
    }

    reader& in_;
    stream_configuration read_;
};

inline result<void> compare_configuration(const machine_options& local, const stream_configuration& read) {
    // A stream's name that ours begins with will do: QEMU compares as much as it has received.
    if (!std::string_view(local.name).starts_with(read.machine))
        return error(errc::bad_configuration, local.name, read.machine).within("name").at_offset(read.offset + 1);
    if (read.target_page_bits) {
        const auto bits = static_cast<std::uint32_t>(std::countr_zero(local.guest_page_size()));
        if (*read.target_page_bits != bits)
            return error(errc::bad_configuration, std::to_string(bits), std::to_string(*read.target_page_bits))
                .within("target-page-bits")
                .at_offset(read.target_page_bits_offset);
    } else if (local.target_page_bits)
        return error(errc::bad_configuration, "target page bits " + std::to_string(*local.target_page_bits), "none");
    if (read.capabilities)
        for (const std::string& capability : *read.capabilities)
            if (!local.has_capability(capability.c_str()))
                return error(errc::bad_configuration, capability + " off", "on")
                    .within("capabilities")
                    .at_offset(read.capabilities_offset);
    for (const std::string& wanted : local.capabilities)
        if (!read.has_capability(wanted))
            return error(errc::bad_configuration, wanted + " on", "off")
                .within("capabilities")
                .at_offset(read.capabilities ? read.capabilities_offset : read.offset + read.size);
    if (read.uuid && local.uuid && *local.uuid != *read.uuid)
        return error(errc::bad_configuration, uuid_text(*local.uuid), uuid_text(*read.uuid))
            .within("uuid")
            .at_offset(read.uuid_offset);
    return {};
}

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

/// Reads the section from behind its type byte. Fails with the path of what can't be: `errc::bad_configuration`,
/// `unknown_subsection`, a version, or the reader's own.
inline result<stream_configuration> read_configuration(reader& in) {
    result<stream_configuration> read = detail::configuration_reader(in).read();
    if (!read) return read.error().within("configuration").at_offset(in.offset());
    return read;
}

/// Reads the section from behind its type byte and compares it with `machine`. Fails with `errc::bad_configuration` and
/// the path of what differs.
inline result<void> load_configuration(const machine_options& machine, reader& in) {
    result<stream_configuration> read = read_configuration(in);
    if (!read) return read.error();
    result<void> compared = detail::compare_configuration(machine, *read);
    if (!compared) return compared.error().within("configuration").at_offset(in.offset());
    return {};
}

} // namespace vmstate
