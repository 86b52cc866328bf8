// SPDX-License-Identifier: BSL-1.0
//
// Whether this kernel and a machine's memory can do postcopy, found out at POSTCOPY_ADVISE, while there is still a source
// to stay with; each error has the reason and the remedy. Depends on ram/ and machine/.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include <vmstate/machine/ram_section.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

namespace detail {

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

} // namespace detail

/// `errc::unsupported`, with the reason and what to do about it, where a machine with these blocks can't be a
/// destination of postcopy on this system. No page is touched; takes about a millisecond.
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

} // namespace vmstate
