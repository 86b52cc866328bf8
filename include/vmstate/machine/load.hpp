// SPDX-License-Identifier: BSL-1.0
//
// Reads a stream into a machine. Nothing in a stream is trusted: what doesn't fit is an error that says in which section
// and at which offset. Depends on machine.hpp, vmdesc_walk.hpp, stream/ and codec/.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <variant>
#include <vector>

#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/capturing_reader.hpp>
#include <vmstate/machine/configuration.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/vmdesc.hpp>
#include <vmstate/machine/vmdesc_walk.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/open.hpp>

namespace vmstate {

/// Hears the commands by which a source asks for answers, see `load_options::commands`. A failure ends the load.
class command_listener {
public:
    command_listener() = default;
    command_listener(const command_listener&) = delete;
    command_listener& operator=(const command_listener&) = delete;
    virtual ~command_listener() = default;

    /// OPEN_RETURN_PATH, the first time.
    virtual result<void> open_return_path() = 0;
    /// PING: `value` is to come back in a PONG.
    virtual result<void> ping(std::uint32_t value) = 0;
    /// POSTCOPY_ADVISE, whose page sizes are ours: the source may go on in postcopy, with its memory (`postcopy-ram`) or
    /// without.
    virtual result<void> postcopy_advise(bool with_memory) {
        static_cast<void>(with_memory);
        return {};
    }
};

/// Does what a source asks for that goes on in postcopy, see `load_options::postcopy`. A failure ends the load.
class postcopy_listener {
public:
    postcopy_listener() = default;
    postcopy_listener(const postcopy_listener&) = delete;
    postcopy_listener& operator=(const postcopy_listener&) = delete;
    virtual ~postcopy_listener() = default;

    /// POSTCOPY_RAM_DISCARD with its payload, which began at `offset` of the stream.
    virtual result<void> discard(std::span<const std::byte> payload, std::uint64_t offset) = 0;
    /// POSTCOPY_LISTEN, in a package: what follows the package in the stream is read by whoever hears this, from `rest` on,
    /// and by nobody else any more. The section of the memory has this id there.
    virtual result<void> listen(reader& rest, std::uint32_t ram_section_id) = 0;
    /// A package is loaded but for the PING that is about to be answered and the POSTCOPY_RUN behind it. Of the answer it
    /// follows that the guest is the destination's: where RUN is in the package it is run from here on, whatever becomes of
    /// the connection; where RUN comes later, the source may have sent it since.
    virtual result<void> about_to_run() = 0;
    /// POSTCOPY_RUN: the package was loaded; nothing follows in it.
    virtual result<void> run() = 0;
    /// Whether a package may end with that PING, and without POSTCOPY_RUN: the source sends it when it has the answer, behind
    /// the package, to whoever has heard `listen`.
    virtual bool may_run_later() const { return false; }
};

/// What becomes of what nobody registered, and how much of it there may be.
struct load_options {
    /// Keeps sections and RAM blocks that nobody registered, and writes them again, untouched and at their place in the
    /// order, when this machine is saved. Their bodies have no length of their own: the JSON description says where
    /// they end, so one of the two next members is needed as well. See `carry_unknown` in carry.hpp.
    bool carry_unknown = false;
    /// The stream's description, where it was read beforehand.
    const vmdesc* description = nullptr;
    /// Otherwise: reads the text of the description at the stream's end (`parse_vmdesc`). From the first unknown
    /// section on the stream is then held in memory.
    result<vmdesc> (*parse_description)(std::string_view json) = nullptr;
    /// The most that is held in memory for that, in bytes.
    std::uint64_t tail_limit = std::uint64_t{256} << 20;
    /// The most memory for RAM blocks that nobody registered, in bytes.
    std::uint64_t ram_limit = std::uint64_t{64} << 30;
    /// Who answers a source that is there; null for a stream that was recorded.
    command_listener* commands = nullptr;
    /// Who has the multifd channels that belong to the stream; null for none.
    ram_sync_listener* ram_sync = nullptr;
    /// Who keeps account of the pages; null for nobody.
    ram_page_listener* ram_pages = nullptr;
    /// Who goes on in postcopy; null where that can't be. The load then ends with POSTCOPY_RUN, or with the package.
    postcopy_listener* postcopy = nullptr;
    /// The most that a package may hold, in bytes.
    std::uint64_t package_limit = std::uint64_t{256} << 20;
};

/// Loads one stream; see `load`.
class stream_loader {
public:
    stream_loader(machine& destination, reader& in, const load_options& options)
        : machine_(destination), in_(&in), options_(options) {}

