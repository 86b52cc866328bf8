// SPDX-License-Identifier: BSL-1.0
//
// What a stream has, collected in one walk, for the text and the JSON output to show.
#pragma once

#include <vmstate/machine/stream_walk.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace inspect {

/// Neighbouring pages of a block that arrived in the same way; of pages that were sent again the last time counts.
struct page_range {
    std::uint64_t first = 0; ///< page number
    std::uint64_t count = 0;
    vmstate::ram_record_kind kind{};
};

struct block_report {
    vmstate::stream_ram_block block;
    std::array<std::uint64_t, 7> records{}; ///< by `ram_record_kind`
    std::uint64_t first_record = 0;         ///< stream offset, 0 without records
    std::vector<page_range> pages;          ///< ascending, no overlaps

    std::uint64_t records_of(vmstate::ram_record_kind kind) const {
        return records[static_cast<std::size_t>(kind)];
    }
    /// Pages whose last record is of this kind.
    std::uint64_t pages_of(vmstate::ram_record_kind kind) const;
    std::uint64_t all_records() const;
    std::uint64_t all_pages() const;
};

struct command_item {
    vmstate::stream_command command;
    std::vector<vmstate::ram_discard> discards;
};
struct package_item {
    std::uint64_t offset = 0;
    std::uint64_t size = 0;
};
struct ram_item {
    vmstate::stream_section section;
    std::uint64_t size = 0; ///< from type byte to footer; 0 where it broke off
    std::uint64_t records = 0;
};
struct device_item {
    vmstate::stream_section section;
    const vmstate::vmdesc_device* description = nullptr;
    std::span<const std::byte> body;
    vmstate::body_extent extent{};
    std::optional<vmstate::error> problem;

    /// Answers to its section id string, that with "#instance", the part behind the path, or its VMStateDescription.
    bool is_called(std::string_view name) const;
};
struct item {
    std::variant<command_item, package_item, ram_item, device_item> content;
    bool in_package = false;
};

struct report {
    std::uint64_t stream_size = 0;
    std::optional<vmstate::stream_configuration> configuration;
    std::optional<vmstate::vmdesc> description;
    std::optional<vmstate::vmdesc_location> location; ///< where the description is, if it is the stream's own
    bool whole_description = false;                   ///< the walk arrived at it
    std::size_t page_size = 4096;
    std::vector<block_report> blocks;
    std::vector<item> items;
    std::vector<vmstate::error> problems; ///< in the order they were met
    std::size_t devices = 0;
    std::size_t guessed = 0; ///< devices that nothing delimits but their footer
    std::optional<std::uint64_t> end_of_sections;
};

/// Walks the stream; `other` is the description of another stream of the same machine, for a stream without its own.
report inspect_stream(std::span<const std::byte> stream, const vmstate::vmdesc* other);

/// "START", "PART", "END" or "FULL".
std::string_view name_of(vmstate::section_type type);

} // namespace inspect
