// EXPECT: elements_of_a_list_or_map_must_be_structs_with_a_description
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <map>

#include <vmstate/describe.hpp>

struct page { std::uint64_t address; };
inline constexpr auto vmstate_page = vmstate::describe<page>({.name = "page"}, vmstate::field<&page::address>);

#ifndef VMSTATE_POSITIVE
struct iommu { std::map<std::uint64_t, std::uint64_t> mappings; };
inline constexpr auto vmstate_iommu = vmstate::describe<iommu>({.name = "iommu"}, vmstate::field<&iommu::mappings>);
#else
struct iommu { std::map<std::uint64_t, page> mappings; };
inline constexpr auto vmstate_iommu =
    vmstate::describe<iommu>({.name = "iommu"}, vmstate::field<&iommu::mappings, vmstate::as<vmstate_page>>);
#endif
