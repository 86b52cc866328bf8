// SPDX-License-Identifier: BSL-1.0
#include "json.hpp"

#include <vmstate/machine/vmdesc_walk.hpp>

#include <boost/json/array.hpp>
#include <boost/json/object.hpp>

#include <cctype>
#include <string_view>
#include <utility>

namespace inspect {

namespace json = boost::json;
using vmstate::ram_record_kind;
using vmstate::vmdesc_kind;

namespace {

std::string hex_text(std::span<const std::byte> bytes) {
    constexpr std::string_view digits = "0123456789abcdef";
    std::string text;
    text.reserve(2 * bytes.size());
    for (const std::byte byte : bytes) {
        text += digits[std::to_integer<std::size_t>(byte >> 4)];
        text += digits[std::to_integer<std::size_t>(byte & std::byte{15})];
    }
    return text;
}

/// Names come from the stream: JSON has to be UTF-8, so bytes above 0x7f become that code point.
json::string text_of(std::string_view name) {
    json::string text;
    for (const char c : name) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x80) {
            text.push_back(c);
        } else {
            text.push_back(static_cast<char>(0xc0 | byte >> 6));
            text.push_back(static_cast<char>(0x80 | (byte & 0x3f)));
        }
    }
    return text;
}

json::value number_of(const vmstate::vmdesc_value& value, std::size_t i) {
    switch (value.kind) {
    case vmdesc_kind::boolean:
        return value.as_unsigned(i) != 0;
    case vmdesc_kind::signed_integer:
        return value.as_signed(i);
    case vmdesc_kind::floating:
        return value.as_double(i);
    case vmdesc_kind::timer: // not pending is null
        return value.as_signed(i) == -1 ? json::value() : json::value(value.as_signed(i));
    case vmdesc_kind::marker:
        return value.as_unsigned(i) == 0x30 ? json::value() : json::value("valid");
    default:
        return value.as_unsigned(i);
    }
}

json::value value_of(const vmstate::vmdesc_value& value) {
    switch (value.kind) {
    case vmdesc_kind::buffer:
    case vmdesc_kind::opaque:
    case vmdesc_kind::unused:
    case vmdesc_kind::bitmap:
        return json::value(hex_text(value.bytes));
    default:
        break;
    }
    if (value.field.array_len == 1)
        return number_of(value, 0);
    json::array numbers;
    for (std::size_t i = 0; i < value.count(); ++i)
        numbers.push_back(number_of(value, i));
    return numbers;
}

/// Builds an array of fields; each level's array is moved into its parent when it ends.
class field_builder final : public vmstate::vmdesc_visitor {
public:
    field_builder() { levels_.emplace_back(); }

    void value(const vmstate::vmdesc_value& value) override {
        json::object field = start(value.field, value.field.index, value.offset);
        field["size"] = value.bytes.size();
        if (value.field.array_len > 1)
            field["array_len"] = value.field.array_len;
        field["value"] = value_of(value);
        top().fields.push_back(std::move(field));
    }
    void begin_nested(const vmstate::vmdesc_nested& place) override {
        json::object field = start(place.field, place.index, place.offset);
        if (place.role == vmstate::vmdesc_role::tree_key)
            field["role"] = "key";
        if (place.role == vmstate::vmdesc_role::tree_value)
            field["role"] = "value";
        field["vmsd_name"] = text_of(place.body.vmsd_name);
        field["version"] = place.body.version;
        levels_.push_back({std::move(field), {}, {}});
    }
    void end_nested() override { close(true); }
    void begin_list(
        const vmstate::vmdesc_field& field, std::uint64_t elements, std::uint64_t offset) override {
        json::object list = start(field, std::nullopt, offset);
        list["elements"] = elements;
        levels_.push_back({std::move(list), {}, {}});
    }
    void end_list() override { close(true); }
    void tree_key(const vmstate::vmdesc_field& field, std::uint64_t index, std::uint64_t key,
        std::uint64_t offset) override {
        json::object node = start(field, index, offset);
        node["role"] = "key";
        node["value"] = key;
        top().fields.push_back(std::move(node));
    }
    void begin_subsection(const vmstate::vmdesc_body& body, std::uint64_t offset) override {
        levels_.push_back(
            {{{"vmsd_name", text_of(body.vmsd_name)}, {"version", body.version}, {"offset", offset}}, {},
                {}});
    }
    void end_subsection() override { close(false); }

