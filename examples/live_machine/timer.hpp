// SPDX-License-Identifier: BSL-1.0
//
// The RISC-V machine's timer: mtime and mtimecmp, as in RISC-V's ACLINT. mtime is the machine's time. Depends on
// guest_clock.hpp.
#pragma once

#include <cstdint>

#include <vmstate/describe.hpp>

#include "guest_clock.hpp"

namespace live {

class timer {
public:
    struct vm;

    static constexpr std::uint32_t mtimecmp = 0x4000; ///< offsets of two words each
    static constexpr std::uint32_t mtime = 0xbff8;

    explicit timer(const guest_clock& clock) : clock_(clock) {}

    bool is_pending() const { return clock_.now() >= mtimecmp_; }
    guest_clock::clock::time_point pending_at() const { return clock_.when(mtimecmp_); }

    bool load(std::uint32_t offset, std::uint32_t& value) const {
        switch (offset) {
        case mtimecmp: value = static_cast<std::uint32_t>(mtimecmp_); return true;
        case mtimecmp + 4: value = static_cast<std::uint32_t>(mtimecmp_ >> 32); return true;
        case mtime: value = static_cast<std::uint32_t>(clock_.now()); return true;
        case mtime + 4: value = static_cast<std::uint32_t>(clock_.now() >> 32); return true;
        default: return false;
        }
    }
    bool store(std::uint32_t offset, std::uint32_t value) {
        switch (offset) {
        case mtimecmp: mtimecmp_ = (mtimecmp_ & ~std::uint64_t{0xffffffff}) | value; return true;
        case mtimecmp + 4: mtimecmp_ = (mtimecmp_ & 0xffffffff) | std::uint64_t{value} << 32; return true;
        default: return false;
        }
    }

private:
    const guest_clock& clock_;
    std::uint64_t mtimecmp_ = ~std::uint64_t{0};
};

struct timer::vm {
    static constexpr auto description =
        vmstate::describe<timer>({.name = "riscv-timer"}, vmstate::field<&timer::mtimecmp_>);
};

} // namespace live
