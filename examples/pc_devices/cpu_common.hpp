// SPDX-License-Identifier: BSL-1.0
// cpu_common: what every vCPU has, whatever its architecture; one section per vCPU. Its table is in QEMU's
// cpu.c. Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <cstdint>

namespace pc_devices {

struct CPUState {
    std::uint32_t halted = 0;
    std::uint32_t interrupt_request = 0;
    std::int32_t exception_index = -1; ///< -1: none
    bool crash_occurred = false;
};

// QEMU asks besides whether it emulates (TCG): under KVM the index means nothing and is not sent.
inline bool cpu_common_exception_index_needed(const CPUState& s) { return s.exception_index != -1; }

inline bool cpu_common_crash_occurred_needed(const CPUState& s) { return s.crash_occurred; }

inline void cpu_common_pre_load(CPUState& s) {
    s.exception_index = -1;
    s.crash_occurred = false;
}

// Bit 0 was a request to leave the execution loop, in QEMUs long gone.
inline void cpu_common_post_load(CPUState& s, int /*version_id*/) {
    s.interrupt_request &= ~std::uint32_t{1};
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_cpu_common_exception_index = vmstate::describe<CPUState>(
    {.name = "cpu_common/exception_index", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<cpu_common_exception_index_needed>,
    vmstate::field<&CPUState::exception_index>);

inline constexpr auto vmstate_cpu_common_crash_occurred = vmstate::describe<CPUState>(
    {.name = "cpu_common/crash_occurred", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<cpu_common_crash_occurred_needed>,
    vmstate::field<&CPUState::crash_occurred>);

inline constexpr auto vmstate_cpu_common = vmstate::describe<CPUState>(
    {.name = "cpu_common", .version_id = 1, .minimum_version_id = 1},
    vmstate::pre_load<cpu_common_pre_load>,
    vmstate::post_load<cpu_common_post_load>,
    vmstate::field<&CPUState::halted>,
    vmstate::field<&CPUState::interrupt_request>,
    vmstate::subsection<vmstate_cpu_common_exception_index>,
    vmstate::subsection<vmstate_cpu_common_crash_occurred>);
// clang-format on

} // namespace pc_devices
