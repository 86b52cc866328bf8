// EXPECT: a_list_or_map_must_have_as
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <map>

#include <vmstate/describe.hpp>

struct request { std::uint32_t tag; };
inline constexpr auto vmstate_request = vmstate::describe<request>({.name = "request"},
    vmstate::field<&request::tag>);

struct disk { std::map<std::uint32_t, request> queue; };
inline constexpr auto vmstate_disk = vmstate::describe<disk>({.name = "disk"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&disk::queue>);
#else
    vmstate::field<&disk::queue, vmstate::as<vmstate_request>>);
#endif
