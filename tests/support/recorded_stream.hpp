// SPDX-License-Identifier: BSL-1.0
// A stream that a QEMU wrote, taken apart by its own description, and a machine of ours built to take it: the devices of
// examples/pc_devices that the stream has, its memory, and whatever else there is carried. Depends on the library and on
// examples/pc_devices.
#pragma once

#include "../examples/pc_devices/pc_devices.hpp"
#include "support/qemu.hpp"

#include <vmstate/machine/stream_walk.hpp>
#include <vmstate/machine/vmdesc.hpp>
#include <vmstate/migrate.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vmstate::tests {

/// A section of a device.
struct recorded_section {
    stream_section header;
    const vmdesc_device* description = nullptr;
    std::span<const std::byte> body;
};

/// Where the RAM part of a stream lies: its first byte, and the one behind its last.
struct byte_range {
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
};

class recorded_stream {
public:
    /// Walks the stream to its last byte. Throws std::runtime_error with the walk's message where anything doesn't fit.
    explicit recorded_stream(std::vector<std::byte> stream);
    recorded_stream(recorded_stream&&) = default; // what points into a vector stays valid
    recorded_stream& operator=(recorded_stream&&) = default;

    std::vector<std::byte> bytes;
    vmdesc_location location;
    vmdesc description;
    std::string machine; ///< empty without a configuration
    std::vector<stream_ram_block> blocks;
    std::vector<recorded_section> sections; ///< of devices, in the order of the stream
    std::map<ram_record_kind, std::size_t> pages;
    byte_range ram;
    std::uint64_t end_of_sections = 0; ///< where the 0x00 is

    const recorded_section* find(std::string_view idstr, std::uint32_t instance_id = 0) const noexcept;
    std::string_view json() const noexcept { return location.text_in(bytes); }
};

/// Saves a QEMU to a file and takes that apart. The QEMU is in "postmigrate" then.
recorded_stream record(qemu& source);

/// The names of all subsections in a body, nested ones included.
void collect_subsections(const vmdesc_body& body, std::set<std::string>& names);

/// A machine of ours in the image of one that wrote a stream.
class replica {
public:
    /// Registers what the stream has; loads nothing yet.
    explicit replica(const recorded_stream& original);
    replica(const replica&) = delete;
    replica& operator=(const replica&) = delete;

    pc_devices::pc_machine_devices devices;
    std::map<std::string, std::vector<std::byte>> memory; ///< of the RAM blocks, by name
    vmstate::machine machine;

    result<void> load(std::span<const std::byte> stream, const vmdesc* description = nullptr);
    result<std::vector<std::byte>> save();
};

/// A stream without its weight, for tests that load it a hundred thousand times: the memory shrinks to a few pages in
/// blocks of the same names, with records of each kind; all else stays byte for byte.
std::vector<std::byte> with_little_memory(const recorded_stream& original);

/// What is the first difference between two bodies, in words; empty where there is none.
std::string difference(std::span<const std::byte> expected, std::span<const std::byte> found);

} // namespace vmstate::tests
