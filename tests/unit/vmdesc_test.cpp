// SPDX-License-Identifier: BSL-1.0
// The JSON description: read from text that QEMU writes and from text that it never would, and bodies walked by it.
#include "support/catch.hpp"

#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/vmdesc_parse.hpp>
#include <vmstate/machine/vmdesc_walk.hpp>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

using namespace vmstate;
using vmstate::tests::contains;

namespace {

std::vector<std::byte> bytes_of(std::string_view hex) {
    std::vector<std::byte> bytes;
    const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
    for (std::size_t i = 0; i < hex.size();) {
        if (hex[i] == ' ') {
            ++i;
            continue;
        }
        bytes.push_back(static_cast<std::byte>(digit(hex[i]) * 16 + digit(hex[i + 1])));
        i += 2;
    }
    return bytes;
}

/// A whole description around the fields (and what else) of one device "dev" version 1.
std::string with_device(std::string_view fields, std::string_view more = "") {
    return R"({"page_size": 4096, "devices": [{"name": "dev", "instance_id": 0, "vmsd_name": "dev", "version": 1, "fields": [)" +
           std::string(fields) + "]" + std::string(more) + "}]}";
}
vmdesc_device device_of(std::string_view fields, std::string_view more = "") {
    const std::string json = with_device(fields, more);
    result<vmdesc> parsed = parse_vmdesc(json);
    INFO(json);
    if (!parsed)
        FAIL(parsed.error().message());
    return parsed->devices.at(0);
}
error refusal_of(std::string_view json, vmdesc_limits limits = {}) {
    const result<vmdesc> parsed = parse_vmdesc(json, limits);
    INFO(json);
    if (parsed)
        FAIL("read without an error");
    CHECK(parsed.error().code() == errc::bad_description_json);
    CHECK(parsed.error().offset() <= json.size());
    return parsed.error();
}

std::string hex_of(std::span<const std::byte> bytes) {
    std::string text;
    for (const std::byte byte : bytes) {
        text += "0123456789abcdef"[std::to_integer<int>(byte) >> 4];
        text += "0123456789abcdef"[std::to_integer<int>(byte) & 15];
    }
    return text;
}

/// Writes down what it is told, a line each.
class recorder final : public vmdesc_visitor {
public:
    void value(const vmdesc_value& value) override {
        std::string text;
        for (std::size_t i = 0; i < value.count(); ++i) {
            if (i != 0)
                text += ',';
            switch (value.kind) {
            case vmdesc_kind::boolean:
                text += value.as_unsigned(i) != 0 ? "true" : "false";
                break;
            case vmdesc_kind::signed_integer:
            case vmdesc_kind::timer:
                text += std::to_string(value.as_signed(i));
                break;
            case vmdesc_kind::unsigned_integer:
                text += std::to_string(value.as_unsigned(i));
                break;
            case vmdesc_kind::floating:
                text += std::to_string(value.as_double(i));
                break;
            case vmdesc_kind::marker:
                text += value.as_unsigned(i) == 0x30 ? "null" : "valid";
                break;
            default:
                text = hex_of(value.bytes);
            }
        }
        add(value.offset, name(value.field, value.field.index) + " = " + text);
    }
    void begin_nested(const vmdesc_nested& place) override {
        constexpr const char* roles[] = {"struct", "tmp", "element", "key", "value"};
        add(place.offset, name(place.field, place.index) + ' ' + roles[static_cast<int>(place.role)] + ' ' +
                              place.body.vmsd_name + " {");
        ++depth_;
    }
    void end_nested() override { --depth_; }
    void begin_list(const vmdesc_field& field, std::uint64_t elements, std::uint64_t offset) override {
        add(offset, field.name + ' ' + field.type + ' ' + std::to_string(elements) + " {");
        ++depth_;
    }
    void end_list() override { --depth_; }
    void tree_key(
        const vmdesc_field& field, std::uint64_t index, std::uint64_t key, std::uint64_t offset) override {
        add(offset, name(field, index) + " key " + std::to_string(key));
    }
    void begin_subsection(const vmdesc_body& body, std::uint64_t offset) override {
        add(offset, "subsection " + body.vmsd_name + " {");
        ++depth_;
    }
    void end_subsection() override { --depth_; }

    const std::vector<std::string>& lines() const { return lines_; }
    int depth() const { return depth_; }

private:
    static std::string name(const vmdesc_field& field, std::optional<std::uint64_t> index) {
        return field.name + (index ? '[' + std::to_string(*index) + ']' : std::string());
    }
    void add(std::uint64_t offset, const std::string& text) {
        lines_.push_back(
            std::to_string(offset) + std::string(static_cast<std::size_t>(1 + 2 * depth_), ' ') + text);
    }

    std::vector<std::string> lines_;
    int depth_ = 0;
};

/// Hands out its bytes in a window that moves, like a reader over a channel does.
class small_reader final : public reader {
public:
    explicit small_reader(std::span<const std::byte> bytes) : bytes_(bytes), window_(max_window) {}

private:
    void refill(std::size_t count) override {
        const std::size_t left = window();
        const std::uint64_t base = offset();
        std::memmove(window_.data(), cursor(), left);
        const std::size_t more = std::min(std::max(count, std::size_t{7}) - left, bytes_.size() - taken_);
        if (more != 0)
            std::memcpy(window_.data() + left, bytes_.data() + taken_, more);
        taken_ += more;
        set_window(window_.data(), window_.data(), window_.data() + left + more, base);
    }

