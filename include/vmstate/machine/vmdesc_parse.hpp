// SPDX-License-Identifier: BSL-1.0
//
// Reads the text of the JSON description into a `vmdesc`. The text comes from the stream and is not trusted: depth and
// size are limited, and what is built takes memory in proportion to the text. Needs Boost.JSON linked (vmstate::json).
#pragma once

#include <vmstate/machine/vmdesc.hpp>

#include <boost/json/basic_parser_impl.hpp>
#include <boost/system/error_code.hpp>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vmstate {

/// What a description may ask for.
struct vmdesc_limits {
    std::size_t max_size = std::size_t{64} << 20; ///< bytes of text
    std::size_t max_depth = 128; ///< objects and arrays inside one another; a struct takes three
};

/// Reads the text. Keys that this library doesn't know are passed over; keys that occur several times, as QEMU writes
/// them for lists, each open a new body. Fails with `errc::bad_description_json`, the device and field concerned as path,
/// and the offset, which counts from `text_offset`: where the text begins in its stream.
result<vmdesc> parse_vmdesc(std::string_view json, vmdesc_limits limits = {}, std::uint64_t text_offset = 0);

namespace detail {

/// What Boost.JSON's parser calls. It keeps a stack of the objects and arrays that are open, each with the part of the
/// tree that it fills; an element of the tree doesn't move while a level below it is open.
class vmdesc_handler {
public:
    // Boost.JSON asks for these; the text as a whole is limited already.
    static constexpr std::size_t max_object_size = std::numeric_limits<std::size_t>::max();
    static constexpr std::size_t max_array_size = std::numeric_limits<std::size_t>::max();
    static constexpr std::size_t max_key_size = 1024;
    static constexpr std::size_t max_string_size = 64 * 1024;

    explicit vmdesc_handler(vmdesc& tree) noexcept : tree_(tree) {}

    using error_code = boost::system::error_code;

    bool on_document_begin(error_code&) { return true; }
    bool on_document_end(error_code& ec) {
        return seen_devices_ || refuse(ec, "a \"devices\" array", "none");
    }

    bool on_object_begin(error_code& ec) {
        if (stack_.empty())
            return push({level::root});
        const place top = stack_.back(); // by value: push may move it
        switch (top.kind) {
        case level::root:
            if (key_ != "configuration")
                return push({level::ignored});
            if (tree_.configuration)
                return refuse(ec, "one \"configuration\"", "another");
            return push({level::device, &tree_.configuration.emplace()});
        case level::devices:
            return push({level::device, &tree_.devices.emplace_back()});
        case level::fields:
            return push({level::field, nullptr, &top.body->fields.emplace_back()});
        case level::subsections:
            return push({level::subsection, &top.body->subsections.emplace_back()});
        case level::field:
            if (key_ != "struct")
                return push({level::ignored});
            if (top.seen & saw_struct)
                return refuse(ec, "one \"struct\"", "another");
            stack_.back().seen |= saw_struct;
            return push({level::structure, nullptr, top.field});
        case level::device:
        case level::subsection:
        case level::structure:
        case level::ignored:
            return push({level::ignored});
        }
        return false;
    }
    bool on_object_end(std::size_t, error_code& ec) {
        const place top = stack_.back();
        const auto saw = [&](unsigned keys) { return (top.seen & keys) == keys; };
        switch (top.kind) {
        case level::root:
        case level::ignored:
            break;
        case level::device:
            if (!saw(saw_fields))
                return refuse(ec, "\"fields\" in every device", "none");
            if (!saw(saw_vmsd_name | saw_version) && !saw(saw_size))
                return refuse(ec, "\"vmsd_name\" and \"version\", or \"size\", in every device", "none");
            if (stack_.size() == 3 && !saw(saw_name | saw_instance_id))
                return refuse(ec, "\"name\" and \"instance_id\" in every device", "none");
            break;
        case level::subsection:
        case level::structure:
            // A struct is empty where the element of an array of pointers is null.
            if (top.seen != 0 && !saw(saw_vmsd_name | saw_version | saw_fields))
                return refuse(ec, "\"vmsd_name\", \"version\" and \"fields\" together", "not all of them");
            if (top.seen == 0 && top.kind == level::subsection)
                return refuse(ec, "a subsection", "an empty object");
            break;
        case level::field:
            if (!saw(saw_name | saw_type | saw_size))
                return refuse(ec, "\"name\", \"type\" and \"size\" in every field", "not all of them");
            if ((top.seen & saw_any_body) != 0 && !saw(saw_any_body))
                return refuse(ec, "\"vmsd_name\", \"version\" and \"fields\" together", "not all of them");
            break;
        case level::devices:
        case level::fields:
        case level::subsections:
            break;
        }
        stack_.pop_back();
        return true;
    }

