// SPDX-License-Identifier: BSL-1.0
//
// The machine with a RISC-V hart, which is interpreted: it runs everywhere. Depends on vm.hpp, hart.hpp, timer.hpp and
// vmstate's ram/.
#pragma once

#include <cstdint>
#include <memory>

#include <vmstate/ram/marked_log.hpp>
#include <vmstate/support/result.hpp>

#include "hart.hpp"
#include "timer.hpp"
#include "vm.hpp"

namespace live {

class riscv_vm final : public vm {
public:
    /// The dirty log is `marked`, by the interpreter, or `pagemap`.
    static vmstate::result<std::unique_ptr<vm>> make(vm_options options);
    ~riscv_vm() override { stop(); }

    vmstate::result<void> boot(const guest_parameters& parameters) override;

private:
    static constexpr std::uint32_t ram_begin = 0x80000000;
    static constexpr std::uint32_t timer_base = 0x02000000;
    static constexpr std::uint32_t uart_base = 0x10000000;

    riscv_vm(vm_options options, memory ram);

    /// What the hart sees.
    struct bus {
        riscv_vm& self;
        bool load(std::uint32_t address, std::uint32_t size, std::uint32_t& value);
        bool store(std::uint32_t address, std::uint32_t size, std::uint32_t value);
        bool is_interrupt_pending() { return self.timer_.is_pending(); }
    };

    void run_guest() override;

    vmstate::marked_log marked_log_;
    hart_state hart_;
    timer timer_{clock_};
};

} // namespace live
