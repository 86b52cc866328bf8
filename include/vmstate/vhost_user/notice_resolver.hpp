// SPDX-License-Identifier: BSL-1.0
//
// The backend's side of page notices: a thread that hears of the backend's own faults, asks the VMM for what its file hasn't,
// and maps what it has. Depends on page_notices.hpp, polling_thread.hpp, ram/userfault.hpp and Linux.
#pragma once

#include <linux/userfaultfd.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/page_notices.hpp>
#include <vmstate/vhost_user/polling_thread.hpp>

namespace vmstate::vhost_user {

/// One thread starts and stops it. What goes wrong on its own thread ends that: who waits for a page then waits until the
/// memory is taken off the userfaultfd, as at the end of postcopy or of the connection.
class notice_resolver {
public:
    /// How its regions are registered with the userfaultfd.
    static constexpr std::uint64_t register_mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR;
    /// What the userfaultfd has to have, where the kernel has it.
    static constexpr std::uint64_t features = userfault_feature::minor_shmem | userfault_feature::minor_hugetlbfs;

    /// A region of SET_MEM_TABLE, in its order.
    struct region {
        std::span<std::byte> memory;
        std::size_t page_size = 0; ///< of the host pages behind it
    };

    /// `faults` outlives this; nobody else reads from it.
    notice_resolver(const userfault& faults, unique_fd notices) : faults_(faults), notices_(std::move(notices)) {}
    notice_resolver(const notice_resolver&) = delete;
    notice_resolver& operator=(const notice_resolver&) = delete;
    ~notice_resolver() { stop(); }

    /// With these regions from now on. Before they are registered.
    result<void> start(std::vector<region> regions) {
        stop();
        regions_ = std::move(regions);
        missed_.clear();
        return thread_.start([this](int stop) { serve(stop); });
    }
    /// Harmless twice.
    void stop() noexcept { thread_.stop(); }

private:
    /// The thread. It touches no guest memory, and waits for nothing but this.
    void serve(int stop) {
        for (;;) {
            const bool full = missed_.size() >= max_missed_pages;
            std::array<pollfd, 3> events{{{stop, POLLIN, 0}, {notices_.get(), POLLIN, 0}, {full ? -1 : faults_.get(), POLLIN, 0}}};
            if (::poll(events.data(), events.size(), -1) < 0) {
                if (errno == EINTR) continue;
                return;
            }
            if (events[0].revents != 0) return;
            if (events[1].revents != 0 && !take_notices()) return;
            if (events[2].revents != 0 && !take_faults()) return;
        }
    }
    bool take_notices() {
        for (;;) {
            const result<std::optional<page_notice>> notice = receive_notice(notices_.get());
            if (!notice) return false;
            if (!*notice) return true;
            // What nobody asked for is no harm.
            if (missed_.erase(**notice) != 0) map(page_at(**notice));
        }
    }
    bool take_faults() {
        std::array<uffd_msg, 32> messages;
        const std::size_t room = std::min(messages.size(), max_missed_pages - missed_.size());
        const ssize_t got = ::read(faults_.get(), messages.data(), room * sizeof(uffd_msg));
        if (got < 0) return errno == EINTR || errno == EAGAIN;
        for (std::size_t i = 0; i != static_cast<std::size_t>(got) / sizeof(uffd_msg); ++i) {
            if (messages[i].event != UFFD_EVENT_PAGEFAULT) continue;
            const std::optional<page_notice> page = find(messages[i].arg.pagefault.address);
            if (!page) continue;
            if ((messages[i].arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR) != 0) map(page_at(*page));
            else if (missed_.insert(*page).second && !send_notice(notices_.get(), *page)) return false;
        }
        return true;
    }
    /// The page is in the file.
    void map(std::span<std::byte> page) const {
        const result<std::size_t> mapped = faults_.map_present(page);
        // Where it was mapped already, or the memory has just been taken off the userfaultfd, its threads look again.
        if (!mapped || *mapped != page.size()) static_cast<void>(faults_.wake(page));
    }
    std::optional<page_notice> find(std::uint64_t address) const noexcept {
        for (std::uint64_t i = 0; i != regions_.size(); ++i) {
            const region& one = regions_[i];
            const std::uint64_t offset = address - reinterpret_cast<std::uintptr_t>(one.memory.data());
            if (offset < one.memory.size()) return page_notice{i, offset - offset % one.page_size};
        }
        return std::nullopt;
    }
    /// Of one that `find` has made.
    std::span<std::byte> page_at(const page_notice& page) const noexcept {
        const region& one = regions_[page.region];
        return one.memory.subspan(static_cast<std::size_t>(page.offset), one.page_size);
    }

    const userfault& faults_;
    const unique_fd notices_;
    detail::polling_thread thread_;
    // The thread's, while there is one.
    std::vector<region> regions_;
    std::set<page_notice> missed_;
};

} // namespace vmstate::vhost_user
