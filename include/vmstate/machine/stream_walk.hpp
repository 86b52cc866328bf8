// SPDX-License-Identifier: BSL-1.0
//
// Walks a whole stream in memory without a machine: header, configuration, commands, packages, RAM records, sections by
// the stream's own JSON description, to the last byte; every length, id, marker and footer is checked. For programs
// that show or check streams. Depends on ram_records.hpp, xbzrle.hpp, vmdesc*.hpp and wire.hpp; the description comes
// parsed, so that Boost.JSON isn't needed here.
#pragma once

#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/configuration.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/machine/vmdesc.hpp>
#include <vmstate/machine/vmdesc_walk.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/machine/xbzrle.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vmstate {

/// A section, or one of the START, PART, END pieces of a live one: then the header's fields are those of its START.
struct stream_section {
    section_type type = section_type::full;
    std::uint32_t section_id = 0;
    std::string idstr;
    std::uint32_t instance_id = 0;
    std::uint32_t version_id = 0;
    std::uint64_t offset = 0;      ///< of its type byte
    std::uint64_t body_offset = 0; ///< of what comes after the header

    /// As the section is called in errors' paths.
    std::string name() const { return instance_id == 0 ? idstr : idstr + '#' + std::to_string(instance_id); }
};

/// A RAM block of the stream's list.
struct stream_ram_block {
    std::string name;
    std::uint64_t used_length = 0;
    std::optional<std::uint64_t> page_size;
    std::optional<std::uint64_t> guest_address;
};

struct stream_command {
    command number{};
    std::uint64_t offset = 0; ///< of its type byte
    std::span<const std::byte> payload;

    std::string_view name() const noexcept { return format_of(number).name; }
};

/// A range that POSTCOPY_RAM_DISCARD names, in bytes of its block.
struct ram_discard {
    std::string block;
    std::uint64_t start = 0;
    std::uint64_t length = 0;
};

/// How the end of a device's body was known.
enum class body_extent {
    described, ///< by the description, every size checked
    guessed, ///< without one, or by another stream's that doesn't fit: the first place where the section's footer is
             ///< followed by something sensible
    broken,  ///< it doesn't follow its description; it ends where a footer and something sensible are
    unknown, ///< broken, or without a description, and no end to be found: all that is left
};

/// What the walk finds, in the order of the stream.
class stream_visitor {
public:
    stream_visitor() = default;
    stream_visitor(const stream_visitor&) = delete;
    stream_visitor& operator=(const stream_visitor&) = delete;
    virtual ~stream_visitor() = default;

    virtual void configuration(const stream_configuration&) {}
    virtual void command(const stream_command&) {}
    /// POSTCOPY_RAM_DISCARD, after its `command`: each range.
    virtual void discard(const ram_discard&) {}
    /// The contents of a PACKAGED command follow until `end_package`.
    virtual void begin_package(std::uint64_t /*offset*/, std::uint64_t /*size*/) {}
    virtual void end_package() {}

    /// A part of the "ram" section; blocks and records follow until `end_ram`.
    virtual void begin_ram(const stream_section&, std::size_t /*page_size*/) {}
    virtual void ram_block(const stream_ram_block&, std::size_t /*index*/) {}
    /// A record; `block` is the index of a page record's block, `payload` its bytes.
    virtual void ram_page(const ram_record&, std::size_t /*block*/, std::span<const std::byte> /*payload*/) {}
    virtual void end_ram(std::uint64_t /*end*/) {}

    /// Any other section. `description` is null where the stream has none for it; `body` begins at
    /// `section.body_offset`. Where the body is broken, `problem` follows.
    virtual void device(const stream_section&, const vmdesc_device* /*description*/,
        std::span<const std::byte> /*body*/, body_extent) {}

    /// 0x00 after the last section.
    virtual void end_of_sections(std::uint64_t /*offset*/) {}
    virtual void description(const vmdesc_location&) {}
    /// Something doesn't fit; path and offset say where. The walk goes on if it can.
    virtual void problem(const error&) {}
};

