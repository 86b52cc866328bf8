// SPDX-License-Identifier: BSL-1.0
//
// One entry of a machine's list of sections, QEMU's SaveStateEntry: what it is called in the stream and who reads and
// writes its body. Depends on device.hpp and ram_section.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <vmstate/machine/device.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/machine/wire.hpp>

namespace vmstate {

/// A described device: the object, and the code for its description.
struct described_device {
    const device_operations* operations;
    void* object;
};

/// A section that nobody registered, kept as it stood in the stream.
struct carried_section {
    std::vector<std::byte> body;
    std::string description; ///< its object in the JSON description, raw
};

struct section {
    /// A name under which older streams have it.
    struct compat_id {
        std::string idstr = {};
        std::uint32_t instance_id;
    };

    std::string idstr = {};
    std::uint32_t instance_id = 0;
    std::uint32_t section_id = 0;
    int version_id = 0;
    int priority = 0;
    std::optional<std::uint32_t> alias_id = {};
    std::optional<compat_id> compat = {};
    std::variant<described_device, handlers, ram_section, carried_section> content = {};

    // What the stream that is being loaded says.
    std::optional<std::uint32_t> load_section_id = {};
    int load_version_id = 0;

    bool has_instance(std::uint32_t id) const noexcept {
        return id == instance_id || (alias_id && id == *alias_id);
    }
    bool is_called(std::string_view name, std::uint32_t instance) const noexcept {
        if (idstr == name && has_instance(instance)) return true;
        return compat && compat->idstr == name &&
               (compat->instance_id == instance || (alias_id && *alias_id == instance));
    }
    ram_section* ram() noexcept { return std::get_if<ram_section>(&content); }
    bool is_carried() const noexcept { return std::holds_alternative<carried_section>(content); }
};

/// How a section is called in errors: `i8259`, or `i8259#1` for another instance than the first.
inline std::string section_path(std::string_view idstr, std::uint32_t instance_id) {
    std::string path(idstr);
    if (instance_id != 0) path += '#' + std::to_string(instance_id);
    return path;
}
inline std::string section_path(const section& entry) { return section_path(entry.idstr, entry.instance_id); }

} // namespace vmstate
