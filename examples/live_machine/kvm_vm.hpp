// SPDX-License-Identifier: BSL-1.0
//
// The machine with an x86 processor by KVM, its interrupt controllers (two 8259, an IOAPIC, the local APIC) and its
// timer (8254), which are in the kernel, and the serial port at 0x3f8 with IRQ 4, which is ours. Depends on vm.hpp,
// kvm_state.hpp and vmstate's ram/.
#pragma once

#include "kvm_api.hpp"

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include <vmstate/ram/kvm_ring_log.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

#include "kvm_state.hpp"
#include "vm.hpp"

namespace live {

class kvm_vm final : public vm {
public:
    /// Whether this host's KVM has all that the machine takes.
    static vmstate::result<void> probe();
    /// The dirty log is one of KVM's, or `pagemap`.
    static vmstate::result<std::unique_ptr<vm>> make(vm_options options);
    ~kvm_vm() override;

    vmstate::result<void> boot(const guest_parameters& parameters) override;

private:
    kvm_vm(vm_options options, memory ram);

    vmstate::result<void> set_up();
    vmstate::result<void> make_board();
    vmstate::result<void> make_vcpu();
    vmstate::result<void> list_cpuid();
    vmstate::result<void> list_msrs();

    void run_guest() override;
    void kick(pthread_t thread) override;
    // Each says why the guest can't go on; empty while it can.
    std::string run_vcpu();
    std::string handle_exit();
    std::string handle_port();
    std::string finish_access();
    std::string set_uart_interrupt();

    // In the order in which they are made: the logs go before what they log.
    vmstate::unique_fd kvm_;
    vmstate::unique_fd vm_;
    vmstate::unique_fd vcpu_;
    std::optional<vmstate::kvm_dirty_ring> ring_;
    kvm_run* run_ = nullptr;
    std::size_t run_size_ = 0;
    kvm_board_state board_;
    kvm_vcpu_state vcpu_state_;
    std::optional<bool> uart_interrupts_; ///< what KVM was told last
};

} // namespace live