    bool on_array_begin(error_code& ec) {
        if (stack_.empty())
            return refuse(ec, "an object", "an array");
        const place top = stack_.back();
        switch (top.kind) {
        case level::root:
            if (key_ != "devices")
                return push({level::ignored});
            if (std::exchange(seen_devices_, true))
                return refuse(ec, "one \"devices\"", "another");
            return push({level::devices});
        case level::device:
        case level::subsection:
        case level::structure:
        case level::field:
            if (key_ == "fields") {
                if (!once(saw_fields))
                    return refuse(ec, "one \"fields\" for each \"vmsd_name\"", "another");
                if (body_of(top) == nullptr)
                    return refuse(ec, "\"vmsd_name\" before \"fields\"", "none");
                return push({level::fields, body_of(top)});
            }
            if (key_ == "subsections") {
                if (!once(saw_subsections))
                    return refuse(ec, "one \"subsections\" for each \"vmsd_name\"", "another");
                if (body_of(top) == nullptr)
                    return refuse(ec, "\"vmsd_name\" before \"subsections\"", "none");
                return push({level::subsections, body_of(top)});
            }
            return push({level::ignored});
        case level::devices:
        case level::fields:
        case level::subsections:
            return refuse(ec, "an object", "an array");
        case level::ignored:
            return push({level::ignored});
        }
        return false;
    }
    bool on_array_end(std::size_t, error_code&) {
        stack_.pop_back();
        return true;
    }

    bool on_key_part(std::string_view part, std::size_t, error_code&) { return append(part); }
    bool on_key(std::string_view part, std::size_t, error_code&) {
        append(part);
        key_ = std::exchange(text_, {});
        return true;
    }
    bool on_string_part(std::string_view part, std::size_t, error_code&) { return append(part); }
    bool on_string(std::string_view part, std::size_t, error_code& ec) {
        append(part);
        return store(std::exchange(text_, {}), ec);
    }
    bool on_number_part(std::string_view, error_code&) { return true; }
    bool on_int64(std::int64_t value, std::string_view, error_code& ec) {
        if (!stack_.empty() && key_ == "version")
            return store_version(value, ec);
        if (value >= 0)
            return store(static_cast<std::uint64_t>(value), ec);
        return !is_known_number() || refuse(ec, "a number of bytes or elements", std::to_string(value));
    }
    bool on_uint64(std::uint64_t value, std::string_view, error_code& ec) { return store(value, ec); }
    bool on_double(double, std::string_view, error_code& ec) { return other("a fraction", ec); }
    bool on_bool(bool, error_code& ec) { return other("a truth value", ec); }
    bool on_null(error_code& ec) { return other("null", ec); }
    bool on_comment_part(std::string_view, error_code&) { return true; }
    bool on_comment(std::string_view, error_code&) { return true; }

    /// What was wrong, where it was this class that said so.
    const error& failure() const noexcept { return failure_; }
    /// Device and fields that are open.
    std::string path() const {
        std::string path;
        const auto add = [&](std::string_view segment) {
            if (segment.empty())
                return;
            if (!path.empty())
                path += '/';
            path += segment;
        };
        for (const place& open : stack_) {
            if (open.kind == level::device) {
                const auto& device = static_cast<const vmdesc_device&>(*open.body);
                add(stack_.size() > 1 && stack_[1].kind == level::device ? "configuration"
                                                                         : std::string_view(device.name));
            } else if (open.kind == level::field) {
                add(open.field->name);
            } else if (open.kind == level::subsection) {
                add(open.body->vmsd_name);
            }
        }
        return path;
    }

private:
    enum class level { root, devices, device, fields, field, structure, subsections, subsection, ignored };
    enum : unsigned {
        saw_name = 1,
        saw_instance_id = 2,
        saw_vmsd_name = 4,
        saw_version = 8,
        saw_fields = 16,
        saw_subsections = 32,
        saw_size = 64,
        saw_type = 128,
        saw_array_len = 256,
        saw_index = 512,
        saw_struct = 1024,
        saw_any_body = saw_vmsd_name | saw_version | saw_fields,
    };
    struct place {
        level kind;
        vmdesc_body* body = nullptr;   ///< what the object or array fills
        vmdesc_field* field = nullptr; ///< of a field, or of its "struct"
        unsigned seen = 0; ///< keys that this object has had; of bodies, since the last "vmsd_name"
    };

