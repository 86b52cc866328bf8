// SPDX-License-Identifier: BSL-1.0
//
// The dirty log of a KVM guest by KVM's dirty rings: each vCPU puts the pages that it writes into a ring of its own, and
// nobody scans a bitmap of all memory. Linux 5.11 or newer. From the kernel's Documentation/virt/kvm/api.rst,
// KVM_CAP_DIRTY_LOG_RING. Depends on kvm_log.hpp.
#pragma once

#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/ram/kvm_log.hpp>

namespace vmstate {

/// The rings of one virtual machine. They serve all of its slots, hence all `kvm_ring_log`s of its blocks.
///
/// A vCPU whose ring is full leaves KVM_RUN with KVM_EXIT_DIRTY_RING_FULL and can't run until someone has called
/// `harvest`; its own thread may.
class kvm_dirty_ring {
public:
    /// Before the first vCPU is created. `entries` per vCPU, a power of two; 16 bytes each. `errc::unsupported` where KVM
    /// has no rings.
    static result<kvm_dirty_ring> enable(int vm_fd, std::uint32_t entries = 65536) {
        const std::uint64_t bytes = std::uint64_t{entries} * sizeof(kvm_dirty_gfn);
        // ACQ_REL is the same with its memory order promised; only that one is offered by processors that reorder more.
        for (const int cap : {KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING}) {
            const int most = ::ioctl(vm_fd, KVM_CHECK_EXTENSION, cap);
            if (most <= 0) continue;
            if (!std::has_single_bit(entries) || bytes > static_cast<std::uint64_t>(most))
                return error(errc::invalid_argument,
                    "a power of two of up to " + std::to_string(static_cast<std::size_t>(most) / sizeof(kvm_dirty_gfn)) +
                        " entries",
                    std::to_string(entries));
            kvm_enable_cap enable{};
            enable.cap = static_cast<__u32>(cap);
            enable.args[0] = bytes;
            if (::ioctl(vm_fd, KVM_ENABLE_CAP, &enable) != 0) return detail::kvm_failure("KVM_CAP_DIRTY_LOG_RING");
            return kvm_dirty_ring(vm_fd, entries);
        }
        return error(errc::unsupported, {}, "KVM without dirty rings");
    }

    /// Each vCPU, before it first runs. The descriptor is needed for the call alone.
    result<void> add_vcpu(int vcpu_fd) {
        const std::size_t bytes = state_->entries * sizeof(kvm_dirty_gfn);
        const auto place =
            static_cast<off_t>(KVM_DIRTY_LOG_PAGE_OFFSET * detail::kvm_slots::host_page_size());
        void* const address = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_fd, place);
        if (address == MAP_FAILED) return detail::kvm_failure("mmap of a dirty ring");
        const std::scoped_lock guard(state_->rings_lock);
        state_->rings.push_back({static_cast<kvm_dirty_gfn*>(address), 0});
        return {};
    }

    /// Any thread: empties the rings into the logs, and lets vCPUs run on whose rings were full. Pages that a processor
    /// still has in a buffer of its own come when the vCPU has left KVM_RUN.
    result<void> harvest() {
        const std::scoped_lock guard(state_->rings_lock);
        return state_->harvest();
    }

private:
    friend class kvm_ring_log;

    /// One block's share of the pages.
    struct listener {
        const kvm_slot* slot;
        const detail::block_pages* pages;
        page_bitmap* written;
    };
    struct ring {
        kvm_dirty_gfn* entries;
        std::uint32_t next; ///< the first that isn't harvested
    };
    struct state {
        state(int fd, std::uint32_t count) noexcept : vm_fd(fd), entries(count) {}
        state(const state&) = delete;
        state& operator=(const state&) = delete;
        ~state() {
            for (const ring& one : rings) ::munmap(one.entries, entries * sizeof(kvm_dirty_gfn));
        }