struct stream_walk_options {
    /// The stream's description, or one of another stream of the same machine; null without one.
    const vmdesc* description = nullptr;
    /// Where `find_vmdesc` found it, if it is this stream's own.
    std::optional<vmdesc_location> location;
    bool section_footers = true; ///< off for machines before 2.4, which say send-section-footer=off
};

/// Walks the stream. What is wrong goes to `visitor.problem`, and the first of it is returned.
result<void> walk_stream(
    std::span<const std::byte> stream, const stream_walk_options& options, stream_visitor& visitor);

namespace detail {

class stream_walker {
public:
    stream_walker(
        std::span<const std::byte> stream, const stream_walk_options& options, stream_visitor& visitor)
        : stream_(stream), options_(options), visitor_(visitor), ram_(page_size_of(options)) {
        if (options.description == nullptr)
            return;
        for (const vmdesc_device& device : options.description->devices)
            described_[{device.name, device.instance_id}].devices.push_back(&device);
        left_ = options.description->devices.size();
    }

    result<void> walk() {
        memory_reader in(stream_);
        const std::uint64_t described = options_.description != nullptr ? options_.description->page_size : 0;
        if (options_.location && described != 0 && !valid_page_size(described)) {
            error failure(errc::bad_description_json, "a page size", std::to_string(described));
            report(failure.within("page_size").at_offset(options_.location->offset));
        }
        if (!walk_all(in))
            report(in.failure());
        if (first_)
            return first_;
        return {};
    }

private:
    static constexpr std::size_t footer_size = 5; ///< type byte and section id
    /// What a stream of items ends with.
    enum class ending { eof, buffer };
    /// Usually one; where ids clash, as with isapc's two "isa-ide" 0, the order tells them apart.
    struct devices_of_id {
        std::vector<const vmdesc_device*> devices;
        std::size_t next = 0;
    };

    static std::size_t page_size_of(const stream_walk_options& options) noexcept {
        const std::uint64_t size = options.description != nullptr ? options.description->page_size : 0;
        return valid_page_size(size) ? static_cast<std::size_t>(size) : 4096;
    }
    static bool valid_page_size(std::uint64_t size) noexcept {
        return std::has_single_bit(size) && size >= 1024 && size <= 65536;
    }

    void report(const error& failure) {
        if (!first_)
            first_ = failure;
        visitor_.problem(failure);
    }
    static bool fail(reader& in, errc code, std::string expected, std::string found, std::uint64_t offset) {
        return in.fail(std::move(error(code, std::move(expected), std::move(found)).at_offset(offset)));
    }
    static bool within(reader& in, std::string_view segment) {
        in.failure().within(segment);
        return false;
    }
    static std::string hex_text(std::uint8_t byte) {
        constexpr std::string_view digits = "0123456789abcdef";
        return {'0', 'x', digits[byte >> 4], digits[byte & 15]};
    }
    bool walk_all(reader& in) {
        const std::uint32_t magic = in.get_be32();
        if (in.failed() || magic != stream_magic)
            return fail(in, errc::not_a_stream, "\"QEVM\"", "something else", 0);
        const std::uint32_t version = in.get_be32();
        if (in.failed())
            return false;
        if (version != stream_version)
            return fail(in, errc::not_a_stream, "version " + std::to_string(stream_version),
                std::to_string(version), 4);
        if (in.peek(1) == 1 &&
            *in.cursor() == std::byte{static_cast<std::uint8_t>(section_type::configuration)} &&
            !walk_configuration(in))
            return false;
        if (!walk_items(in, ending::eof))
            return false;
        return walk_end(in);
    }

    // ---- configuration ----------------------------------------------------------------------------------