    bool push(place next) {
        stack_.push_back(next);
        key_.clear();
        return true;
    }
    bool append(std::string_view part) {
        text_.append(part);
        return true;
    }
    /// Marks a key as seen; false if the object has had it.
    bool once(unsigned key) {
        unsigned& seen = stack_.back().seen;
        if ((seen & key) != 0)
            return false;
        seen |= key;
        return true;
    }
    /// The body that "version", "fields" and "subsections" belong to; null before its "vmsd_name".
    static vmdesc_body* body_of(const place& open) noexcept {
        if (open.field == nullptr)
            return open.body;
        return open.field->bodies.empty() ? nullptr : &open.field->bodies.back();
    }
    bool is_known_number() const noexcept {
        const level kind = stack_.empty() ? level::ignored : stack_.back().kind;
        if (kind == level::root)
            return key_ == "page_size";
        if (kind == level::device)
            return key_ == "instance_id" || key_ == "size";
        return kind == level::field && (key_ == "size" || key_ == "array_len" || key_ == "index");
    }
    bool is_known_text() const noexcept {
        const level kind = stack_.empty() ? level::ignored : stack_.back().kind;
        if (kind == level::device)
            return key_ == "name" || key_ == "vmsd_name";
        if (kind == level::field)
            return key_ == "name" || key_ == "type" || key_ == "vmsd_name";
        return (kind == level::structure || kind == level::subsection) && key_ == "vmsd_name";
    }
    bool is_known_container() const noexcept {
        switch (stack_.empty() ? level::ignored : stack_.back().kind) {
        case level::root:
            return key_ == "devices" || key_ == "configuration";
        case level::field:
        case level::device:
        case level::structure:
        case level::subsection:
            return key_ == "fields" || key_ == "subsections" || key_ == "struct";
        case level::devices:
        case level::fields:
        case level::subsections:
            return true; // arrays of objects alone
        case level::ignored:
            return false;
        }
        return false;
    }
    bool is_version() const noexcept {
        if (stack_.empty() || key_ != "version")
            return false;
        const level kind = stack_.back().kind;
        return kind == level::device || kind == level::subsection || kind == level::structure ||
               kind == level::field;
    }
    bool other(const char* what, error_code& ec) {
        if (stack_.empty())
            return refuse(ec, "an object", what);
        if (is_known_number() || is_version())
            return refuse(ec, "an integer for \"" + key_ + '"', what);
        if (is_known_text())
            return refuse(ec, "text for \"" + key_ + '"', what);
        if (is_known_container())
            return refuse(ec, "an object or array", what);
        return true;
    }
    bool store_version(std::int64_t value, error_code& ec) {
        if (!is_version())
            return true;
        vmdesc_body* body = body_of(stack_.back());
        if (body == nullptr || !once(saw_version))
            return refuse(ec, "one \"version\" for each \"vmsd_name\"", "another");
        body->version = value;
        return true;
    }
    bool store(std::string text, error_code& ec) {
        if (!is_known_text())
            return other("text", ec);
        place& top = stack_.back();
        if (key_ == "vmsd_name") {
            if (top.kind == level::field || (top.kind == level::structure && top.seen == 0)) {
                if ((top.seen & saw_any_body) != 0 && (top.seen & saw_any_body) != saw_any_body)
                    return refuse(
                        ec, "\"vmsd_name\", \"version\" and \"fields\" together", "not all of them");
                top.seen &= ~(saw_any_body | saw_subsections);
                top.field->bodies.emplace_back();
            }
            if (!once(saw_vmsd_name))
                return refuse(ec, "one \"vmsd_name\"", "another");
            body_of(top)->vmsd_name = std::move(text);
        } else if (key_ == "name") {
            if (!once(saw_name))
                return refuse(ec, "one \"name\"", "another");
            (top.kind == level::device ? static_cast<vmdesc_device*>(top.body)->name : top.field->name) =
                std::move(text);
        } else {
            if (!once(saw_type))
                return refuse(ec, "one \"type\"", "another");
            top.field->type = std::move(text);
        }
        return true;
    }
    bool store(std::uint64_t value, error_code& ec) {
        if (is_version())
            return refuse(ec, "a version", std::to_string(value));
        if (!is_known_number())
            return other("a number", ec);
        const place& top = stack_.back();
        if (key_ == "page_size") {
            tree_.page_size = value;
        } else if (key_ == "instance_id") {
            if (value > std::numeric_limits<std::uint32_t>::max())
                return refuse(ec, "an instance id", std::to_string(value));
            if (!once(saw_instance_id))
                return refuse(ec, "one \"instance_id\"", "another");
            static_cast<vmdesc_device*>(top.body)->instance_id = static_cast<std::uint32_t>(value);
        } else if (key_ == "size") {
            if (!once(saw_size))
                return refuse(ec, "one \"size\"", "another");
            if (top.kind == level::field)
                top.field->size = value; // an old-style device's is that of its one field
        } else if (key_ == "array_len") {
            if (!once(saw_array_len))
                return refuse(ec, "one \"array_len\"", "another");
            if (value < 2)
                return refuse(ec, "\"array_len\" of 2 or more", std::to_string(value));
            top.field->array_len = value;
        } else {
            if (!once(saw_index))
                return refuse(ec, "one \"index\"", "another");
            top.field->index = value;
        }
        return true;
    }
    bool refuse(error_code& ec, std::string expected, std::string found) {
        failure_ = error(errc::bad_description_json, std::move(expected), std::move(found));
        ec = boost::system::errc::make_error_code(boost::system::errc::invalid_argument);
        return false;
    }

