// SPDX-License-Identifier: BSL-1.0
//
// The dirty log of a KVM guest by KVM's bitmap: KVM_GET_DIRTY_LOG and, where there is manual protection,
// KVM_CLEAR_DIRTY_LOG. From the kernel's Documentation/virt/kvm/api.rst. Depends on marked_log.hpp and Linux.
#pragma once

#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/ram/marked_log.hpp>

namespace vmstate {

/// A memory slot of a virtual machine, as it was given to KVM_SET_USER_MEMORY_REGION.
struct kvm_slot {
    std::uint32_t slot = 0;  ///< with the address space in its upper half
    std::uint32_t flags = 0; ///< without KVM_MEM_LOG_DIRTY_PAGES
    std::uint64_t guest_phys_addr = 0;
    std::span<std::byte> memory = {}; ///< whole host pages
    std::uint64_t block_offset = 0;   ///< where in its RAM block the memory begins
};

namespace detail {

inline error kvm_failure(std::string_view what, int number = errno) {
    const bool absent = number == ENOTTY || number == ENOSYS || number == EPERM;
    return error(absent ? errc::unsupported : errc::io, {},
        std::string(what) + ": " + std::system_category().message(number));
}

/// The slots that a block consists of: a PC's RAM, for one, is in two, below and above 4 GiB.
class kvm_slots {
public:
    kvm_slots(int vm_fd, std::vector<kvm_slot> slots) : vm_fd_(vm_fd), slots_(std::move(slots)) {}

    int vm_fd() const noexcept { return vm_fd_; }
    auto begin() const noexcept { return slots_.begin(); }
    auto end() const noexcept { return slots_.end(); }

    /// Switches KVM's logging of all of them on, or of none after an error; or off.
    result<void> set_logging(bool on) const {
        for (std::size_t i = 0; i < slots_.size(); ++i) {
            if (set_logging(slots_[i], on)) continue;
            error failure = kvm_failure("KVM_SET_USER_MEMORY_REGION");
            for (std::size_t done = 0; on && done < i; ++done) (void)set_logging(slots_[done], false);
            return failure;
        }
        return {};
    }

    static std::uint64_t host_page_size() noexcept {
        static const auto size = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
        return size;
    }

private:
    bool set_logging(const kvm_slot& slot, bool on) const noexcept {
        kvm_userspace_memory_region region{};
        region.slot = slot.slot;
        region.flags = slot.flags | (on ? KVM_MEM_LOG_DIRTY_PAGES : 0U);
        region.guest_phys_addr = slot.guest_phys_addr;
        region.memory_size = slot.memory.size();
        region.userspace_addr = reinterpret_cast<std::uintptr_t>(slot.memory.data());
        return ::ioctl(vm_fd_, KVM_SET_USER_MEMORY_REGION, &region) == 0;
    }

    int vm_fd_;
    std::vector<kvm_slot> slots_;
};

} // namespace detail

/// Sees what the guest writes, and what KVM writes for it. What the program itself writes to guest memory, such as a
/// device's DMA, KVM doesn't see: `mark` it.
class kvm_bitmap_log {
public:
    /// `vm_fd` stays open, and the slots as they are, while the log is started. `block_size` in bytes.
    kvm_bitmap_log(int vm_fd, std::vector<kvm_slot> slots, std::uint64_t block_size, std::size_t page_size = 4096)
        : slots_(vm_fd, std::move(slots)), pages_(block_size, page_size), marks_(block_size, page_size) {}
    kvm_bitmap_log(kvm_bitmap_log&& other) noexcept
        : slots_(std::move(other.slots_))
        , pages_(other.pages_)
        , marks_(std::move(other.marks_))
        , manual_(other.manual_)
        , started_(std::exchange(other.started_, false)) {}
    kvm_bitmap_log& operator=(kvm_bitmap_log&&) = delete;
    ~kvm_bitmap_log() {
        if (started_) (void)stop();
    }

    /// Any thread: the program has written `length` bytes at `offset` of the block. Call it after the write.
    void mark(std::uint64_t offset, std::uint64_t length) noexcept { marks_.mark(offset, length); }