    bool walk_configuration(reader& in) {
        in.get_u8();
        const result<stream_configuration> read = read_configuration(in);
        if (!read) {
            // It may be the reader's own error, but with its path.
            in.fail(read.error());
            in.failure() = read.error();
            return false;
        }
        const stream_configuration& configuration = *read;
        format_.ignore_shared = configuration.has_capability("x-ignore-shared");
        format_.mapped_ram = configuration.has_capability("mapped-ram");
        if (configuration.target_page_bits) {
            const std::size_t size = std::size_t{1} << *configuration.target_page_bits;
            const std::uint64_t described =
                options_.location && options_.description != nullptr ? options_.description->page_size : 0;
            if (described != 0 && described != size) {
                error failure(errc::bad_description_json, "page_size " + std::to_string(size), std::to_string(described));
                return in.fail(failure.within("configuration").at_offset(configuration.offset));
            }
            ram_ = ram_record_reader(size);
        }
        visitor_.configuration(configuration);
        return true;
    }

    // ---- items ------------------------------------------------------------------------------------------

    bool walk_items(reader& in, ending last) {
        for (;;) {
            if (last == ending::buffer && in.remaining() == 0)
                return true;
            const std::uint64_t offset = in.offset();
            const std::uint8_t type = in.get_u8();
            if (in.failed())
                return false;
            switch (static_cast<section_type>(type)) {
            case section_type::eof:
                if (last == ending::buffer)
                    return fail(in, errc::bad_section, "an item of the package", "0x00", offset);
                visitor_.end_of_sections(offset);
                return true;
            case section_type::start:
            case section_type::full:
                if (!walk_new_section(in, static_cast<section_type>(type), offset))
                    return false;
                break;
            case section_type::part:
            case section_type::end:
                if (!walk_known_section(in, static_cast<section_type>(type), offset))
                    return false;
                break;
            case section_type::command:
                if (!walk_command(in, offset, last))
                    return false;
                break;
            case section_type::subsection:
            case section_type::vmdescription:
            case section_type::configuration:
            case section_type::footer:
            default:
                return fail(in, errc::bad_section, "an item", "type byte " + hex_text(type), offset);
            }
        }
    }

    bool walk_new_section(reader& in, section_type type, std::uint64_t offset) {
        stream_section section;
        section.type = type;
        section.offset = offset;
        section.section_id = in.get_be32();
        section.idstr = in.get_counted_string();
        section.instance_id = in.get_be32();
        section.version_id = in.get_be32();
        section.body_offset = in.offset();
        if (in.failed())
            return within(in, section.idstr);
        if (section.idstr.empty())
            return fail(in, errc::bad_section, "a name", "none", offset + 5);
        if (type == section_type::start && !live_.emplace(section.section_id, section).second)
            return fail(
                in, errc::bad_section, "a new section id", std::to_string(section.section_id), offset + 1);
        return walk_body_of(in, section);
    }
    bool walk_known_section(reader& in, section_type type, std::uint64_t offset) {
        const std::uint32_t id = in.get_be32();
        if (in.failed())
            return false;
        const auto known = live_.find(id);
        if (known == live_.end())
            return fail(
                in, errc::bad_section, "the id of a section that has begun", std::to_string(id), offset + 1);
        stream_section section = known->second;
        section.type = type;
        section.offset = offset;
        section.body_offset = in.offset();
        if (type == section_type::end)
            live_.erase(known);
        return walk_body_of(in, section);
    }
    bool walk_body_of(reader& in, const stream_section& section) {
        if (section.idstr == "ram") {
            if (section.type == section_type::full)
                return fail(in, errc::bad_section, "START, PART or END of ram", "FULL", section.offset);
            visitor_.begin_ram(section, ram_.page_size());
            if (!walk_ram(in) || !walk_footer(in, section))
                return within(in, section.name());
            visitor_.end_ram(in.offset());
            return true;
        }
        const vmdesc_device* device = section.type == section_type::full ? describe(section) : nullptr;
        return walk_device(in, section, device) || within(in, section.name());
    }
    bool walk_footer(reader& in, const stream_section& section) const {
        if (!options_.section_footers)
            return true;
        const std::uint64_t offset = in.offset();
        const std::uint8_t type = in.get_u8();
        if (in.failed())
            return within(in, "footer");
        if (type != static_cast<std::uint8_t>(section_type::footer))
            return fail(in, errc::bad_section, "the section's footer (0x7e)", hex_text(type), offset);
        const std::uint32_t id = in.get_be32();
        if (in.failed())
            return within(in, "footer");
        return id == section.section_id ||
               fail(in, errc::bad_section, "footer of section " + std::to_string(section.section_id),
                   std::to_string(id), offset + 1);
    }

