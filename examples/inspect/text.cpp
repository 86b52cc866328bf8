// SPDX-License-Identifier: BSL-1.0
#include "text.hpp"

#include <vmstate/machine/vmdesc_walk.hpp>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <iomanip>
#include <ostream>
#include <sstream>
#include <string_view>
#include <utility>

namespace inspect {

using vmstate::body_extent;
using vmstate::ram_record_kind;
using vmstate::vmdesc_kind;

namespace {

enum class style { plain, heading, dim, good, bad };

std::string hex(std::uint64_t value, std::size_t digits) {
    std::ostringstream text;
    text << std::hex << std::setfill('0') << std::setw(static_cast<int>(digits)) << value;
    return std::move(text).str();
}
std::string offset_text(std::uint64_t offset) { return hex(offset, 8); }

/// Names come from the stream: what isn't printable must not reach the terminal.
std::string printable(std::string_view text) {
    std::string clean;
    for (const char c : text) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte >= 0x20 && byte < 0x7f)
            clean += c;
        else
            clean += "\\x" + hex(byte, 2);
    }
    return clean;
}

std::string size_text(std::uint64_t bytes) {
    constexpr std::string_view units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    std::size_t unit = 0;
    auto value = static_cast<double>(bytes);
    for (; value >= 1024 && unit + 1 < std::size(units); ++unit)
        value /= 1024;
    char text[32];
    std::snprintf(text, sizeof text, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit].data());
    return text;
}
std::string count_text(std::uint64_t count, std::string_view noun) {
    return std::to_string(count) + ' ' + std::string(noun) + (count == 1 ? "" : "s");
}
std::string pad(std::string text, std::size_t width) {
    if (text.size() < width)
        text.append(width - text.size(), ' ');
    return text;
}
std::string pad_left(std::string text, std::size_t width) {
    if (text.size() < width)
        text.insert(0, width - text.size(), ' ');
    return text;
}

// ---- values -----------------------------------------------------------------------------------------------

using lines = std::vector<std::string>;

/// "a, b, c x 3" in lines of at most `width`.
lines wrap(const std::vector<std::string>& words, std::size_t width) {
    lines wrapped(1);
    for (std::size_t i = 0; i < words.size(); ++i) {
        const std::string word = words[i] + (i + 1 < words.size() ? "," : "");
        if (!wrapped.back().empty() && wrapped.back().size() + 1 + word.size() > width)
            wrapped.emplace_back();
        if (!wrapped.back().empty())
            wrapped.back() += ' ';
        wrapped.back() += word;
    }
    return wrapped;
}

/// Shortens to `most` lines, unless all are wanted.
lines shorten(lines text, std::size_t most, bool whole) {
    if (whole || text.size() <= most + 1)
        return text;
    const std::size_t left_out = text.size() - most;
    text.resize(most);
    text.push_back("... " + std::to_string(left_out) + " more lines");
    return text;
}

/// 16 bytes to a line with their characters; lines like the one before are left out.
lines hex_dump(std::span<const std::byte> bytes) {
    lines dump;
    bool starred = false;
    for (std::size_t at = 0; at < bytes.size(); at += 16) {
        const auto line = bytes.subspan(at, std::min<std::size_t>(16, bytes.size() - at));
        if (at != 0 && line.size() == 16 && at + 16 < bytes.size() &&
            std::equal(line.begin(), line.end(), line.begin() - 16)) {
            if (!std::exchange(starred, true))
                dump.push_back("*");
            continue;
        }
        starred = false;
        std::string text = bytes.size() > 16 ? hex(at, bytes.size() > 0x10000 ? 8 : 4) + "  " : std::string();
        std::string characters;
        for (const std::byte byte : line) {
            const auto value = std::to_integer<unsigned>(byte);
            text += hex(value, 2) + ' ';
            characters += value >= 0x20 && value < 0x7f ? static_cast<char>(value) : '.';
        }
        if (bytes.size() > 16)
            text.append(3 * (16 - line.size()), ' ');
        dump.push_back(text + ' ' + characters);
    }
    return dump;
}

