// SPDX-License-Identifier: BSL-1.0
#include "make_vm.hpp"

#include <utility>

#ifdef LIVE_KVM
#include "kvm_vm.hpp"
#endif
#include "riscv_vm.hpp"

namespace live {

#ifdef LIVE_KVM

vmstate::result<void> probe_kvm() { return kvm_vm::probe(); }

vmstate::result<std::unique_ptr<vm>> make_vm(cpu_kind cpu, vm_options options) {
    return cpu == cpu_kind::kvm ? kvm_vm::make(std::move(options)) : riscv_vm::make(std::move(options));
}

#else

vmstate::result<void> probe_kvm() {
    return vmstate::error(vmstate::errc::unsupported, {}, "the machine with KVM is for x86-64");
}

vmstate::result<std::unique_ptr<vm>> make_vm(cpu_kind cpu, vm_options options) {
    if (cpu == cpu_kind::kvm) return probe_kvm().error();
    return riscv_vm::make(std::move(options));
}

#endif

} // namespace live