    result<void> load() {
        begin();
        if (result<void> done = load_header(); !done) return done;
        if (result<void> done = load_items(); !done) return done;
        if (!complete_)
            if (result<void> done = load_description(); !done) return done;
        if (options_.carry_unknown) {
            if (ram_section* ram = machine_.ram()) ram->adopt_order();
            machine_.adopt_order(order_, std::move(carried_));
        }
        return {};
    }

private:
    void begin() {
        machine_.remove_carried();
        for (const std::unique_ptr<section>& entry : machine_.sections()) {
            entry->load_section_id.reset();
            if (ram_section* ram = entry->ram()) ram->begin_load(machine_.options());
        }
        if (options_.description != nullptr) index_description(*options_.description);
    }

    // ---- header

    result<void> load_header() {
        const std::uint32_t magic = in_->get_be32();
        if (in_->failed()) return failed_in("header");
        if (magic != stream_magic)
            return error(errc::not_a_stream, "\"QEVM\"", hex(magic)).within("header").at_offset(0);
        const std::uint32_t version = in_->get_be32();
        if (in_->failed()) return failed_in("header");
        if (version != stream_version)
            return error(errc::not_a_stream, "format version 3",
                std::to_string(version) + (version == obsolete_stream_version ? ", which is obsolete" : ""))
                .within("header")
                .at_offset(4);
        if (!machine_.options().send_configuration) return {};
        const std::uint64_t position = in_->offset();
        const std::uint8_t type = in_->get_u8();
        if (in_->failed()) return failed_in("configuration");
        if (type != static_cast<std::uint8_t>(section_type::configuration))
            return error(errc::bad_configuration, "a configuration section", "type " + hex(type))
                .within("configuration")
                .at_offset(position);
        return load_configuration(machine_.options(), *in_);
    }

    // ---- sections

    result<void> load_items() {
        for (;;) {
            const std::uint64_t position = in_->offset();
            const std::uint8_t type = in_->get_u8();
            if (in_->failed()) return failed_in("next section");
            result<void> done;
            switch (static_cast<section_type>(type)) {
            case section_type::eof:
                return check_all_ended(position);
            case section_type::start:
            case section_type::full:
                done = load_start_or_full(position, static_cast<section_type>(type));
                break;
            case section_type::part:
            case section_type::end:
                done = load_part_or_end(position, static_cast<section_type>(type));
                break;
            case section_type::command:
                done = load_command(position);
                break;
            default:
                return error(errc::bad_section, "a section, a command or the end", "type " + hex(type))
                    .within("next section")
                    .at_offset(position);
            }
            if (!done) return done;
            if (complete_) return {};
        }
    }

    /// QEMU takes an end of the stream anywhere between two sections. But a section that was started and not ended has
    /// its rest behind that end: memory of which nothing but the list of blocks is there isn't a load.
    result<void> check_all_ended(std::uint64_t position) const {
        // In the order of the stream, so that the same bytes always get the same message.
        for (const section* entry : order_)
            if (entry->load_section_id && by_section_id_.contains(*entry->load_section_id))
                return error(errc::bad_section, "the section's END", "the end of the sections")
                    .within(section_path(*entry))
                    .at_offset(position);
        return {};
    }

    struct section_header {
        std::uint64_t position = 0; ///< of its type byte
        section_type type = section_type::full;
        std::uint32_t section_id = 0;
        std::string idstr = {};
        std::uint32_t instance_id = 0;
        std::uint32_t version_id = 0;

