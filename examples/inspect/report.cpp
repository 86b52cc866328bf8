// SPDX-License-Identifier: BSL-1.0
#include "report.hpp"

#include <vmstate/machine/vmdesc_parse.hpp>

#include <algorithm>
#include <utility>

namespace inspect {

using vmstate::ram_record_kind;

namespace {

/// One record: which page, the how-manieth of its block, and of which kind.
struct page_mark {
    std::uint64_t page;
    std::uint64_t order : 56;
    std::uint64_t kind_number : 8;

    page_mark(std::uint64_t number, std::size_t nth, ram_record_kind kind) noexcept
        : page(number), order(nth & 0xff'ffff'ffff'ffff), kind_number(static_cast<std::uint8_t>(kind)) {}

    ram_record_kind kind() const noexcept { return static_cast<ram_record_kind>(kind_number); }
    friend bool operator<(const page_mark& a, const page_mark& b) noexcept {
        return a.page != b.page ? a.page < b.page : a.order < b.order;
    }
};

/// The last mark of each page, neighbours of one kind joined.
std::vector<page_range> ranges_of(std::vector<page_mark>& marks) {
    std::sort(marks.begin(), marks.end());
    std::vector<page_range> ranges;
    for (std::size_t i = 0; i < marks.size(); ++i) {
        if (i + 1 < marks.size() && marks[i + 1].page == marks[i].page)
            continue;
        if (ranges.empty() || ranges.back().kind != marks[i].kind() ||
            ranges.back().first + ranges.back().count != marks[i].page)
            ranges.push_back({marks[i].page, 0, marks[i].kind()});
        ++ranges.back().count;
    }
    return ranges;
}

class collector final : public vmstate::stream_visitor {
public:
    explicit collector(report& into) : report_(into) {}

    void configuration(const vmstate::stream_configuration& found) override { report_.configuration = found; }
    void command(const vmstate::stream_command& found) override { add(command_item{found, {}}); }
    void discard(const vmstate::ram_discard& range) override {
        std::get<command_item>(report_.items.back().content).discards.push_back(range);
    }
    void begin_package(std::uint64_t offset, std::uint64_t size) override {
        add(package_item{offset, size});
        in_package_ = true;
    }
    void end_package() override { in_package_ = false; }

    void begin_ram(const vmstate::stream_section& section, std::size_t page_size) override {
        report_.page_size = page_size;
        add(ram_item{section, 0, 0});
    }
    void ram_block(const vmstate::stream_ram_block& block, std::size_t) override {
        report_.blocks.emplace_back().block = block;
        marks_.emplace_back();
    }
    void ram_page(const vmstate::ram_record& record, std::size_t index, std::span<const std::byte>) override {
        block_report& block = report_.blocks[index];
        if (block.first_record == 0)
            block.first_record = record.position;
        ++block.records[static_cast<std::size_t>(record.kind)];
        ++std::get<ram_item>(report_.items.back().content).records;
        marks_[index].emplace_back(record.value / report_.page_size, marks_[index].size(), record.kind);
    }
    void end_ram(std::uint64_t end) override {
        ram_item& ram = std::get<ram_item>(report_.items.back().content);
        ram.size = end - ram.section.offset;
    }

    void device(const vmstate::stream_section& section, const vmstate::vmdesc_device* description,
        std::span<const std::byte> body, vmstate::body_extent extent) override {
        add(device_item{section, description, body, extent, std::nullopt});
        ++report_.devices;
        if (extent == vmstate::body_extent::guessed)
            ++report_.guessed;
        awaits_problem_ = extent == vmstate::body_extent::broken || extent == vmstate::body_extent::unknown;
    }
    void end_of_sections(std::uint64_t offset) override { report_.end_of_sections = offset; }
    void description(const vmstate::vmdesc_location&) override { report_.whole_description = true; }
    void problem(const vmstate::error& found) override {
        report_.problems.push_back(found);
        if (std::exchange(awaits_problem_, false))
            std::get<device_item>(report_.items.back().content).problem = found;
    }

    void finish() {
        for (std::size_t i = 0; i < marks_.size(); ++i) {
            report_.blocks[i].pages = ranges_of(marks_[i]);
            marks_[i] = {};
        }
    }

private:
    template <class Content>
    void add(Content content) {
        item& entry = report_.items.emplace_back();
        entry.content.template emplace<Content>(std::move(content));
        entry.in_package = in_package_;
    }

    report& report_;
    std::vector<std::vector<page_mark>> marks_; ///< one per record, by block
    bool in_package_ = false;
    bool awaits_problem_ = false;
};

} // namespace

std::uint64_t block_report::pages_of(ram_record_kind kind) const {
    std::uint64_t sum = 0;
    for (const page_range& range : pages)
        if (range.kind == kind)
            sum += range.count;
    return sum;
}
std::uint64_t block_report::all_records() const {
    std::uint64_t sum = 0;
    for (const std::uint64_t count : records)
        sum += count;
    return sum;
}
std::uint64_t block_report::all_pages() const {
    std::uint64_t sum = 0;
    for (const page_range& range : pages)
        sum += range.count;
    return sum;
}

bool device_item::is_called(std::string_view name) const {
    const std::string_view id = section.idstr;
    return name == id || name == id.substr(id.rfind('/') + 1) ||
           name == section.idstr + '#' + std::to_string(section.instance_id) ||
           (description != nullptr && !description->vmsd_name.empty() && name == description->vmsd_name);
}

report inspect_stream(std::span<const std::byte> stream, const vmstate::vmdesc* other) {
    report made;
    made.stream_size = stream.size();
    vmstate::stream_walk_options options;
    options.description = other;
    const vmstate::result<vmstate::vmdesc_location> location = vmstate::find_vmdesc(stream);
    if (location) {
        vmstate::result<vmstate::vmdesc> parsed =
            vmstate::parse_vmdesc(location->text_in(stream), {}, location->offset);
        if (parsed) {
            made.description = std::move(*parsed);
            made.location = *location;
            options.description = &*made.description;
            options.location = *location;
        } else {
            made.problems.push_back(std::move(parsed.error().within("description")));
        }
    }
    collector visitor(made);
    // What is wrong has come through the visitor already.
    (void)vmstate::walk_stream(stream, options, visitor);
    visitor.finish();
    return made;
}

std::string_view name_of(vmstate::section_type type) {
    switch (type) {
    case vmstate::section_type::start:
        return "START";
    case vmstate::section_type::part:
        return "PART";
    case vmstate::section_type::end:
        return "END";
    default:
        return "FULL";
    }
}

} // namespace inspect
