// SPDX-License-Identifier: BSL-1.0
#include "kvm_vm.hpp"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <utility>

#include <vmstate/migrate.hpp>
#include <vmstate/ram/kvm_log.hpp>

#include "kvm_call.hpp"

#ifndef sigev_notify_thread_id // by its man page there; not in every C library
#define sigev_notify_thread_id _sigev_un._tid
#endif

namespace live {

namespace {

constexpr int kick_signal = SIGUSR1;

constexpr std::uint16_t uart_port = 0x3f8;
constexpr std::uint16_t stop_port = 0xf4;
constexpr std::uint32_t uart_irq = 4;

// Three pages and one that KVM takes for itself on Intel's processors: outside of RAM.
constexpr std::uint64_t identity_map = 0xfffbc000;
constexpr unsigned long tss = 0xfffbd000;

/// A processor makes an entry for a page; a KVM that emulates makes one for each write, and looks only now and then whether
/// the ring is full: it should be seldom.
constexpr std::uint32_t ring_entries = 65536;

struct needed_capability {
    int number;
    const char* name;
};
#define NEED(capability) needed_capability{capability, #capability}
constexpr needed_capability needed_capabilities[]{NEED(KVM_CAP_IRQCHIP), NEED(KVM_CAP_PIT2), NEED(KVM_CAP_PIT_STATE2),
    NEED(KVM_CAP_REINJECT_CONTROL), NEED(KVM_CAP_SET_TSS_ADDR), NEED(KVM_CAP_SET_IDENTITY_MAP_ADDR),
    NEED(KVM_CAP_EXT_CPUID), NEED(KVM_CAP_XSAVE), NEED(KVM_CAP_XCRS), NEED(KVM_CAP_DEBUGREGS),
    NEED(KVM_CAP_VCPU_EVENTS), NEED(KVM_CAP_MP_STATE), NEED(KVM_CAP_ADJUST_CLOCK), NEED(KVM_CAP_IMMEDIATE_EXIT)};
#undef NEED

vmstate::result<vmstate::unique_fd> open_kvm() {
    vmstate::unique_fd kvm(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
    if (!kvm) return kvm_failure("/dev/kvm");
    const vmstate::result<int> version = LIVE_KVM_CALL(kvm.get(), KVM_GET_API_VERSION, 0);
    if (!version) return version.error();
    if (*version != KVM_API_VERSION)
        return vmstate::error(vmstate::errc::unsupported, "KVM's API 12", std::to_string(*version));
    for (const needed_capability& one : needed_capabilities)
        if (::ioctl(kvm.get(), KVM_CHECK_EXTENSION, one.number) <= 0)
            return vmstate::error(vmstate::errc::unsupported, {}, std::string("KVM without ") + one.name);
    return kvm;
}

/// Sends the signal to the thread that makes it, when it is time.
class kick_timer {
public:
    kick_timer() {
        ::sigevent event{};
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = kick_signal;
        event.sigev_notify_thread_id = ::gettid();
        exists_ = ::timer_create(CLOCK_MONOTONIC, &event, &timer_) == 0;
    }
    kick_timer(const kick_timer&) = delete;
    kick_timer& operator=(const kick_timer&) = delete;
    ~kick_timer() {
        if (exists_) ::timer_delete(timer_);
    }

    explicit operator bool() const { return exists_; }
    void set(std::optional<guest_clock::clock::time_point> time) {
        if (time == set_to_) return;
        set_to_ = time;
        ::itimerspec spec{};
        if (time) {
            const std::chrono::nanoseconds ns = time->time_since_epoch();
            spec.it_value.tv_sec = ns.count() / 1'000'000'000;
            spec.it_value.tv_nsec = ns.count() % 1'000'000'000;
        }
        ::timer_settime(timer_, TIMER_ABSTIME, &spec, nullptr);
    }

private:
    ::timer_t timer_{};
    bool exists_ = false;
    std::optional<guest_clock::clock::time_point> set_to_;
};

::sigset_t only_kick() {
    ::sigset_t set;
    ::sigemptyset(&set);
    ::sigaddset(&set, kick_signal);
    return set;
}

/// Takes the signals that are pending: they have done what they were for.
void take_kicks() {
    const ::sigset_t kick = only_kick();
    const ::timespec now{};
    while (::sigtimedwait(&kick, nullptr, &now) > 0) {}
}

vmstate::result<void> without_value(const vmstate::result<int>& done) {
    if (!done) return done.error();
    return {};
}

} // namespace

vmstate::result<void> kvm_vm::probe() {
    const vmstate::result<vmstate::unique_fd> kvm = open_kvm();
    if (!kvm) return kvm.error();
    const vmstate::unique_fd vm(::ioctl(kvm->get(), KVM_CREATE_VM, 0));
    if (!vm) return kvm_failure("KVM_CREATE_VM");
    return {};
}

vmstate::result<std::unique_ptr<vm>> kvm_vm::make(vm_options options) {
    if (options.dirty_log == dirty_log_kind::marked)
        return vmstate::error(vmstate::errc::invalid_argument, "a dirty log for KVM: kvm-bitmap, kvm-ring or pagemap",
            "marked");
    vmstate::result<memory> ram = make_memory(options);
    if (!ram) return ram.error();
    std::unique_ptr<kvm_vm> made(new kvm_vm(std::move(options), std::move(*ram)));
    if (const vmstate::result<void> done = made->set_up(); !done) return done.error();
    return std::unique_ptr<vm>(std::move(made));
}

kvm_vm::kvm_vm(vm_options options, memory ram) : vm(std::move(options), std::move(ram), "live-machine-kvm", 0) {
    // In this order they are loaded: what the interrupt controllers then send to the APIC, its own state replaces.
    machine_.add_device<vmstate_kvm_board>(board_);
    machine_.add_device<vmstate_kvm_vcpu>(vcpu_state_);
}

kvm_vm::~kvm_vm() {
    stop();
    guest_.dirty_logs.clear();
    if (run_ != nullptr) ::munmap(run_, run_size_);
}

// ---- making it --------------------------------------------------------------------------------------------------

vmstate::result<void> kvm_vm::set_up() {
    // It does nothing but end KVM_RUN.
    struct ::sigaction action {};
    action.sa_handler = [](int) {};
    ::sigaction(kick_signal, &action, nullptr);

    vmstate::result<vmstate::unique_fd> kvm = open_kvm();
    if (!kvm) return kvm.error();
    kvm_ = std::move(*kvm);
    vmstate::result<void> done = make_board();
    if (done) done = make_vcpu();
    if (!done) return done;

    const std::vector<vmstate::kvm_slot> slots{
        {.slot = 0, .flags = 0, .guest_phys_addr = 0, .memory = ram_.bytes(), .block_offset = 0}};
    if (options_.dirty_log == dirty_log_kind::kvm_bitmap)
        guest_.dirty_logs.emplace("ram", vmstate::kvm_bitmap_log(vm_.get(), slots, ram_.bytes().size()));
    if (ring_) guest_.dirty_logs.emplace("ram", vmstate::kvm_ring_log(*ring_, slots, ram_.bytes().size()));
    return {};
}

vmstate::result<void> kvm_vm::make_board() {
    vm_ = vmstate::unique_fd(::ioctl(kvm_.get(), KVM_CREATE_VM, 0));
    if (!vm_) return kvm_failure("KVM_CREATE_VM");
    board_.vm_fd = vm_.get();
    __u64 map = identity_map;
    vmstate::result<int> done = LIVE_KVM_CALL(vm_.get(), KVM_SET_IDENTITY_MAP_ADDR, &map);
    if (done) done = LIVE_KVM_CALL(vm_.get(), KVM_SET_TSS_ADDR, tss);
    if (done) done = LIVE_KVM_CALL(vm_.get(), KVM_CREATE_IRQCHIP, 0);
    kvm_pit_config pit{};
    if (done) done = LIVE_KVM_CALL(vm_.get(), KVM_CREATE_PIT2, &pit);
    // A tick that comes while the one before it waits is lost: a guest that is slow has no past to catch up with.
    kvm_reinject_control reinject{};
    if (done) done = LIVE_KVM_CALL(vm_.get(), KVM_REINJECT_CONTROL, &reinject);
    if (!done) return done.error();

    if (options_.dirty_log == dirty_log_kind::kvm_ring) {
        vmstate::result<vmstate::kvm_dirty_ring> ring = vmstate::kvm_dirty_ring::enable(vm_.get(), ring_entries);
        if (!ring) return ring.error();
        ring_.emplace(std::move(*ring));
    }
    kvm_userspace_memory_region region{};
    region.memory_size = ram_.bytes().size();
    region.userspace_addr = reinterpret_cast<std::uintptr_t>(ram_.bytes().data());
    return without_value(LIVE_KVM_CALL(vm_.get(), KVM_SET_USER_MEMORY_REGION, &region));
}

vmstate::result<void> kvm_vm::make_vcpu() {
    vcpu_ = vmstate::unique_fd(::ioctl(vm_.get(), KVM_CREATE_VCPU, 0));
    if (!vcpu_) return kvm_failure("KVM_CREATE_VCPU");
    vcpu_state_.vcpu_fd = vcpu_.get();
    if (ring_)
        if (vmstate::result<void> added = ring_->add_vcpu(vcpu_.get()); !added) return added;
    const vmstate::result<int> size = LIVE_KVM_CALL(kvm_.get(), KVM_GET_VCPU_MMAP_SIZE, 0);
    if (!size) return size.error();
    run_size_ = static_cast<std::size_t>(*size);
    void* const run = ::mmap(nullptr, run_size_, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_.get(), 0);
    if (run == MAP_FAILED) return kvm_failure("mmap of the vCPU");
    run_ = static_cast<kvm_run*>(run);
    // More would take KVM_GET_XSAVE2; it is only so where a program has asked for it.
    const int xsave = ::ioctl(vm_.get(), KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    if (xsave > static_cast<int>(sizeof(kvm_xsave)))
        return vmstate::error(vmstate::errc::unsupported, "an XSAVE area of up to 4096 bytes", std::to_string(xsave));
    vmstate::result<void> listed = list_cpuid();
    if (listed) listed = list_msrs();
    return listed;
}

vmstate::result<void> kvm_vm::list_cpuid() {
    constexpr std::uint32_t most = 1024;
    kvm_list<kvm_cpuid2, kvm_cpuid_entry2> all(most);
    all.header()->nent = most;
    if (const vmstate::result<int> got = LIVE_KVM_CALL(kvm_.get(), KVM_GET_SUPPORTED_CPUID, all.header()); !got)
        return got.error();
    for (std::uint32_t i = 0; i != all.header()->nent; ++i) {
        kvm_cpuid_entry2 entry = all.get(i);
        // Here KVM tells of the processor that it was asked on; ours is number 0.
        if (entry.function == 0x1) entry.ebx &= 0x00ffffff;
        if (entry.function == 0xb || entry.function == 0x1f) entry.edx = 0;
        if (entry.function == 0x8000001e) entry.eax = 0;
        all.set(i, entry);
        vcpu_state_.own_cpuid.push_back(entry);
    }
    return without_value(LIVE_KVM_CALL(vcpu_.get(), KVM_SET_CPUID2, all.header()));
}

/// Those of KVM's list that can be read, and be set to what was read: the list is for all processors.
vmstate::result<void> kvm_vm::list_msrs() {
    constexpr std::uint32_t most = 4096;
    kvm_list<kvm_msr_list, __u32> all(most);
    all.header()->nmsrs = most;
    if (const vmstate::result<int> got = LIVE_KVM_CALL(kvm_.get(), KVM_GET_MSR_INDEX_LIST, all.header()); !got)
        return got.error();
    for (std::uint32_t i = 0; i != all.header()->nmsrs; ++i) {
        kvm_msr_batch one(1);
        one.header()->nmsrs = 1;
        one.set(0, {.index = all.get(i), .reserved = 0, .data = 0});
        if (::ioctl(vcpu_.get(), KVM_GET_MSRS, one.header()) == 1 && ::ioctl(vcpu_.get(), KVM_SET_MSRS, one.header()) == 1)
            vcpu_state_.msr_indices.push_back(all.get(i));
    }
    return {};
}

/// Protected mode from the beginning: 32 bits, flat segments, no paging. The guest has the same in its own GDT.
vmstate::result<void> kvm_vm::boot(const guest_parameters& parameters) {
    put_program(x86_guest_image(), parameters);
    kvm_sregs sregs{};
    if (const vmstate::result<int> got = LIVE_KVM_CALL(vcpu_.get(), KVM_GET_SREGS, &sregs); !got) return got.error();
    kvm_segment flat{};
    flat.limit = 0xffffffff;
    flat.present = flat.db = flat.s = flat.g = 1;
    flat.selector = 16;
    flat.type = 3; // data, written, used
    sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
    flat.selector = 8;
    flat.type = 11; // code, read, used
    sregs.cs = flat;
    sregs.cr0 |= 1;
    kvm_regs regs{};
    regs.rflags = 2;
    vmstate::result<int> done = LIVE_KVM_CALL(vcpu_.get(), KVM_SET_SREGS, &sregs);
    if (done) done = LIVE_KVM_CALL(vcpu_.get(), KVM_SET_REGS, &regs);
    return without_value(done);
}

// ---- running it -------------------------------------------------------------------------------------------------

void kvm_vm::run_guest() {
    if (std::string why = run_vcpu(); !why.empty()) halt_for(std::move(why));
}

void kvm_vm::kick(pthread_t thread) { ::pthread_kill(thread, kick_signal); }

std::string kvm_vm::run_vcpu() {
    using clock = guest_clock::clock;
    constexpr clock::duration slice = std::chrono::milliseconds(10); // after which a guest that is throttled pauses
    // Blocked but in KVM_RUN: a kick that comes before it ends it as well as one that comes in it.
    ::sigset_t mask;
    const ::sigset_t kick = only_kick();
    ::pthread_sigmask(SIG_BLOCK, &kick, &mask);
    ::sigdelset(&mask, kick_signal);
    kvm_list<kvm_signal_mask, std::uint64_t> in_run(1);
    in_run.header()->len = sizeof(std::uint64_t); // as the kernel has it; the C library's is longer
    std::uint64_t bits = 0;
    std::memcpy(&bits, &mask, sizeof bits);
    in_run.set(0, bits);
    if (const vmstate::result<int> set = LIVE_KVM_CALL(vcpu_.get(), KVM_SET_SIGNAL_MASK, in_run.header()); !set)
        return set.error().message();
    kick_timer timer;
    if (!timer) return kvm_failure("timer_create").message();

    uart_interrupts_.reset();
    clock::time_point began = clock::now();
    while (send_serial()) {
        if (std::string why = set_uart_interrupt(); !why.empty()) return why;
        std::optional<clock::time_point> wake = next_character();
        if (!is_throttled()) {
            began = clock::now();
        } else {
            if (const clock::duration ran = clock::now() - began; ran >= slice) {
                if (wait_until(clock::now() + throttled_after(ran))) break;
                began = clock::now();
            }
            wake = wake ? std::min(*wake, began + slice) : began + slice;
        }
        if (must_stop()) break;
        timer.set(wake);
        if (::ioctl(vcpu_.get(), KVM_RUN, 0) == 0) {
            if (std::string why = handle_exit(); !why.empty()) {
                (void)finish_access();
                return why;
            }
        } else if (errno == EINTR || errno == EAGAIN) {
            take_kicks();
        } else {
            return kvm_failure("KVM_RUN").message();
        }
    }
    return finish_access();
}

/// The instruction of an access that we were asked for ends when KVM is called again: before that, the vCPU's state is
/// neither the one before it nor the one after it.
std::string kvm_vm::finish_access() {
    for (;;) {
        run_->immediate_exit = 1;
        const int ran = ::ioctl(vcpu_.get(), KVM_RUN, 0);
        const int failure = errno;
        run_->immediate_exit = 0;
        take_kicks();
        if (ran != 0) {
            if (failure == EINTR) return {};
            return kvm_failure("KVM_RUN", failure).message();
        }
        if (std::string why = handle_exit(); !why.empty()) return why;
    }
}

std::string kvm_vm::handle_exit() {
    switch (run_->exit_reason) {
    case KVM_EXIT_IO: return handle_port();
    case KVM_EXIT_DIRTY_RING_FULL: {
        const vmstate::result<void> harvested = ring_->harvest();
        return harvested ? "" : harvested.error().message();
    }
    case KVM_EXIT_INTR:
    case KVM_EXIT_IRQ_WINDOW_OPEN: return {};
    case KVM_EXIT_SHUTDOWN: return "the guest's processor has shut down";
    case KVM_EXIT_MMIO: {
        std::array<char, 64> text{};
        std::snprintf(text.data(), text.size(), "nothing to access at 0x%llx", run_->mmio.phys_addr);
        return text.data();
    }
    case KVM_EXIT_INTERNAL_ERROR: {
        kvm_regs regs{};
        ::ioctl(vcpu_.get(), KVM_GET_REGS, &regs);
        std::array<char, 96> text{};
        std::snprintf(text.data(), text.size(), "KVM's internal error %u at 0x%llx%s", run_->internal.suberror, regs.rip,
            run_->internal.suberror == KVM_INTERNAL_ERROR_EMULATION ? ", an instruction that it doesn't emulate" : "");
        return text.data();
    }
    default: return "KVM's exit " + std::to_string(run_->exit_reason);
    }
}

std::string kvm_vm::handle_port() {
    const auto& io = run_->io;
    std::uint8_t* data = reinterpret_cast<std::uint8_t*>(run_) + io.data_offset;
    const bool is_uart = io.port >= uart_port && io.port < uart_port + 8 && io.size == 1;
    if (!is_uart) {
        std::array<char, 64> text{};
        std::snprintf(text.data(), text.size(),
            io.port == stop_port ? "the guest has stopped itself: port 0x%x" : "nothing to access at port 0x%x", io.port);
        return text.data();
    }
    const std::uint32_t offset = io.port - uart_port;
    for (std::uint32_t i = 0; i != io.count; ++i)
        if (io.direction == KVM_EXIT_IO_IN) data[i] = uart_.load(offset);
        else uart_.store(offset, data[i], clock_.now());
    return {};
}

std::string kvm_vm::set_uart_interrupt() {
    const bool level = uart_.interrupts();
    if (uart_interrupts_ == level) return {};
    uart_interrupts_ = level;
    kvm_irq_level line{};
    line.irq = uart_irq;
    line.level = level ? 1 : 0;
    const vmstate::result<int> set = LIVE_KVM_CALL(vm_.get(), KVM_IRQ_LINE, &line);
    return set ? "" : set.error().message();
}

} // namespace live