    /// Fields and subsections into `device`; levels that a broken body left open are closed.
    void finish(json::object& device) {
        while (levels_.size() > 1)
            close(true);
        fill(device, top());
    }

private:
    struct level {
        json::object object;
        json::array fields;
        json::array subsections;
    };

    level& top() { return levels_.back(); }
    static json::object start(
        const vmstate::vmdesc_field& field, std::optional<std::uint64_t> index, std::uint64_t offset) {
        json::object object{{"name", text_of(field.name)}, {"type", text_of(field.type)}};
        if (index)
            object["index"] = *index;
        object["offset"] = offset;
        return object;
    }
    static void fill(json::object& object, level& from) {
        object["fields"] = std::move(from.fields);
        if (!from.subsections.empty())
            object["subsections"] = std::move(from.subsections);
    }
    void close(bool is_field) {
        level done = std::move(levels_.back());
        levels_.pop_back();
        fill(done.object, done);
        (is_field ? top().fields : top().subsections).push_back(std::move(done.object));
    }

    std::vector<level> levels_;
};

json::object problem_object(const vmstate::error& problem) {
    json::object object{{"kind", to_string(problem.code())}, {"path", text_of(problem.path())}};
    if (problem.offset() != vmstate::error::no_offset)
        object["offset"] = problem.offset();
    object["expected"] = text_of(problem.expected());
    object["found"] = text_of(problem.found());
    object["message"] = text_of(problem.message());
    return object;
}

std::string_view kind_key(ram_record_kind kind) {
    switch (kind) {
    case ram_record_kind::zero:
        return "zero";
    case ram_record_kind::page:
        return "normal";
    case ram_record_kind::xbzrle:
        return "xbzrle";
    case ram_record_kind::compress_page:
        return "compressed";
    default:
        return "";
    }
}
constexpr ram_record_kind page_kinds[] = {
    ram_record_kind::page, ram_record_kind::zero, ram_record_kind::xbzrle, ram_record_kind::compress_page};

json::object ram_object(const report& stream, bool with_map) {
    json::array blocks;
    for (const block_report& each : stream.blocks) {
        json::object block{{"name", text_of(each.block.name)}, {"used_length", each.block.used_length}};
        if (each.block.page_size)
            block["page_size"] = *each.block.page_size;
        if (each.block.guest_address)
            block["guest_address"] = *each.block.guest_address;
        json::object records;
        for (const ram_record_kind kind : page_kinds)
            records[kind_key(kind)] = each.records_of(kind);
        block["records"] = std::move(records);
        block["pages"] = each.all_pages();
        if (with_map) {
            json::array map;
            for (const page_range& range : each.pages)
                map.push_back({{"start", range.first * stream.page_size},
                    {"length", range.count * stream.page_size}, {"kind", kind_key(range.kind)}});
            block["map"] = std::move(map);
        }
        blocks.push_back(std::move(block));
    }
    return {{"page_size", stream.page_size}, {"blocks", std::move(blocks)}};
}

json::object section_object(const vmstate::stream_section& section, std::string_view kind) {
    return {{"item", kind}, {"name", text_of(section.idstr)}, {"instance_id", section.instance_id},
        {"version_id", section.version_id}, {"section_id", section.section_id},
        {"part", name_of(section.type)}, {"offset", section.offset}};
}

