// SPDX-License-Identifier: BSL-1.0
//
// How a machine is configured, as far as its stream shows it. Depends on the standard library alone.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace vmstate {

struct machine_options {
    /// QEMU's name of the machine type, with its version: "pc-i440fx-7.2".
    std::string name = {};
    /// The guest's page size, 4096 on x86: a power of two from 1024 to 65536.
    std::size_t page_size = 4096;
    /// Set where the target's page size varies and this machine's is not the smallest (Arm, for one): then it is part
    /// of the stream, and a stream without it is refused. Goes before `page_size`.
    std::optional<std::uint32_t> target_page_bits = {};
    /// Those capabilities that both sides have to agree on: "x-ignore-shared".
    std::vector<std::string> capabilities = {};
    /// Part of the stream, and compared with the one in a stream that is loaded. Like QEMU, a machine without one
    /// accepts any.
    std::optional<std::array<std::uint8_t, 16>> uuid = {};
    bool send_configuration =
        true; ///< QEMU's global migration.send-configuration; off for machines before 2.3
    bool send_section_footer = true; ///< migration.send-section-footer; off for machines before 2.4
    bool suppress_vmdesc = false;    ///< -M suppress-vmdesc=on: no JSON description

    std::size_t guest_page_size() const noexcept {
        return target_page_bits ? std::size_t{1} << (*target_page_bits & 63) : page_size;
    }
    bool valid_page_size() const noexcept {
        const std::size_t size = guest_page_size();
        return std::has_single_bit(size) && size >= 1024 && size <= 65536;
    }
    bool has_capability(const char* capability) const noexcept {
        for (const std::string& enabled : capabilities)
            if (enabled == capability) return true;
        return false;
    }
};

} // namespace vmstate
