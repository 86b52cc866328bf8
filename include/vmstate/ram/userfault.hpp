// SPDX-License-Identifier: BSL-1.0
//
// A userfaultfd: opened in whatever way this system permits, and its calls with their errors. From the kernel's
// Documentation/admin-guide/mm/userfaultfd.rst. Depends on support/ and Linux.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate {

/// Bits of UFFDIO_API's features under names of our own, since older headers lack some of them.
namespace userfault_feature {
inline constexpr std::uint64_t pagefault_flag_wp = 1U << 0;
inline constexpr std::uint64_t missing_hugetlbfs = 1U << 4;   ///< Linux 4.11
inline constexpr std::uint64_t missing_shmem = 1U << 5;       ///< Linux 4.11
inline constexpr std::uint64_t thread_id = 1U << 8;           ///< Linux 4.14: a fault says whose it is
inline constexpr std::uint64_t minor_hugetlbfs = 1U << 9;     ///< Linux 5.13
inline constexpr std::uint64_t minor_shmem = 1U << 10;        ///< Linux 5.14
inline constexpr std::uint64_t wp_hugetlbfs_shmem = 1U << 12; ///< Linux 5.19
inline constexpr std::uint64_t wp_unpopulated = 1U << 13;     ///< Linux 6.4
inline constexpr std::uint64_t wp_async = 1U << 15;           ///< Linux 6.7
} // namespace userfault_feature

/// Whose faults a userfaultfd has to see.
enum class userfault_scope {
    user_and_kernel, ///< also those of system calls and of KVM; takes privilege or vm.unprivileged_userfaultfd
    user_only,       ///< any process may
};

class userfault {
public:
    /// Opens one and agrees on `features`: `errc::unsupported` where the kernel lacks one of them, or userfaultfd.
    static result<userfault> open(userfault_scope scope, std::uint64_t features) {
        result<userfault> opened = open_descriptor(scope);
        if (!opened) return opened;
        uffdio_api api{};
        api.api = UFFD_API;
        api.features = features;
        if (::ioctl(opened->get(), UFFDIO_API, &api) == 0) return opened;
        if (errno == EINVAL) return error(errc::unsupported, {}, "userfaultfd without the features asked for");
        return failure("UFFDIO_API");
    }
    /// What this kernel has.
    static result<std::uint64_t> supported_features() {
        // The handshake is done once per descriptor: one of its own asks.
        const result<userfault> opened = open_descriptor(userfault_scope::user_only);
        if (!opened) return opened.error();
        uffdio_api api{};
        api.api = UFFD_API;
        if (::ioctl(opened->get(), UFFDIO_API, &api) != 0) return failure("UFFDIO_API");
        return std::uint64_t{api.features};
    }

    int get() const noexcept { return fd_.get(); }

    /// `mode`: UFFDIO_REGISTER_MODE_*. The memory is whole pages of its mappings. The calls that are possible there: bit
    /// _UFFDIO_ZEROPAGE and so on.
    result<std::uint64_t> register_memory(std::span<std::byte> memory, std::uint64_t mode) const {
        uffdio_register arguments{};
        arguments.range = range_of(memory);
        arguments.mode = mode;
        if (::ioctl(get(), UFFDIO_REGISTER, &arguments) != 0) return failure("UFFDIO_REGISTER");
        return std::uint64_t{arguments.ioctls};
    }
    /// The same, where the calls that `mode` needs have to be possible.
    result<void> add(std::span<std::byte> memory, std::uint64_t mode) const {
        const result<std::uint64_t> calls = register_memory(memory, mode);
        if (!calls) return calls.error();
        if ((mode & UFFDIO_REGISTER_MODE_WP) != 0 && (*calls & std::uint64_t{1} << _UFFDIO_WRITEPROTECT) == 0)
            return error(errc::unsupported, {}, "no write-protection for this kind of memory");
        return {};
    }
    /// Ends faults and protection, and wakes who waits for them.
    result<void> remove(std::span<std::byte> memory) const {
        uffdio_range range = range_of(memory);
        if (::ioctl(get(), UFFDIO_UNREGISTER, &range) != 0) return failure("UFFDIO_UNREGISTER");
        // The kernel wakes first and unregisters then: who comes between the two, which newer ones let happen, sleeps on.
        static_cast<void>(wake(memory));
        return {};
    }
    /// Write-protects the memory, or ends that and wakes who waits for it.
    result<void> write_protect(std::span<std::byte> memory, bool protect) const {
        uffdio_writeprotect arguments{};
        arguments.range = range_of(memory);
        arguments.mode = protect ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
        while (::ioctl(get(), UFFDIO_WRITEPROTECT, &arguments) != 0) {
            // Another thread changes the process's mappings just now.
            if (errno != EAGAIN && errno != EINTR) return failure("UFFDIO_WRITEPROTECT");
        }
        return {};
    }

