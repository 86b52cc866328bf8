// SPDX-License-Identifier: BSL-1.0
// The program vmstate-inspect on streams of a QEMU: what it prints, and what it says of damaged ones.
#include "support/catch.hpp"
#include "support/qemu.hpp"

#include <boost/json.hpp>

#include <sys/wait.h>

#include <cstdio>
#include <string>
#include <vector>

using namespace vmstate::tests;
namespace json = boost::json;

#ifdef VMSTATE_INSPECT

namespace {

struct outcome {
    int status = -1;
    std::string output; ///< both streams
};

/// Runs the program through the shell.
outcome run(const std::string& arguments) {
    outcome ended;
    std::FILE* const pipe = ::popen((std::string(VMSTATE_INSPECT) + ' ' + arguments + " 2>&1").c_str(), "r");
    REQUIRE(pipe != nullptr);
    char buffer[4096];
    for (std::size_t size = 0; (size = std::fread(buffer, 1, sizeof buffer, pipe)) != 0;)
        ended.output.append(buffer, size);
    const int status = ::pclose(pipe);
    if (WIFEXITED(status))
        ended.status = WEXITSTATUS(status);
    return ended;
}

json::object as_json(const outcome& ended) {
    CAPTURE(ended.output);
    boost::system::error_code failed;
    const json::value value = json::parse(ended.output, failed);
    REQUIRE(!failed);
    return value.as_object();
}

const json::object* find_device(const json::array& items, std::string_view name) {
    for (const json::value& item : items)
        if (item.as_object().at("item").as_string() == "device" &&
            item.as_object().at("name").as_string() == name)
            return &item.as_object();
    return nullptr;
}
const json::value& field(const json::object& device, std::string_view name) {
    for (const json::value& each : device.at("fields").as_array())
        if (each.as_object().at("name").as_string() == name)
            return each.as_object().at("value");
    FAIL("no field " << name);
    return device.at("fields");
}

} // namespace

TEST_CASE("vmstate-inspect shows a stream, for people and for programs, and where a damaged one breaks") {
    VMSTATE_REQUIRE_QEMU();
    qemu source({.machine = "pc", .stopped = true});
    source.outb(0x60, 0xf3); // to the keyboard: set the typematic rate; its parameter stays outstanding
    const std::string file = source.directory() / "vm.state";
    REQUIRE(source.migrate_to_file(file).completed);
    std::vector<std::byte> stream = read_file(file);

    const outcome text = run(file);
    CHECK(text.status == 0);
    CHECK_THAT(text.output, contains("pc-i440fx-7.2") || contains("pc-i440fx-"));
    CHECK_THAT(text.output, contains("ok: " + std::to_string(stream.size()) + " bytes read to the last"));
    CHECK_THAT(text.output, contains("0000:00:01.1/ide"));
    CHECK_THAT(text.output, contains("\"paused\", then 94 zero bytes") || contains("\"prelaunch\""));
    CHECK_THAT(text.output, !contains("\x1b["));
    CHECK_THAT(run("--color=always " + file).output, contains("\x1b[1m"));
    CHECK(run("- < " + file).output.substr(1) == text.output.substr(file.size()));
    CHECK_THAT(run("'exec:cat " + file + "'").output, contains("ok: "));
    CHECK_THAT(run("file:" + file).output, contains("ok: "));

    const outcome one = run("--device 'i8259#1' " + file);
    CHECK(one.status == 0);
    CHECK_THAT(one.output, contains("i8259#1"));
    CHECK_THAT(one.output, contains("elcr"));
    CHECK_THAT(one.output, !contains("pckbd"));
    CHECK_THAT(run("--ram " + file).output, contains("000000000-000ffffff  zero            4096 pages"));

    const json::object whole = as_json(run("--json " + file));
    CHECK(whole.at("ok").as_bool());
    CHECK(whole.at("problems").as_array().empty());
    CHECK(whole.at("size").to_number<std::size_t>() == stream.size());
    CHECK(whole.at("ram").as_object().at("blocks").as_array().at(0).as_object().at("name").as_string() ==
          "pc.ram");
    const json::object* const keyboard = find_device(whole.at("items").as_array(), "ps2kbd");
    REQUIRE(keyboard != nullptr);
    CHECK(keyboard->at("extent").as_string() == "described");
    const json::object* const timer = find_device(whole.at("items").as_array(), "timer");
    REQUIRE(timer != nullptr);
    CHECK(field(*timer, "cpu_ticks_offset").is_int64());
    const json::object* const ide = find_device(whole.at("items").as_array(), "0000:00:01.1/ide");
    REQUIRE(ide != nullptr);
    CHECK(ide->at("fields").as_array().at(0).as_object().at("vmsd_name").as_string() == "PCIDevice");

    CHECK(run("--device nobody " + file).status == 2);
    CHECK(run(file + ".missing").status == 2);
    CHECK(run("--unknown").status == 2);
    CHECK(run("--help").status == 0);

    // A byte of the second PIC's footer, then the end cut off.
    const json::object* pic = nullptr;
    for (const json::value& item : whole.at("items").as_array())
        if (const json::object& object = item.as_object();
            object.at("item").as_string() == "device" && object.at("name").as_string() == "i8259")
            pic = &object;
    REQUIRE(pic != nullptr);
    const auto footer =
        pic->at("body_offset").to_number<std::size_t>() + pic->at("body_size").to_number<std::size_t>();
    stream[footer] = std::byte{0x7f};
    write_file(source.directory() / "damaged.state", stream);
    const outcome damaged = run((source.directory() / "damaged.state").string());
    CHECK(damaged.status == 1);
    CHECK_THAT(damaged.output,
        contains("i8259#1: malformed section: expected the section's footer (0x7e), found 0x7f"));
    CHECK_THAT(damaged.output, contains("globalstate"));
    const json::object report = as_json(run("--json " + (source.directory() / "damaged.state").string()));
    CHECK(!report.at("ok").as_bool());
    CHECK(report.at("problems").as_array().at(0).as_object().at("offset").to_number<std::size_t>() == footer);
    CHECK(report.at("problems").as_array().at(0).as_object().at("path").as_string() == "i8259#1");

    stream.resize(footer - 3);
    write_file(source.directory() / "short.state", stream);
    const outcome cut = run((source.directory() / "short.state").string());
    CHECK(cut.status == 1);
    CHECK_THAT(cut.output, contains("i8259#1: stream ends too early"));
    CHECK_THAT(cut.output, contains("none: nothing says where a device's section ends"));
}

#else

TEST_CASE("vmstate-inspect shows a stream") {
    skip("vmstate-inspect is not built (VMSTATE_BUILD_EXAMPLES is off)");
}

#endif
