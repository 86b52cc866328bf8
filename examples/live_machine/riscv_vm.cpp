// SPDX-License-Identifier: BSL-1.0
#include "riscv_vm.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <utility>

#include <vmstate/migrate.hpp>

namespace live {

namespace {

std::string describe_halt(const hart_state& hart) {
    const char* const why = hart.halted == halt::ebreak                ? "the guest has stopped itself"
                            : hart.halted == halt::illegal_instruction ? "illegal instruction"
                                                                       : "nothing to access";
    std::array<char, 96> text{};
    std::snprintf(text.data(), text.size(), "%s: 0x%08x at pc 0x%08x", why, hart.halted_by, hart.pc);
    return text.data();
}

} // namespace

vmstate::result<std::unique_ptr<vm>> riscv_vm::make(vm_options options) {
    if (options.dirty_log != dirty_log_kind::marked && options.dirty_log != dirty_log_kind::pagemap)
        return vmstate::error(vmstate::errc::invalid_argument, "a dirty log for a RISC-V hart: marked or pagemap",
            "one of KVM's");
    vmstate::result<memory> ram = make_memory(options);
    if (!ram) return ram.error();
    return std::unique_ptr<vm>(new riscv_vm(std::move(options), std::move(*ram)));
}

riscv_vm::riscv_vm(vm_options options, memory ram)
    : vm(std::move(options), std::move(ram), "live-machine-riscv", ram_begin), marked_log_(ram_.bytes().size()) {
    machine_.add_device<vmstate_hart>(hart_);
    machine_.add_device<timer::vm::description>(timer_);
    if (options_.dirty_log == dirty_log_kind::marked) guest_.dirty_logs.emplace("ram", marked_log_);
}

vmstate::result<void> riscv_vm::boot(const guest_parameters& parameters) {
    put_program(riscv_guest_image(), parameters);
    hart_ = {.pc = ram_begin};
    return {};
}

void riscv_vm::run_guest() {
    using clock = guest_clock::clock;
    bus all{*this};
    for (;;) {
        // Short enough for the serial port to be served in time, long enough for that to cost nothing.
        const clock::time_point began = clock::now();
        const run_end end = run(hart_, all, 20'000);
        if (!send_serial()) return;
        if (end == run_end::halted) return halt_for(describe_halt(hart_));
        if (end == run_end::wait) {
            clock::time_point go_on = timer_.pending_at();
            if (const auto character = next_character()) go_on = std::min(go_on, *character);
            if (wait_until(go_on)) return;
        } else {
            const clock::duration pause = throttled_after(clock::now() - began);
            if (pause.count() != 0 ? wait_until(clock::now() + pause) : must_stop()) return;
        }
    }
}

bool riscv_vm::bus::load(std::uint32_t address, std::uint32_t size, std::uint32_t& value) {
    if (address % size != 0) return false;
    if (address >= ram_begin) {
        if (address - ram_begin >= self.ram_.bytes().size()) return false;
        value = self.ram_.load(address - ram_begin, size);
        return true;
    }
    if (address >= uart_base && address - uart_base < 8 && size == 1) {
        value = self.uart_.load(address - uart_base);
        return true;
    }
    return address >= timer_base && size == 4 && self.timer_.load(address - timer_base, value);
}

bool riscv_vm::bus::store(std::uint32_t address, std::uint32_t size, std::uint32_t value) {
    if (address % size != 0) return false;
    if (address >= ram_begin) {
        if (address - ram_begin >= self.ram_.bytes().size()) return false;
        self.ram_.store(address - ram_begin, size, value);
        // After the write: see marked_log.
        if (self.options_.dirty_log == dirty_log_kind::marked) self.marked_log_.mark(address - ram_begin, size);
        return true;
    }
    if (address >= uart_base && address - uart_base < 8 && size == 1) {
        self.uart_.store(address - uart_base, static_cast<std::uint8_t>(value), self.clock_.now());
        return true;
    }
    return address >= timer_base && size == 4 && self.timer_.store(address - timer_base, value);
}

} // namespace live
