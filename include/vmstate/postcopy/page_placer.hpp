// SPDX-License-Identifier: BSL-1.0
//
// Puts pages into memory that is registered with a userfaultfd, so that each host page appears at once and in full, and
// who waits for it goes on. Depends on received_pages.hpp and ram/userfault.hpp.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/postcopy/received_pages.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

namespace detail {

/// Memory that belongs to nobody's guest: for pages that aren't complete yet.
class scratch_memory {
public:
    scratch_memory() noexcept = default;
    scratch_memory(scratch_memory&& other) noexcept : bytes_(std::exchange(other.bytes_, {})) {}
    scratch_memory& operator=(scratch_memory&& other) noexcept {
        std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~scratch_memory() {
        if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
    }
    /// `size` bytes, zero until they are written.
    static result<scratch_memory> map(std::size_t size) {
        void* const address =
            ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (address == MAP_FAILED) return userfault::failure("mmap");
        scratch_memory mapped;
        mapped.bytes_ = {static_cast<std::byte*>(address), size};
        return mapped;
    }
    std::span<std::byte> span() const noexcept { return bytes_; }

private:
    std::span<std::byte> bytes_;
};

} // namespace detail

/// `start()` comes first and once; then any thread places. A page that was received stays as it is: the same page may come
/// by two channels, and the first wins. One that is there and was never received is nobody's, and an error
/// (`errc::bad_ram`): it came into being behind our back, and whoever looks at it finds something else than the source's.
/// What `on_placed` calls happens on the thread that placed.
class page_placer {
public:
    /// A host page of `block` has come, and is marked as received.
    using placed_function = std::function<void(ram_block& block, std::uint64_t offset, std::uint64_t size)>;

    /// `received` has the blocks, and outlives this.
    explicit page_placer(received_pages& received) noexcept : received_(received) {}
    page_placer(const page_placer&) = delete;
    page_placer& operator=(const page_placer&) = delete;

    /// Tells `who` of each page. Before `start`.
    void on_placed(placed_function who) { listeners_.push_back(std::move(who)); }

    /// Opens the userfaultfd and registers the part of each block that is in use: from here on who touches a missing page
    /// waits until it is placed, or until this is gone.
    result<void> start() {
        const result<std::uint64_t> supported = userfault::supported_features();
        if (!supported) return supported.error();
        thread_ids_ = (*supported & userfault_feature::thread_id) != 0;
        result<userfault> opened = userfault::open(userfault_scope::user_and_kernel,
            *supported & (userfault_feature::thread_id | userfault_feature::missing_hugetlbfs |
                             userfault_feature::missing_shmem));
        if (!opened) return opened.error();
        result<void> done;
        std::uint64_t largest = 0;
        received_.for_each_block([&](const ram_block& block) {
            if (!done || block.used_length == 0) return;
            const result<std::uint64_t> calls = opened->register_memory(block.used(), UFFDIO_REGISTER_MODE_MISSING);
            if (!calls) done = std::move(error(calls.error()).within(block.name));
            else if ((*calls & std::uint64_t{1} << _UFFDIO_ZEROPAGE) == 0) {
                without_zero_page_.push_back(&block);
                largest = std::max(largest, block.options.host_page_size);
            }
        });
        if (!done) return done;
        if (largest != 0) {
            // Never written, so that there is no more behind it than the kernel's page of zeros.
            result<detail::scratch_memory> zeros = detail::scratch_memory::map(static_cast<std::size_t>(largest));
            if (!zeros) return zeros.error();
            zeros_ = std::move(*zeros);
        }
        fault_.emplace(std::move(*opened));
        return {};
    }
    /// After `start`.
    const userfault& fault() const noexcept { return *fault_; }
    received_pages& received() const noexcept { return received_; }
    /// Whether faults say which thread they stopped.
    bool has_thread_ids() const noexcept { return thread_ids_; }

    /// Places the host page at `offset` with what is at `from`, outside of guest memory.
    result<void> place(ram_block& block, std::uint64_t offset, const std::byte* from) {
        const in_hand mine(*this, host_page(block, offset));
        if (result<void> done = copy(host_page(block, offset), block, from); !done) return done;
        return arrived(block, offset);
    }
    /// The same for host pages that follow each other, by one call: each appears for itself.
    result<void> place_run(ram_block& block, std::uint64_t offset, std::span<const std::byte> pages) {
        const in_hand mine(*this, block.page(offset, pages.size()));
        if (result<void> done = copy(block.page(offset, pages.size()), block, pages.data()); !done) return done;
        const std::uint64_t size = block.options.host_page_size;
        for (std::uint64_t at = offset; at != offset + pages.size(); at += size)
            if (result<void> done = arrived(block, at); !done) return done;
        return {};
    }
    /// The same for a page of zeros, without memory behind it where the kernel can.
    result<void> place_zero(ram_block& block, std::uint64_t offset) {
        const in_hand mine(*this, host_page(block, offset));
        if (result<void> done = zero(block, offset); !done) return done;
        return arrived(block, offset);
    }
    /// Who waits in a page that was received goes on. A page of zeros that came in precopy needn't ever have come into
    /// being: then it does now.
    result<void> settle(ram_block& block, std::uint64_t offset) { return zero(block, offset); }

private:
    /// Pages that a thread is about to place, until they are marked: no other places them meanwhile, so that whoever finds
    /// one there and not marked knows that none of us did it. The other waits for a system call, never for a page.
    class in_hand {
    public:
        in_hand(page_placer& whose, std::span<std::byte> pages) : whose_(whose), pages_(pages) {
            std::unique_lock lock(whose_.hands_mutex_);
            whose_.hand_freed_.wait(lock, [&] {
                return std::none_of(whose_.in_hands_.begin(), whose_.in_hands_.end(), [&](std::span<std::byte> other) {
                    return pages_.data() < other.data() + other.size() && other.data() < pages_.data() + pages_.size();
                });
            });
            whose_.in_hands_.push_back(pages_);
        }
        ~in_hand() {
            {
                const std::lock_guard lock(whose_.hands_mutex_);
                std::erase_if(whose_.in_hands_, [&](std::span<std::byte> one) { return one.data() == pages_.data(); });
            }
            whose_.hand_freed_.notify_all();
        }
        in_hand(const in_hand&) = delete;
        in_hand& operator=(const in_hand&) = delete;