    std::span<const std::byte> bytes_;
    std::vector<std::byte> window_;
    std::size_t taken_ = 0;
};

using lines = std::vector<std::string>;

lines walked(const vmdesc_device& device, std::string_view hex, std::uint64_t offset = 0) {
    const std::vector<std::byte> bytes = bytes_of(hex);
    CHECK(body_size(device) == bytes.size());

    memory_reader in(bytes, offset);
    recorder seen;
    const result<void> outcome = walk_body(device, in, seen);
    if (!outcome)
        FAIL(outcome.error().message());
    CHECK(in.remaining() == 0);
    CHECK(seen.depth() == 0);

    memory_reader skipped(bytes, offset);
    CHECK(skip_body(device, skipped).has_value());
    CHECK(skipped.remaining() == 0);

    small_reader pieces(bytes);
    recorder again;
    CHECK(walk_body(device, pieces, again).has_value());
    CHECK(pieces.offset() == bytes.size());
    CHECK(again.lines().size() == seen.lines().size());
    return seen.lines();
}

/// The error of a walk, the same as a skip's.
error breaks(const vmdesc_device& device, std::string_view hex) {
    const std::vector<std::byte> bytes = bytes_of(hex);
    memory_reader in(bytes, 1000);
    recorder seen;
    const result<void> outcome = walk_body(device, in, seen);
    memory_reader other(bytes, 1000);
    const result<void> skipped = skip_body(device, other);
    REQUIRE(outcome.has_error());
    REQUIRE(skipped.has_error());
    CHECK(skipped.error().message() == outcome.error().message());
    return outcome.error();
}

constexpr std::string_view u8_field = R"({"name": "a", "type": "uint8", "size": 1})";

} // namespace

// ---- text to tree -------------------------------------------------------------------------------------------

TEST_CASE("a description is read as QEMU writes it") {
    const std::string json =
        R"({"page_size": 4096, "devices": [)"
        R"({"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2, "fields": [)"
        R"({"name": "cpu_ticks_offset", "type": "int64", "size": 8}, {"name": "unused", "type": "unused_buffer", "size": 8}]}, )"
        R"({"name": "fw_cfg", "instance_id": 4294967294, "vmsd_name": "fw_cfg", "version": 2, "fields": [)"
        R"({"name": "regs", "array_len": 16, "type": "uint64", "size": 8}, )"
        R"({"name": "port", "index": 1, "type": "struct", "struct": {"vmsd_name": "port", "version": 3, "fields": [)"
        R"({"name": "irq[0]", "type": "uint8", "size": 1}]}, "size": 1}], )"
        R"("subsections": [{"vmsd_name": "fw_cfg/dma", "version": 0, "fields": [], )"
        R"("subsections": [{"vmsd_name": "fw_cfg/dma/x", "version": 1, "fields": []}]}]}, )"
        R"({"name": "slirp", "instance_id": 0, "size": 77, "fields": [{"name": "data", "size": 77, "type": "buffer"}]}]})";
    const result<vmdesc> parsed = parse_vmdesc(json);
    REQUIRE(parsed.has_value());
    CHECK(parsed->page_size == 4096);
    CHECK(!parsed->configuration);
    REQUIRE(parsed->devices.size() == 3);

    const vmdesc_device& timer = parsed->devices[0];
    CHECK(timer.name == "timer");
    CHECK(timer.instance_id == 0);
    CHECK(timer.version == 2);
    REQUIRE(timer.fields.size() == 2);
    CHECK(timer.fields[1].type == "unused_buffer");
    CHECK(body_size(timer) == 16);

    const vmdesc_device& fw_cfg = parsed->devices[1];
    CHECK(fw_cfg.instance_id == 4294967294);
    CHECK(fw_cfg.fields[0].array_len == 16);
    CHECK(!fw_cfg.fields[0].index);
    CHECK(fw_cfg.fields[1].index == 1);
    REQUIRE(fw_cfg.fields[1].bodies.size() == 1);
    CHECK(fw_cfg.fields[1].bodies[0].version == 3);
    CHECK(fw_cfg.fields[1].bodies[0].fields.at(0).name == "irq[0]");
    REQUIRE(fw_cfg.subsections.size() == 1);
    CHECK(fw_cfg.subsections[0].subsections.at(0).vmsd_name == "fw_cfg/dma/x");
    CHECK(body_size(fw_cfg) == 16 * 8 + 1 + (6 + 10) + (6 + 12));

    const vmdesc_device& slirp = parsed->devices[2];
    CHECK(slirp.vmsd_name.empty());
    CHECK(body_size(slirp) == 77);
}