        std::string path() const { return section_path(idstr, instance_id); }
    };

    result<void> load_start_or_full(std::uint64_t position, section_type type, bool packaged = false) {
        section_header header{position, type};
        header.section_id = in_->get_be32();
        header.idstr = in_->get_counted_string();
        if (in_->failed()) return failed_in("section header");
        if (header.idstr.empty())
            return error(errc::bad_section, "a section's id", "none")
                .within("section header")
                .at_offset(position);
        header.instance_id = in_->get_be32();
        header.version_id = in_->get_be32();
        if (in_->failed()) return failed_in(header.path());
        // Its pages come over the stream, where others are read at the same time.
        result<void> done = packaged && header.idstr == ram_section::id
                                ? error(errc::bad_section, "no memory in a package", "its section")
                                : load_section(header);
        if (!done) return done.error().within(header.path()).at_offset(position);
        return {};
    }

    result<void> load_section(const section_header& header) {
        if (!section_ids_.insert(header.section_id).second)
            return error(errc::bad_section, "a section id of its own", std::to_string(header.section_id))
                .at_offset(header.position);
        const std::size_t nth = occurrences_[key_of(header.idstr, header.instance_id)]++;
        section* entry = machine_.find_section(header.idstr, header.instance_id);
        const bool taken = entry != nullptr && entry->load_section_id.has_value();
        if (entry == nullptr || taken) {
            if (options_.carry_unknown && header.type == section_type::full) return carry(header, nth);
            if (options_.carry_unknown && header.idstr == ram_section::id && !taken) {
                if (registration added = machine_.add_ram_section(); !added) return added;
                entry = machine_.find_section(header.idstr, header.instance_id);
                if (entry == nullptr) return unknown(header);
                entry->ram()->begin_load(machine_.options());
            } else if (taken) {
                return error(errc::bad_section, "each section once", "a second one")
                    .at_offset(header.position);
            } else {
                return unknown(header);
            }
        }
        // Only what has a part to send while the guest runs is started and ended; a device's state is in one piece, and
        // loading it again from a PART would run its hooks again.
        if (header.type == section_type::start && std::holds_alternative<described_device>(entry->content))
            return error(errc::bad_section, "a device as FULL", "START").at_offset(header.position);
        if (header.version_id > static_cast<std::uint32_t>(entry->version_id))
            return error(errc::version_too_new, "version " + std::to_string(entry->version_id) + " or older",
                std::to_string(header.version_id))
                .at_offset(header.position);
        entry->load_section_id = header.section_id;
        entry->load_version_id = static_cast<int>(header.version_id);
        if (header.type == section_type::start) by_section_id_[header.section_id] = entry;
        order_.push_back(entry);
        if (result<void> done = load_body(*entry); !done) return done;
        return load_footer(header.section_id);
    }
    static error unknown(const section_header& header) {
        return error(errc::unknown_section, {},
            '\'' + header.idstr + "' instance " + std::to_string(header.instance_id) + " version " +
                std::to_string(header.version_id))
            .at_offset(header.position);
    }

    result<void> load_part_or_end(std::uint64_t position, section_type type) {
        const std::uint32_t section_id = in_->get_be32();
        if (in_->failed()) return failed_in("section header");
        const auto known = by_section_id_.find(section_id);
        if (known == by_section_id_.end())
            return error(
                errc::unknown_section, "the id of a section that was started", std::to_string(section_id))
                .within("section header")
                .at_offset(position);
        section& entry = *known->second;
        // Nothing of it comes behind its END.
        if (type == section_type::end) by_section_id_.erase(known);
        result<void> done = load_body(entry);
        if (done) done = load_footer(section_id);
        if (!done) return done.error().within(section_path(entry)).at_offset(position);
        return {};
    }

