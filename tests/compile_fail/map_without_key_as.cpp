// EXPECT: a_key_of_a_map_must_be_an_integer_or_have_key_as
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <map>

#include <vmstate/describe.hpp>

struct page { std::uint64_t address; };
inline constexpr auto vmstate_page = vmstate::describe<page>({.name = "page"}, vmstate::field<&page::address>);
struct domain { std::uint32_t id; bool operator<(const domain& other) const { return id < other.id; } };
inline constexpr auto vmstate_domain = vmstate::describe<domain>({.name = "domain"}, vmstate::field<&domain::id>);

struct iommu { std::map<domain, page> mappings; };
inline constexpr auto vmstate_iommu = vmstate::describe<iommu>({.name = "iommu"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&iommu::mappings, vmstate::as<vmstate_page>>);
#else
    vmstate::field<&iommu::mappings, vmstate::as<vmstate_page>, vmstate::key_as<vmstate_domain>>);
#endif