TEST_CASE("keys that occur several times in a list's entry each open an element") {
    const vmdesc_device device = device_of(
        R"({"name": "q", "type": "qtailq", "vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}], )"
        R"("subsections": [{"vmsd_name": "e/x", "version": 1, "fields": []}], )"
        R"("vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}, {"name": "b", "type": "uint8", "size": 1}], "size": 15}, )"
        R"({"name": "t", "type": "tmp", "vmsd_name": "t", "version": 0, "fields": [], "size": 0})");
    REQUIRE(device.fields.size() == 2);
    REQUIRE(device.fields[0].bodies.size() == 2);
    CHECK(device.fields[0].bodies[0].fields.size() == 1);
    CHECK(device.fields[0].bodies[0].subsections.size() == 1);
    CHECK(device.fields[0].bodies[1].fields.size() == 2);
    CHECK(device.fields[0].bodies[1].subsections.empty());
    CHECK(device.fields[1].bodies.size() == 1);
}

TEST_CASE("the configuration of QEMU 8.2 and newer is read") {
    const result<vmdesc> parsed = parse_vmdesc(
        R"({"configuration": {"vmsd_name": "configuration", "version": 1, "fields": [{"name": "len", "type": "uint32", "size": 4}]}, )"
        R"("page_size": 4096, "devices": []})");
    REQUIRE(parsed.has_value());
    REQUIRE(parsed->configuration);
    CHECK(parsed->configuration->vmsd_name == "configuration");
    CHECK(parsed->configuration->raw_json.starts_with(R"({"vmsd_name": "configuration")"));
    CHECK(parsed->configuration->raw_json.ends_with(R"("size": 4}]})"));
}

TEST_CASE("what this library does not know is passed over, whatever it holds") {
    const std::string other = R"([{"name": 1, "fields": [[]], "size": -1}, null, true, 1.5, "x"])";
    const result<vmdesc> parsed = parse_vmdesc(
        R"({"new": )" + other + R"(, "page_size": 4096, "more": {"devices": [)" + other +
        R"(]}, "devices": [{"alias": )" + other +
        R"(, "name": "d", "instance_id": 3, "vmsd_name": "d", "version": -1, "fields": [{"unit": )" + other +
        R"(, "name": "a", "type": "uint8", "note": null, "size": 1}]}], "last": )" + other + "}");
    REQUIRE(parsed.has_value());
    REQUIRE(parsed->devices.size() == 1);
    CHECK(parsed->devices[0].version == -1);
    CHECK(parsed->devices[0].fields.size() == 1);
    CHECK(parsed->devices[0].fields[0].size == 1);
}

TEST_CASE("each device keeps its text, whatever brackets and quotes its strings hold") {
    const std::string first =
        R"({"name": "a]}\"[{", "instance_id": 0, "vmsd_name": "\\", "version": 1, "fields": []})";
    const std::string second =
        R"({ "name":"b","instance_id":1,"vmsd_name":"b","version":1,"fields":[{"name":"x","type":"uint8","size":1}] })";
    const result<vmdesc> parsed = parse_vmdesc(R"({"x": [{}, [{}]], "page_size": 4096, "devices": [)" +
                                               first + " ,\n" + second + R"(], "y": [{"devices": [{}]}]})");
    REQUIRE(parsed.has_value());
    CHECK(parsed->devices.at(0).raw_json == first);
    CHECK(parsed->devices.at(0).name == "a]}\"[{");
    CHECK(parsed->devices.at(1).raw_json == second);
}

TEST_CASE("a device's text that can't be found is no description: it could not be written again") {
    const std::string device = R"({"name": "b", "instance_id": 1, "vmsd_name": "b", "version": 1, "fields": []})";
    for (const std::string key : {R"(d\u0065vices)", R"(\u0064evices)"})
        CHECK_THAT(refusal_of("{\"" + key + "\": [" + device + "]}").message(), contains("without escapes"));
    CHECK_THAT(refusal_of(R"({"c\u006fnfiguration": )" + device + R"(, "devices": []})").message(),
        contains("without escapes"));
    // Without a device there is nothing to be lost; and other keys are spelled as one likes.
    CHECK(parse_vmdesc(R"({"d\u0065vices": []})").has_value());
    CHECK(parse_vmdesc(R"({"p\u0061ge_size": 4096, "devices": []})")->page_size == 4096);
}

TEST_CASE("devices with the same id are told apart by their order") {
    const std::string text =
        R"({"name": "isa-ide", "instance_id": 0, "vmsd_name": "isa-ide", "version": 3, "fields": []}, )"
        R"({"name": "isa-ide", "instance_id": 1, "vmsd_name": "isa-ide", "version": 4, "fields": []}, )"
        R"({"name": "isa-ide", "instance_id": 0, "vmsd_name": "isa-ide", "version": 5, "fields": []})";
    const result<vmdesc> parsed = parse_vmdesc(R"({"devices": [)" + text + "]}");
    REQUIRE(parsed.has_value());
    CHECK(parsed->find("isa-ide", 0) == &parsed->devices[0]);
    CHECK(parsed->find("isa-ide", 0, 1) == &parsed->devices[2]);
    CHECK(parsed->find("isa-ide", 0, 2) == nullptr);
    CHECK(parsed->find("isa-ide", 1) == &parsed->devices[1]);
    CHECK(parsed->find("isa-id", 0) == nullptr);
}

