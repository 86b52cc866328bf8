// SPDX-License-Identifier: BSL-1.0
//
// vmstate-rewrite IN OUT: loads a QEMU stream into a machine that has our own devices and memory, and saves that machine
// as a new stream. Sections that no device here stands for are carried through as they are. Says what became of each
// section, and whether what it wrote has the same bytes.
#include "pc_devices.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/machine/stream_walk.hpp>
#include <vmstate/migrate.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iterator>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

/// What a walk through a stream finds, without a machine: enough to build one that can load it.
class stream_contents final : public vmstate::stream_visitor {
public:
    struct device_section {
        std::string idstr;
        std::uint32_t instance_id;
        std::uint32_t version_id;
        std::span<const std::byte> body;
    };

    std::optional<vmstate::stream_configuration> machine;
    std::vector<vmstate::stream_ram_block> blocks;
    std::vector<device_section> devices;
    std::uint64_t pages = 0;
    std::uint64_t zero_pages = 0;

    void configuration(const vmstate::stream_configuration& found) override { machine = found; }
    void ram_block(const vmstate::stream_ram_block& block, std::size_t) override { blocks.push_back(block); }
    void ram_page(const vmstate::ram_record& record, std::size_t, std::span<const std::byte>) override {
        ++(record.kind == vmstate::ram_record_kind::zero ? zero_pages : pages);
    }
    void device(const vmstate::stream_section& section, const vmstate::vmdesc_device*, std::span<const std::byte> body,
                vmstate::body_extent) override {
        devices.push_back({section.idstr, section.instance_id, section.version_id, body});
    }

    bool has(std::string_view idstr, std::uint32_t instance_id) const {
        return std::any_of(devices.begin(), devices.end(), [&](const device_section& section) {
            return section.idstr == idstr && section.instance_id == instance_id;
        });
    }
    std::size_t count(std::string_view idstr) const {
        return static_cast<std::size_t>(std::count_if(devices.begin(), devices.end(),
            [&](const device_section& section) { return section.idstr == idstr; }));
    }
};

/// A stream, its description, and what is in it.
struct parsed_stream {
    std::vector<std::byte> bytes;
    vmstate::vmdesc description;
    stream_contents contents;

    vmstate::result<void> read(const std::string& path) {
        std::ifstream file(path, std::ios::binary);
        if (!file) return vmstate::error(vmstate::errc::io, "a file that can be read", path);
        const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
        const auto all = std::as_bytes(std::span(text));
        bytes.assign(all.begin(), all.end());

        const vmstate::result<vmstate::vmdesc_location> location = vmstate::find_vmdesc(bytes);
        if (!location) return location.error();
        vmstate::result<vmstate::vmdesc> parsed = vmstate::parse_vmdesc(location->text_in(bytes), {}, location->offset);
        if (!parsed) return parsed.error();
        description = std::move(*parsed);
        return vmstate::walk_stream(bytes, {.description = &description, .location = *location}, contents);
    }
};

vmstate::machine_options options_for(const parsed_stream& stream) {
    vmstate::machine_options options;
    if (stream.description.page_size != 0) options.page_size = static_cast<std::size_t>(stream.description.page_size);
    if (const auto& configuration = stream.contents.machine) {
        options.name = configuration->machine;
        options.target_page_bits = configuration->target_page_bits;
        options.capabilities = configuration->capabilities.value_or(std::vector<std::string>{});
        options.uuid = configuration->uuid;
    } else {
        options.send_configuration = false;
    }
    return options;
}

const char* what_became_of(const vmstate::section& entry) { return entry.is_carried() ? "carried" : "typed"; }

