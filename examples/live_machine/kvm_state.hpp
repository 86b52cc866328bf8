// SPDX-License-Identifier: BSL-1.0
//
// What KVM remembers of a virtual machine with one vCPU, in the kernel's own structs: captured when it is saved, given to
// KVM when it was loaded. Meanings from the kernel's Documentation/virt/kvm/api.rst. What the kernel calls padding or
// reserved, and what it computes itself, doesn't travel. Depends on describe.hpp.
#pragma once

#include "kvm_api.hpp"

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>
#include <vector>

#include <vmstate/describe.hpp>

namespace live {

// ---- the vCPU ---------------------------------------------------------------------------------------------------

inline constexpr auto vmstate_kvm_regs = vmstate::describe<kvm_regs>(
    {.name = "kvm-regs"},
    vmstate::field<&kvm_regs::rax>,
    vmstate::field<&kvm_regs::rbx>,
    vmstate::field<&kvm_regs::rcx>,
    vmstate::field<&kvm_regs::rdx>,
    vmstate::field<&kvm_regs::rsi>,
    vmstate::field<&kvm_regs::rdi>,
    vmstate::field<&kvm_regs::rsp>,
    vmstate::field<&kvm_regs::rbp>,
    vmstate::field<&kvm_regs::r8>,
    vmstate::field<&kvm_regs::r9>,
    vmstate::field<&kvm_regs::r10>,
    vmstate::field<&kvm_regs::r11>,
    vmstate::field<&kvm_regs::r12>,
    vmstate::field<&kvm_regs::r13>,
    vmstate::field<&kvm_regs::r14>,
    vmstate::field<&kvm_regs::r15>,
    vmstate::field<&kvm_regs::rip>,
    vmstate::field<&kvm_regs::rflags>);
static_assert(vmstate::completeness_checked<vmstate_kvm_regs>);

inline constexpr auto vmstate_kvm_segment = vmstate::describe<kvm_segment>(
    {.name = "kvm-segment"},
    vmstate::field<&kvm_segment::base>,
    vmstate::field<&kvm_segment::limit>,
    vmstate::field<&kvm_segment::selector>,
    vmstate::field<&kvm_segment::type>,
    vmstate::field<&kvm_segment::present>,
    vmstate::field<&kvm_segment::dpl>,
    vmstate::field<&kvm_segment::db>,
    vmstate::field<&kvm_segment::s>,
    vmstate::field<&kvm_segment::l>,
    vmstate::field<&kvm_segment::g>,
    vmstate::field<&kvm_segment::avl>,
    vmstate::field<&kvm_segment::unusable>,
    vmstate::transient<&kvm_segment::padding>);
static_assert(vmstate::completeness_checked<vmstate_kvm_segment>);

inline constexpr auto vmstate_kvm_dtable = vmstate::describe<kvm_dtable>(
    {.name = "kvm-dtable"},
    vmstate::field<&kvm_dtable::base>,
    vmstate::field<&kvm_dtable::limit>,
    vmstate::transient<&kvm_dtable::padding>);
static_assert(vmstate::completeness_checked<vmstate_kvm_dtable>);

inline constexpr auto vmstate_kvm_sregs = vmstate::describe<kvm_sregs>(
    {.name = "kvm-sregs"},
    vmstate::field<&kvm_sregs::cs, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::ds, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::es, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::fs, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::gs, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::ss, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::tr, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::ldt, vmstate::as<vmstate_kvm_segment>>,
    vmstate::field<&kvm_sregs::gdt, vmstate::as<vmstate_kvm_dtable>>,
    vmstate::field<&kvm_sregs::idt, vmstate::as<vmstate_kvm_dtable>>,
    vmstate::field<&kvm_sregs::cr0>,
    vmstate::field<&kvm_sregs::cr2>,
    vmstate::field<&kvm_sregs::cr3>,
    vmstate::field<&kvm_sregs::cr4>,
    vmstate::field<&kvm_sregs::cr8>,
    vmstate::field<&kvm_sregs::efer>,
    vmstate::field<&kvm_sregs::apic_base>,
    vmstate::field<&kvm_sregs::interrupt_bitmap>);
static_assert(vmstate::completeness_checked<vmstate_kvm_sregs>);

inline constexpr auto vmstate_kvm_debugregs = vmstate::describe<kvm_debugregs>(
    {.name = "kvm-debugregs"},
    vmstate::field<&kvm_debugregs::db>,
    vmstate::field<&kvm_debugregs::dr6>,
    vmstate::field<&kvm_debugregs::dr7>,
    vmstate::field<&kvm_debugregs::flags>,
    vmstate::transient<&kvm_debugregs::reserved>);
static_assert(vmstate::completeness_checked<vmstate_kvm_debugregs>);

inline constexpr auto vmstate_kvm_xcr = vmstate::describe<kvm_xcr>(
    {.name = "kvm-xcr"},
    vmstate::field<&kvm_xcr::xcr>,
    vmstate::field<&kvm_xcr::value>,
    vmstate::transient<&kvm_xcr::reserved>);
static_assert(vmstate::completeness_checked<vmstate_kvm_xcr>);

inline constexpr auto vmstate_kvm_xcrs = vmstate::describe<kvm_xcrs>(
    {.name = "kvm-xcrs"},
    vmstate::field<&kvm_xcrs::nr_xcrs>,
    vmstate::field<&kvm_xcrs::flags>,
    vmstate::field<&kvm_xcrs::xcrs, vmstate::as<vmstate_kvm_xcr>, vmstate::length<&kvm_xcrs::nr_xcrs>>,
    vmstate::transient<&kvm_xcrs::padding>);
static_assert(vmstate::completeness_checked<vmstate_kvm_xcrs>);

inline constexpr auto vmstate_kvm_xsave =
    vmstate::describe<kvm_xsave>({.name = "kvm-xsave"}, vmstate::field<&kvm_xsave::region>);
static_assert(vmstate::completeness_checked<vmstate_kvm_xsave>);

inline constexpr auto vmstate_kvm_lapic =
    vmstate::describe<kvm_lapic_state>({.name = "kvm-lapic"}, vmstate::field<&kvm_lapic_state::regs>);
static_assert(vmstate::completeness_checked<vmstate_kvm_lapic>);

inline constexpr auto vmstate_kvm_mp_state =
    vmstate::describe<kvm_mp_state>({.name = "kvm-mp-state"}, vmstate::field<&kvm_mp_state::mp_state>);
static_assert(vmstate::completeness_checked<vmstate_kvm_mp_state>);

using kvm_exception = decltype(kvm_vcpu_events::exception);
using kvm_soft_interrupt = decltype(kvm_vcpu_events::interrupt);
using kvm_nmi = decltype(kvm_vcpu_events::nmi);
using kvm_smi = decltype(kvm_vcpu_events::smi);
using kvm_triple_fault = decltype(kvm_vcpu_events::triple_fault);

inline constexpr auto vmstate_kvm_exception = vmstate::describe<kvm_exception>(
    {.name = "kvm-exception"},
    vmstate::field<&kvm_exception::injected>,
    vmstate::field<&kvm_exception::nr>,
    vmstate::field<&kvm_exception::has_error_code>,
    vmstate::field<&kvm_exception::pending>,
    vmstate::field<&kvm_exception::error_code>);
static_assert(vmstate::completeness_checked<vmstate_kvm_exception>);

inline constexpr auto vmstate_kvm_interrupt = vmstate::describe<kvm_soft_interrupt>(
    {.name = "kvm-interrupt"},
    vmstate::field<&kvm_soft_interrupt::injected>,
    vmstate::field<&kvm_soft_interrupt::nr>,
    vmstate::field<&kvm_soft_interrupt::soft>,
    vmstate::field<&kvm_soft_interrupt::shadow>);
static_assert(vmstate::completeness_checked<vmstate_kvm_interrupt>);

inline constexpr auto vmstate_kvm_nmi = vmstate::describe<kvm_nmi>(
    {.name = "kvm-nmi"},
    vmstate::field<&kvm_nmi::injected>,
    vmstate::field<&kvm_nmi::pending>,
    vmstate::field<&kvm_nmi::masked>,
    vmstate::transient<&kvm_nmi::pad>);
static_assert(vmstate::completeness_checked<vmstate_kvm_nmi>);

inline constexpr auto vmstate_kvm_smi = vmstate::describe<kvm_smi>(
    {.name = "kvm-smi"},
    vmstate::field<&kvm_smi::smm>,
    vmstate::field<&kvm_smi::pending>,
    vmstate::field<&kvm_smi::smm_inside_nmi>,
    vmstate::field<&kvm_smi::latched_init>);
static_assert(vmstate::completeness_checked<vmstate_kvm_smi>);

inline constexpr auto vmstate_kvm_triple_fault = vmstate::describe<kvm_triple_fault>(
    {.name = "kvm-triple-fault"}, vmstate::field<&kvm_triple_fault::pending>);
static_assert(vmstate::completeness_checked<vmstate_kvm_triple_fault>);

inline constexpr auto vmstate_kvm_vcpu_events = vmstate::describe<kvm_vcpu_events>(
    {.name = "kvm-vcpu-events"},
    vmstate::field<&kvm_vcpu_events::flags>, // which of the others count
    vmstate::field<&kvm_vcpu_events::exception, vmstate::as<vmstate_kvm_exception>>,
    vmstate::field<&kvm_vcpu_events::interrupt, vmstate::as<vmstate_kvm_interrupt>>,
    vmstate::field<&kvm_vcpu_events::nmi, vmstate::as<vmstate_kvm_nmi>>,
    vmstate::field<&kvm_vcpu_events::sipi_vector>,
    vmstate::field<&kvm_vcpu_events::smi, vmstate::as<vmstate_kvm_smi>>,
    vmstate::field<&kvm_vcpu_events::triple_fault, vmstate::as<vmstate_kvm_triple_fault>>,
    vmstate::field<&kvm_vcpu_events::exception_has_payload>,
    vmstate::field<&kvm_vcpu_events::exception_payload>,
    vmstate::transient<&kvm_vcpu_events::reserved>);
static_assert(vmstate::completeness_checked<vmstate_kvm_vcpu_events>);

inline constexpr auto vmstate_kvm_msr = vmstate::describe<kvm_msr_entry>(
    {.name = "kvm-msr"},
    vmstate::field<&kvm_msr_entry::index>,
    vmstate::field<&kvm_msr_entry::data>,
    vmstate::transient<&kvm_msr_entry::reserved>);
static_assert(vmstate::completeness_checked<vmstate_kvm_msr>);

inline constexpr auto vmstate_kvm_cpuid = vmstate::describe<kvm_cpuid_entry2>(
    {.name = "kvm-cpuid"},
    vmstate::field<&kvm_cpuid_entry2::function>,
    vmstate::field<&kvm_cpuid_entry2::index>,
    vmstate::field<&kvm_cpuid_entry2::flags>,
    vmstate::field<&kvm_cpuid_entry2::eax>,
    vmstate::field<&kvm_cpuid_entry2::ebx>,
    vmstate::field<&kvm_cpuid_entry2::ecx>,
    vmstate::field<&kvm_cpuid_entry2::edx>,
    vmstate::transient<&kvm_cpuid_entry2::padding>);
static_assert(vmstate::completeness_checked<vmstate_kvm_cpuid>);

/// One vCPU. Its descriptor has to be open, and the vCPU out of KVM_RUN, while it is saved or loaded.
struct kvm_vcpu_state {
    int vcpu_fd = -1;
    std::vector<kvm_cpuid_entry2> own_cpuid;   ///< what the vCPU was made with
    std::vector<std::uint32_t> msr_indices;    ///< those that this KVM lets us read and write