TEST_CASE("text that no description can be is refused, with the place") {
    CHECK_THAT(refusal_of("").message(), contains("bad JSON description"));
    CHECK_THAT(refusal_of("[]").message(), contains("expected an object, found an array"));
    CHECK_THAT(refusal_of("7").message(), contains("expected an object"));
    CHECK_THAT(refusal_of("\"x\"").message(), contains("expected an object, found text"));
    CHECK_THAT(refusal_of("{}").message(), contains("a \"devices\" array"));
    CHECK_THAT(refusal_of(R"({"devices": 3})").message(), contains("an object or array"));
    CHECK_THAT(refusal_of(R"({"devices": [3]})").message(), contains("an object or array"));
    CHECK_THAT(refusal_of(R"({"devices": [[]]})").message(), contains("expected an object, found an array"));
    CHECK_THAT(refusal_of(R"({"devices": [], "devices": []})").message(), contains("one \"devices\""));
    CHECK_THAT(refusal_of(R"({"devices": [{}]})").message(), contains("\"fields\" in every device"));
    CHECK_THAT(refusal_of(R"({"devices": [], "page_size": -1})").message(), contains("found -1"));
    CHECK_THAT(refusal_of(R"({"devices": []} {})").message(), contains("something behind it"));
    CHECK(refusal_of(R"({"devices": []} x)").offset() == 16);
    CHECK_THAT(refusal_of(R"({"devices": [{"fields": [], "size": 1}]})").message(),
        contains("\"name\" and \"instance_id\""));
    CHECK_THAT(
        refusal_of(R"({"devices": [{"name": "d", "instance_id": 4294967296, "size": 0, "fields": []}]})")
            .message(),
        contains("d: bad JSON description: expected an instance id, found 4294967296"));
    CHECK_THAT(refusal_of(R"({"devices": [{"name": "d", "instance_id": 0, "fields": []}]})").message(),
        contains("or \"size\""));

    CHECK(refusal_of(with_device("{}")).path() == "dev");
    CHECK(refusal_of(with_device(R"({"name": "a", "type": "uint8", "size": "1"})")).path() == "dev/a");
    CHECK_THAT(refusal_of(with_device(R"({"name": "a", "type": "uint8"})")).message(),
        contains("dev/a: bad JSON description: expected \"name\", \"type\" and \"size\""));
    CHECK_THAT(refusal_of(with_device(R"({"name": "a", "type": "uint8", "size": 1.5})")).message(),
        contains("an integer for \"size\", found a fraction"));
    CHECK_THAT(
        refusal_of(with_device(R"({"name": "a", "type": "uint8", "size": 18446744073709551616})")).message(),
        contains("an integer for \"size\""));
    CHECK_THAT(refusal_of(with_device(R"({"name": "a", "type": "uint8", "size": -1})")).message(),
        contains("found -1"));
    CHECK_THAT(refusal_of(with_device(R"({"name": "a", "name": "b", "type": "uint8", "size": 1})")).message(),
        contains("one \"name\""));
    CHECK_THAT(refusal_of(with_device(R"({"name": "a", "type": "uint8", "size": 1, "size": 1})")).message(),
        contains("one \"size\""));
    CHECK_THAT(
        refusal_of(with_device(R"({"name": "a", "type": "uint8", "size": 1, "array_len": 1})")).message(),
        contains("\"array_len\" of 2 or more"));
    CHECK_THAT(refusal_of(with_device(R"({"name": "a", "type": null, "size": 1})")).message(),
        contains("text for \"type\", found null"));
    CHECK_THAT(
        refusal_of(with_device(R"({"name": "a", "type": "qlist", "fields": [], "size": 1})")).message(),
        contains("\"vmsd_name\" before \"fields\""));
    CHECK_THAT(
        refusal_of(with_device(R"({"name": "a", "type": "qlist", "vmsd_name": "e", "vmsd_name": "e"})"))
            .message(),
        contains("together"));
    CHECK_THAT(refusal_of(with_device(
                              R"({"name": "a", "type": "qlist", "vmsd_name": "e", "version": 1, "size": 1})"))
                   .message(),
        contains("together"));
    CHECK_THAT(
        refusal_of(with_device(R"({"name": "a", "type": "struct", "struct": {"version": 1}, "size": 1})"))
            .message(),
        contains("\"version\""));
    CHECK_THAT(
        refusal_of(with_device(R"({"name": "a", "type": "struct", "struct": 7, "size": 1})")).message(),
        contains("an object or array"));
    CHECK_THAT(
        refusal_of(with_device(u8_field, R"(, "subsections": [{}])")).message(), contains("a subsection"));
    CHECK_THAT(refusal_of(with_device(u8_field, R"(, "fields": [])")).message(), contains("one \"fields\""));
    CHECK_THAT(refusal_of(with_device(u8_field, R"(, "version": 2)")).message(), contains("one \"version\""));
    CHECK_THAT(
        refusal_of(with_device(u8_field, R"(, "vmsd_name": "x")")).message(), contains("one \"vmsd_name\""));
    CHECK_THAT(refusal_of(with_device(u8_field, R"(, "version": 9223372036854775808)")).message(),
        contains("a version"));
    CHECK(refusal_of(with_device("\x01")).offset() == with_device("").find(R"(]}]})"));
}

