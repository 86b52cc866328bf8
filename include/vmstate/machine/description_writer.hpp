// SPDX-License-Identifier: BSL-1.0
//
// Writes a device's entry of the JSON description from what the generated `walk` tells, in the shape and spacing of
// QEMU's migration/vmstate.c. Depends on codec/field_visitor.hpp and json_writer.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <vmstate/codec/field_visitor.hpp>
#include <vmstate/machine/json_writer.hpp>

namespace vmstate {

/// Between construction and `finish`, hand it to `walk`. The keys go into the object that `json` is in.
class description_writer final : public field_visitor {
public:
    description_writer(json_writer& json, std::string_view name, int version_id) : json_(json) {
        open_body(name, version_id);
    }

    void begin_field(const field_event& field) override {
        if (fields_.empty()) size_ += std::uint64_t{field.size} * field.array_len;
        json_.start_object();
        if (field.number == field_event::no_index) json_.put_string("name", field.name);
        else json_.put_string("name", std::string(field.name) + '[' + std::to_string(field.number) + ']');
        if (field.array_len > 1)
            json_.put_number("array_len", static_cast<std::int64_t>(field.array_len));
        else if (field.index != field_event::no_index)
            json_.put_number("index", static_cast<std::int64_t>(field.index));
        json_.put_string("type", field.type);
        // Of all that has a description inside, a struct alone has an object for it, null pointer or not.
        const bool is_struct = field.type == "struct";
        if (is_struct) json_.start_object("struct");
        fields_.push_back({is_struct, field.size});
    }
    void end_field() override {
        if (fields_.back().is_struct) json_.end_object();
        json_.put_number("size", static_cast<std::int64_t>(fields_.back().size));
        json_.end_object();
        fields_.pop_back();
    }
    void begin_nested(std::string_view name, int version_id) override { open_body(name, version_id); }
    void end_nested() override { close_body(); }
    void begin_subsection(std::string_view name, int version_id) override {
        body& parent = bodies_.back();
        if (!parent.in_subsections) {
            json_.end_array();
            json_.start_array("subsections");
            parent.in_subsections = true;
        }
        if (fields_.empty()) size_ += 1 + 1 + name.size() + 4;
        json_.start_object();
        open_body(name, version_id);
    }
    void end_subsection() override {
        close_body();
        json_.end_object();
    }

    /// After `walk`: closes what is open.
    void finish() { close_body(); }
    /// Bytes that the entries stand for.
    std::uint64_t size() const noexcept { return size_; }

private:
    struct body {
        bool in_subsections = false;
    };
    struct open_field {
        bool is_struct;
        std::size_t size;
    };

    void open_body(std::string_view name, int version_id) {
        json_.put_string("vmsd_name", name);
        json_.put_number("version", version_id);
        json_.start_array("fields");
        bodies_.push_back({});
    }
    void close_body() {
        json_.end_array(); // fields or subsections
        bodies_.pop_back();
    }

    json_writer& json_;
    std::vector<body> bodies_;
    std::vector<open_field> fields_;
    std::uint64_t size_ = 0;
};

} // namespace vmstate