    std::uint32_t nr_cpuid = 0;
    std::vector<kvm_cpuid_entry2> cpuid; ///< the source's; a guest knows its processor, so it has to be the same
    kvm_sregs sregs{};
    kvm_xcrs xcrs{};
    kvm_xsave xsave{};
    kvm_regs regs{};
    kvm_lapic_state lapic{};
    std::uint32_t nr_msrs = 0;
    std::vector<kvm_msr_entry> msrs;
    kvm_debugregs debugregs{};
    kvm_mp_state mp_state{};
    kvm_vcpu_events events{};

    vmstate::result<void> capture();
    vmstate::result<void> apply();
};
inline constexpr auto vmstate_kvm_vcpu = vmstate::describe<kvm_vcpu_state>(
    {.name = "kvm-vcpu"},
    vmstate::pre_save<&kvm_vcpu_state::capture>,
    vmstate::post_load<&kvm_vcpu_state::apply>,
    vmstate::field<&kvm_vcpu_state::nr_cpuid>,
    vmstate::field<&kvm_vcpu_state::cpuid, vmstate::as<vmstate_kvm_cpuid>, vmstate::length<&kvm_vcpu_state::nr_cpuid>,
        vmstate::limit<1024>>,
    vmstate::field<&kvm_vcpu_state::sregs, vmstate::as<vmstate_kvm_sregs>>,
    vmstate::field<&kvm_vcpu_state::xcrs, vmstate::as<vmstate_kvm_xcrs>>,
    vmstate::field<&kvm_vcpu_state::xsave, vmstate::as<vmstate_kvm_xsave>>,
    vmstate::field<&kvm_vcpu_state::regs, vmstate::as<vmstate_kvm_regs>>,
    vmstate::field<&kvm_vcpu_state::lapic, vmstate::as<vmstate_kvm_lapic>>,
    vmstate::field<&kvm_vcpu_state::nr_msrs>,
    vmstate::field<&kvm_vcpu_state::msrs, vmstate::as<vmstate_kvm_msr>, vmstate::length<&kvm_vcpu_state::nr_msrs>,
        vmstate::limit<4096>>,
    vmstate::field<&kvm_vcpu_state::debugregs, vmstate::as<vmstate_kvm_debugregs>>,
    vmstate::field<&kvm_vcpu_state::mp_state, vmstate::as<vmstate_kvm_mp_state>>,
    vmstate::field<&kvm_vcpu_state::events, vmstate::as<vmstate_kvm_vcpu_events>>,
    vmstate::transient<&kvm_vcpu_state::vcpu_fd, &kvm_vcpu_state::own_cpuid, &kvm_vcpu_state::msr_indices>);
static_assert(vmstate::completeness_checked<vmstate_kvm_vcpu>);

// ---- the board: interrupt controllers, timer, clock ---------------------------------------------------------------

inline constexpr auto vmstate_kvm_pic = vmstate::describe<kvm_pic_state>(
    {.name = "kvm-i8259"},
    vmstate::field<&kvm_pic_state::last_irr>,
    vmstate::field<&kvm_pic_state::irr>,
    vmstate::field<&kvm_pic_state::imr>,
    vmstate::field<&kvm_pic_state::isr>,
    vmstate::field<&kvm_pic_state::priority_add>,
    vmstate::field<&kvm_pic_state::irq_base>,
    vmstate::field<&kvm_pic_state::read_reg_select>,
    vmstate::field<&kvm_pic_state::poll>,
    vmstate::field<&kvm_pic_state::special_mask>,
    vmstate::field<&kvm_pic_state::init_state>,
    vmstate::field<&kvm_pic_state::auto_eoi>,
    vmstate::field<&kvm_pic_state::rotate_on_auto_eoi>,
    vmstate::field<&kvm_pic_state::special_fully_nested_mode>,
    vmstate::field<&kvm_pic_state::init4>,
    vmstate::field<&kvm_pic_state::elcr>,
    vmstate::field<&kvm_pic_state::elcr_mask>);
static_assert(vmstate::completeness_checked<vmstate_kvm_pic>);

/// An entry of the IOAPIC's table: a union of its 64 bits and of their parts.
struct ioapic_redirection {
    using entry = std::remove_extent_t<decltype(kvm_ioapic_state::redirtbl)>;

