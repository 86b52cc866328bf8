// EXPECT: elements_of_a_list_or_map_can_not_have_a_version_in_as
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <map>

#include <vmstate/describe.hpp>

struct page { std::uint64_t address; };
inline constexpr auto vmstate_page = vmstate::describe<page>({.name = "page"}, vmstate::field<&page::address>);

struct iommu { std::map<std::uint64_t, page> mappings; };
inline constexpr auto vmstate_iommu = vmstate::describe<iommu>({.name = "iommu"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&iommu::mappings, vmstate::as<vmstate_page, 0>>);
#else
    vmstate::field<&iommu::mappings, vmstate::as<vmstate_page>>);
#endif