TEST_CASE("depth and size of the text are limited") {
    std::string deep = R"({"name": "a", "type": "uint8", "size": 1})";
    for (int i = 0; i < 20; ++i)
        deep = R"({"name": "s", "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [)" +
               deep + R"(]}, "size": 1})";
    CHECK(parse_vmdesc(with_device(deep)).has_value());
    CHECK_THAT(refusal_of(with_device(deep), {.max_depth = 32}).message(), contains("bad JSON description"));
    const std::string brackets = R"({"x": )" + std::string(100'000, '[');
    CHECK(refusal_of(brackets).offset() < 1000);
    const std::string objects = [] {
        std::string text;
        for (int i = 0; i < 100'000; ++i)
            text += "{\"x\":";
        return text;
    }();
    CHECK(refusal_of(objects).offset() < 1000);
    CHECK_THAT(refusal_of(with_device(""), {.max_size = 50}).message(), contains("at most 50 bytes"));
}

TEST_CASE(
    "no prefix of a description is a description, and a changed byte is an error or another description") {
    const std::string json = with_device(
        R"({"name": "q", "type": "qtailq", "vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}], )"
        R"("vmsd_name": "e", "version": 1, "fields": [{"name": "a", "array_len": 3, "type": "uint8", "size": 1}], "size": 7})",
        R"(, "subsections": [{"vmsd_name": "dev/x", "version": 1, "fields": []}])");
    const std::vector<std::byte> body = bytes_of("01 11 01 22 33 44 00 05 05 6465762f78 00000001");
    REQUIRE(
        walked(parse_vmdesc(json)->devices.at(0), "01 11 01 22 33 44 00 05 05 6465762f78 00000001").size() ==
        6);
    for (std::size_t size = 0; size < json.size(); ++size)
        CHECK(refusal_of(std::string_view(json).substr(0, size)));
    int read = 0;
    for (std::size_t i = 0; i < json.size(); ++i)
        for (int bit = 0; bit < 8; ++bit) {
            std::string changed = json;
            changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
            const result<vmdesc> parsed = parse_vmdesc(changed);
            if (!parsed) {
                CHECK(parsed.error().code() == errc::bad_description_json);
                continue;
            }
            ++read;
            for (const vmdesc_device& device : parsed->devices) {
                memory_reader in(body);
                recorder seen;
                (void)walk_body(device, in, seen);
                CHECK(in.offset() <= body.size());
            }
        }
    CHECK(read > 100);
}

// ---- where the text is --------------------------------------------------------------------------------------

namespace {

std::vector<std::byte> stream_with(
    std::string_view before, std::string_view json, std::string_view after = "") {
    vector_writer out;
    out.write(before.data(), before.size());
    out.put_u8(0);
    out.put_u8(6);
    out.put_be32(static_cast<std::uint32_t>(json.size()));
    out.write(json.data(), json.size());
    out.write(after.data(), after.size());
    return out.take();
}

} // namespace

TEST_CASE("the description is found at the end of a stream") {
    const std::string json = with_device(u8_field);
    const std::string before(300, '\x06');
    const std::vector<std::byte> stream = stream_with(before, json);
    const result<vmdesc_location> found = find_vmdesc(stream);
    REQUIRE(found.has_value());
    CHECK(found->offset == 306);
    CHECK(found->size == json.size());
    CHECK(found->text_in(stream) == json);
}

TEST_CASE("the description is found when something follows it, and not when there is none") {
    const std::string json = with_device(u8_field);
    const std::vector<std::byte> stream = stream_with("abc", json, "more\x06");
    const result<vmdesc_location> found = find_vmdesc(stream);
    REQUIRE(found.has_value());
    CHECK(found->text_in(stream) == json);

    // Another text of the kind in guest memory comes before it and isn't taken.
    const std::vector<std::byte> first = stream_with("", json);
    const std::string memory(reinterpret_cast<const char*>(first.data()), first.size());
    const result<vmdesc_location> second = find_vmdesc(stream_with(memory, json));
    REQUIRE(second.has_value());
    CHECK(second->offset == memory.size() + 6);

    CHECK(find_vmdesc({}).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("06")).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("00 06")).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("00 06 00000000")).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("00 06 ffffffff 7b7d")).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("00 06 00000003 7b7d")).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("01 06 00000002 7b7d")).error() == errc::bad_description_json);
    CHECK(find_vmdesc(bytes_of("00 06 00000002 7b7d")).has_value());
    for (std::size_t size = 0; size < stream.size() - 5; ++size)
        CHECK(!find_vmdesc(std::span<const std::byte>(stream).first(size)));
}

// ---- bodies by the tree -------------------------------------------------------------------------------------