    // ---- devices ----------------------------------------------------------------------------------------

    const vmdesc_device* describe(const stream_section& section) {
        const auto found = described_.find({section.idstr, section.instance_id});
        if (found == described_.end() || found->second.next == found->second.devices.size())
            return nullptr;
        --left_;
        return found->second.devices[found->second.next++];
    }

    /// Leaves `in` behind the footer. A body that doesn't fit is reported and, where the next item can be found, stepped
    /// over; false where it can't.
    bool walk_device(reader& in, const stream_section& section, const vmdesc_device* device) {
        error failure;
        if (device != nullptr) {
            memory_reader body({in.cursor(), static_cast<std::size_t>(in.remaining())}, in.offset());
            if (has_version_of(section, *device, body) && skip_body(*device, body)) {
                const std::span<const std::byte> content(
                    in.cursor(), static_cast<std::size_t>(body.offset() - section.body_offset));
                const std::span<const std::byte> behind(body.cursor(), body.window());
                const bool whole = walk_footer(body, section);
                if (whole || (options_.location && is_damaged_footer(behind))) {
                    visitor_.device(
                        section, device, content, whole ? body_extent::described : body_extent::broken);
                    if (!whole)
                        report(body.failure().within(section.name()));
                    in.skip(content.size() + (options_.section_footers ? footer_size : 0));
                    return true;
                }
            }
            // Another stream's description may differ without either being damaged.
            if (options_.location)
                failure = body.failure();
        } else if (options_.location && section.type == section_type::full) {
            failure = error(errc::bad_description_json, "every section in the description", "not this one");
            failure.at_offset(section.offset);
        }

        const std::optional<std::size_t> size =
            options_.section_footers ? find_footer(in, section) : std::nullopt;
        const std::span<const std::byte> rest(in.cursor(), static_cast<std::size_t>(in.remaining()));
        if (!size) {
            visitor_.device(section, device, rest, body_extent::unknown);
            if (failure)
                return in.fail(std::move(failure));
            return fail(in, errc::truncated, "the section's footer", "none", section.body_offset);
        }
        visitor_.device(section, device, rest.first(*size),
            failure && device != nullptr ? body_extent::broken : body_extent::guessed);
        if (failure)
            report(failure.within(section.name()));
        in.skip(*size);
        return walk_footer(in, section);
    }
    /// A footer's place with something else in it, but then an item that makes sense.
    bool is_damaged_footer(std::span<const std::byte> bytes) const {
        return bytes.size() > footer_size && is_item(bytes.subspan(footer_size));
    }
    static bool has_version_of(const stream_section& section, const vmdesc_device& device, reader& in) {
        // What an old-style function wrote has no version in the description.
        return device.vmsd_name.empty() || device.version == static_cast<std::int64_t>(section.version_id) ||
               fail(in, errc::bad_description_json, "version " + std::to_string(device.version),
                   std::to_string(section.version_id), section.body_offset - 4);
    }

