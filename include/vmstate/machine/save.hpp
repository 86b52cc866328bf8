// SPDX-License-Identifier: BSL-1.0
//
// Writes a machine's stream: header, configuration, memory, devices, description. The steps are there one by one for
// those who do more between them than a machine that stands still needs. Depends on machine.hpp, stream/ and codec/.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/configuration.hpp>
#include <vmstate/machine/description_writer.hpp>
#include <vmstate/machine/json_writer.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/stream/buffered_writer.hpp>
#include <vmstate/stream/open.hpp>

namespace vmstate {

/// The parts of a stream in the order in which they are called. After a failure, which the writer keeps, the rest does
/// nothing.
class stream_saver {
public:
    stream_saver(machine& source, writer& out) : machine_(source), out_(out) {}

    /// Magic, version, configuration.
    result<void> save_header() {
        out_.put_be32(stream_magic);
        out_.put_be32(stream_version);
        if (machine_.options().send_configuration) save_configuration(machine_.options(), out_);
        return out_.status();
    }
    /// START, PART and END of the memory, which stands still.
    result<void> save_ram() {
        for (const std::unique_ptr<section>& entry : machine_.sections()) {
            ram_section* const ram = entry->ram();
            if (ram == nullptr) continue;
            begin_section(section_type::start, *entry);
            ram->save_setup(out_, machine_.options());
            end_section(*entry);
            begin_section(section_type::part, *entry);
            ram->save_pages(out_, machine_.options());
            end_section(*entry);
            begin_section(section_type::end, *entry);
            ram->save_complete(out_);
            end_section(*entry);
            if (out_.failed()) return error(out_.failure()).within(section_path(*entry));
        }
        return {};
    }
    /// A FULL section for each device that needs one.
    result<void> save_devices() {
        start_description();
        for (const std::unique_ptr<section>& entry : machine_.sections()) {
            result<void> saved = save_device(*entry);
            if (!saved) return saved.error().within(section_path(*entry)).at_offset(out_.offset());
        }
        return {};
    }
    /// The end of the sections, and the JSON description unless the machine suppresses it.
    result<void> save_end() {
        out_.put_u8(static_cast<std::uint8_t>(section_type::eof));
        if (!machine_.options().suppress_vmdesc) {
            json_.end_array();
            json_.end_object();
            const std::string& text = json_.text();
            if (text.size() > std::numeric_limits<std::uint32_t>::max())
                out_.fail(error(
                    errc::invalid_argument, "a description of less than 4 GiB", std::to_string(text.size()))
                              .within("vmdesc"));
            out_.put_u8(static_cast<std::uint8_t>(section_type::vmdescription));
            out_.put_be32(static_cast<std::uint32_t>(text.size()));
            out_.write(text.data(), text.size());
        }
        return out_.status();
    }

    /// The header of a section, or of a part of one; its body, written to the same writer, and `end_section` follow.
    void begin_section(section_type type, const section& entry) {
        out_.put_u8(static_cast<std::uint8_t>(type));
        out_.put_be32(entry.section_id);
        if (type != section_type::start && type != section_type::full) return;
        out_.put_counted_string(entry.idstr);
        out_.put_be32(entry.instance_id);
        out_.put_be32(static_cast<std::uint32_t>(entry.version_id));
    }
    void end_section(const section& entry) {
        if (!machine_.options().send_section_footer) return;
        out_.put_u8(static_cast<std::uint8_t>(section_type::footer));
        out_.put_be32(entry.section_id);
    }
    /// A command between two sections.
    void put_command(command number, std::span<const std::byte> payload = {}) {
        out_.put_u8(static_cast<std::uint8_t>(section_type::command));
        out_.put_be16(static_cast<std::uint16_t>(number));
        out_.put_be16(static_cast<std::uint16_t>(payload.size()));
        out_.write(payload);
    }

private:
    void start_description() {
        json_ = {};
        json_.start_object();
        json_.put_number("page_size", static_cast<std::int64_t>(machine_.options().guest_page_size()));
        json_.start_array("devices");
    }