TEST_CASE("every type of field is decoded") {
    const vmdesc_device device = device_of(
        R"({"name": "u8", "type": "uint8", "size": 1}, {"name": "u16", "type": "uint16 equal", "size": 2}, )"
        R"({"name": "u32", "type": "uint32", "size": 4}, {"name": "u64", "type": "uint64", "size": 8}, )"
        R"({"name": "i8", "type": "int8", "size": 1}, {"name": "i16", "type": "int16", "size": 2}, )"
        R"({"name": "i32", "type": "int32 le", "size": 4}, {"name": "i64", "type": "int64 equal", "size": 8}, )"
        R"({"name": "yes", "type": "bool", "size": 1}, {"name": "d", "type": "CPU_Double_U", "size": 8}, )"
        R"({"name": "t", "type": "timer", "size": 8}, {"name": "b", "type": "buffer", "size": 3}, )"
        R"({"name": "empty", "type": "buffer", "size": 0}, {"name": "u", "type": "unused_buffer", "size": 2}, )"
        R"({"name": "map", "type": "bitmap", "size": 8}, {"name": "own", "type": "pci irq state", "size": 2}, )"
        R"({"name": "many", "array_len": 3, "type": "int16", "size": 2}, {"name": "one", "index": 5, "type": "uint8", "size": 1})");
    CHECK(walked(device,
              "ff fffe 01020304 8000000000000000 fe fffe 80000000 ffffffffffffffff 02 3ff8000000000000"
              "ffffffffffffffff 616263 0000 0000000000000005 abcd 0001 ffff 8000 2a",
              100) ==
          lines{"100 u8 = 255", "101 u16 = 65534", "103 u32 = 16909060", "107 u64 = 9223372036854775808",
              "115 i8 = -2", "116 i16 = -2", "118 i32 = -2147483648", "122 i64 = -1", "130 yes = true",
              "131 d = 1.500000", "139 t = -1", "147 b = 616263", "150 empty = ", "150 u = 0000",
              "152 map = 0000000000000005", "160 own = abcd", "162 many = 1,-1,-32768", "168 one[5] = 42"});
}

TEST_CASE("bits of a bitmap count from the last byte of each word") {
    const vmdesc_field field{
        .name = "map", .type = "bitmap", .size = 16, .array_len = 1, .index = {}, .bodies = {}};
    const std::vector<std::byte> bytes = bytes_of("8000000000000001 0000000000000002");
    const vmdesc_value value{field, vmdesc_kind::bitmap, 0, bytes};
    for (std::size_t i = 0; i < 128; ++i)
        CHECK(value.bit(i) == (i == 0 || i == 63 || i == 65));
}

TEST_CASE("structs, arrays of structs and subsections are walked") {
    const vmdesc_device device = device_of(
        R"({"name": "s", "type": "struct", "struct": {"vmsd_name": "s", "version": 2, "fields": [{"name": "a", "type": "uint8", "size": 1}], )"
        R"("subsections": [{"vmsd_name": "s/x", "version": 7, "fields": [{"name": "b", "type": "uint8", "size": 1}]}]}, "size": 11}, )"
        R"({"name": "v", "array_len": 2, "type": "vstruct", "vmsd_name": "v", "version": 1, "fields": [{"name": "c", "type": "uint16", "size": 2}], "size": 2}, )"
        R"({"name": "none", "array_len": 1000000000000, "type": "struct", "struct": {"vmsd_name": "n", "version": 1, "fields": []}, "size": 0}, )"
        R"({"name": "t", "type": "tmp", "vmsd_name": "t", "version": 1, "fields": [{"name": "d", "type": "uint8", "size": 1}], "size": 1})",
        R"(, "subsections": [{"vmsd_name": "dev/y", "version": 1, "fields": [{"name": "e", "type": "uint8", "size": 1}], )"
        R"("subsections": [{"vmsd_name": "dev/y/z", "version": 0, "fields": []}]}])");
    CHECK(
        walked(device,
            "01 05 03 732f78 00000007 02  0003 0004  05  05 05 6465762f79 00000001 06 05 07 6465762f792f7a 00000000") ==
        lines{"0 s struct s {", "0   a = 1", "1   subsection s/x {", "10     b = 2", "11 v[0] struct v {",
            "11   c = 3", "13 v[1] struct v {", "13   c = 4", "15 none[0] struct n {", "15 t tmp t {",
            "15   d = 5", "16 subsection dev/y {", "27   e = 6", "28   subsection dev/y/z {"});
}

TEST_CASE("lists and trees are walked") {
    const std::string element =
        R"("vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}])";
    const vmdesc_device device = device_of(
        R"({"name": "none", "type": "qlist", "size": 1}, )"
        R"({"name": "q", "type": "qtailq", )" +
        element + ", " + element +
        R"(, "size": 5}, )"
        R"({"name": "direct", "type": "gtree", )" +
        element + ", " + element +
        R"(, "size": 25}, )"
        R"({"name": "tree", "type": "gtree", "vmsd_name": "k", "version": 1, "fields": [{"name": "k", "type": "uint16", "size": 2}], )" +
        element +
        R"(, "size": 9}, )"
        R"({"name": "bare", "type": "gtree", "size": 5})");
    CHECK(
        walked(device,
            "00  01 0a 01 0b 00  00000002 01 0000000000000007 0c 01 ffffffffffffffff 0d 00  00000001 01 1234 0e 00  00000000 00") ==
        lines{"0 none qlist 0 {", "1 q qtailq 2 {", "2   q[0] element e {", "2     a = 10",
            "4   q[1] element e {", "4     a = 11", "6 direct gtree 2 {", "11   direct[0] key 7",
            "19   direct[0] value e {", "19     a = 12", "21   direct[1] key 18446744073709551615",
            "29   direct[1] value e {", "29     a = 13", "31 tree gtree 1 {", "36   tree[0] key k {",
            "36     k = 4660", "38   tree[0] value e {", "38     a = 14", "40 bare gtree 0 {"});
}

