// SPDX-License-Identifier: BSL-1.0
// Any bytes, loaded into a machine: devices of ours, a little memory, and what else there is carried by the description
// at the stream's end. What loads must save, and what was saved must load as the same; and it must be all that the stream
// has: another reader of the format, which knows no devices, walks it and counts. The seeds are streams of QEMU 7.2
// without their memory (tests/interop/damaged_streams_test.cpp writes them); the machine is that of the name in the
// stream.
#include "../examples/pc_devices/pc_devices.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/machine/stream_walk.hpp>
#include <vmstate/migrate.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>
#include <vector>

namespace {

/// A machine with all devices that its kind can have, and two blocks of memory.
struct subject {
    explicit subject(std::string_view type)
        : devices(pc_devices::machine_kind_of(type))
        , main_memory(8192)
        , rom(4096)
        , machine({.name = std::string(type)}) {
        pc_devices::global_state_store(devices.globalstate, pc_devices::run_state::prelaunch);
        if (!devices.register_with(machine) ||
            !machine.add_ram(type == "microvm" ? "microvm.ram" : "pc.ram", main_memory) ||
            !machine.add_ram("pc.bios", rom, {.used_length = 4096, .resizable = true}))
            std::abort();
    }

    pc_devices::pc_machine_devices devices;
    std::vector<std::byte> main_memory;
    std::vector<std::byte> rom;
    vmstate::machine machine;
};

bool load(subject& into, std::span<const std::byte> stream) {
    vmstate::load_options options = vmstate::carry_unknown();
    options.ram_limit = 1 << 20;
    vmstate::memory_reader in(stream);
    const auto outcome = vmstate::load(into.machine, in, options);
    if (!outcome && (outcome.error().code() == vmstate::errc::ok || outcome.error().message().empty()))
        std::abort();
    return outcome.has_value();
}

std::vector<std::byte> save(subject& from) {
    vmstate::vector_writer out;
    if (!vmstate::save(from.machine, out)) std::abort();
    return out.take();
}

/// The sections that the walk comes by, once each. The walk goes by the description; where it can't, it says so.
class section_counter final : public vmstate::stream_visitor {
public:
    std::size_t sections = 0;

    void begin_ram(const vmstate::stream_section& section, std::size_t) override {
        if (section.type == vmstate::section_type::start) ++sections;
    }
    void device(const vmstate::stream_section& section, const vmstate::vmdesc_device*, std::span<const std::byte>,
        vmstate::body_extent) override {
        if (section.type == vmstate::section_type::start || section.type == vmstate::section_type::full) ++sections;
    }
};

/// Nothing is left out of a load without a word: where the walk finds nothing wrong, it has found what was loaded.
void check_all_loaded(const vmstate::machine& into, std::span<const std::byte> stream) {
    const auto location = vmstate::find_vmdesc(stream);
    if (!location) return;
    const auto description = vmstate::parse_vmdesc(location->text_in(stream), {}, location->offset);
    if (!description) return;
    vmstate::stream_walk_options options;
    options.description = &*description;
    options.location = *location;
    section_counter walked;
    if (!vmstate::walk_stream(stream, options, walked)) return;
    std::size_t loaded = 0;
    for (const auto& entry : into.sections()) loaded += entry->load_section_id.has_value() ? 1 : 0;
    if (loaded != walked.sections) std::abort();
}

std::string_view type_in(std::span<const std::byte> stream) {
    const std::string_view text(reinterpret_cast<const char*>(stream.data()), stream.size());
    for (const std::string_view type : {"microvm", "isapc", "pc-q35-7.2"})
        if (text.size() > 13 && text.substr(13).starts_with(type)) return type;
    return "pc-i440fx-7.2";
}

} // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const auto stream = std::as_bytes(std::span(data, size));
    const std::string_view type = type_in(stream);
    subject first(type);
    if (!load(first, stream)) return 0;
    check_all_loaded(first.machine, stream);
    const std::vector<std::byte> saved = save(first);
    subject second(type);
    if (!load(second, saved) || save(second) != saved) std::abort();
    return 0;
}
