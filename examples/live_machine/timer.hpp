// SPDX-License-Identifier: BSL-1.0
//
// The guest's clock: mtime and mtimecmp, as in RISC-V's ACLINT. It counts microseconds in which the machine runs: a guest
// that stands still, because it is being migrated for one, sees no time pass. Depends on describe.hpp.
#pragma once

#include <chrono>
#include <cstdint>

#include <vmstate/describe.hpp>

namespace live {

class timer {
public:
    using clock = std::chrono::steady_clock;
    struct vm;

    static constexpr std::uint32_t mtimecmp = 0x4000; ///< offsets of two words each
    static constexpr std::uint32_t mtime = 0xbff8;

    /// The machine runs from now on, or stands still. Called by the thread that runs it.
    void start() { started_ = clock::now() - std::chrono::microseconds(mtime_); }
    void stop() { mtime_ = now(); }

    /// While the machine runs.
    std::uint64_t now() const {
        return static_cast<std::uint64_t>(
            std::chrono::duration_cast<std::chrono::microseconds>(clock::now() - started_).count());
    }
    bool is_pending() const { return now() >= mtimecmp_; }
    /// When it will be; an hour from now, where that is later.
    clock::time_point pending_at() const {
        const std::uint64_t at = now();
        constexpr std::uint64_t hour = 3'600'000'000;
        const std::uint64_t left = mtimecmp_ > at ? mtimecmp_ - at : 0;
        return clock::now() + std::chrono::microseconds(left < hour ? left : hour);
    }

    bool load(std::uint32_t offset, std::uint32_t& value) const {
        switch (offset) {
        case mtimecmp: value = static_cast<std::uint32_t>(mtimecmp_); return true;
        case mtimecmp + 4: value = static_cast<std::uint32_t>(mtimecmp_ >> 32); return true;
        case mtime: value = static_cast<std::uint32_t>(now()); return true;
        case mtime + 4: value = static_cast<std::uint32_t>(now() >> 32); return true;
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
    static constexpr std::uint64_t longest = std::uint64_t{1} << 52; ///< what a stream may claim: 142 years

    std::uint64_t mtime_ = 0; ///< when it stood still last
    std::uint64_t mtimecmp_ = ~std::uint64_t{0};
    clock::time_point started_{}; ///< when mtime was 0
};

struct timer::vm {
    static constexpr auto description = vmstate::describe<timer>(
        {.name = "riscv-timer"},
        vmstate::field<&timer::mtime_, vmstate::between<0, longest>>,
        vmstate::field<&timer::mtimecmp_>);
};

} // namespace live