    result<void> start() {
        if (started_) return detail::log_started();
        // With manual protection reading the log and protecting pages anew are two steps, and the second one takes no
        // more pages at a time than KVM can protect without keeping the guest from running. It holds for all logs of
        // this virtual machine.
        manual_ = false;
        if (::ioctl(slots_.vm_fd(), KVM_CHECK_EXTENSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) > 0) {
            kvm_enable_cap enable{};
            enable.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
            enable.args[0] = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
            if (::ioctl(slots_.vm_fd(), KVM_ENABLE_CAP, &enable) != 0)
                return detail::kvm_failure("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2");
            manual_ = true;
        }
        if (result<void> marking = marks_.start(); !marking) return marking;
        if (result<void> logging = slots_.set_logging(true); !logging) {
            (void)marks_.stop();
            return logging;
        }
        started_ = true;
        return {};
    }
    result<std::uint64_t> collect(page_bitmap& into) {
        if (!started_) return detail::log_not_started();
        result<std::uint64_t> added = marks_.collect(into);
        for (const kvm_slot& slot : slots_) {
            if (!added) return added;
            if (result<void> collected = collect(slot, into, *added); !collected) return collected.error();
        }
        return added;
    }
    result<void> stop() {
        if (!std::exchange(started_, false)) return {};
        (void)marks_.stop();
        return slots_.set_logging(false);
    }

private:
    /// So many pages are protected in one step. A multiple of 64.
    static constexpr std::uint64_t pages_at_once = 1U << 16;

    result<void> collect(const kvm_slot& slot, page_bitmap& into, std::uint64_t& added) {
        const std::uint64_t host_page = detail::kvm_slots::host_page_size();
        const std::uint64_t count = slot.memory.size() / host_page;
        words_.assign(static_cast<std::size_t>((count + 63) / 64), 0);
        kvm_dirty_log log{};
        log.slot = slot.slot;
        log.dirty_bitmap = words_.data();
        if (::ioctl(slots_.vm_fd(), KVM_GET_DIRTY_LOG, &log) != 0) return detail::kvm_failure("KVM_GET_DIRTY_LOG");
        for_each_run([&](std::uint64_t first, std::uint64_t run) {
            added += pages_.mark(into, slot.block_offset + first * host_page, run * host_page);
        });
        // What is written until a page is protected anew is written before this collect returns, and the page is in it.
        for (std::uint64_t first = 0; manual_ && first < count; first += pages_at_once) {
            const std::uint64_t pages = std::min(pages_at_once, count - first);
            const auto begin = words_.begin() + static_cast<std::ptrdiff_t>(first / 64);
            const auto end = begin + static_cast<std::ptrdiff_t>((pages + 63) / 64);
            if (std::all_of(begin, end, [](std::uint64_t word) { return word == 0; })) continue;
            kvm_clear_dirty_log clear{};
            clear.slot = slot.slot;
            clear.first_page = first;
            clear.num_pages = static_cast<std::uint32_t>(pages);
            clear.dirty_bitmap = &*begin;
            if (::ioctl(slots_.vm_fd(), KVM_CLEAR_DIRTY_LOG, &clear) != 0)
                return detail::kvm_failure("KVM_CLEAR_DIRTY_LOG");
        }
        return {};
    }
    /// KVM's words are the host's `unsigned long`, bit n of the slot in word n / 64.
    template <class Visit>
    void for_each_run(Visit visit) const {
        for (std::size_t i = 0; i < words_.size(); ++i) {
            std::uint64_t word = words_[i];
            while (word != 0) {
                const int first = std::countr_zero(word);
                const int run = std::countr_one(word >> first);
                visit(i * 64 + static_cast<unsigned>(first), static_cast<std::uint64_t>(run));
                if (first + run == 64) break;
                word &= ~std::uint64_t{0} << (first + run);
            }
        }
    }

    detail::kvm_slots slots_;
    detail::block_pages pages_;
    marked_log marks_;
    std::vector<std::uint64_t> words_;
    bool manual_ = false;
    bool started_ = false;
};

} // namespace vmstate