lines bytes_text(std::span<const std::byte> bytes) {
    if (bytes.empty())
        return {"no bytes"};
    const auto last =
        std::find_if(bytes.rbegin(), bytes.rend(), [](std::byte byte) { return byte != std::byte{0}; });
    const auto used = static_cast<std::size_t>(bytes.rend() - last);
    if (used == 0)
        return {count_text(bytes.size(), "byte") + ", all zero"};
    const bool is_text =
        used >= 3 && std::all_of(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(used),
                         [](std::byte byte) { return byte >= std::byte{0x20} && byte < std::byte{0x7f}; });
    if (is_text) {
        const std::string text(reinterpret_cast<const char*>(bytes.data()), used);
        return {'"' + text + '"' +
                (used < bytes.size() ? ", then " + count_text(bytes.size() - used, "zero byte") : "")};
    }
    return hex_dump(bytes);
}

std::string number_text(const vmstate::vmdesc_value& value, std::size_t i) {
    switch (value.kind) {
    case vmdesc_kind::boolean: {
        const std::uint64_t byte = value.as_unsigned(i);
        return byte == 0 ? "false" : byte == 1 ? "true" : "true (0x" + hex(byte, 2) + ')';
    }
    case vmdesc_kind::signed_integer:
        return std::to_string(value.as_signed(i));
    case vmdesc_kind::floating: {
        std::ostringstream text;
        text << std::setprecision(17) << value.as_double(i);
        return std::move(text).str();
    }
    case vmdesc_kind::timer: {
        if (value.as_signed(i) == -1)
            return "not pending";
        std::ostringstream text;
        text << value.as_signed(i) << " ns";
        return std::move(text).str();
    }
    case vmdesc_kind::marker:
        return value.as_unsigned(i) == 0x30 ? "null" : "valid";
    default: {
        const std::uint64_t number = value.as_unsigned(i);
        return number < 10 || value.count() > 1 ? std::to_string(number)
                                                : std::to_string(number) + " (0x" + hex(number, 1) + ')';
    }
    }
}

lines array_text(const vmstate::vmdesc_value& value, std::size_t width) {
    std::vector<std::string> words;
    const std::size_t count = value.count();
    const std::size_t size = value.element_size();
    for (std::size_t i = 0; i < count;) {
        const auto element = value.bytes.subspan(i * size, size);
        std::size_t next = i + 1;
        while (next < count && std::equal(element.begin(), element.end(),
                                   value.bytes.begin() + static_cast<std::ptrdiff_t>(next * size)))
            ++next;
        const std::string text = number_text(value, i);
        // A run of four or more is said once.
        if (next - i >= 4)
            words.push_back(std::to_string(next - i) + " x " + text);
        else
            words.insert(words.end(), next - i, text);
        i = next;
    }
    return wrap(words, width);
}

lines bitmap_text(const vmstate::vmdesc_value& value, std::size_t width) {
    std::vector<std::string> words;
    const std::size_t bits = value.bytes.size() * 8;
    for (std::size_t i = 0; i < bits; ++i) {
        if (!value.bit(i))
            continue;
        std::size_t last = i;
        while (last + 1 < bits && value.bit(last + 1))
            ++last;
        words.push_back(i == last ? std::to_string(i) : std::to_string(i) + '-' + std::to_string(last));
        i = last;
    }
    if (words.empty())
        return {"none of " + count_text(bits, "bit")};
    words.front().insert(0, "bits ");
    words.back() += " of " + std::to_string(bits);
    return wrap(words, width);
}

lines value_text(const vmstate::vmdesc_value& value, std::size_t width) {
    switch (value.kind) {
    case vmdesc_kind::buffer:
    case vmdesc_kind::opaque:
    case vmdesc_kind::unused:
        return bytes_text(value.bytes);
    case vmdesc_kind::bitmap:
        return bitmap_text(value, width);
    default:
        return value.count() == 1 ? lines{number_text(value, 0)} : array_text(value, width);
    }
}

