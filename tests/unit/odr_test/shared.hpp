// SPDX-License-Identifier: BSL-1.0
//
// Descriptions in a header that two translation units include. Each unit saves and loads with them; the program links
// only when nothing in a description is defined twice, and both units must see one and the same description.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <string_view>
#include <vector>

#include <vmstate/describe.hpp>

namespace odr {

struct part {
    std::uint8_t a = 1;
    std::uint16_t b = 2;
};
inline constexpr auto vmstate_part = vmstate::reflect<part>({.name = "part"});

struct codec {
    static constexpr std::string_view type = "odr";
    static vmstate::result<void> save(vmstate::writer& w, const std::uint32_t& value) {
        w.put_be32(value);
        return w.status();
    }
    static vmstate::result<void> load(vmstate::reader& r, std::uint32_t& value) {
        value = r.get_be32();
        return r.status();
    }
    static std::size_t size(const std::uint32_t&) { return 4; }
};

struct device {
    std::uint8_t count = 2;
    std::vector<std::uint32_t> values = std::vector<std::uint32_t>(2, 3);
    part whole;
    std::list<part> queue = std::list<part>(1);
    std::uint32_t coded = 5;
    bool extended = true;
    std::uint8_t extra = 6;
    int restarts = 0;
};
inline bool extra_needed(const device& s) { return s.extended; }
inline bool is_sane(const device& s) { return s.count < 10; }
inline void restart(device& s, int) { ++s.restarts; }

inline constexpr auto vmstate_device_extra =
    vmstate::describe<device>({.name = "device/extra"}, vmstate::needed<extra_needed>, vmstate::field<&device::extra>);
inline constexpr auto vmstate_device = vmstate::describe<device>(
    {.name = "device", .version_id = 2, .minimum_version_id = 1},
    vmstate::post_load<restart>,
    vmstate::field<&device::count>,
    vmstate::field<&device::values, vmstate::length<&device::count>>,
    vmstate::validate<"count is small", is_sane>,
    vmstate::field<&device::whole, vmstate::as<vmstate_part>>,
    vmstate::field<&device::queue, vmstate::as<vmstate_part>>,
    vmstate::field<&device::coded, vmstate::coded<codec>, vmstate::since<2>>,
    vmstate::transient<&device::extended, &device::restarts>,
    vmstate::subsection<vmstate_device_extra>);

// Defined in other.cpp.
std::vector<std::byte> save_elsewhere(const device& state);
bool load_elsewhere(const std::vector<std::byte>& bytes, device& state);
const void* description_elsewhere();
std::uint64_t fingerprint_elsewhere();

} // namespace odr
