// SPDX-License-Identifier: BSL-1.0
//
// vmstate-inspect: shows what is in a QEMU migration stream, and checks it to the last byte.
#include "input.hpp"
#include "json.hpp"
#include "report.hpp"
#include "text.hpp"

#include <vmstate/machine/vmdesc_parse.hpp>

#include <CLI/CLI.hpp>
#include <boost/json/serialize.hpp>

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <optional>
#include <string>
#include <utility>

namespace {

constexpr int exit_broken = 1;
constexpr int exit_usage = 2;

std::size_t terminal_width() {
    winsize size{};
    return ::ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col >= 60 ? size.ws_col : 110;
}

int complain(const std::string& text) {
    std::cerr << "vmstate-inspect: " << text << '\n';
    return exit_usage;
}

vmstate::result<vmstate::vmdesc> description_of(const std::string& name) {
    const vmstate::result<inspect::input> other = inspect::input::open(name);
    if (!other)
        return other.error();
    const vmstate::result<vmstate::vmdesc_location> location = vmstate::find_vmdesc(other->bytes());
    if (!location)
        return location.error();
    return vmstate::parse_vmdesc(location->text_in(other->bytes()), {}, location->offset);
}

} // namespace

int main(int argc, char** argv) {
    std::string file;
    std::string device;
    std::string description;
    std::string colour = "auto";
    bool as_json = false;
    bool ram = false;
    bool summary = false;
    bool whole = false;

    CLI::App app{
        "Shows what is in a QEMU migration stream - machine, RAM, every device field by field, by the\n"
        "description that the stream carries - and checks every byte of it.",
        "vmstate-inspect"};
    app.add_option(
           "FILE", file, "A file, - for standard input, or a URI: file:PATH[,offset=N], exec:COMMAND, fd:N")
        ->required()
        ->type_name("");
    app.add_option("-d,--device", device,
           "Only this device: i8259, i8259#1, 0000:00:01.1/ide, ide, or a VMStateDescription's name")
        ->type_name("NAME");
    app.add_flag("-r,--ram", ram, "The map of pages of each RAM block; alone or with --device, nothing else");
    app.add_flag("-s,--summary", summary, "Sections and commands without fields");
    app.add_flag("-f,--full", whole, "Show long buffers and arrays whole");
    app.add_flag("-j,--json", as_json, "One JSON object, for programs");
    app.add_option("--description", description,
           "Take the description from another stream of the same machine: for streams that have none (postcopy, suppress-vmdesc)")
        ->type_name("FILE");
    app.add_option("--color", colour, "auto (on a terminal, unless NO_COLOR is set), always or never")
        ->type_name("WHEN")
        ->check(CLI::IsMember({"auto", "always", "never"}));
    app.footer(
        "Exit status: 0 when every byte fits; 1 when the stream is damaged: what can be read is shown, and where it\n"
        "breaks; 2 when it can't be read at all, or has no such device.\n"
        "\n"
        "Example: (echo 'migrate \"exec:cat > vm.state\"'; sleep 3; echo quit) |\n"
        "             qemu-system-x86_64 -S -display none -monitor stdio\n"
        "         vmstate-inspect vm.state --device ps2kbd");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& failure) {
        return app.exit(failure) == 0 ? 0 : exit_usage;
    }

    const vmstate::result<inspect::input> opened = inspect::input::open(file);
    if (!opened)
        return complain(opened.error().message());
    std::optional<vmstate::vmdesc> other;
    if (!description.empty()) {
        vmstate::result<vmstate::vmdesc> parsed = description_of(description);
        if (!parsed)
            return complain(description + ": " + parsed.error().message());
        other = std::move(*parsed);
    }

    const inspect::report report = inspect::inspect_stream(opened->bytes(), other ? &*other : nullptr);

    if (as_json) {
        inspect::json_options options;
        options.title = file;
        options.everything = device.empty() && !ram;
        options.summary = summary;
        options.ram = ram;
        options.device = device;
        std::cout << boost::json::serialize(inspect::to_json(report, options)) << '\n';
    } else {
        inspect::text_options options;
        options.title = file;
        options.colours = colour == "always" || (colour == "auto" && ::isatty(STDOUT_FILENO) == 1 &&
                                                    std::getenv("NO_COLOR") == nullptr);
        options.width = terminal_width();
        options.everything = device.empty() && !ram;
        options.summary = summary;
        options.ram = ram;
        options.whole_buffers = whole;
        options.device = device;
        inspect::write_text(std::cout, report, options);
    }
    std::cout.flush();
    if (!std::cout)
        return complain("writing to standard output failed");

    if (!report.problems.empty())
        return exit_broken;
    const bool found = device.empty() ||
                       std::any_of(report.items.begin(), report.items.end(), [&](const inspect::item& entry) {
                           const auto* section = std::get_if<inspect::device_item>(&entry.content);
                           return section != nullptr && section->is_called(device);
                       });
    return found ? 0 : complain("no section is called " + device);
}
