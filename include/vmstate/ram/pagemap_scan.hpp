// SPDX-License-Identifier: BSL-1.0
//
// PAGEMAP_SCAN (Linux 6.7): asks the kernel which pages of this process are present or were written, and write-protects
// them anew in the same step. From the kernel's Documentation/admin-guide/mm/pagemap.rst; the constants are here because
// older headers lack them. Depends on support/ and Linux.
#pragma once

#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>
#include <utility>

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate {

/// What a page can be, PAGE_IS_*.
namespace page_category {
inline constexpr std::uint64_t written = 1U << 1;
inline constexpr std::uint64_t present = 1U << 3;
inline constexpr std::uint64_t swapped = 1U << 4;
inline constexpr std::uint64_t zero_frame = 1U << 5; ///< the kernel's shared page of zeros
} // namespace page_category

namespace detail {

/// struct page_region: addresses from `start` up to `end`.
struct scanned_region {
    std::uint64_t start;
    std::uint64_t end;
    std::uint64_t categories;
};

/// struct pm_scan_arg.
struct scan_arguments {
    std::uint64_t size;
    std::uint64_t flags;
    std::uint64_t start;
    std::uint64_t end;
    std::uint64_t walk_end;
    std::uint64_t vec;
    std::uint64_t vec_len;
    std::uint64_t max_pages;
    std::uint64_t category_inverted;
    std::uint64_t category_mask;
    std::uint64_t category_anyof_mask;
    std::uint64_t return_mask;
};
static_assert(sizeof(scan_arguments) == 96);

inline constexpr std::uint64_t scan_write_protect_matching = 1U << 0; // PM_SCAN_WP_MATCHING
inline constexpr std::uint64_t scan_check_write_protect_async = 1U << 1; // PM_SCAN_CHECK_WPASYNC

} // namespace detail

/// /proc/self/pagemap.
class pagemap {
public:
    /// Which pages are asked for: those with all of `all_of`, at least one of `any_of` (0: no matter), none of `none_of`.
    struct query {
        std::uint64_t all_of = 0;
        std::uint64_t any_of = 0;
        std::uint64_t none_of = 0;
    };

    static result<pagemap> open() {
        unique_fd fd(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
        if (!fd) return failure("/proc/self/pagemap");
        return pagemap(std::move(fd));
    }

    /// Calls `found(offset, length)`, in bytes from the start of `memory`, for the stretches of pages that `wanted`
    /// describes, in order. `errc::unsupported` where the kernel has no PAGEMAP_SCAN.
    template <class Found>
    result<void> scan(std::span<const std::byte> memory, query wanted, Found found) const {
        return walk(memory, wanted, 0, found);
    }
    /// The same for the pages that were written since they were last write-protected, and write-protects them anew. The
    /// memory is registered with a userfaultfd that protects asynchronously. Where it fails, pages may have been protected
    /// that `found` hasn't seen.
    template <class Found>
    result<void> take_written(std::span<const std::byte> memory, Found found) const {
        return walk(memory, {.all_of = page_category::written},
            detail::scan_write_protect_matching | detail::scan_check_write_protect_async, found);
    }
    /// The same for memory that `write_protect` has left alone: what isn't there is no page that was written, as it is in
    /// the eyes of the kernel where it has put no mark. Takes the kernel about twice as long.
    template <class Found>
    result<void> take_written_if_present(std::span<const std::byte> memory, Found found) const {
        return walk(memory, {.all_of = page_category::written, .any_of = page_category::present | page_category::swapped},
            detail::scan_write_protect_matching | detail::scan_check_write_protect_async, found);
    }
    /// Write-protects all of it, in one step and without looking at it: a page that isn't there gets a mark in the page
    /// table, which takes that into being and looks like a page in swap.
    result<void> write_protect(std::span<const std::byte> memory) const {
        detail::scan_arguments arguments = arguments_for(memory, {.all_of = page_category::written});
        arguments.flags = detail::scan_write_protect_matching | detail::scan_check_write_protect_async;
        // Without room for an answer one call goes through all of it.
        if (::ioctl(fd_.get(), request, &arguments) < 0) return failure("PAGEMAP_SCAN");
        return {};
    }

    /// What older kernels tell, too: calls `found` for the stretches of pages that are present or in swap.
    template <class Found>
    result<void> read_entries(std::span<const std::byte> memory, std::size_t host_page_size, Found found) const {
        std::array<std::uint64_t, batch> entries;
        const std::uint64_t first = reinterpret_cast<std::uintptr_t>(memory.data()) / host_page_size;
        const std::uint64_t count = memory.size() / host_page_size;
        for (std::uint64_t done = 0; done < count;) {
            const std::size_t wanted = static_cast<std::size_t>(std::min<std::uint64_t>(batch, count - done));
            const ssize_t got = ::pread(fd_.get(), entries.data(), wanted * sizeof(std::uint64_t),
                static_cast<off_t>((first + done) * sizeof(std::uint64_t)));
            if (got <= 0) return failure("/proc/self/pagemap");
            const std::size_t pages = static_cast<std::size_t>(got) / sizeof(std::uint64_t);
            for (std::size_t i = 0; i < pages; ++i)
                if (entries[i] >> 62 != 0) found((done + i) * host_page_size, host_page_size);
            done += pages;
        }
        return {};
    }

private:
    static constexpr unsigned long request = _IOWR('f', 16, detail::scan_arguments);
    /// One call brings at most so many stretches. The kernel gathers them for 2 MiB at a time; more than these would not
    /// fit into the first-level cache.
    static constexpr std::size_t batch = 1024;

    explicit pagemap(unique_fd fd) noexcept : fd_(std::move(fd)) {}

    static detail::scan_arguments arguments_for(std::span<const std::byte> memory, query wanted) noexcept {
        detail::scan_arguments arguments{};
        arguments.size = sizeof arguments;
        arguments.start = reinterpret_cast<std::uintptr_t>(memory.data());
        arguments.end = arguments.start + memory.size();
        arguments.category_inverted = wanted.none_of;
        arguments.category_mask = wanted.all_of | wanted.none_of;
        arguments.category_anyof_mask = wanted.any_of;
        return arguments;
    }

    template <class Found>
    result<void> walk(
        std::span<const std::byte> memory, query wanted, std::uint64_t flags, Found& found) const {
        std::array<detail::scanned_region, batch> regions;
        detail::scan_arguments arguments = arguments_for(memory, wanted);
        const std::uint64_t base = arguments.start;
        arguments.flags = flags;
        arguments.vec = reinterpret_cast<std::uintptr_t>(regions.data());
        arguments.vec_len = regions.size();
        // Written is returned where written is asked for: the kernel has a faster way for just that.
        arguments.return_mask = wanted.all_of | wanted.any_of;
        while (arguments.start < arguments.end) {
            arguments.walk_end = arguments.start;
            const long count = ::ioctl(fd_.get(), request, &arguments);
            // Signals don't interrupt it, unless they kill the process.
            if (count < 0) return failure("PAGEMAP_SCAN");
            for (long i = 0; i < count; ++i) {
                const detail::scanned_region& region = regions[static_cast<std::size_t>(i)];
                found(region.start - base, region.end - region.start);
            }
            if (arguments.walk_end <= arguments.start) break;
            arguments.start = arguments.walk_end;
        }
        return {};
    }

    static error failure(const char* what) {
        const int number = errno;
        const bool absent = number == ENOTTY || number == ENOSYS || number == EPERM || number == EACCES;
        return error(absent ? errc::unsupported : errc::io, {},
            std::string(what) + ": " + std::system_category().message(number));
    }

    unique_fd fd_;
};

} // namespace vmstate