    static constexpr std::string_view type = "ioapic-redirection";
    template <class Writer>
    static vmstate::result<void> save(Writer& w, const entry& value) {
        w.put_be64(value.bits);
        return w.status();
    }
    template <class Reader>
    static vmstate::result<void> load(Reader& r, entry& value) {
        value.bits = r.get_be64();
        if (r.failed()) return r.failure();
        return {};
    }
    static std::size_t size(const entry&) { return sizeof(entry::bits); }
};

inline constexpr auto vmstate_kvm_ioapic = vmstate::describe<kvm_ioapic_state>(
    {.name = "kvm-ioapic"},
    vmstate::field<&kvm_ioapic_state::base_address>,
    vmstate::field<&kvm_ioapic_state::ioregsel>,
    vmstate::field<&kvm_ioapic_state::id>,
    vmstate::field<&kvm_ioapic_state::irr>,
    vmstate::field<&kvm_ioapic_state::redirtbl, vmstate::coded<ioapic_redirection>>,
    vmstate::transient<&kvm_ioapic_state::pad>);
static_assert(vmstate::completeness_checked<vmstate_kvm_ioapic>);

inline constexpr auto vmstate_kvm_pit_channel = vmstate::describe<kvm_pit_channel_state>(
    {.name = "kvm-pit-channel"},
    vmstate::field<&kvm_pit_channel_state::count>,
    vmstate::field<&kvm_pit_channel_state::latched_count>,
    vmstate::field<&kvm_pit_channel_state::count_latched>,
    vmstate::field<&kvm_pit_channel_state::status_latched>,
    vmstate::field<&kvm_pit_channel_state::status>,
    vmstate::field<&kvm_pit_channel_state::read_state>,
    vmstate::field<&kvm_pit_channel_state::write_state>,
    vmstate::field<&kvm_pit_channel_state::write_latch>,
    vmstate::field<&kvm_pit_channel_state::rw_mode>,
    vmstate::field<&kvm_pit_channel_state::mode>,
    vmstate::field<&kvm_pit_channel_state::bcd>,
    vmstate::field<&kvm_pit_channel_state::gate>,
    vmstate::transient<&kvm_pit_channel_state::count_load_time>); // the host's time; KVM sets it to that of KVM_SET_PIT2
static_assert(vmstate::completeness_checked<vmstate_kvm_pit_channel>);

inline constexpr auto vmstate_kvm_pit = vmstate::describe<kvm_pit_state2>(
    {.name = "kvm-pit"},
    vmstate::field<&kvm_pit_state2::channels, vmstate::as<vmstate_kvm_pit_channel>>,
    vmstate::field<&kvm_pit_state2::flags>,
    vmstate::transient<&kvm_pit_state2::reserved>);
static_assert(vmstate::completeness_checked<vmstate_kvm_pit>);

inline constexpr auto vmstate_kvm_clock = vmstate::describe<kvm_clock_data>(
    {.name = "kvm-clock"},
    vmstate::field<&kvm_clock_data::clock>,
    // The other times are this host's.
    vmstate::transient<&kvm_clock_data::flags, &kvm_clock_data::pad0, &kvm_clock_data::realtime,
        &kvm_clock_data::host_tsc, &kvm_clock_data::pad>);
static_assert(vmstate::completeness_checked<vmstate_kvm_clock>);

/// What there is once per virtual machine.
struct kvm_board_state {
    int vm_fd = -1;

    kvm_pic_state pic_master{};
    kvm_pic_state pic_slave{};
    kvm_ioapic_state ioapic{};
    kvm_pit_state2 pit{};
    kvm_clock_data clock{};

    vmstate::result<void> capture();
    vmstate::result<void> apply();
};
inline constexpr auto vmstate_kvm_board = vmstate::describe<kvm_board_state>(
    {.name = "kvm-board"},
    vmstate::pre_save<&kvm_board_state::capture>,
    vmstate::post_load<&kvm_board_state::apply>,
    vmstate::field<&kvm_board_state::pic_master, vmstate::as<vmstate_kvm_pic>>,
    vmstate::field<&kvm_board_state::pic_slave, vmstate::as<vmstate_kvm_pic>>,
    vmstate::field<&kvm_board_state::ioapic, vmstate::as<vmstate_kvm_ioapic>>,
    vmstate::field<&kvm_board_state::pit, vmstate::as<vmstate_kvm_pit>>,
    vmstate::field<&kvm_board_state::clock, vmstate::as<vmstate_kvm_clock>>,
    vmstate::transient<&kvm_board_state::vm_fd>);
static_assert(vmstate::completeness_checked<vmstate_kvm_board>);

} // namespace live
