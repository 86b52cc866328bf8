// SPDX-License-Identifier: BSL-1.0
//
// Throws memory away, so that the next touch of it is a fault: private memory, shared memory, huge pages. Depends on
// discard.hpp, machine/ram_block.hpp and Linux.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>
#include <string_view>
#include <system_error>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/postcopy/discard.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

namespace detail {

inline constexpr int madv_dontneed_locked = 24; // Linux 5.18

inline error discard_failure(const ram_block& block, std::string_view call, const ram_range& range, int number) {
    return std::move(error(errc::bad_ram, "memory that can be discarded",
        std::string(call) + " of " + std::to_string(range.start) + "+" + std::to_string(range.length) + ": " +
            std::system_category().message(number))
                         .within(block.name));
}

} // namespace detail

/// Throws away a part of `block` that is whole host pages: afterwards it is zero, and missing to a userfaultfd. Shared
/// memory is gone for whoever maps it: a hole in its file.
inline result<void> discard_range(const ram_block& block, const ram_range& range) {
    void* const begin = block.memory.data() + range.start;
    const auto length = static_cast<std::size_t>(range.length);
    if (block.options.file.fd >= 0) {
        if (::fallocate(block.options.file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>(block.options.file.offset + range.start), static_cast<off_t>(range.length)) == 0)
            return {};
        return detail::discard_failure(block, "fallocate(PUNCH_HOLE)", range, errno);
    }
    // A shared mapping whose file nobody told; of a private one the kernel says that it is none.
    if (::madvise(begin, length, MADV_REMOVE) == 0) return {};
    if (errno != EINVAL && errno != EACCES) return detail::discard_failure(block, "MADV_REMOVE", range, errno);
    // Huge pages since Linux 5.18. Locked memory is refused with the same error, and has an advice of its own.
    if (::madvise(begin, length, MADV_DONTNEED) == 0) return {};
    const int number = errno;
    if (number == EINVAL && ::madvise(begin, length, detail::madv_dontneed_locked) == 0) return {};
    return detail::discard_failure(block, "MADV_DONTNEED", range, number);
}

/// Off before the first discard: a transparent huge page that the kernel put together would fill what was discarded
/// around a page that came. On again at the end. Advice alone, so that a kernel without them is no failure; hugetlb
/// has none.
inline void set_transparent_huge_pages(const ram_block& block, bool on) noexcept {
    if (block.options.host_page_size > static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))) return;
    (void)::madvise(block.memory.data(), block.memory.size(), on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

} // namespace vmstate
