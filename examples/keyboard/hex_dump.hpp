// SPDX-License-Identifier: BSL-1.0
//
// The bytes of a body with the fields beside them. A description can be walked: `walk` calls a field_visitor for all
// that `save` would write, in that order, so the place of each field in the bytes is known. Depends on
// vmstate/describe.hpp.
#pragma once

#include <vmstate/describe.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdio>
#include <span>
#include <string>
#include <string_view>

/// Prints a line for each field: offset, bytes, name, QEMU's name for its type.
class hex_dump final : public vmstate::field_visitor {
public:
    explicit hex_dump(std::span<const std::byte> bytes) : bytes_(bytes) {}

    void begin_field(const vmstate::field_event& field) override {
        print_line(field.size * field.array_len, std::string(field.name) + " (" + std::string(field.type) + ")");
    }
    void begin_subsection(std::string_view name, int version_id) override {
        print_line(1, "a subsection");
        print_line(1 + name.size(), "  its name, \"" + std::string(name) + '"');
        print_line(4, "  its version, " + std::to_string(version_id));
    }

private:
    static constexpr std::size_t bytes_per_line = 8;

    void print_line(std::size_t size, std::string label) {
        while (size != 0 && offset_ != bytes_.size()) {
            const std::size_t count = std::min({size, bytes_per_line, bytes_.size() - offset_});
            std::array<char, 3 * bytes_per_line + 1> hex{};
            for (std::size_t i = 0; i != count; ++i)
                std::snprintf(&hex[3 * i], 4, "%02x ", std::to_integer<unsigned>(bytes_[offset_ + i]));
            if (label.empty()) std::printf("    %4zu  %s\n", offset_, hex.data());
            else std::printf("    %4zu  %-25s %s\n", offset_, hex.data(), label.c_str());
            label.clear();
            offset_ += count;
            size -= count;
        }
    }

    std::span<const std::byte> bytes_;
    std::size_t offset_ = 0;
};

/// Prints `bytes`, which `Description` made of `state`.
template <const auto& Description, class S>
void print_with_fields(const S& state, std::span<const std::byte> bytes) {
    hex_dump visitor(bytes);
    vmstate::walk<Description>(state, visitor);
}