TEST_CASE("null elements of arrays of pointers are known by their marker") {
    const vmdesc_device device = device_of(
        R"({"name": "p", "index": 0, "type": "struct", "struct": {}, "size": 1}, )"
        R"({"name": "p", "index": 1, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}]}, "size": 1}, )"
        R"({"name": "n", "index": 0, "type": "uint32", "size": 1}, {"name": "n", "index": 1, "type": "uint64", "size": 1}, )"
        R"({"name": "m", "index": 0, "type": "ptr-marker", "size": 1}, {"name": "m", "index": 1, "type": "ptr-marker", "size": 1}, )"
        R"({"name": "run", "array_len": 2, "type": "struct", "struct": {}, "size": 1})");
    CHECK(walked(device, "30 30 30 30 30 31 3030") ==
          lines{"0 p[0] = null", "1 p[1] struct s {", "1   a = 48", "2 n[0] = null", "3 n[1] = null",
              "4 m[0] = null", "5 m[1] = valid", "6 run = null,null"});
    CHECK(breaks(device, "31 30 30 30 30 31 3030").message() ==
          "p[0]: bad marker byte: expected a null pointer's marker 0x30, found 0x31 (offset 1000)");
    CHECK(breaks(device, "30 30 30 30 32 31 3030").path() == "m[0]");
    CHECK(breaks(device, "30 30 30 30 30 31 3031").offset() == 1007);
}

TEST_CASE("a buffer that fits no window comes in one piece") {
    const vmdesc_device device = device_of(
        R"({"name": "big", "type": "buffer", "size": 300000}, {"name": "words", "array_len": 5000, "type": "uint64", "size": 8})");
    std::vector<std::byte> bytes(340000);
    for (std::size_t i = 0; i < bytes.size(); ++i)
        bytes[i] = static_cast<std::byte>(i * 7 + i / 256);
    struct : vmdesc_visitor {
        std::vector<std::byte> all;
        void value(const vmdesc_value& value) override {
            all.insert(all.end(), value.bytes.begin(), value.bytes.end());
        }
    } kept;
    small_reader in(bytes);
    REQUIRE(walk_body(device, in, kept).has_value());
    CHECK(kept.all == bytes);
    small_reader skipped(bytes);
    REQUIRE(skip_body(device, skipped).has_value());
    CHECK(skipped.offset() == bytes.size());
}

TEST_CASE("a body that does not follow its description is refused, with field and offset") {
    const vmdesc_device plain = device_of(
        R"({"name": "a", "type": "uint16", "size": 2}, {"name": "b", "array_len": 2, "type": "uint32", "size": 4})");
    CHECK(
        breaks(plain, "01").message() == "a: stream ends too early: expected 2 bytes, found 1 (offset 1000)");
    CHECK(breaks(plain, "0102 0000").message() ==
          "b: stream ends too early: expected 8 bytes, found 2 (offset 1002)");

    const vmdesc_device list = device_of(
        R"({"name": "q", "type": "qtailq", "vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}], "size": 3})");
    CHECK(breaks(list, "00 0a 00").message() ==
          "q[0]: bad marker byte: expected an element's marker 0x01, found 0x00 (offset 1000)");
    CHECK(breaks(list, "01 0a 01").message() ==
          "q: bad marker byte: expected the list's end 0x00, found 0x01 (offset 1002)");

    const vmdesc_device tree = device_of(
        R"({"name": "t", "type": "gtree", "vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}], "size": 15})");
    CHECK(breaks(tree, "00000002 01 0000000000000000 0a 00").message() ==
          "t: bad JSON description: expected 1 keys and values, found 2 nodes (offset 1000)");
    CHECK(breaks(tree, "80000001 01 0000000000000000 0a 00").code() == errc::bad_description_json);

    const vmdesc_device sub = device_of(R"({"name": "a", "type": "uint8", "size": 1})",
        R"(, "subsections": [{"vmsd_name": "dev/x", "version": 3, "fields": [{"name": "b", "type": "uint8", "size": 1}]}])");
    CHECK(breaks(sub, "01").message() ==
          "dev/x: stream ends too early: expected 1 byte, found 0 (offset 1001)");
    CHECK(breaks(sub, "01 7e 00000000").message() ==
          "dev/x: malformed section: expected a subsection (0x05), found 0x7e (offset 1001)");
    CHECK(breaks(sub, "01 05 05 6465762f79 00000003 01").message() ==
          "dev/x: malformed section: expected this subsection's name, found \"dev/y\" (offset 1002)");
    CHECK(breaks(sub, "01 05 05 6465762f78 00000004 01").message() ==
          "dev/x: malformed section: expected version 3, found 4 (offset 1008)");
    CHECK(breaks(sub, "01 05 05 6465762f78 00000003").path() == "dev/x/b");
}

