// SPDX-License-Identifier: BSL-1.0
#include "kvm_state.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <span>
#include <string>
#include <utility>

#include "kvm_call.hpp"

namespace live {

namespace {

std::string hex(std::uint32_t number) {
    std::array<char, 16> text{};
    std::snprintf(text.data(), text.size(), "0x%x", number);
    return text.data();
}

/// KVM takes fewer than 256 MSRs in one call; it stops at the first that it doesn't know or take.
vmstate::result<void> transfer_msrs(int vcpu_fd, std::span<kvm_msr_entry> msrs, bool get) {
    constexpr std::size_t at_once = 128;
    for (std::size_t first = 0; first < msrs.size(); first += at_once) {
        const std::span<kvm_msr_entry> some = msrs.subspan(first, std::min(at_once, msrs.size() - first));
        kvm_msr_batch batch(some.size());
        batch.header()->nmsrs = static_cast<__u32>(some.size());
        for (std::size_t i = 0; i != some.size(); ++i) batch.set(i, some[i]);
        const vmstate::result<int> done = get ? LIVE_KVM_CALL(vcpu_fd, KVM_GET_MSRS, batch.header())
                                              : LIVE_KVM_CALL(vcpu_fd, KVM_SET_MSRS, batch.header());
        if (!done) return done.error();
        if (static_cast<std::size_t>(*done) != some.size())
            return vmstate::error(vmstate::errc::io, {}, std::string(get ? "KVM_GET_MSRS" : "KVM_SET_MSRS") +
                                      ": not MSR " + hex(some[static_cast<std::size_t>(*done)].index));
        if (get)
            for (std::size_t i = 0; i != some.size(); ++i) some[i] = batch.get(i);
    }
    return {};
}

bool is_same(const kvm_cpuid_entry2& a, const kvm_cpuid_entry2& b) {
    return a.function == b.function && a.index == b.index && a.flags == b.flags && a.eax == b.eax && a.ebx == b.ebx &&
           a.ecx == b.ecx && a.edx == b.edx;
}

/// The first of the calls that fails; those behind it aren't made.
class sequence {
public:
    explicit sequence(int fd) : fd_(fd) {}
    template <class Argument>
    sequence& then(const char* name, unsigned long request, Argument* argument) {
        if (!done_) return *this;
        if (const vmstate::result<int> called = kvm_call(fd_, name, request, argument); !called) done_ = called.error();
        return *this;
    }
    vmstate::result<void> done() const { return done_; }

private:
    int fd_;
    vmstate::result<void> done_;
};
#define THEN(request, argument) then(#request, request, argument)

} // namespace

vmstate::result<void> kvm_vcpu_state::capture() {
    cpuid = own_cpuid;
    nr_cpuid = static_cast<std::uint32_t>(cpuid.size());
    msrs.clear();
    for (const std::uint32_t index : msr_indices) msrs.push_back({.index = index, .reserved = 0, .data = 0});
    nr_msrs = static_cast<std::uint32_t>(msrs.size());
    // First the two that may change others: reading the events delivers what a pending exception puts into CR2 or DR6
    // (unless that is asked for as a payload), and reading the MP state lets an INIT or SIPI that is due take effect.
    const vmstate::result<void> got = sequence(vcpu_fd)
                                          .THEN(KVM_GET_VCPU_EVENTS, &events)
                                          .THEN(KVM_GET_MP_STATE, &mp_state)
                                          .THEN(KVM_GET_SREGS, &sregs)
                                          .THEN(KVM_GET_XCRS, &xcrs)
                                          .THEN(KVM_GET_XSAVE, &xsave)
                                          .THEN(KVM_GET_REGS, &regs)
                                          .THEN(KVM_GET_LAPIC, &lapic)
                                          .THEN(KVM_GET_DEBUGREGS, &debugregs)
                                          .done();
    if (!got) return got;
    return transfer_msrs(vcpu_fd, msrs, true);
}

vmstate::result<void> kvm_vcpu_state::apply() {
    const auto differs = std::mismatch(cpuid.begin(), cpuid.end(), own_cpuid.begin(), own_cpuid.end(), is_same);
    if (differs.first != cpuid.end() || differs.second != own_cpuid.end())
        return vmstate::error(vmstate::errc::value_mismatch, "a processor as the source's, by CPUID",
            differs.first == cpuid.end() ? "more leaves here" : "another leaf " + hex(differs.first->function));
    // The APIC's base and mode come with the system registers, before its own registers; these before the MSR of its
    // deadline; KVM_SET_REGS forgets exceptions, so events come last.
    vmstate::result<void> set = sequence(vcpu_fd)
                                    .THEN(KVM_SET_SREGS, &sregs)
                                    .THEN(KVM_SET_XCRS, &xcrs)
                                    .THEN(KVM_SET_XSAVE, &xsave)
                                    .THEN(KVM_SET_REGS, &regs)
                                    .THEN(KVM_SET_LAPIC, &lapic)
                                    .done();
    if (set) set = transfer_msrs(vcpu_fd, msrs, false);
    if (!set) return set;
    return sequence(vcpu_fd)
        .THEN(KVM_SET_DEBUGREGS, &debugregs)
        .THEN(KVM_SET_MP_STATE, &mp_state)
        .THEN(KVM_SET_VCPU_EVENTS, &events)
        .done();
}

vmstate::result<void> kvm_board_state::capture() {
    kvm_irqchip master{.chip_id = KVM_IRQCHIP_PIC_MASTER, .pad = 0, .chip = {}};
    kvm_irqchip slave{.chip_id = KVM_IRQCHIP_PIC_SLAVE, .pad = 0, .chip = {}};
    kvm_irqchip io{.chip_id = KVM_IRQCHIP_IOAPIC, .pad = 0, .chip = {}};
    clock = {};
    const vmstate::result<void> got = sequence(vm_fd)
                                          .THEN(KVM_GET_IRQCHIP, &master)
                                          .THEN(KVM_GET_IRQCHIP, &slave)
                                          .THEN(KVM_GET_IRQCHIP, &io)
                                          .THEN(KVM_GET_PIT2, &pit)
                                          .THEN(KVM_GET_CLOCK, &clock)
                                          .done();
    pic_master = master.chip.pic;
    pic_slave = slave.chip.pic;
    ioapic = io.chip.ioapic;
    return got;
}

vmstate::result<void> kvm_board_state::apply() {
    kvm_irqchip master{.chip_id = KVM_IRQCHIP_PIC_MASTER, .pad = 0, .chip = {}};
    kvm_irqchip slave{.chip_id = KVM_IRQCHIP_PIC_SLAVE, .pad = 0, .chip = {}};
    kvm_irqchip io{.chip_id = KVM_IRQCHIP_IOAPIC, .pad = 0, .chip = {}};
    master.chip.pic = pic_master;
    slave.chip.pic = pic_slave;
    io.chip.ioapic = ioapic;
    kvm_clock_data time{};
    time.clock = clock.clock;
    return sequence(vm_fd)
        .THEN(KVM_SET_CLOCK, &time)
        .THEN(KVM_SET_PIT2, &pit)
        .THEN(KVM_SET_IRQCHIP, &master)
        .THEN(KVM_SET_IRQCHIP, &slave)
        .THEN(KVM_SET_IRQCHIP, &io)
        .done();
}

} // namespace live