    result<void> load_body(section& entry) {
        struct body_loader {
            stream_loader& self;
            const section& entry;
            result<void> operator()(described_device& device) const {
                return device.operations->load(*self.in_, device.object, entry.load_version_id);
            }
            result<void> operator()(handlers& pair) const {
                if (!pair.load) return error(errc::unsupported, {}, "no function to load this section with");
                return pair.load(*self.in_, entry.load_version_id);
            }
            result<void> operator()(ram_section& ram) const {
                return self.load_ram(ram, entry.load_version_id);
            }
            result<void> operator()(carried_section&) const { return error(errc::bad_section); }
        };
        result<void> done = std::visit(body_loader{*this, entry}, entry.content);
        if (!done) return done.error().at_offset(in_->offset());
        return in_->status();
    }
    result<void> load_ram(ram_section& ram, int version_id) {
        if (version_id != ram_section::version_id)
            return error(errc::version_too_old, "version " + std::to_string(ram_section::version_id),
                std::to_string(version_id));
        return ram.load(*in_,
            {advised_page_sizes_, options_.carry_unknown, options_.ram_limit, options_.ram_sync, options_.ram_pages});
    }
    result<void> load_footer(std::uint32_t section_id) {
        if (!machine_.options().send_section_footer) return {};
        const std::uint64_t position = in_->offset();
        const std::uint8_t type = in_->get_u8();
        if (!in_->failed() && type != static_cast<std::uint8_t>(section_type::footer))
            return error(errc::bad_section, "the section's footer", "type " + hex(type))
                .within("footer")
                .at_offset(position);
        const std::uint32_t id = in_->get_be32();
        if (in_->failed()) return failed_in("footer");
        if (id != section_id)
            return error(errc::bad_section, "section id " + std::to_string(section_id), std::to_string(id))
                .within("footer")
                .at_offset(position);
        return {};
    }

    // ---- what nobody registered

    result<void> carry(const section_header& header, std::size_t nth) {
        if (result<void> found = find_description(); !found) return found;
        const auto known = described_.find(key_of(header.idstr, header.instance_id));
        if (known == described_.end() || nth >= known->second.size())
            return error(errc::unknown_section, "a section that is registered or described", "neither")
                .at_offset(header.position);
        const vmdesc_device& device = *known->second[nth];
        capturing_reader body(*in_);
        result<void> skipped = skip_body(device, body);
        if (!skipped) return skipped;
        if (body.failed()) return body.failure();

        auto entry = std::make_unique<section>();
        entry->idstr = header.idstr;
        entry->instance_id = header.instance_id;
        entry->version_id = static_cast<int>(header.version_id);
        entry->load_section_id = header.section_id;
        entry->content = carried_section{body.take(), device.raw_json};
        order_.push_back(entry.get());
        carried_.push_back(std::move(entry));
        return load_footer(header.section_id);
    }

    /// Where no description was given: the rest of the stream is taken into memory, and the description is at its end.
    result<void> find_description() {
        if (options_.description != nullptr || tail_description_) return {};
        if (options_.parse_description == nullptr)
            return error(
                errc::unknown_section, "a description that says where the section ends", "none was given");
        const std::uint64_t position = in_->offset();
        while (in_->peek(1) != 0) {
            if (tail_.size() + in_->window() > options_.tail_limit)
                return error(errc::out_of_range,
                    "at most " + std::to_string(options_.tail_limit) +
                        " bytes from the first unknown section on",
                    "more");
            tail_.insert(tail_.end(), in_->cursor(), in_->window_end());
            in_->seek(in_->window_end());
        }
        if (in_->failed()) return in_->failure();
        tail_reader_ = std::make_unique<memory_reader>(tail_, position);
        in_ = tail_reader_.get();
        const result<vmdesc_location> where = find_vmdesc(tail_);
        if (!where) return where.error();
        result<vmdesc> parsed = options_.parse_description(where->text_in(tail_));
        if (!parsed) return parsed.error().within("vmdesc");
        tail_description_ = std::make_unique<vmdesc>(std::move(*parsed));
        index_description(*tail_description_);
        return {};
    }
    void index_description(const vmdesc& description) {
        for (const vmdesc_device& device : description.devices)
            described_[key_of(device.name, device.instance_id)].push_back(&device);
    }
    static std::string key_of(std::string_view idstr, std::uint32_t instance_id) {
        return std::string(idstr) + '#' + std::to_string(instance_id);
    }