TEST_CASE("a description that contradicts itself is refused when a body is walked by it") {
    const auto message = [&](std::string_view fields) {
        return breaks(device_of(fields), "3030303030303030").message();
    };
    CHECK_THAT(message(R"({"name": "a", "type": "uint32", "size": 3})"),
        contains("a: bad JSON description: expected 4 bytes for a uint32, found 3 bytes"));
    CHECK_THAT(message(R"({"name": "a", "type": "bool", "size": 2})"), contains("1 byte for a bool"));
    CHECK_THAT(message(R"({"name": "a", "type": "bitmap", "size": 7})"), contains("8-byte words"));
    CHECK_THAT(message(R"({"name": "a", "type": "struct", "struct": {}, "size": 2})"),
        contains("a body of 2 bytes"));
    CHECK_THAT(
        message(
            R"({"name": "a", "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": []}, "size": 2})"),
        contains("expected 2 bytes, found 0 bytes by its fields"));
    CHECK_THAT(
        message(
            R"({"name": "a", "array_len": 3, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [{"name": "b", "type": "uint8", "size": 1}]}, "size": 2})"),
        contains("a[0]: bad JSON description: expected 2 bytes, found 1 byte by its fields"));
    CHECK_THAT(message(R"({"name": "a", "array_len": 2, "type": "qlist", "size": 1})"),
        contains("an array of lists"));
    CHECK_THAT(
        message(
            R"({"name": "a", "type": "tmp", "vmsd_name": "s", "version": 1, "fields": [], "vmsd_name": "s", "version": 1, "fields": [], "size": 0})"),
        contains("one body in a tmp"));
}

TEST_CASE("sizes and counts that no stream can hold cost nothing") {
    const auto refused = [](std::string_view fields) {
        const vmdesc_device device = device_of(fields);
        const std::vector<std::byte> bytes(100);
        memory_reader in(bytes);
        recorder seen;
        const result<void> known = walk_body(device, in, seen);
        REQUIRE(known.has_error());
        small_reader endless(bytes); // doesn't know how much is left
        recorder again;
        const result<void> unknown = walk_body(device, endless, again);
        REQUIRE(unknown.has_error());
        small_reader skipped(bytes);
        REQUIRE(!skip_body(device, skipped));
        return known.error().code();
    };
    CHECK(refused(R"({"name": "a", "type": "buffer", "size": 18446744073709551615})") == errc::truncated);
    CHECK(refused(R"({"name": "a", "array_len": 18446744073709551615, "type": "uint64", "size": 8})") ==
          errc::truncated);
    CHECK(refused(R"({"name": "a", "array_len": 4611686018427387904, "type": "uint32", "size": 4})") ==
          errc::truncated);
    CHECK(
        refused(
            R"({"name": "a", "array_len": 18446744073709551615, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [{"name": "b", "type": "uint8", "size": 1}]}, "size": 1})") ==
        errc::truncated);

    // Few bytes, many entries without any, many times.
    std::string empty;
    for (int i = 0; i < 1000; ++i)
        empty += R"({"name": "e", "type": "buffer", "size": 0}, )";
    CHECK(
        refused(
            R"({"name": "a", "array_len": 100, "type": "struct", "struct": {"vmsd_name": "s", "version": 1, "fields": [)" +
            empty + R"({"name": "b", "type": "uint8", "size": 1}]}, "size": 1})") ==
        errc::bad_description_json);

    vmdesc_body large;
    large.fields.assign(3, vmdesc_field{.name = "a",
                               .type = "buffer",
                               .size = std::uint64_t{1} << 63,
                               .array_len = 1,
                               .index = {},
                               .bodies = {}});
    CHECK(body_size(large) == std::numeric_limits<std::uint64_t>::max());
}

TEST_CASE("every prefix and every changed byte of a body is an error or another body") {
    const std::string element =
        R"("vmsd_name": "e", "version": 1, "fields": [{"name": "a", "type": "uint8", "size": 1}])";
    const vmdesc_device device = device_of(
        R"({"name": "q", "type": "qtailq", )" + element + ", " + element +
            R"(, "size": 5}, {"name": "g", "type": "gtree", )" + element +
            R"(, "size": 15}, {"name": "p", "index": 0, "type": "struct", "struct": {}, "size": 1}, {"name": "n", "type": "uint32", "size": 4})",
        R"(, "subsections": [{"vmsd_name": "dev/x", "version": 1, "fields": [{"name": "b", "type": "bool", "size": 1}]}])");
    const std::string_view hex =
        "01 0a 01 0b 00  00000001 01 0000000000000007 0c 00  30  01020304  05 05 6465762f78 00000001 01";
    REQUIRE(walked(device, hex).size() == 13);
    const std::vector<std::byte> whole = bytes_of(hex);
    for (std::size_t size = 0; size < whole.size(); ++size) {
        memory_reader in(std::span<const std::byte>(whole).first(size));
        const result<void> outcome = skip_body(device, in);
        REQUIRE(outcome.has_error());
        CHECK(outcome.error().code() == errc::truncated);
        CHECK(outcome.error().offset() <= size);
        CHECK(outcome.error().path() != "");
    }
    for (std::size_t i = 0; i < whole.size(); ++i)
        for (int bit = 0; bit < 8; ++bit) {
            std::vector<std::byte> changed = whole;
            changed[i] ^= static_cast<std::byte>(1 << bit);
            memory_reader in(changed);
            recorder seen;
            const result<void> outcome = walk_body(device, in, seen);
            const bool is_data = (i == 1 || i == 3 || (i >= 10 && i < 19) || (i >= 21 && i < 25) || i == 36);
            CHECK(outcome.has_value() == is_data);
            if (outcome)
                CHECK(in.remaining() == 0);
        }
}
