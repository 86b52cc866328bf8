// SPDX-License-Identifier: BSL-1.0
//
// Whether this kernel and a machine's memory can do postcopy, found out at POSTCOPY_ADVISE, while there is still a source
// to stay with; each error has the reason and the remedy. Depends on discard_memory.hpp, ram/ and machine/.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/postcopy/discard.hpp>
#include <vmstate/postcopy/discard_memory.hpp>
#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/ram/pagemap_scan.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

namespace detail {

inline constexpr int madv_populate_read = 22;  // Linux 5.14
inline constexpr int madv_populate_write = 23; // Linux 5.14

/// The first number in a file that is one line, or in the line of a file that begins with `key`; -1 where there is none.
inline long number_in(const char* path, std::string_view key = {}) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "re"), std::fclose);
    char line[256];
    long number = -1;
    while (file && std::fgets(line, sizeof line, file.get()) != nullptr)
        if (std::string_view(line).starts_with(key) && std::sscanf(line + key.size(), "%ld", &number) == 1) return number;
    return -1;
}

inline error no_postcopy(std::string remedy, std::string reason) {
    return std::move(error(errc::unsupported, std::move(remedy), std::move(reason)).within("postcopy"));
}

/// Why no userfaultfd could be had that sees the faults of system calls and of KVM, too.
inline error why_no_userfault(const error& failure) {
    const std::string reason(failure.found().empty() ? failure.message() : std::string(failure.found()));
    const long unprivileged = number_in("/proc/sys/vm/unprivileged_userfaultfd");
    if (unprivileged < 0) return no_postcopy("a kernel with CONFIG_USERFAULTFD", reason);
    if (number_in("/proc/self/status", "Seccomp:") == 2)
        return no_postcopy("a seccomp filter that permits userfaultfd, or access to /dev/userfaultfd (Linux 6.1)",
            reason + "; a seccomp filter is active");
    if (unprivileged == 0)
        return no_postcopy(
            "vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd (Linux 6.1), or the capability CAP_SYS_PTRACE",
            reason + " with vm.unprivileged_userfaultfd=0");
    return no_postcopy("a userfaultfd", reason);
}

/// Of the file system that a mapping's file is in, where that is hugetlbfs; else 0.
inline std::uint64_t hugetlbfs_page_size(int fd) noexcept {
    constexpr long hugetlbfs_magic = 0x958458f6;
    struct statfs system {};
    if (fd < 0 || ::fstatfs(fd, &system) != 0 || static_cast<long>(system.f_type) != hugetlbfs_magic) return 0;
    return static_cast<std::uint64_t>(system.f_bsize);
}

inline result<void> check_block(const userfault& fault, std::uint64_t supported, const ram_block& block) {
    const std::uint64_t unit = block.options.host_page_size;
    const auto small_page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    const std::string pages = "whole pages of " + std::to_string(unit) + " bytes";
    if (unit == 0 || unit % small_page != 0)
        return no_postcopy("a host_page_size that is a multiple of " + std::to_string(small_page), std::to_string(unit));
    if (reinterpret_cast<std::uintptr_t>(block.memory.data()) % unit != 0)
        return no_postcopy("memory that begins at " + pages, "an address that doesn't");
    if (block.used_length % unit != 0 || block.used_length == 0)
        return no_postcopy("a length of " + pages, std::to_string(block.used_length) + " bytes");

    const memory_kind kind = memory_kind_of(block.used());
    if (kind == memory_kind::other)
        return no_postcopy("memory that is anonymous or mapped shared",
            "a private mapping of a file (what is discarded there comes back from the file), or several kinds");
    if (kind == memory_kind::shared && (supported & userfault_feature::missing_shmem) == 0)
        return no_postcopy("anonymous memory, or Linux 4.11", "a kernel without UFFD_FEATURE_MISSING_SHMEM");
    if (block.options.file.fd >= 0 && kind != memory_kind::shared)
        return no_postcopy("ram_options.file of a shared mapping alone", "a private one");

    // The memory itself is tried; who waits in it meanwhile goes on when it is taken back.
    const result<std::uint64_t> calls = fault.register_memory(block.used(), UFFDIO_REGISTER_MODE_MISSING);
    if (!calls)
        return no_postcopy("memory that is anonymous, a memfd, or in tmpfs or hugetlbfs, writable, and registered with no "
                           "other userfaultfd",
            std::string(calls.error().found().empty() ? calls.error().message() : std::string(calls.error().found())));
    if (result<void> removed = fault.remove(block.used()); !removed) return removed;

    // Huge pages are filled whole, and have no page of zeros.
    const bool huge = (*calls & std::uint64_t{1} << _UFFDIO_ZEROPAGE) == 0;
    if (huge && (supported & userfault_feature::missing_hugetlbfs) == 0)
        return no_postcopy("small pages, or Linux 4.11", "a kernel without UFFD_FEATURE_MISSING_HUGETLBFS");
    const std::uint64_t real = hugetlbfs_page_size(block.options.file.fd);
    if ((huge && unit == small_page) || (real != 0 && real != unit))
        return no_postcopy("ram_options.host_page_size of the huge pages" + (real != 0 ? ": " + std::to_string(real) : ""),
            std::to_string(unit));
    return {};
}