// ---- fields -----------------------------------------------------------------------------------------------

struct row {
    std::uint64_t offset;
    std::string name; ///< indented
    std::string type;
    lines value;
    bool is_heading; ///< of a struct, list or subsection
};

class row_collector final : public vmstate::vmdesc_visitor {
public:
    row_collector(std::size_t width, bool whole) : width_(width), whole_(whole) {}

    void value(const vmstate::vmdesc_value& value) override {
        constexpr std::size_t most_lines = 8;
        std::string type = printable(value.field.type);
        if (value.field.array_len > 1)
            type += '[' + std::to_string(value.field.array_len) + ']';
        add(value.offset, name_of(value.field, value.field.index), std::move(type),
            shorten(value_text(value, width_), most_lines, whole_), false);
    }
    void begin_nested(const vmstate::vmdesc_nested& place) override {
        std::string name = name_of(place.field, place.index);
        if (place.role == vmstate::vmdesc_role::tree_key)
            name += " key";
        const bool inlined = place.role == vmstate::vmdesc_role::list_element ||
                             place.role == vmstate::vmdesc_role::tree_key ||
                             place.role == vmstate::vmdesc_role::tree_value;
        add(place.offset, std::move(name), inlined ? std::string("element") : printable(place.field.type),
            {printable(place.body.vmsd_name) + " version " + std::to_string(place.body.version)}, true);
        ++depth_;
    }
    void end_nested() override { --depth_; }
    void begin_list(
        const vmstate::vmdesc_field& field, std::uint64_t elements, std::uint64_t offset) override {
        add(offset, name_of(field, std::nullopt), printable(field.type), {count_text(elements, "element")},
            true);
        ++depth_;
    }
    void end_list() override { --depth_; }
    void tree_key(const vmstate::vmdesc_field& field, std::uint64_t index, std::uint64_t key,
        std::uint64_t offset) override {
        add(offset, name_of(field, index) + " key", "uint64",
            {std::to_string(key) + " (0x" + hex(key, 1) + ')'}, false);
    }
    void begin_subsection(const vmstate::vmdesc_body& body, std::uint64_t offset) override {
        add(offset, printable(body.vmsd_name), "subsection", {"version " + std::to_string(body.version)},
            true);
        ++depth_;
    }
    void end_subsection() override { --depth_; }

    std::vector<row> take_rows() { return std::move(rows_); }

private:
    static std::string name_of(const vmstate::vmdesc_field& field, std::optional<std::uint64_t> index) {
        return printable(field.name) + (index ? '[' + std::to_string(*index) + ']' : std::string());
    }
    void add(std::uint64_t offset, std::string name, std::string type, lines value, bool is_heading) {
        rows_.push_back({offset, std::string(2 * depth_, ' ') + std::move(name), std::move(type),
            std::move(value), is_heading});
    }

    std::size_t width_;
    bool whole_;
    std::size_t depth_ = 0;
    std::vector<row> rows_;
};

// ---- the report -------------------------------------------------------------------------------------------

class text_writer {
public:
    text_writer(std::ostream& out, const report& stream, const text_options& options)
        : out_(out), stream_(stream), options_(options) {}

    void write() {
        if (options_.everything) {
            write_head();
            write_ram();
            write_items();
        } else {
            if (options_.ram)
                write_ram();
            if (!options_.device.empty())
                write_items();
        }
        write_verdict();
    }

private:
    std::string paint(style how, const std::string& text) const {
        if (!options_.colours || text.empty())
            return text;
        switch (how) {
        case style::plain:
            return text;
        case style::heading:
            return "\x1b[1m" + text + "\x1b[0m";
        case style::dim:
            return "\x1b[2m" + text + "\x1b[0m";
        case style::good:
            return "\x1b[32m" + text + "\x1b[0m";
        case style::bad:
            return "\x1b[1;31m" + text + "\x1b[0m";
        }
        return text;
    }