    // ---- commands

    result<void> load_command(std::uint64_t position) {
        const auto number = static_cast<command>(in_->get_be16());
        const std::uint16_t length = in_->get_be16();
        if (in_->failed()) return failed_in("command");
        const command_format format = format_of(number);
        if (format.name.empty())
            return error(
                errc::bad_command, "a command from 1 to 11", std::to_string(static_cast<unsigned>(number)))
                .within("command")
                .at_offset(position);
        result<void> done =
            format.length && *format.length != length
                ? error(errc::bad_command, std::to_string(*format.length) + " bytes", std::to_string(length))
                : obey(number, length);
        if (!done) return done.error().within(format.name).at_offset(position);
        return {};
    }
    /// The commands of a plain precopy stream.
    result<void> obey(command number, std::uint16_t length) {
        switch (number) {
        case command::open_return_path:
            // Twice is harmless.
            if (return_path_open_) return {};
            return_path_open_ = true;
            return options_.commands != nullptr ? options_.commands->open_return_path() : result<void>();
        case command::ping: {
            const std::uint32_t value = in_->get_be32();
            if (in_->failed()) return in_->failure();
            if (!return_path_open_) return error(errc::bad_command, "OPEN_RETURN_PATH before a PING", "none");
            return options_.commands != nullptr ? options_.commands->ping(value) : result<void>();
        }
        case command::postcopy_advise:
            return advise(length);
        case command::switchover_start:
            return {};
        default:
            if (options_.postcopy == nullptr) return error(errc::unsupported, {}, std::string(format_of(number).name));
            return obey_postcopy(number, length);
        }
    }
    /// Those of a stream that goes on in postcopy.
    result<void> obey_postcopy(command number, std::uint16_t length) {
        switch (number) {
        case command::postcopy_ram_discard: {
            const std::uint64_t position = in_->offset();
            std::vector<std::byte> payload(length);
            if (!in_->read(payload.data(), payload.size())) return in_->failure();
            return options_.postcopy->discard(payload, position);
        }
        case command::packaged:
            return load_package();
        case command::postcopy_listen:
        case command::postcopy_run:
            return error(errc::bad_command, "it inside of a package", "it outside");
        case command::postcopy_resume:
        case command::recv_bitmap:
            return error(errc::bad_command, "it after a connection broke in postcopy", "it on the first");
        default:
            return error(errc::unsupported, {}, std::string(format_of(number).name));
        }
    }
    /// The source may go on in postcopy: its pages have to have our sizes.
    result<void> advise(std::uint16_t length) {
        if (advised_) return error(errc::bad_command, "POSTCOPY_ADVISE once", "a second one");
        advised_ = true;
        if (length == 0) return options_.commands != nullptr ? options_.commands->postcopy_advise(false) : result<void>();
        if (length != 16) return error(errc::bad_command, "0 or 16 bytes", std::to_string(length));
        const std::uint64_t page_sizes = in_->get_be64();
        const std::uint64_t page_size = in_->get_be64();
        if (in_->failed()) return in_->failure();
        const ram_section* ram = machine_.ram();
        const std::uint64_t local = ram != nullptr ? ram->page_size_summary() : 0;
        // With blocks still to come that nobody registered, theirs are among the source's sizes.
        if (options_.carry_unknown ? (local & ~page_sizes) != 0 : local != page_sizes)
            return error(errc::bad_command, "RAM page sizes " + hex(local), hex(page_sizes));
        if (page_size != machine_.options().guest_page_size())
            return error(errc::bad_command,
                "guest pages of " + std::to_string(machine_.options().guest_page_size()) + " bytes",
                std::to_string(page_size));
        advised_page_sizes_ = page_sizes;
        return options_.commands != nullptr ? options_.commands->postcopy_advise(true) : result<void>();
    }

    // ---- the package of postcopy

