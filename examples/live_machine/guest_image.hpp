// SPDX-License-Identifier: BSL-1.0
//
// The guest programs (guest_riscv.S, guest_x86.S), assembled, and what they want to know from whoever starts them.
// Depends on nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace live {

/// Each runs at the beginning of RAM.
std::span<const std::byte> riscv_guest_image() noexcept;
std::span<const std::byte> x86_guest_image() noexcept;

/// The parameter page, as the guests read it: little-endian, as they and this host are.
struct guest_parameters {
    static constexpr std::uint32_t offset = 0x1000;     ///< in RAM
    static constexpr std::uint32_t first_free = 0x3000; ///< behind code, parameters and stack

    std::uint32_t hot_begin; ///< addresses: these pages are checked and written,
    std::uint32_t hot_end;   ///< and those from here on checked,
    std::uint32_t cold_end;  ///< up to here
    std::uint32_t pages_per_interval; ///< of each kind
    std::uint32_t interval_us;        ///< up to `longest_interval`
    std::uint32_t intervals_per_tick;

    /// A PC's timer can't count further.
    static constexpr std::uint32_t longest_interval = 50'000;
};
static_assert(sizeof(guest_parameters) == 24);

} // namespace live