        /// Under `rings_lock`, which is held until KVM has protected the pages anew: otherwise another thread could take a
        /// page out of a log that the guest may still write without a new entry.
        result<void> harvest() {
            if (failure) return failure;
            for (ring& one : rings) {
                for (std::uint32_t harvested = 0;; ++one.next, ++unreset) {
                    // KVM stops the vCPU some entries before; without one left it has lost count, and pages with it.
                    if (harvested++ == entries) return failure = error(errc::io, {}, "a dirty ring ran over");
                    kvm_dirty_gfn& entry = one.entries[one.next & (entries - 1)];
                    const std::atomic_ref<__u32> flags(entry.flags);
                    // Acquire: the rest of the entry was written before its flag. Release: KVM reuses it afterwards.
                    if ((flags.load(std::memory_order_acquire) & (KVM_DIRTY_GFN_F_DIRTY | KVM_DIRTY_GFN_F_RESET)) !=
                        KVM_DIRTY_GFN_F_DIRTY)
                        break;
                    note(entry.slot, entry.offset);
                    flags.store(KVM_DIRTY_GFN_F_RESET, std::memory_order_release);
                }
            }
            return reset();
        }
        result<void> reset() {
            constexpr int most_in_vain = 1000; // what can't be blocked: a debugger, SIGSTOP
            for (int in_vain = 0; unreset != 0;) {
                const int done = reset_undisturbed();
                if (done < 0 && errno != EINTR) return failure = detail::kvm_failure("KVM_RESET_DIRTY_RINGS");
                if (done > 0) {
                    unreset -= std::min(unreset, static_cast<std::uint64_t>(done));
                    in_vain = 0;
                } else if (++in_vain == most_in_vain) {
                    return error(errc::io, "KVM_RESET_DIRTY_RINGS of all that was harvested", std::to_string(unreset) + " entries less");
                }
            }
            return {};
        }
        /// As the ioctl. Linux 6.16 and newer leave off at a signal, tell how far they have come, and have not protected all
        /// that they count: no signal may come.
        int reset_undisturbed() const noexcept {
            ::sigset_t all;
            ::sigset_t before;
            ::sigfillset(&all);
            ::pthread_sigmask(SIG_SETMASK, &all, &before);
            const int done = ::ioctl(vm_fd, KVM_RESET_DIRTY_RINGS, 0);
            const int why = errno;
            ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
            errno = why;
            return done;
        }
        void note(std::uint32_t slot, std::uint64_t page) const noexcept {
            const std::uint64_t host_page = detail::kvm_slots::host_page_size();
            for (const listener& one : listeners)
                if (one.slot->slot == slot && page < one.slot->memory.size() / host_page)
                    one.pages->mark(*one.written, one.slot->block_offset + page * host_page, host_page);
        }

        int vm_fd;
        std::uint32_t entries;
        std::mutex rings_lock; // and of the logs' bitmaps
        std::vector<ring> rings;
        std::vector<listener> listeners;
        std::uint64_t unreset = 0; ///< entries that were harvested and that KVM hasn't taken back yet
        error failure;
    };

    kvm_dirty_ring(int vm_fd, std::uint32_t entries) : state_(std::make_shared<state>(vm_fd, entries)) {}

    std::shared_ptr<state> state_;
};

/// One block's log over the rings. What the program itself writes to guest memory KVM doesn't see: `mark` it.
class kvm_ring_log {
public:
    /// The slots stay as they are while the log is started. `block_size` in bytes.
    kvm_ring_log(const kvm_dirty_ring& ring, std::vector<kvm_slot> slots, std::uint64_t block_size,
        std::size_t page_size = 4096)
        : state_(std::make_unique<state>(ring.state_, std::move(slots), block_size, page_size)) {}
    kvm_ring_log(kvm_ring_log&&) noexcept = default;
    kvm_ring_log& operator=(kvm_ring_log&&) = delete;
    ~kvm_ring_log() {
        if (state_) (void)stop();
    }

    /// Any thread: the program has written `length` bytes at `offset` of the block. Call it after the write.
    void mark(std::uint64_t offset, std::uint64_t length) noexcept { state_->marks.mark(offset, length); }

    result<void> start() {
        if (state_->started) return detail::log_started();
        kvm_dirty_ring::state& ring = *state_->ring;
        {
            const std::scoped_lock guard(ring.rings_lock);
            state_->written.clear_all();
            for (const kvm_slot& slot : state_->slots)
                ring.listeners.push_back({&slot, &state_->pages, &state_->written});
        }
        state_->started = true;
        result<void> logging = state_->marks.start();
        if (logging) logging = state_->slots.set_logging(true);
        if (!logging) leave();
        return logging;
    }
    result<std::uint64_t> collect(page_bitmap& into) {
        if (!state_->started) return detail::log_not_started();
        result<std::uint64_t> added = state_->marks.collect(into);
        if (!added) return added;
        const std::scoped_lock guard(state_->ring->rings_lock);
        if (result<void> harvested = state_->ring->harvest(); !harvested) return harvested.error();
        *added += into.merge(state_->written);
        state_->written.clear_all();
        return added;
    }
    result<void> stop() {
        if (!state_->started) return {};
        leave();
        return state_->slots.set_logging(false);
    }

private:
    struct state {
        state(std::shared_ptr<kvm_dirty_ring::state> r, std::vector<kvm_slot> s, std::uint64_t block_size,
            std::size_t page_size)
            : ring(std::move(r))
            , slots(ring->vm_fd, std::move(s))
            , pages(block_size, page_size)
            , marks(block_size, page_size)
            , written(pages.count()) {}

        std::shared_ptr<kvm_dirty_ring::state> ring;
        detail::kvm_slots slots;
        detail::block_pages pages;
        marked_log marks;
        page_bitmap written; // guarded by the rings' lock
        bool started = false;
    };

    /// The rings forget this log.
    void leave() {
        const std::scoped_lock guard(state_->ring->rings_lock);
        std::erase_if(state_->ring->listeners,
            [this](const kvm_dirty_ring::listener& one) { return one.written == &state_->written; });
        (void)state_->marks.stop();
        state_->started = false;
    }

    std::unique_ptr<state> state_;
};

} // namespace vmstate