    /// The end of a body that nothing delimits: the first place with the section's footer, and behind it an item that
    /// makes sense, or the end.
    std::optional<std::size_t> find_footer(const reader& in, const stream_section& section) const {
        const std::byte* const end = in.window_end();
        std::array<std::byte, footer_size> footer{std::byte{static_cast<std::uint8_t>(section_type::footer)}};
        for (std::size_t i = 0; i < 4; ++i)
            footer[i + 1] = std::byte(static_cast<std::uint8_t>(section.section_id >> (24 - 8 * i)));
        for (const std::byte* p = in.cursor();; ++p) {
            p = std::search(p, end, footer.begin(), footer.end());
            if (p == end)
                return std::nullopt;
            if (is_item({p + footer.size(), end}))
                return static_cast<std::size_t>(p - in.cursor());
        }
    }
    bool is_item(std::span<const std::byte> bytes) const {
        if (bytes.empty())
            return true;
        memory_reader in(bytes);
        switch (static_cast<section_type>(in.get_u8())) {
        case section_type::eof:
            return in.remaining() == 0 ||
                   in.get_u8() == static_cast<std::uint8_t>(section_type::vmdescription);
        case section_type::start:
        case section_type::full: {
            in.get_be32();
            const std::string name = in.get_counted_string();
            in.get_be32();
            const std::uint32_t version = in.get_be32();
            const bool printable =
                std::all_of(name.begin(), name.end(), [](char c) { return c > ' ' && c < 0x7f; });
            return !in.failed() && !name.empty() && printable &&
                   version <= std::numeric_limits<std::int32_t>::max();
        }
        case section_type::part:
        case section_type::end: {
            const std::uint32_t id = in.get_be32();
            return !in.failed() && live_.contains(id);
        }
        case section_type::command: {
            const auto number = static_cast<vmstate::command>(in.get_be16());
            const std::uint16_t length = in.get_be16();
            return !in.failed() && !format_of(number).name.empty() && length <= in.remaining();
        }
        default:
            return false;
        }
    }

    // ---- RAM --------------------------------------------------------------------------------------------

    bool walk_ram(reader& in) {
        for (;;) {
            ram_record record;
            if (!ram_.next(in, record))
                return within(in, ram_.block());
            switch (record.kind) {
            case ram_record_kind::end_of_section:
                return true;
            case ram_record_kind::multifd_flush:
                break;
            case ram_record_kind::block_list:
                if (!walk_block_list(in, record))
                    return false;
                break;
            case ram_record_kind::zero:
            case ram_record_kind::page:
            case ram_record_kind::xbzrle:
            case ram_record_kind::compress_page:
                if (!walk_page(in, record))
                    return within(in, ram_.block());
                break;
            }
        }
    }
    bool walk_block_list(reader& in, const ram_record& record) {
        if (!blocks_.empty())
            return fail(in, errc::bad_ram, "one list of blocks", "another", record.position);
        if (format_.mapped_ram)
            return fail(in, errc::unsupported, "pages in the stream", "mapped-ram", record.position);
        ram_block_list list(record.value, format_);
        while (!list.done()) {
            ram_block_entry entry;
            if (!list.next(in, entry))
                return false;
            if (!indices_.emplace(entry.name, blocks_.size()).second) {
                fail(in, errc::bad_ram, "each block once", "another", entry.position);
                return within(in, entry.name);
            }
            blocks_.push_back(
                {std::string(entry.name), entry.used_length, entry.page_size, entry.guest_address});
            visitor_.ram_block(blocks_.back(), blocks_.size() - 1);
        }
        return true;
    }
    bool walk_page(reader& in, const ram_record& record) {
        if (record.names_block) {
            const auto known = indices_.find(ram_.block());
            if (known == indices_.end())
                return fail(in, errc::bad_ram, "a block of the list", "another", record.position);
            block_ = known->second;
        }
        const std::uint64_t length = blocks_[block_].used_length;
        if (record.value >= length || length - record.value < ram_.page_size())
            return fail(in, errc::bad_ram, "a page within " + std::to_string(length) + " bytes",
                "offset " + std::to_string(record.value), record.position);
        if (record.payload_size > in.remaining())
            return fail(in, errc::truncated, std::to_string(record.payload_size) + " bytes",
                std::to_string(in.remaining()), in.offset());
        const std::span<const std::byte> payload(in.cursor(), record.payload_size);
        if (record.kind == ram_record_kind::xbzrle && !xbzrle_decode(payload, scratch_page()))
            return fail(in, errc::bad_ram, "runs that stay within the page", "others", record.position);
        visitor_.ram_page(record, block_, payload);
        in.skip(record.payload_size);
        return true;
    }
    /// A page to decode to: the walk has no RAM, and only wants to know whether the encoding stays within the page.
    std::span<std::byte> scratch_page() {
        scratch_.resize(ram_.page_size());
        return scratch_;
    }
    // ---- commands ---------------------------------------------------------------------------------------

