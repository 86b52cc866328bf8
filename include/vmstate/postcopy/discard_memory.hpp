// SPDX-License-Identifier: BSL-1.0
//
// Throws memory away, so that the next touch of it is a fault: private memory, shared memory, huge pages. Depends on
// discard.hpp, machine/ram_block.hpp, ram/present_pages.hpp and Linux.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/postcopy/discard.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

namespace detail {

inline constexpr int madv_dontneed_locked = 24; // Linux 5.18

/// What a discard came to: the call that failed, and why.
struct discard_outcome {
    std::string_view call = {}; ///< none where it succeeded
    int number = 0;             ///< errno

    bool failed() const noexcept { return !call.empty(); }
};

/// `kind` is the block's memory's. MADV_DONTNEED is for private memory alone: of a shared mapping it takes this process's
/// page table entries away, and the page stays in the file.
inline discard_outcome discard(const ram_block& block, const ram_range& range, memory_kind kind) noexcept {
    void* const begin = block.memory.data() + range.start;
    const auto length = static_cast<std::size_t>(range.length);
    const auto outcome = [](std::string_view call, int failed) {
        return failed == 0 ? discard_outcome{} : discard_outcome{call, errno};
    };
    if (block.options.file.fd >= 0)
        return outcome("fallocate(PUNCH_HOLE)",
            ::fallocate(block.options.file.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                static_cast<off_t>(block.options.file.offset + range.start), static_cast<off_t>(range.length)));
    if (kind == memory_kind::other) return {"madvise of memory of several kinds", EINVAL};
    // Locked memory is refused here.
    if (kind == memory_kind::shared) return outcome("MADV_REMOVE", ::madvise(begin, length, MADV_REMOVE));
    // Huge pages since Linux 5.18. Locked memory is refused with the same error, and has an advice of its own.
    const discard_outcome first = outcome("MADV_DONTNEED", ::madvise(begin, length, MADV_DONTNEED));
    if (first.number == EINVAL && ::madvise(begin, length, madv_dontneed_locked) == 0) return {};
    return first;
}

} // namespace detail

/// What kind of memory a block has; asked of the system, which takes some tens of microseconds.
inline detail::memory_kind discard_kind(const ram_block& block) {
    return block.options.file.fd >= 0 ? detail::memory_kind::shared : detail::memory_kind_of(block.used());
}

/// Throws away a part of `block` that is whole host pages: afterwards it is zero, and missing to a userfaultfd. Shared
/// memory is gone for whoever maps it: a hole in its file. `kind` is `discard_kind` of the block.
inline result<void> discard_range(const ram_block& block, const ram_range& range, detail::memory_kind kind) {
    const detail::discard_outcome done = detail::discard(block, range, kind);
    if (!done.failed()) return {};
    return std::move(error(errc::bad_ram, "memory that can be discarded",
        std::string(done.call) + " of " + std::to_string(range.start) + "+" + std::to_string(range.length) + ": " +
            std::system_category().message(done.number))
                         .within(block.name));
}
/// The same for who does it once.
inline result<void> discard_range(const ram_block& block, const ram_range& range) {
    return discard_range(block, range, discard_kind(block));
}

/// Off before the first discard: a transparent huge page that the kernel put together would fill what was discarded
/// around a page that came. On again at the end. Advice alone, so that a kernel without them is no failure; hugetlb
/// has none.
inline void set_transparent_huge_pages(const ram_block& block, bool on) noexcept {
    if (block.options.host_page_size > static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE))) return;
    (void)::madvise(block.memory.data(), block.memory.size(), on ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

} // namespace vmstate
