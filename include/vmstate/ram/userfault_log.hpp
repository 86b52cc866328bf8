// SPDX-License-Identifier: BSL-1.0
//
// The dirty log for kernels without PAGEMAP_SCAN: the first write to each page stops at a userfaultfd until a thread has
// noted the page and let it go on. Linux 5.7 or newer. Depends on dirty_log.hpp, userfault.hpp.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/ram/userfault.hpp>

namespace vmstate {

/// Sees what is written through this mapping of the memory: by this process, by system calls on its behalf, by KVM. Each
/// page's first write after a collect costs a switch to the log's thread. While it is active a thread that writes waits
/// for the log's thread: never for one that calls `start`, `collect` or `stop`.
class userfault_log {
public:
    struct options {
        std::size_t page_size = 4096;      ///< the target's
        std::size_t host_page_size = 4096; ///< of the pages that back the memory: 4096, 2 MiB, 1 GiB
        /// Features of userfaultfd to do without where this kernel has them.
        std::uint64_t without_features = 0;
    };

    /// `memory` is whole host pages.
    explicit userfault_log(std::span<std::byte> memory) : userfault_log(memory, options{}) {}
    userfault_log(std::span<std::byte> memory, const options& how) : memory_(memory), options_(how) {}
    userfault_log(userfault_log&&) noexcept = default;
    userfault_log& operator=(userfault_log&&) = delete;
    ~userfault_log() { (void)stop(); }

    result<void> start() {
        if (active_) return detail::log_started();
        result<std::uint64_t> supported = userfault::supported_features();
        if (!supported) return supported.error();
        const std::uint64_t features = userfault_feature::pagefault_flag_wp |
                                       (*supported & ~options_.without_features &
                                           (userfault_feature::wp_hugetlbfs_shmem | userfault_feature::wp_unpopulated));
        result<userfault> fault = userfault::open(userfault_scope::user_and_kernel, features);
        if (!fault) return fault.error();
        unique_fd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!wake) return userfault::failure("eventfd");
        // Protection is a bit of a page that is there; an absent one has nowhere to keep it unless the kernel can mark
        // the place.
        if ((features & userfault_feature::wp_unpopulated) == 0) populate();
        if (result<void> added = fault->add(memory_, UFFDIO_REGISTER_MODE_WP); !added) return added;
        // The thread is there before the first page is protected.
        auto starting =
            std::make_unique<active>(memory_, options_, std::move(*fault), std::move(wake));
        active* const running = starting.get();
        try {
            starting->thread = std::thread([running] { running->serve(); });
        } catch (const std::system_error& refused) {
            return error(errc::io, {}, std::string("thread: ") + refused.what());
        }
        active_ = std::move(starting);
        if (result<void> armed = active_->fault.write_protect(memory_, true); !armed) {
            (void)stop();
            return armed;
        }
        return {};
    }
    result<std::uint64_t> collect(page_bitmap& into) {
        if (!active_) return detail::log_not_started();
        if (result<void> fits = active_->pages.check(into); !fits) return fits.error();
        return active_->collect(into);
    }
    result<void> stop() {
        if (!active_) return {};
        const std::unique_ptr<active> ending = std::move(active_);
        const std::uint64_t one = 1;
        while (::write(ending->wake.get(), &one, sizeof one) < 0 && errno == EINTR) {
        }
        ending->thread.join();
        // Who waits for a page now goes on.
        return ending->fault.remove(memory_);
    }

private:
    /// What `start` makes and `stop` ends; it stays where it is, for its thread.
    struct active {
        active(std::span<std::byte> block, const options& how, userfault f, unique_fd w)
            : memory(block)
            , host_page_size(how.host_page_size)
            , pages(block.size(), how.page_size)
            , hosts(block.size(), how.host_page_size)
            , fault(std::move(f))
            , wake(std::move(w))
            , written(hosts.count()) {}

        /// The thread: notes pages and lets their writers go on. Takes `written_lock` for each batch of faults.
        void serve() {
            std::array<uffd_msg, 64> messages;
            for (;;) {
                std::array<pollfd, 2> events{{{fault.get(), POLLIN, 0}, {wake.get(), POLLIN, 0}}};
                if (::poll(events.data(), events.size(), -1) < 0) {
                    if (errno == EINTR) continue;
                    return give_up(userfault::failure("poll"));
                }
                if (events[1].revents != 0) return;
                const ssize_t got = ::read(fault.get(), messages.data(), sizeof messages);
                if (got < 0) {
                    if (errno == EINTR || errno == EAGAIN) continue;
                    return give_up(userfault::failure("read from userfaultfd"));
                }
                const std::scoped_lock guard(written_lock);
                for (std::size_t i = 0; i < static_cast<std::size_t>(got) / sizeof(uffd_msg); ++i) {
                    if (messages[i].event != UFFD_EVENT_PAGEFAULT) continue;
                    if (result<void> released = release(messages[i].arg.pagefault.address); !released)
                        return give_up_locked(released.error());
                }
            }
        }
        /// Under `written_lock`. Without it a collect could take the page's bit and protect it just before it is unprotected
        /// here, and what is written then would be in no collect.
        result<void> release(std::uint64_t address) {
            const std::uint64_t offset = address - reinterpret_cast<std::uintptr_t>(memory.data());
            const page_run host = hosts.touched_by(offset, 1);
            if (host.count == 0) return {};
            written.set(host.first);
            return fault.write_protect(memory.subspan(host.first * host_page_size, host_page_size), false);
        }

        result<std::uint64_t> collect(page_bitmap& into) {
            // A stretch at a time: while the lock is held writers wait.
            constexpr std::size_t stretch = 64 * page_bitmap::bits_per_word;
            std::uint64_t added = 0;
            for (std::size_t begin = 0; begin < written.size(); begin += stretch) {
                const std::size_t end = std::min(begin + stretch, written.size());
                const std::scoped_lock guard(written_lock);
                if (failure) return failure;
                for (page_run run = written.find_next_run(begin); run.count != 0 && run.first < end;
                     run = written.find_next_run(run.first + run.count)) {
                    run.count = std::min(run.count, end - run.first);
                    const std::span<std::byte> stretch_memory =
                        memory.subspan(run.first * host_page_size, run.count * host_page_size);
                    // Protected first: where that fails the bits are still there, for the next collect.
                    if (result<void> armed = fault.write_protect(stretch_memory, true); !armed)
                        return armed.error();
                    written.clear_range(run.first, run.count);
                    added += pages.mark(into, run.first * host_page_size, run.count * host_page_size);
                }
            }
            return added;
        }

        /// Nobody is to wait for a thread that is gone.
        void give_up(error why) {
            const std::scoped_lock guard(written_lock);
            give_up_locked(std::move(why));
        }
        void give_up_locked(error why) {
            failure = std::move(why);
            (void)fault.remove(memory);
        }

        std::span<std::byte> memory;
        std::size_t host_page_size;
        detail::block_pages pages; // target's
        detail::block_pages hosts; // the host's
        userfault fault;
        unique_fd wake;
        std::thread thread;

        std::mutex written_lock;
        page_bitmap written; // by host page; a set bit is a page without protection
        error failure;
    };

    /// Makes every page present, at least as the kernel's page of zeros.
    void populate() const noexcept {
        const volatile std::byte* const bytes = memory_.data();
        for (std::size_t i = 0; i < memory_.size(); i += options_.host_page_size) (void)bytes[i];
    }

    std::span<std::byte> memory_;
    options options_;
    std::unique_ptr<active> active_;
};

} // namespace vmstate