    bool walk_command(reader& in, std::uint64_t offset, ending last) {
        stream_command command;
        command.offset = offset;
        command.number = static_cast<vmstate::command>(in.get_be16());
        const std::uint16_t length = in.get_be16();
        if (in.failed())
            return false;
        const command_format format = format_of(command.number);
        if (format.name.empty())
            return fail(in, errc::bad_command, "a command",
                std::to_string(static_cast<unsigned>(command.number)), offset + 1);
        if (format.length && *format.length != length) {
            fail(in, errc::bad_command, std::to_string(*format.length) + " bytes", std::to_string(length),
                offset + 3);
            return within(in, format.name);
        }
        if (length > in.remaining()) {
            fail(in, errc::truncated, std::to_string(length) + " bytes", std::to_string(in.remaining()),
                in.offset());
            return within(in, format.name);
        }
        command.payload = {in.cursor(), length};
        memory_reader payload(command.payload, in.offset());
        in.skip(length);
        visitor_.command(command);
        if (!walk_payload(in, payload, command.number, last)) {
            if (payload.failed())
                in.fail(payload.failure());
            return within(in, format.name);
        }
        return true;
    }
    bool walk_payload(reader& in, reader& payload, vmstate::command number, ending last) {
        switch (number) {
        case vmstate::command::postcopy_advise:
            if (payload.remaining() == 0)
                return true;
            if (payload.remaining() != 16)
                return fail(payload, errc::bad_command, "0 or 16 bytes", std::to_string(payload.remaining()),
                    payload.offset());
            format_.advised_page_sizes = payload.get_be64();
            if (const std::uint64_t size = payload.get_be64(); size != ram_.page_size()) {
                if (!valid_page_size(size) || page_size_known())
                    return fail(payload, errc::bad_command, "page size " + std::to_string(ram_.page_size()),
                        std::to_string(size), payload.offset() - 8);
                ram_ = ram_record_reader(static_cast<std::size_t>(size));
            }
            return true;
        case vmstate::command::postcopy_ram_discard:
            return walk_discards(payload);
        case vmstate::command::packaged:
            return walk_package(in, payload, last);
        case vmstate::command::recv_bitmap: {
            const std::uint64_t size = payload.remaining();
            const std::string block = payload.get_counted_string();
            if (!payload.failed() && (block.empty() || payload.remaining() != 0))
                return fail(payload, errc::bad_command, "a block's name", std::to_string(size) + " bytes",
                    payload.offset());
            return !payload.failed();
        }
        default:
            return true;
        }
    }
    bool page_size_known() const noexcept {
        return options_.description != nullptr && options_.description->page_size != 0;
    }
    /// u8 0, name, u8 0, then pairs of start and length.
    bool walk_discards(reader& payload) {
        const std::uint8_t version = payload.get_u8();
        if (!payload.failed() && version != 0)
            return fail(
                payload, errc::bad_command, "version 0", std::to_string(version), payload.offset() - 1);
        ram_discard range;
        range.block = payload.get_counted_string();
        const std::uint8_t nul = payload.get_u8();
        if (payload.failed())
            return false;
        if (nul != 0)
            return fail(
                payload, errc::bad_command, "0x00 behind the name", hex_text(nul), payload.offset() - 1);
        if (payload.remaining() == 0 || payload.remaining() % 16 != 0)
            return fail(payload, errc::bad_command, "pairs of start and length",
                std::to_string(payload.remaining()) + " bytes", payload.offset());
        const auto known = indices_.find(range.block);
        if (known == indices_.end())
            return fail(
                payload, errc::bad_ram, "a block of the list", '"' + range.block + '"', payload.offset());
        const std::uint64_t length = blocks_[known->second].used_length;
        while (payload.remaining() != 0) {
            const std::uint64_t offset = payload.offset();
            range.start = payload.get_be64();
            range.length = payload.get_be64();
            if (range.start > length || range.length > length - range.start)
                return fail(payload, errc::bad_ram, "a range within " + std::to_string(length) + " bytes",
                    std::to_string(range.start) + "+" + std::to_string(range.length), offset);
            visitor_.discard(range);
        }
        return true;
    }
    bool walk_package(reader& in, reader& payload, ending last) {
        if (last == ending::buffer)
            return fail(payload, errc::bad_command, "no package in a package", "one", payload.offset());
        const std::uint32_t size = payload.get_be32();
        if (size > in.remaining())
            return fail(in, errc::truncated, std::to_string(size) + " bytes", std::to_string(in.remaining()),
                in.offset());
        memory_reader package({in.cursor(), size}, in.offset());
        visitor_.begin_package(in.offset(), size);
        // The package has a length of its own: whatever is wrong inside, what follows it can be read.
        if (!walk_items(package, ending::buffer))
            report(package.failure());
        visitor_.end_package();
        in.skip(size);
        return true;
    }