    private:
        page_placer& whose_;
        const std::span<std::byte> pages_;
    };

    static std::span<std::byte> host_page(const ram_block& block, std::uint64_t offset) noexcept {
        return block.page(offset, static_cast<std::size_t>(block.options.host_page_size));
    }
    bool has_zero_page(const ram_block& block) const noexcept {
        return std::find(without_zero_page_.begin(), without_zero_page_.end(), &block) == without_zero_page_.end();
    }
    result<void> zero(ram_block& block, std::uint64_t offset) {
        const std::span<std::byte> page = host_page(block, offset);
        if (!has_zero_page(block)) return copy(page, block, zeros_.span().data());
        return each_step(page, block, [&](std::span<std::byte> rest, std::size_t) { return fault_->zero(rest); });
    }
    result<void> copy(std::span<std::byte> page, const ram_block& block, const std::byte* from) {
        return each_step(
            page, block, [&](std::span<std::byte> rest, std::size_t done) { return fault_->copy(rest, from + done); });
    }
    /// `call` stops short at what is there already: who waits for that is woken here. It is a host page, unless the memory
    /// has smaller pages than the source's: a block that came with a stream has.
    template <class Call>
    result<void> each_step(std::span<std::byte> page, const ram_block& block, Call call) {
        const std::size_t unit = has_zero_page(block) ? small_page_ : static_cast<std::size_t>(block.options.host_page_size);
        for (std::size_t done = 0; done < page.size();) {
            const result<std::size_t> placed = call(page.subspan(done), done);
            if (!placed) {
                note_begun(block, page, page.size());
                return std::move(error(placed.error()).within(block.name));
            }
            done += *placed;
            if (done == page.size()) break;
            if (!is_ours(block, page.data() + done)) {
                note_begun(block, page, done);
                return std::move(error(errc::bad_ram, "memory that is missing until its page comes",
                    "a page at " + std::to_string(page.data() + done - block.memory.data()) + " that came into being by another way")
                                     .within(block.name));
            }
            if (result<void> woken = fault_->wake(page.subspan(done, unit)); !woken) return woken;
            done += unit;
        }
        return {};
    }
    /// Whether a page that is there was received, or may have been placed by a call that failed behind it.
    bool is_ours(const ram_block& block, const std::byte* page) const {
        const std::uint64_t size = block.options.host_page_size;
        const std::uint64_t offset = static_cast<std::uint64_t>(page - block.memory.data()) / size * size;
        if (received_.has(block, offset, size)) return true;
        const std::lock_guard lock(hands_mutex_);
        return begun_.contains({&block, offset});
    }
    /// Of `pages` the first `size` bytes may be placed, and aren't marked.
    void note_begun(const ram_block& block, std::span<std::byte> pages, std::size_t size) {
        const std::uint64_t unit = block.options.host_page_size;
        const auto offset = static_cast<std::uint64_t>(pages.data() - block.memory.data());
        const std::lock_guard lock(hands_mutex_);
        for (std::uint64_t at = 0; at < size; at += unit) begun_.emplace(&block, offset + at);
    }
    result<void> arrived(ram_block& block, std::uint64_t offset) {
        // After the page: who sees the mark finds it. Before the listeners: one that looks at the mark while it notes a
        // request either sees it, or is told.
        received_.mark(block, offset, block.options.host_page_size);
        for (const placed_function& tell : listeners_) tell(block, offset, block.options.host_page_size);
        return {};
    }

    received_pages& received_;
    std::vector<placed_function> listeners_;
    std::optional<userfault> fault_;
    bool thread_ids_ = false;
    const std::size_t small_page_ = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    std::vector<const ram_block*> without_zero_page_; // hugetlb
    detail::scratch_memory zeros_;

    mutable std::mutex hands_mutex_; ///< all below
    std::condition_variable hand_freed_;
    std::vector<std::span<std::byte>> in_hands_;
    std::set<std::pair<const ram_block*, std::uint64_t>> begun_; ///< host pages of which a failed call may have placed some
};

} // namespace vmstate