    vmdesc& tree_;
    std::vector<place> stack_;
    std::string key_;
    std::string text_;
    error failure_;
    bool seen_devices_ = false;
};

/// Cuts the text of each device's object out of text that has been parsed, so that brackets and quotes match. Keys are
/// compared as they are spelled: false where one is spelled with escapes, and so wasn't found.
inline bool keep_vmdesc_texts(std::string_view json, vmdesc& tree) {
    std::size_t depth = 0;
    std::size_t begin = 0;
    std::size_t device = 0;
    std::string_view key;    // the last string at depth 1
    bool in_devices = false; // inside the value of "devices", or of "configuration"
    bool in_configuration = false;
    for (std::size_t i = 0; i < json.size(); ++i) {
        switch (json[i]) {
        case '"': {
            const std::size_t text = i + 1;
            for (++i; json[i] != '"'; ++i)
                if (json[i] == '\\')
                    ++i;
            if (depth == 1)
                key = json.substr(text, i - text);
            break;
        }
        case '{':
        case '[':
            if (depth == 1) {
                in_devices = json[i] == '[' && key == "devices";
                in_configuration = json[i] == '{' && key == "configuration";
                begin = i;
            } else if (depth == 2 && in_devices) {
                begin = i;
            }
            ++depth;
            break;
        case '}':
        case ']':
            --depth;
            if (depth == 2 && in_devices)
                tree.devices[device++].raw_json = json.substr(begin, i + 1 - begin);
            if (depth == 1 && in_configuration)
                tree.configuration->raw_json = json.substr(begin, i + 1 - begin);
            break;
        default:
            break;
        }
    }
    return device == tree.devices.size() && (!tree.configuration || !tree.configuration->raw_json.empty());
}

} // namespace detail

inline result<vmdesc> parse_vmdesc(std::string_view json, vmdesc_limits limits, std::uint64_t text_offset) {
    if (json.size() > limits.max_size)
        return std::move(error(errc::bad_description_json,
            "at most " + std::to_string(limits.max_size) + " bytes of text", std::to_string(json.size()))
                             .at_offset(text_offset));
    vmdesc tree;
    boost::json::parse_options options;
    options.max_depth = limits.max_depth;
    boost::json::basic_parser<detail::vmdesc_handler> parser(options, tree);
    boost::system::error_code ec;
    std::size_t read = parser.write_some(false, json.data(), json.size(), ec);
    if (ec) {
        const detail::vmdesc_handler& handler = parser.handler();
        error failure =
            handler.failure() ? handler.failure() : error(errc::bad_description_json, {}, ec.message());
        return std::move(failure.within(handler.path()).at_offset(text_offset + read));
    }
    while (read < json.size() &&
           (json[read] == ' ' || json[read] == '\n' || json[read] == '\r' || json[read] == '\t'))
        ++read;
    if (read != json.size())
        return std::move(error(errc::bad_description_json, "one object", "something behind it")
                             .at_offset(text_offset + read));
    // Whoever writes a device again needs its text as it was.
    if (!detail::keep_vmdesc_texts(json, tree))
        return std::move(error(errc::bad_description_json, "\"devices\" and \"configuration\" without escapes",
            "another spelling")
                             .at_offset(text_offset));
    return tree;
}

} // namespace vmstate