    // ---- the end ----------------------------------------------------------------------------------------

    bool walk_end(reader& in) {
        for (const auto& [id, section] : live_) {
            error failure(errc::bad_section, "the END of every section", "none");
            report(failure.within(section.name()).at_offset(in.offset() - 1));
        }
        const std::uint64_t offset = in.offset();
        if (in.remaining() != 0) {
            const std::uint8_t type = in.get_u8();
            if (type != static_cast<std::uint8_t>(section_type::vmdescription))
                return fail(
                    in, errc::trailing_bytes, "the end, or a description (0x06)", hex_text(type), offset);
            const std::uint32_t size = in.get_be32();
            if (in.failed())
                return false;
            if (size > in.remaining())
                return fail(in, errc::truncated, std::to_string(size) + " bytes of description",
                    std::to_string(in.remaining()), in.offset());
            if (options_.location && options_.location->offset != in.offset())
                return fail(in, errc::bad_description_json,
                    "the description at " + std::to_string(options_.location->offset), "here", in.offset());
            visitor_.description({in.offset(), size});
            in.skip(size);
            if (in.remaining() != 0)
                return fail(in, errc::trailing_bytes, "the end", std::to_string(in.remaining()) + " bytes",
                    in.offset());
        }
        if (!options_.location || left_ == 0)
            return true;
        for (const auto& [id, of_id] : described_)
            if (of_id.next != of_id.devices.size()) {
                fail(in, errc::bad_description_json, "every section that the description has", "not this one",
                    offset);
                return within(in, id.first);
            }
        return true;
    }

    std::span<const std::byte> stream_;
    const stream_walk_options& options_;
    stream_visitor& visitor_;
    ram_record_reader ram_;
    ram_list_format format_;
    std::vector<stream_ram_block> blocks_;
    std::map<std::string, std::size_t, std::less<>> indices_;
    std::size_t block_ = 0; ///< of the last page record
    std::vector<std::byte> scratch_;
    std::map<std::uint32_t, stream_section> live_; ///< begun by START and not ended
    std::map<std::pair<std::string_view, std::uint32_t>, devices_of_id> described_;
    std::size_t left_ = 0; ///< devices of the description that the stream has not had yet
    error first_;
};

} // namespace detail

inline result<void> walk_stream(
    std::span<const std::byte> stream, const stream_walk_options& options, stream_visitor& visitor) {
    return detail::stream_walker(stream, options, visitor).walk();
}

} // namespace vmstate