    /// All devices at once, so that the stream is free for pages while they are loaded. Read in full before any of it is
    /// looked at.
    result<void> load_package() {
        const std::uint32_t size = in_->get_be32();
        if (in_->failed()) return in_->failure();
        if (size > options_.package_limit)
            return error(errc::out_of_range, "a package of at most " + std::to_string(options_.package_limit) + " bytes",
                std::to_string(size));
        const std::uint64_t position = in_->offset();
        // Memory is taken as bytes come: what a stream says that it has is not yet there.
        constexpr std::size_t piece = std::size_t{1} << 20;
        std::vector<std::byte> package;
        while (package.size() < size) {
            const std::size_t begin = package.size();
            package.resize(begin + std::min(piece, size - begin));
            if (!in_->read(package.data() + begin, package.size() - begin)) return in_->failure();
        }
        reader& rest = *in_;
        memory_reader items(package, position);
        in_ = &items;
        result<void> done = load_package_items(rest);
        in_ = &rest;
        return done;
    }
    result<void> load_package_items(reader& rest) {
        while (in_->peek(1) != 0) {
            const std::uint64_t position = in_->offset();
            if (complete_)
                return error(errc::trailing_bytes, "nothing behind POSTCOPY_RUN", std::to_string(in_->window()) + " bytes")
                    .at_offset(position);
            const std::uint8_t type = in_->get_u8();
            result<void> done;
            switch (static_cast<section_type>(type)) {
            case section_type::full:
                done = load_start_or_full(position, section_type::full, true);
                break;
            case section_type::command:
                done = load_package_command(position, rest);
                break;
            default:
                return error(errc::bad_section, "a whole section or a command in a package", "type " + hex(type))
                    .within("next section")
                    .at_offset(position);
            }
            if (!done) return done;
        }
        if (complete_) return {};
        return error(errc::bad_command, "POSTCOPY_RUN at the package's end", "none").at_offset(in_->offset());
    }
    result<void> load_package_command(std::uint64_t position, reader& rest) {
        const auto number = static_cast<command>(in_->get_be16());
        const std::uint16_t length = in_->get_be16();
        if (in_->failed()) return failed_in("command");
        const command_format format = format_of(number);
        const std::string name =
            format.name.empty() ? std::to_string(static_cast<unsigned>(number)) : std::string(format.name);
        result<void> done;
        if (format.length && *format.length != length)
            done = error(errc::bad_command, std::to_string(*format.length) + " bytes", std::to_string(length));
        else if (number == command::ping)
            done = ping_in_package(length);
        else if (number == command::postcopy_listen)
            done = listen(rest);
        else if (number == command::postcopy_run)
            done = run();
        else
            done = error(errc::bad_command, "PING, POSTCOPY_LISTEN or POSTCOPY_RUN in a package", name);
        if (!done) return done.error().within(name).at_offset(position);
        return {};
    }
    result<void> listen(reader& rest) {
        for (const auto& [section_id, entry] : by_section_id_)
            if (entry->ram() != nullptr) return options_.postcopy->listen(rest, section_id);
        return error(errc::bad_command, "a section of memory that has begun and not ended", "none");
    }
    result<void> ping_in_package(std::uint16_t length) {
        constexpr std::array<std::uint8_t, 5> run_command{static_cast<std::uint8_t>(section_type::command), 0,
            static_cast<std::uint8_t>(command::postcopy_run), 0, 0};
        const bool is_last = in_->remaining() == length + run_command.size() &&
                             std::memcmp(in_->cursor() + length, run_command.data(), run_command.size()) == 0;
        const bool is_all = in_->remaining() == length && options_.postcopy->may_run_later();
        if (is_last || is_all)
            if (result<void> ready = options_.postcopy->about_to_run(); !ready) return ready;
        complete_ = is_all;
        return obey(command::ping, length);
    }
    result<void> run() {
        if (result<void> done = options_.postcopy->run(); !done) return done;
        complete_ = true;
        return {};
    }

    // ---- description

