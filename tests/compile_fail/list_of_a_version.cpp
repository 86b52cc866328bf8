// EXPECT: elements_of_a_list_or_map_can_not_have_a_version_in_as
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <list>

#include <vmstate/describe.hpp>

struct request { std::uint32_t tag; };
inline constexpr auto vmstate_request = vmstate::describe<request>({.name = "request", .version_id = 2},
    vmstate::field<&request::tag>);

struct disk { std::list<request> queue; };
inline constexpr auto vmstate_disk = vmstate::describe<disk>({.name = "disk"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&disk::queue, vmstate::as<vmstate_request, 2>>);
#else
    vmstate::field<&disk::queue, vmstate::as<vmstate_request>>);
#endif