    /// Fills missing pages at `target` with those at `from`, and wakes who waits for them; each appears at once, in full.
    /// How many bytes were placed: fewer than asked for where the page behind them was there already; nobody is woken
    /// for that one. Both are whole pages of the mapping at `target`.
    result<std::size_t> copy(std::span<std::byte> target, const std::byte* from) const {
        return place(target, [&](std::span<std::byte> rest, std::size_t done) {
            uffdio_copy arguments{};
            arguments.dst = reinterpret_cast<std::uintptr_t>(rest.data());
            arguments.src = reinterpret_cast<std::uintptr_t>(from + done);
            arguments.len = rest.size();
            const int failed = ::ioctl(get(), UFFDIO_COPY, &arguments);
            return step{failed == 0 ? 0 : errno, std::int64_t{arguments.copy}, "UFFDIO_COPY"};
        });
    }
    /// The same with zeros, without memory behind them. Not for hugetlb.
    result<std::size_t> zero(std::span<std::byte> target) const {
        return place(target, [&](std::span<std::byte> rest, std::size_t) {
            uffdio_zeropage arguments{};
            arguments.range = range_of(rest);
            const int failed = ::ioctl(get(), UFFDIO_ZEROPAGE, &arguments);
            return step{failed == 0 ? 0 : errno, std::int64_t{arguments.zeropage}, "UFFDIO_ZEROPAGE"};
        });
    }
    /// Maps pages that the memory's file has already, where the mapping is registered for minor faults, and wakes who waits
    /// for them. How many bytes: fewer than asked for where the page behind them was mapped already; nobody is woken for
    /// that one. Linux 5.13 for hugetlb, 5.14 for shmem.
    result<std::size_t> map_present(std::span<std::byte> target) const {
        return place(target, [&](std::span<std::byte> rest, std::size_t) {
            uffdio_continue arguments{};
            arguments.range = range_of(rest);
            const int failed = ::ioctl(get(), UFFDIO_CONTINUE, &arguments);
            return step{failed == 0 ? 0 : errno, std::int64_t{arguments.mapped}, "UFFDIO_CONTINUE"};
        });
    }
    /// Lets the threads that wait in `memory` try again.
    result<void> wake(std::span<std::byte> memory) const {
        uffdio_range range = range_of(memory);
        while (::ioctl(get(), UFFDIO_WAKE, &range) != 0)
            if (errno != EAGAIN && errno != EINTR) return failure("UFFDIO_WAKE");
        return {};
    }

    /// `errno` as an error; not permitted or not there is `errc::unsupported`.
    static error failure(std::string_view what, int number = errno) {
        const bool absent = number == ENOSYS || number == EPERM || number == EACCES || number == ENOTTY;
        return error(absent ? errc::unsupported : errc::io, {},
            std::string(what) + ": " + std::system_category().message(number));
    }

private:
    explicit userfault(unique_fd fd) noexcept : fd_(std::move(fd)) {}

    static result<userfault> open_descriptor(userfault_scope scope) {
        constexpr int flags = O_CLOEXEC | O_NONBLOCK;
        int fd = static_cast<int>(::syscall(SYS_userfaultfd, flags));
        if (fd < 0 && errno == EPERM) {
            // Where the system call is forbidden the device, whose permissions the administrator sets, may not be.
            if (const unique_fd device(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC)); device)
                fd = ::ioctl(device.get(), _IO(0xAA, 0x00), flags); // USERFAULTFD_IOC_NEW, Linux 6.1
            else
                errno = EPERM;
        }
        if (fd < 0 && scope == userfault_scope::user_only)
            fd = static_cast<int>(::syscall(SYS_userfaultfd, flags | 1)); // UFFD_USER_MODE_ONLY, Linux 5.11
        if (fd < 0) return failure("userfaultfd");
        return userfault(unique_fd(fd));
    }
    /// What one call did: the kernel counts the bytes, or has -errno there where there are none.
    struct step {
        int number;
        std::int64_t placed;
        std::string_view call;
    };
    template <class Call>
    static result<std::size_t> place(std::span<std::byte> target, Call call) {
        std::size_t done = 0;
        while (done < target.size()) {
            const step now = call(target.subspan(done), done);
            if (now.placed > 0) done += static_cast<std::size_t>(now.placed);
            if (now.number == EEXIST) return done;
            // Some of it was placed, or another thread changes the process's mappings just now.
            if (now.number != 0 && now.number != EAGAIN && now.number != EINTR) return failure(now.call, now.number);
        }
        return done;
    }
    static uffdio_range range_of(std::span<std::byte> memory) noexcept {
        return {reinterpret_cast<std::uintptr_t>(memory.data()), memory.size()};
    }

    unique_fd fd_;
};

} // namespace vmstate
