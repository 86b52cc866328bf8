// SPDX-License-Identifier: BSL-1.0
#include "support/recorded_stream.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/stream/memory_channel.hpp>

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace vmstate::tests {

namespace {

class recorder final : public stream_visitor {
public:
    explicit recorder(recorded_stream& stream) : stream_(stream) {}

    void configuration(const stream_configuration& found) override { stream_.machine = found.machine; }
    void begin_ram(const stream_section& section, std::size_t) override {
        if (stream_.ram.begin == 0) stream_.ram.begin = section.offset;
    }
    void ram_block(const stream_ram_block& block, std::size_t) override { stream_.blocks.push_back(block); }
    void ram_page(const ram_record& record, std::size_t, std::span<const std::byte>) override {
        ++stream_.pages[record.kind];
    }
    void end_ram(std::uint64_t end) override { stream_.ram.end = end; }
    void device(const stream_section& section, const vmdesc_device* description,
        std::span<const std::byte> body, body_extent) override {
        stream_.sections.push_back({section, description, body});
    }
    void end_of_sections(std::uint64_t offset) override { stream_.end_of_sections = offset; }

private:
    recorded_stream& stream_;
};

template <class T>
T value_of(result<T> outcome, const char* what) {
    if (!outcome) throw std::runtime_error(std::string(what) + ": " + outcome.error().message());
    return std::move(*outcome);
}

machine_options options_of(const recorded_stream& original) {
    machine_options options;
    options.name = original.machine;
    return options;
}

std::size_t count(const recorded_stream& original, std::string_view idstr) {
    return static_cast<std::size_t>(std::count_if(original.sections.begin(), original.sections.end(),
        [&](const recorded_section& section) { return section.header.idstr == idstr; }));
}

} // namespace

recorded_stream::recorded_stream(std::vector<std::byte> stream) : bytes(std::move(stream)) {
    location = value_of(find_vmdesc(bytes), "the description");
    description = value_of(parse_vmdesc(json(), {}, location.offset), "the description");
    recorder visitor(*this);
    if (const auto walked = walk_stream(bytes, {.description = &description, .location = location}, visitor);
        !walked)
        throw std::runtime_error("the stream: " + walked.error().message());
}

const recorded_section* recorded_stream::find(
    std::string_view idstr, std::uint32_t instance_id) const noexcept {
    const auto found = std::find_if(sections.begin(), sections.end(), [&](const recorded_section& section) {
        return section.header.idstr == idstr && section.header.instance_id == instance_id;
    });
    return found == sections.end() ? nullptr : &*found;
}

recorded_stream record(qemu& source) {
    const auto file = source.directory() / "recorded.state";
    const auto outcome = source.migrate_to_file(file);
    if (!outcome.completed) throw qemu_error("the migration to a file failed: " + outcome.error);
    recorded_stream recorded(read_file(file));
    std::filesystem::remove(file);
    return recorded;
}

void collect_subsections(const vmdesc_body& body, std::set<std::string>& names) {
    for (const vmdesc_field& field : body.fields)
        for (const vmdesc_body& nested : field.bodies)
            collect_subsections(nested, names);
    for (const vmdesc_body& subsection : body.subsections) {
        names.insert(subsection.vmsd_name);
        collect_subsections(subsection, names);
    }
}

replica::replica(const recorded_stream& original)
    : devices(pc_devices::machine_kind_of(original.machine), count(original, "cpu_common"))
    , machine(options_of(original)) {
    devices.apply_compat(original.machine);
    // Whoever saves a machine says first what it is doing; a load may put something else in its place.
    pc_devices::global_state_store(devices.globalstate, pc_devices::run_state::prelaunch);
    const auto registered =
        devices.register_with(machine, [&](std::string_view idstr, std::uint32_t instance_id) {
            return original.find(idstr, instance_id) != nullptr;
        });
    if (!registered) throw std::runtime_error("a device: " + registered.error().message());
    for (const stream_ram_block& block : original.blocks) {
        auto& bytes = memory[block.name];
        bytes.resize(static_cast<std::size_t>(block.used_length));
        if (const auto added = machine.add_ram(block.name, bytes); !added)
            throw std::runtime_error("a RAM block: " + added.error().message());
    }
}

result<void> replica::load(std::span<const std::byte> stream, const vmdesc* description) {
    load_options options = carry_unknown();
    options.description = description;
    memory_reader in(stream);
    return vmstate::load(machine, in, options);
}

result<std::vector<std::byte>> replica::save() {
    vector_writer out;
    if (auto saved = vmstate::save(machine, out); !saved) return saved.error();
    return out.take();
}

std::vector<std::byte> with_little_memory(const recorded_stream& original) {
    constexpr std::size_t page_size = 4096;
    const auto begin = static_cast<std::size_t>(original.ram.begin);
    const auto end = static_cast<std::size_t>(original.ram.end);
    const std::span<const std::byte> bytes(original.bytes);
    vector_writer out(bytes.size() - (end - begin) + 2 * page_size);
    out.write(bytes.first(begin));

    // The id of the section stands behind the type byte of its START.
    memory_reader header(bytes.subspan(begin + 1, 4));
    const std::uint32_t id = header.get_be32();
    const auto begin_part = [&](section_type type) {
        out.put_u8(static_cast<std::uint8_t>(type));
        out.put_be32(id);
    };
    const auto end_part = [&] {
        out.put_be64(ram_flag::eos);
        out.put_u8(static_cast<std::uint8_t>(section_type::footer));
        out.put_be32(id);
    };

    begin_part(section_type::start);
    out.put_counted_string(ram_section::id);
    out.put_be32(0);
    out.put_be32(ram_section::version_id);
    out.put_be64((original.blocks.size() + 1) * page_size | ram_flag::mem_size);
    for (const stream_ram_block& block : original.blocks) {
        out.put_counted_string(block.name);
        out.put_be64(&block == &original.blocks.front() ? 2 * page_size : page_size);
    }
    end_part();

    begin_part(section_type::part);
    const auto named = [&](std::size_t i, std::uint64_t word) {
        out.put_be64(word);
        out.put_counted_string(original.blocks[i].name);
    };
    named(0, ram_flag::page);
    out.fill(std::byte{0xa5}, page_size);
    out.put_be64(page_size | ram_flag::zero | ram_flag::continued);
    out.put_u8(0);
    for (std::size_t i = 1; i < original.blocks.size(); ++i) {
        named(i, ram_flag::zero);
        out.put_u8(0);
    }
    end_part();

    begin_part(section_type::end);
    named(0, ram_flag::xbzrle);
    out.put_u8(1);
    out.put_be16(5);
    for (const unsigned encoded : {0x82u, 0x01u, 2u, 0x11u, 0x22u}) // two bytes at 130
        out.put_u8(static_cast<std::uint8_t>(encoded));
    end_part();

    out.write(bytes.subspan(end));
    return out.take();
}

std::string difference(std::span<const std::byte> expected, std::span<const std::byte> found) {
    const auto where = std::mismatch(expected.begin(), expected.end(), found.begin(), found.end());
    if (where.first == expected.end() && where.second == found.end()) return {};
    const auto at = static_cast<std::size_t>(where.first - expected.begin());
    const auto byte_text = [&](std::span<const std::byte> bytes) {
        return at < bytes.size() ? std::to_string(std::to_integer<int>(bytes[at])) : "the end";
    };
    return "byte " + std::to_string(at) + ": expected " + byte_text(expected) + ", found " +
           byte_text(found) + " (" + std::to_string(expected.size()) + " and " +
           std::to_string(found.size()) + " bytes)";
}

} // namespace vmstate::tests