    /// What follows the end: the description, which is passed over, or nothing. Anything else means that the end wasn't
    /// one: a section whose type byte was damaged.
    ///
    /// A machine with a description waits for its first byte, as QEMU does, and reads no byte behind it: the source may
    /// keep the channel open for the return path. A machine without one must not wait at all: it looks only where a
    /// byte has been read already, or where the channel knows its end (memory, a regular file).
    result<void> load_description() {
        const bool suppressed = machine_.options().suppress_vmdesc;
        if (suppressed && in_->window() == 0 &&
            in_->remaining() == std::numeric_limits<std::uint64_t>::max())
            return {};
        if (in_->peek(1) == 0) return in_->status();
        const std::uint64_t position = in_->offset();
        if (*in_->cursor() != static_cast<std::byte>(section_type::vmdescription))
            return error(errc::trailing_bytes, "the description or the end of the stream",
                "type " + hex(std::to_integer<std::uint8_t>(*in_->cursor())))
                .within("vmdesc")
                .at_offset(position);
        if (suppressed) return {};
        in_->skip(1);
        const std::uint32_t length = in_->get_be32();
        if (!in_->failed()) in_->skip(length);
        if (in_->failed()) return failed_in("vmdesc");
        return {};
    }

    // ---- errors

    error failed_in(std::string_view where) const { return error(in_->failure()).within(where); }
    static std::string hex(std::uint64_t value) {
        constexpr std::string_view digits = "0123456789abcdef";
        std::string text;
        do text.insert(text.begin(), digits[value & 15]);
        while ((value >>= 4) != 0);
        return "0x" + text;
    }

    machine& machine_;
    reader* in_;
    load_options options_;

    std::unordered_map<std::uint32_t, section*> by_section_id_; ///< of sections that were started and not ended
    std::unordered_set<std::uint32_t> section_ids_;             ///< of all sections so far
    std::unordered_map<std::string, std::size_t> occurrences_;  ///< how often an id and instance came
    std::vector<section*> order_;
    machine::section_list carried_;

    std::unordered_map<std::string, std::vector<const vmdesc_device*>> described_;
    std::unique_ptr<vmdesc> tail_description_;
    std::vector<std::byte> tail_;
    std::unique_ptr<memory_reader> tail_reader_;

    bool return_path_open_ = false;
    bool advised_ = false;
    std::uint64_t advised_page_sizes_ = 0;
    bool complete_ = false; ///< the package is, with POSTCOPY_RUN or without: the rest of the stream is somebody else's
};

/// Loads a stream into a machine whose guest stands still. Errors name the section, the field and the offset in the
/// stream; devices and memory may then be partly loaded, and the guest must not be started.
inline result<void> load(machine& destination, reader& in, const load_options& options = {}) {
    if (result<void> fit = destination.check(); !fit) return fit;
    return stream_loader(destination, in, options).load();
}

/// The same from a channel, which stays open. More may have been read from it than belongs to the stream.
inline result<void> load(machine& destination, input_channel& input, const load_options& options = {}) {
    buffered_reader in(input);
    return load(destination, static_cast<reader&>(in), options);
}
inline result<void> load(
    machine& destination, const std::unique_ptr<input_channel>& input, const load_options& options = {}) {
    if (!input) return error(errc::invalid_argument, "a channel", "none");
    return load(destination, *input, options);
}
/// The same from a channel that is handed over, and that is closed at the end: a command that fails is an error.
inline result<void> load(
    machine& destination, std::unique_ptr<input_channel>&& input, const load_options& options = {}) {
    const std::unique_ptr<input_channel> owned = std::move(input);
    if (result<void> loaded = load(destination, owned, options); !loaded) return loaded;
    return owned->close();
}
/// The same from a channel that may not have been opened: then the error is that of opening.
template <opening_of<input_channel> Opening>
result<void> load(machine& destination, Opening&& input, const load_options& options = {}) {
    if (input.has_error()) return input.error();
    return load(destination, *std::forward<Opening>(input), options);
}
/// The same from something of the user's that can be read.
template <byte_source Source>
result<void> load(machine& destination, Source& source, const load_options& options = {}) {
    return load(destination, *make_input_channel(source), options);
}

} // namespace vmstate