    void head_line(const std::string& what, const std::string& value) {
        out_ << "  " << pad(what, 20) << value << '\n';
    }
    void write_head() {
        out_ << paint(style::heading, printable(options_.title)) << ": "
             << count_text(stream_.stream_size, "byte") << '\n';
        if (const auto& configuration = stream_.configuration) {
            head_line("machine", printable(configuration->machine));
            if (configuration->target_page_bits)
                head_line("target page bits", std::to_string(*configuration->target_page_bits));
            if (configuration->capabilities) {
                std::string list;
                for (const std::string& capability : *configuration->capabilities)
                    list += (list.empty() ? "" : ", ") + printable(capability);
                head_line("capabilities", list.empty() ? "none" : list);
            }
            if (configuration->uuid)
                head_line("uuid", uuid_text(*configuration->uuid));
        } else {
            head_line("machine", "not said: the stream has no configuration");
        }
        if (stream_.location)
            head_line("description", count_text(stream_.location->size, "byte") + " of JSON at " +
                                         offset_text(stream_.location->offset) + ", " +
                                         count_text(stream_.description->devices.size(), "device"));
        else if (stream_.description)
            head_line("description", "none of its own; another stream's is used");
        else
            head_line("description", "none: nothing says where a device's section ends");
    }
    static std::string uuid_text(const std::array<std::uint8_t, 16>& uuid) {
        std::string text;
        for (std::size_t i = 0; i < uuid.size(); ++i)
            text += (i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "") + hex(uuid[i], 2);
        return text;
    }

    // RAM