    result<void> save_device(section& entry) {
        struct saver {
            stream_saver& self;
            section& entry;
            result<void> operator()(described_device& device) const {
                return self.save_described(entry, device);
            }
            result<void> operator()(handlers& pair) const { return self.save_legacy(entry, pair); }
            result<void> operator()(ram_section&) const { return {}; }
            result<void> operator()(carried_section& carried) const {
                return self.save_carried(entry, carried);
            }
        };
        return std::visit(saver{*this, entry}, entry.content);
    }
    result<void> save_described(const section& entry, const described_device& device) {
        const device_operations& operations = *device.operations;
        if (!operations.is_needed(device.object)) return {};
        begin_section(section_type::full, entry);
        const std::uint64_t begin = out_.offset();
        result<void> saved = operations.save(out_, device.object);
        if (!saved) return saved;
        if (out_.failed()) return out_.failure();
        const std::uint64_t size = out_.offset() - begin;
        end_section(entry);
        if (!machine_.options().suppress_vmdesc) describe(entry, device, size);
        return out_.status();
    }
    result<void> save_legacy(const section& entry, const handlers& pair) {
        if (!pair.save) return {};
        begin_section(section_type::full, entry);
        const std::uint64_t begin = out_.offset();
        result<void> saved = pair.save(out_);
        if (!saved) return saved;
        if (out_.failed()) return out_.failure();
        const std::uint64_t size = out_.offset() - begin;
        end_section(entry);
        if (!machine_.options().suppress_vmdesc) describe_as_buffer(entry, size);
        return out_.status();
    }
    result<void> save_carried(const section& entry, const carried_section& carried) {
        begin_section(section_type::full, entry);
        out_.write(carried.body);
        end_section(entry);
        if (!machine_.options().suppress_vmdesc) json_.put_raw(carried.description);
        return out_.status();
    }

    void describe(const section& entry, const described_device& device, std::uint64_t size) {
        json_writer json;
        start_device(json, entry);
        description_writer description(json, device.operations->name, device.operations->version_id);
        device.operations->walk(device.object, description);
        description.finish();
        json.end_object();
        // A hook may have cleared after saving what decides which fields there are: then the entries don't account for
        // the bytes, and a reader has to be told how many there are rather than what they might be.
        if (description.size() == size)
            json_.put_raw(json.text());
        else
            describe_as_buffer(entry, size);
    }
    /// How QEMU describes what an old-style function has written.
    void describe_as_buffer(const section& entry, std::uint64_t size) {
        start_device(json_, entry);
        json_.put_number("size", static_cast<std::int64_t>(size));
        json_.start_array("fields");
        json_.start_object();
        json_.put_string("name", "data");
        json_.put_number("size", static_cast<std::int64_t>(size));
        json_.put_string("type", "buffer");
        json_.end_object();
        json_.end_array();
        json_.end_object();
    }
    static void start_device(json_writer& json, const section& entry) {
        json.start_object();
        json.put_string("name", entry.idstr);
        json.put_number("instance_id", entry.instance_id);
    }

    machine& machine_;
    writer& out_;
    json_writer json_;
};

/// Saves a machine that stands still as one stream. Errors name the section, the field and the offset in the stream.
inline result<void> save(machine& source, writer& out) {
    if (result<void> fit = source.check(); !fit) return fit;
    stream_saver saver(source, out);
    if (result<void> done = saver.save_header(); !done) return done;
    if (result<void> done = saver.save_ram(); !done) return done;
    if (result<void> done = saver.save_devices(); !done) return done;
    return saver.save_end();
}

/// The same to a channel, which stays open.
inline result<void> save(machine& source, output_channel& output) {
    buffered_writer out(output);
    if (result<void> saved = save(source, static_cast<writer&>(out)); !saved) return saved;
    return out.flush();
}
inline result<void> save(machine& source, const std::unique_ptr<output_channel>& output) {
    if (!output) return error(errc::invalid_argument, "a channel", "none");
    return save(source, *output);
}
/// The same to a channel that is handed over, and that is closed at the end: an error of the last write, or a command
/// that fails, is an error of the save.
inline result<void> save(machine& source, std::unique_ptr<output_channel>&& output) {
    const std::unique_ptr<output_channel> owned = std::move(output);
    if (result<void> saved = save(source, owned); !saved) return saved;
    return owned->close();
}
/// The same to a channel that may not have been opened: then the error is that of opening.
template <opening_of<output_channel> Opening>
result<void> save(machine& source, Opening&& output) {
    if (output.has_error()) return output.error();
    return save(source, *std::forward<Opening>(output));
}
/// The same to something of the user's that can be written to.
template <byte_sink Sink>
result<void> save(machine& source, Sink& sink) {
    return save(source, *make_output_channel(sink));
}

} // namespace vmstate
