// SPDX-License-Identifier: BSL-1.0
//
// The guest program (guest.S), assembled, and what it wants to know from whoever starts it. Depends on nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace live {

/// Runs at the beginning of RAM.
std::span<const std::byte> guest_image() noexcept;

/// The parameter page, as guest.S reads it: little-endian, as the guest and this host are.
struct guest_parameters {
    static constexpr std::uint32_t offset = 0x1000;     ///< in RAM
    static constexpr std::uint32_t first_free = 0x3000; ///< behind code, parameters and stack

    std::uint32_t hot_begin; ///< addresses: these pages are checked and written,
    std::uint32_t hot_end;   ///< and those from here on checked,
    std::uint32_t cold_end;  ///< up to here
    std::uint32_t pages_per_interval; ///< of each kind
    std::uint32_t interval_us;
    std::uint32_t intervals_per_tick;
};

} // namespace live