/// One line for each section that was written; how many of them differ from what was read.
std::size_t print_sections(const vmstate::machine& machine, const stream_contents& in, const stream_contents& out) {
    std::printf("  %-28s %7s %7s  %-7s  %s\n", "section", "version", "bytes", "loaded", "written");
    std::size_t different = 0;
    std::size_t i = 0;
    // Sections are written in the order in which they came; one that isn't needed any more would be missing.
    for (const auto& entry : machine.sections()) {
        if (entry->ram() != nullptr || i == out.devices.size()) continue;
        const stream_contents::device_section& written = out.devices[i];
        if (written.idstr != entry->idstr || written.instance_id != entry->instance_id) continue;
        const bool same = i < in.devices.size() && std::ranges::equal(written.body, in.devices[i].body);
        std::printf("  %-28s %7u %7zu  %-7s  %s\n", vmstate::section_path(*entry).c_str(), written.version_id, written.body.size(),
            what_became_of(*entry), same ? "same bytes" : "DIFFERENT");
        different += same ? 0 : 1;
        ++i;
    }
    if (in.devices.size() != out.devices.size()) {
        std::printf("  %zu sections were read, %zu written\n", in.devices.size(), out.devices.size());
        ++different;
    }
    return different;
}

int complain(const std::string& about, const vmstate::error& failure) {
    std::fprintf(stderr, "vmstate-rewrite: %s: %s\n", about.c_str(), failure.message().c_str());
    return EXIT_FAILURE;
}

int rewrite(const std::string& in_path, const std::string& out_path) {
    // What is in the stream, by its own description.
    parsed_stream in;
    if (const auto read = in.read(in_path); !read) return complain(in_path, read.error());
    const std::string machine_type = in.contents.machine ? in.contents.machine->machine : std::string();

    // A machine of that kind: its devices, where the stream has them, and its memory.
    vmstate::machine machine(options_for(in));
    pc_devices::pc_machine_devices devices(pc_devices::machine_kind_of(machine_type), in.contents.count("cpu_common"));
    devices.apply_compat(machine_type);
    devices.register_with(machine,
        [&](std::string_view idstr, std::uint32_t instance_id) { return in.contents.has(idstr, instance_id); });

    std::vector<std::vector<std::byte>> memory;
    memory.reserve(in.contents.blocks.size());
    for (const vmstate::stream_ram_block& block : in.contents.blocks) {
        memory.emplace_back(block.used_length);
        machine.add_ram(block.name, memory.back(), {.host_page_size = block.page_size.value_or(4096),
                                                       .guest_address = block.guest_address.value_or(0)});
    }

    // Load, change nothing, save.
    vmstate::load_options options;
    options.carry_unknown = true;
    options.description = &in.description;
    vmstate::memory_input_channel input(in.bytes);
    if (const auto loaded = vmstate::load(machine, input, options); !loaded) return complain(in_path, loaded.error());
    if (const auto saved = vmstate::save(machine, vmstate::open_output("file:" + out_path)); !saved)
        return complain(out_path, saved.error());

    // What we wrote is walked like what we read.
    parsed_stream out;
    if (const auto read = out.read(out_path); !read) return complain(out_path, read.error());

    std::printf("machine %s\n", machine_type.c_str());
    const std::size_t different = print_sections(machine, in.contents, out.contents);
    std::printf("  ram: %llu pages with data and %llu zero pages read, %llu and %llu written\n",
        static_cast<unsigned long long>(in.contents.pages), static_cast<unsigned long long>(in.contents.zero_pages),
        static_cast<unsigned long long>(out.contents.pages), static_cast<unsigned long long>(out.contents.zero_pages));
    std::printf("%s, %zu bytes, to %s, %zu bytes\n", in_path.c_str(), in.bytes.size(), out_path.c_str(), out.bytes.size());
    if (different == 0) return EXIT_SUCCESS;
    std::fprintf(stderr, "vmstate-rewrite: %zu sections are not what they were\n", different);
    return EXIT_FAILURE;
}

} // namespace

int main(int argc, char** argv) {
    if (argc != 3 || std::string_view(argv[1]).starts_with('-')) {
        std::fprintf(stderr, "usage: vmstate-rewrite IN OUT\n"
                             "Loads the QEMU stream IN into a machine and saves the machine to OUT. Exit status: 0 when every\n"
                             "device section came out as it went in, 1 when not, or when IN can't be loaded; 2 for this text.\n");
        return 2;
    }
    try {
        return rewrite(argv[1], argv[2]);
    } catch (const std::exception& failure) { // out of memory: the stream says how large the machine is
        std::fprintf(stderr, "vmstate-rewrite: %s\n", failure.what());
        return EXIT_FAILURE;
    }
}