json::object device_object(const device_item& device, bool with_fields) {
    json::object object = section_object(device.section, "device");
    object["body_offset"] = device.section.body_offset;
    object["body_size"] = device.body.size();
    switch (device.extent) {
    case vmstate::body_extent::described:
        object["extent"] = "described";
        break;
    case vmstate::body_extent::guessed:
        object["extent"] = "guessed";
        break;
    case vmstate::body_extent::broken:
        object["extent"] = "broken";
        break;
    case vmstate::body_extent::unknown:
        object["extent"] = "unknown";
        break;
    }
    if (device.description != nullptr && !device.description->vmsd_name.empty())
        object["vmsd_name"] = text_of(device.description->vmsd_name);
    if (with_fields && device.description != nullptr) {
        field_builder builder;
        vmstate::memory_reader in(device.body, device.section.body_offset);
        // A body that breaks off shows as far as it goes; the error is known already.
        (void)vmstate::walk_body(*device.description, in, builder);
        builder.finish(object);
        if (in.remaining() != 0 && device.extent != vmstate::body_extent::unknown)
            object["rest"] = hex_text({in.cursor(), in.window()});
    } else if (with_fields) {
        object["body"] = hex_text(device.body);
    }
    if (device.problem)
        object["problem"] = problem_object(*device.problem);
    return object;
}

json::object command_object(const command_item& each) {
    json::object object{{"item", "command"}, {"name", each.command.name()}, {"offset", each.command.offset},
        {"payload", hex_text(each.command.payload)}};
    if (!each.discards.empty()) {
        json::array ranges;
        for (const vmstate::ram_discard& range : each.discards)
            ranges.push_back({{"start", range.start}, {"length", range.length}});
        object["block"] = text_of(each.discards.front().block);
        object["ranges"] = std::move(ranges);
    }
    return object;
}

json::array items_array(const report& stream, const json_options& options) {
    json::array items;
    for (const item& entry : stream.items) {
        json::object object;
        if (const auto* device = std::get_if<device_item>(&entry.content)) {
            if (!options.device.empty() && !device->is_called(options.device))
                continue;
            object = device_object(*device, !options.summary);
        } else if (!options.device.empty()) {
            continue;
        } else if (const auto* command = std::get_if<command_item>(&entry.content)) {
            object = command_object(*command);
        } else if (const auto* package = std::get_if<package_item>(&entry.content)) {
            object = {{"item", "package"}, {"offset", package->offset}, {"size", package->size}};
        } else {
            const ram_item& ram = std::get<ram_item>(entry.content);
            object = section_object(ram.section, "ram");
            object["size"] = ram.size;
            object["page_records"] = ram.records;
        }
        if (entry.in_package)
            object["in_package"] = true;
        items.push_back(std::move(object));
    }
    return items;
}

json::object configuration_object(const vmstate::stream_configuration& configuration) {
    json::object object{{"machine", text_of(configuration.machine)}, {"offset", configuration.offset},
        {"size", configuration.size}};
    if (configuration.target_page_bits)
        object["target_page_bits"] = *configuration.target_page_bits;
    if (configuration.capabilities) {
        json::array list;
        for (const std::string& capability : *configuration.capabilities)
            list.push_back(text_of(capability));
        object["capabilities"] = std::move(list);
    }
    if (configuration.uuid)
        object["uuid"] = hex_text(std::as_bytes(std::span(*configuration.uuid)));
    return object;
}

} // namespace

json::value to_json(const report& stream, const json_options& options) {
    json::object object{
        {"file", text_of(options.title)}, {"size", stream.stream_size}, {"ok", stream.problems.empty()}};
    if (options.everything) {
        object["configuration"] =
            stream.configuration ? json::value(configuration_object(*stream.configuration)) : json::value();
        object["description"] = stream.location ? json::value{{"offset", stream.location->offset},
                                                      {"size", stream.location->size},
                                                      {"page_size", stream.description->page_size},
                                                      {"devices", stream.description->devices.size()}}
                                                : json::value();
    }
    if ((options.everything || options.ram) && !stream.blocks.empty())
        object["ram"] = ram_object(stream, options.ram);
    if (options.everything || !options.device.empty())
        object["items"] = items_array(stream, options);
    json::array problems;
    for (const vmstate::error& problem : stream.problems)
        problems.push_back(problem_object(problem));
    object["problems"] = std::move(problems);
    return object;
}

} // namespace inspect