    void write_ram() {
        if (stream_.blocks.empty())
            return;
        std::size_t width = 5;
        for (const block_report& block : stream_.blocks)
            width = std::max(width, printable(block.block.name).size());
        const auto line = [&](const std::vector<std::string>& cells, style how) {
            std::string text = "  " + pad(cells[0], width);
            for (std::size_t i = 1; i < cells.size(); ++i)
                text += pad_left(cells[i], i == 1 ? 12 : 10);
            out_ << paint(how, text) << '\n';
        };
        // Compressed pages are rare enough to have no column where there are none.
        constexpr ram_record_kind kinds[] = {ram_record_kind::page, ram_record_kind::zero,
            ram_record_kind::xbzrle, ram_record_kind::compress_page};
        const std::size_t shown = sum_of([](const block_report& block) {
            return block.records_of(ram_record_kind::compress_page);
        }) != 0
                                      ? 4
                                      : 3;

        out_ << '\n' << paint(style::heading, "RAM") << ", pages of " << stream_.page_size << " bytes\n";
        std::vector<std::string> head{"block", "size", "pages", "normal", "zero", "xbzrle"};
        if (shown == 4)
            head.emplace_back("compress");
        head.emplace_back("missing");
        head.emplace_back("resent");
        line(head, style::dim);
        const auto cells_of = [&](const block_report& block) {
            const std::uint64_t pages = block.block.used_length / stream_.page_size;
            std::vector<std::string> cells{
                printable(block.block.name), size_text(block.block.used_length), std::to_string(pages)};
            for (std::size_t i = 0; i < shown; ++i)
                cells.push_back(std::to_string(block.records_of(kinds[i])));
            cells.push_back(std::to_string(pages - std::min(pages, block.all_pages())));
            cells.push_back(std::to_string(block.all_records() - block.all_pages()));
            return cells;
        };
        for (const block_report& block : stream_.blocks) {
            line(cells_of(block), style::plain);
            if (block.block.page_size || block.block.guest_address) {
                std::string extra = "    ";
                if (block.block.page_size)
                    extra += "backed by pages of " + size_text(*block.block.page_size) + ' ';
                if (block.block.guest_address)
                    extra += "at guest address 0x" + hex(*block.block.guest_address, 1);
                out_ << extra << '\n';
            }
        }
        if (options_.ram)
            write_page_maps();
    }
    template <class Count>
    std::uint64_t sum_of(Count count) const {
        std::uint64_t sum = 0;
        for (const block_report& block : stream_.blocks)
            sum += count(block);
        return sum;
    }
    void write_page_maps() {
        for (const block_report& block : stream_.blocks) {
            out_ << "\n  " << paint(style::heading, printable(block.block.name)) << '\n';
            std::uint64_t next = 0;
            const std::uint64_t all = block.block.used_length / stream_.page_size;
            const auto line = [&](std::uint64_t first, std::uint64_t count, std::string_view kind) {
                out_ << "    " << hex(first * stream_.page_size, 9) << '-'
                     << hex((first + count) * stream_.page_size - 1, 9) << "  " << pad(std::string(kind), 10)
                     << pad_left(std::to_string(count), 10) << (count == 1 ? " page\n" : " pages\n");
            };
            for (const page_range& range : block.pages) {
                if (range.first != next)
                    line(next, range.first - next, "missing");
                line(range.first, range.count, kind_text(range.kind));
                next = range.first + range.count;
            }
            if (next < all)
                line(next, all - next, "missing");
        }
    }
    static std::string_view kind_text(ram_record_kind kind) {
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

    // sections and commands

    void write_items() {
        if (options_.everything)
            out_ << '\n' << paint(style::heading, "Sections and commands") << '\n';
        for (const item& entry : stream_.items) {
            const std::string indent = entry.in_package ? "  " : "";
            if (const auto* device = std::get_if<device_item>(&entry.content)) {
                if (options_.device.empty() || device->is_called(options_.device))
                    write_device(*device, indent);
                continue;
            }
            if (!options_.device.empty())
                continue;
            if (const auto* command = std::get_if<command_item>(&entry.content))
                write_command(*command, indent);
            else if (const auto* package = std::get_if<package_item>(&entry.content))
                out_ << paint(style::dim, offset_text(package->offset)) << "  package of "
                     << count_text(package->size, "byte") << ":\n";
            else
                write_ram_part(std::get<ram_item>(entry.content), indent);
        }
        if (options_.everything && stream_.end_of_sections)
            out_ << paint(style::dim, offset_text(*stream_.end_of_sections)) << "  end of sections\n";
    }
    void write_ram_part(const ram_item& ram, const std::string& indent) {
        out_ << paint(style::dim, offset_text(ram.section.offset)) << "  " << indent
             << paint(style::heading, pad(ram.section.name(), 24)) << ' '
             << pad(std::string(name_of(ram.section.type)), 6) << "version " << ram.section.version_id
             << ", section " << ram.section.section_id << ", "
             << (ram.size != 0 ? count_text(ram.size, "byte") : std::string("broken off")) << ", "
             << count_text(ram.records, "page") << '\n';
    }
    void write_command(const command_item& item, const std::string& indent) {
        out_ << paint(style::dim, offset_text(item.command.offset)) << "  " << indent << "command "
             << item.command.name();
        const std::span<const std::byte> payload = item.command.payload;
        vmstate::memory_reader in(payload);
        switch (item.command.number) {
        case vmstate::command::ping:
            out_ << ' ' << in.get_be32();
            break;
        case vmstate::command::postcopy_advise:
            if (payload.size() == 16) {
                const std::uint64_t sizes = in.get_be64();
                out_ << " page sizes 0x" << hex(sizes, 1) << ", target's " << in.get_be64();
            }
            break;
        case vmstate::command::recv_bitmap:
            out_ << ' ' << printable(in.get_counted_string());
            break;
        case vmstate::command::postcopy_ram_discard:
            if (!item.discards.empty())
                out_ << ' ' << printable(item.discards.front().block) << ", "
                     << count_text(item.discards.size(), "range");
            break;
        default:
            break;
        }
        out_ << '\n';
        if (options_.summary)
            return;
        for (const vmstate::ram_discard& range : item.discards)
            out_ << "            " << hex(range.start, 9) << '+' << hex(range.length, 1) << '\n';
    }

    void write_device(const device_item& device, const std::string& indent) {
        const vmstate::stream_section& section = device.section;
        std::string text = "version " + std::to_string(section.version_id) + ", section " +
                           std::to_string(section.section_id) + ", ";
        text += device.extent == body_extent::unknown ? "of unknown length"
                                                      : count_text(device.body.size(), "byte");
        if (device.extent == body_extent::guessed)
            text += " by its footer";
        if (section.type != vmstate::section_type::full)
            text = std::string(name_of(section.type)) + ", " + text;
        if (!options_.summary && options_.everything)
            out_ << '\n';
        out_ << paint(style::dim, offset_text(section.offset)) << "  " << indent
             << paint(style::heading, pad(printable(section.name()), 26 - indent.size())) << ' ' << text
             << '\n';
        if (!options_.summary) {
            if (device.description != nullptr)
                write_fields(device);
            else
                write_rows({bytes_row(section.body_offset, "(no description)", device.body)});
        }
        if (device.problem)
            write_problem(*device.problem, "          ");
    }
    row bytes_row(std::uint64_t offset, std::string name, std::span<const std::byte> bytes) const {
        return {offset, std::move(name), "", shorten(bytes_text(bytes), 8, options_.whole_buffers), false};
    }
    void write_fields(const device_item& device) {
        row_collector collector(options_.width > 90 ? options_.width - 50 : 40, options_.whole_buffers);
        vmstate::memory_reader in(device.body, device.section.body_offset);
        // A body that breaks off shows as far as it goes; the error is known already.
        (void)vmstate::walk_body(*device.description, in, collector);
        std::vector<row> rows = collector.take_rows();
        if (in.remaining() != 0 && device.extent != body_extent::unknown)
            rows.push_back(bytes_row(in.offset(), "(not in the description)", {in.cursor(), in.window()}));
        write_rows(rows);
    }
    void write_rows(const std::vector<row>& rows) {
        std::size_t name_width = 24;
        std::size_t type_width = 10;
        for (const row& each : rows) {
            name_width = std::max(name_width, std::min<std::size_t>(each.name.size(), 44));
            type_width = std::max(type_width, std::min<std::size_t>(each.type.size(), 20));
        }
        for (const row& each : rows) {
            out_ << paint(style::dim, offset_text(each.offset)) << "    " << pad(each.name, name_width)
                 << "  " << paint(style::dim, pad(each.type, type_width)) << "  "
                 << paint(each.is_heading ? style::dim : style::plain, each.value.front()) << '\n';
            for (std::size_t i = 1; i < each.value.size(); ++i)
                out_ << std::string(8 + 4 + name_width + 2 + type_width + 2, ' ') << each.value[i] << '\n';
        }
    }

    // the end

    void write_problem(const vmstate::error& problem, const std::string& indent) {
        const bool has_offset = problem.offset() != vmstate::error::no_offset;
        std::string text = printable(problem.message());
        // The offset goes first and in hexadecimal, as it stands before the fields.
        if (has_offset)
            text.resize(text.rfind(" (offset "));
        out_ << indent << paint(style::bad, "broken")
             << (has_offset ? " at " + offset_text(problem.offset()) : "") << ": " << text << '\n';
    }
    void write_verdict() {
        if (options_.everything && stream_.guessed != 0) {
            out_
                << '\n'
                << count_text(stream_.guessed, "section") << (stream_.guessed == 1 ? " has" : " have")
                << " no description that fits: such sections can't be delimited, they end where their footer was found.\n";
        }
        out_ << '\n';
        if (stream_.problems.empty()) {
            std::uint64_t records = 0;
            for (const block_report& block : stream_.blocks)
                records += block.all_records();
            out_ << paint(style::good, "ok") << ": " << count_text(stream_.stream_size, "byte")
                 << " read to the last, " << count_text(stream_.devices, "device section") << ", "
                 << count_text(records, "page record") << '\n';
            return;
        }
        for (const vmstate::error& problem : stream_.problems)
            write_problem(problem, "");
    }

    std::ostream& out_;
    const report& stream_;
    const text_options& options_;
};

} // namespace

void write_text(std::ostream& out, const report& stream, const text_options& options) {
    text_writer(out, stream, options).write();
}

} // namespace inspect
