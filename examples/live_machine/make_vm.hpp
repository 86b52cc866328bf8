// SPDX-License-Identifier: BSL-1.0
//
// Which processor the machine has. Depends on vm.hpp.
#pragma once

#include <memory>

#include <vmstate/support/result.hpp>

#include "vm.hpp"

namespace live {

enum class cpu_kind { kvm, riscv };

/// Whether the machine with KVM can be made here.
vmstate::result<void> probe_kvm();

vmstate::result<std::unique_ptr<vm>> make_vm(cpu_kind cpu, vm_options options);

} // namespace live
