// EXPECT: an_element_must_not_have_fields_gated_by_a_version_its_loader_does_not_see
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <list>

#include <vmstate/describe.hpp>

struct request { std::uint32_t tag; std::uint8_t lun; };
inline constexpr auto vmstate_request = vmstate::describe<request>(
    {.name = "request", .version_id = 1, .minimum_version_id = 0},
    vmstate::field<&request::tag>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&request::lun, vmstate::since<1>>);
#else
    vmstate::field<&request::lun>);
#endif

struct disk { std::list<request> queue; };
inline constexpr auto vmstate_disk = vmstate::describe<disk>({.name = "disk"},
    vmstate::field<&disk::queue, vmstate::as<vmstate_request>>);
