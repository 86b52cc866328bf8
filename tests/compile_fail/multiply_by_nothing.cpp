// EXPECT: an_attribute_must_fit_its_member
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <vector>

#include <vmstate/describe.hpp>

#ifndef VMSTATE_POSITIVE
inline constexpr std::size_t unit = 0;
#else
inline constexpr std::size_t unit = 512;
#endif

struct dma { std::uint16_t sectors; std::vector<std::uint8_t> buffer; };
inline constexpr auto vmstate_dma = vmstate::describe<dma>({.name = "dma"},
    vmstate::field<&dma::sectors>,
    vmstate::field<&dma::buffer, vmstate::length<&dma::sectors>, vmstate::multiply<unit>>);