/// What to do about memory that can't be discarded.
inline std::string discard_remedy(const ram_block& block, const discard_outcome& why) {
    if (block.options.file.fd >= 0) {
        if (why.number == EBADF) return "ram_options.file open for writing";
        if (why.number == EPERM) return "ram_options.file without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE";
        return "ram_options.file in which holes can be punched";
    }
    const memory_kind kind = discard_kind(block);
    if (kind == memory_kind::shared)
        return why.number == EPERM ? "a file without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE"
                                   : "ram_options.file of the shared mapping, or memory that isn't locked (mlock)";
    if (kind == memory_kind::private_hugetlb) return "huge pages of a memfd or in hugetlbfs, mapped shared; or Linux 5.18";
    return "memory that can be discarded";
}

} // namespace detail

/// Whether what is thrown away of `block` is gone: tried at its beginning, up to 2 MiB or a host page, whose content is
/// lost. `errc::unsupported` says what to do about memory that can't be discarded.
inline result<void> try_discard(const ram_block& block) {
    if (block.used_length == 0) return {};
    const std::uint64_t unit = block.options.host_page_size;
    const detail::memory_kind kind = discard_kind(block);
    const auto refuse = [&](std::string remedy, std::string reason) {
        return std::move(detail::no_postcopy(std::move(remedy), std::move(reason)).within(block.name));
    };
    // As much as one huge page may have made present.
    const std::uint64_t most = std::max<std::uint64_t>(unit, (std::uint64_t{2} << 20) / unit * unit);
    const ram_range begin{0, std::min(block.used_length, most)};
    // Where there may be no memory to be had, as of a pool of huge pages, touching it would be the end of us.
    const auto populate = [&](int advice) { return ::madvise(block.memory.data(), static_cast<std::size_t>(unit), advice) == 0; };
    auto* const first = reinterpret_cast<volatile std::byte*>(block.memory.data());
    const bool is_marked = populate(detail::madv_populate_write);
    if (is_marked) *first = std::byte{0x5a};
    if (const detail::discard_outcome done = detail::discard(block, begin, kind); done.failed())
        return refuse(detail::discard_remedy(block, done),
            std::string(done.call) + ": " + std::system_category().message(done.number));
    if (!is_marked || !populate(detail::madv_populate_read)) return {};
    if (*first != std::byte{0})
        return refuse("ram_options.file that is the one mapped, and its offset there", "memory that stays when the file is punched");
    static_cast<void>(detail::discard(block, begin, kind)); // what looking at it has made
    return {};
}

/// Whether a machine's stream can go on in postcopy, at either end: with `x-ignore-shared` some of its memory is no part of
/// it (QEMU refuses the two together). `errc::invalid_argument`.
inline result<void> check_postcopy_machine(const machine& of) {
    if (!of.options().has_capability("x-ignore-shared")) return {};
    return error(errc::invalid_argument, "postcopy_ram or x-ignore-shared", "both");
}

/// `errc::unsupported`, with the reason and what to do about it, where a machine with these blocks can't be a
/// destination of postcopy on this system. No page is touched; takes about a millisecond. Whether the memory can be discarded
/// is found out when a source has come: `try_discard`.
inline result<void> check_postcopy_support(const ram_section& ram) {
    const result<std::uint64_t> supported = userfault::supported_features();
    if (!supported) return detail::why_no_userfault(supported.error());
    const result<userfault> fault = userfault::open(userfault_scope::user_and_kernel,
        *supported & (userfault_feature::missing_hugetlbfs | userfault_feature::missing_shmem));
    if (!fault) return detail::why_no_userfault(fault.error());
    for (const std::unique_ptr<ram_block>& block : ram.blocks()) {
        if (block->used_length == 0) continue;
        if (result<void> fits = detail::check_block(*fault, *supported, *block); !fits)
            return std::move(fits.error().within(block->name));
    }
    return {};
}

/// Whether nothing is there of the pages of `block` that `owed` names, a bit per target page of `page_size`; `errc::bad_ram`
/// names the first that is. What the system doesn't tell at once isn't looked for: `page_placer` finds it.
inline result<void> check_absent(const ram_block& block, const page_bitmap& owed, std::size_t page_size) {
    std::optional<std::uint64_t> there;
    page_run next = owed.find_next_run(0);
    const auto found = [&](std::uint64_t offset, std::uint64_t length) { // ascending
        const auto first = static_cast<std::size_t>(offset / page_size);
        if (next.count != 0 && next.first + next.count <= first) next = owed.find_next_run(first);
        if (!there && next.count != 0 && next.first < first + static_cast<std::size_t>(length / page_size))
            there = std::uint64_t{std::max(next.first, first)} * page_size;
    };
    if (block.options.file.fd >= 0) {
        // hugetlbfs calls all of a file data.
        if (detail::hugetlbfs_page_size(block.options.file.fd) == 0)
            static_cast<void>(detail::find_data(block.options.file, block.used_length, found));
    } else if (detail::memory_kind_of(block.used()) != detail::memory_kind::shared) {
        if (const result<pagemap> map = pagemap::open())
            static_cast<void>(map->scan(block.used(), {.any_of = page_category::present | page_category::swapped}, found));
    }
    if (!there) return {};
    return std::move(error(errc::bad_ram, "memory that is missing until its pages come",
        "a page at " + std::to_string(*there) + " that came into being by another way")
                         .within(block.name));
}

} // namespace vmstate
