// SPDX-License-Identifier: BSL-1.0
//
// Memory for a guest: anonymous, a memfd, or a file, mapped here and unmapped with its owner. Whoever has mapped memory
// already needs none of this: a span will do. Depends on support/ and Linux.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate {

/// Where in which file a block's memory is: a memfd, or a file of tmpfs, hugetlbfs or a disk, mapped shared. The
/// descriptor stays its owner's.
struct ram_file {
    int fd = -1; ///< none
    std::uint64_t offset = 0; ///< of the block's first byte
};

/// Whether the file has nothing there: memory that is mapped from it is zero, and reading it would only bring it into being.
/// False where the file system doesn't know (hugetlbfs).
inline bool is_hole(const ram_file& file, std::uint64_t offset, std::uint64_t size) noexcept {
    const auto begin = static_cast<off_t>(file.offset + offset);
    const off_t data = ::lseek(file.fd, begin, SEEK_DATA);
    return data < 0 ? errno == ENXIO : data >= begin + static_cast<off_t>(size);
}

/// Memory that is zero, or what its file holds, and not there until it is touched. Lengths and offsets are in bytes, whole
/// pages of what backs them. Errors are `errc::bad_ram` with the system's words.
class ram_memory {
public:
    /// The size of ordinary pages.
    static constexpr std::uint64_t small_page = 4096;

    ram_memory() noexcept = default;
    ram_memory(ram_memory&& other) noexcept
        : bytes_(std::exchange(other.bytes_, {}))
        , page_size_(other.page_size_)
        , fd_(std::move(other.fd_))
        , offset_(other.offset_) {}
    ram_memory& operator=(ram_memory&& other) noexcept {
        if (this == &other) return *this;
        unmap();
        bytes_ = std::exchange(other.bytes_, {});
        page_size_ = other.page_size_;
        fd_ = std::move(other.fd_);
        offset_ = other.offset_;
        return *this;
    }
    ~ram_memory() { unmap(); }

    /// Private to this process, without a file. `page_size`: `small_page`, or that of a kind of huge pages that the system
    /// has (hugetlb: 2 MiB, 1 GiB), which are then reserved for it or the call fails.
    static result<ram_memory> anonymous(std::uint64_t size, std::uint64_t page_size = small_page) {
        if (result<void> fits = check(size, page_size); !fits) return fits.error();
        const int kind = page_size == small_page ? MAP_NORESERVE : MAP_HUGETLB | huge_page_flag(page_size);
        return map(size, MAP_PRIVATE | MAP_ANONYMOUS | kind, unique_fd(), 0, page_size);
    }
    /// A memfd of its own, mapped shared: other processes that are given its descriptor see the same memory. `name` is for
    /// /proc alone.
    static result<ram_memory> memfd(const char* name, std::uint64_t size, std::uint64_t page_size = small_page) {
        if (result<void> fits = check(size, page_size); !fits) return fits.error();
        const unsigned kind =
            page_size == small_page ? 0u : unsigned{MFD_HUGETLB} | static_cast<unsigned>(huge_page_flag(page_size));
        unique_fd fd(::memfd_create(name, MFD_CLOEXEC | kind));
        if (!fd) return failure("memfd_create", size, page_size);
        if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) return failure("ftruncate", size, page_size);
        return map(size, MAP_SHARED, std::move(fd), 0, page_size);
    }
    /// A part of a file that is open, mapped shared; the descriptor is duplicated. The size of its pages is found out.
    static result<ram_memory> file(int fd, std::uint64_t offset, std::uint64_t size) {
        const std::uint64_t page_size = page_size_of(fd);
        if (result<void> fits = check(size, page_size); !fits) return fits.error();
        if (offset % page_size != 0) return bad_size(offset, page_size);
        unique_fd own(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
        if (!own) return failure("fcntl", size, page_size);
        struct stat status {};
        if (::fstat(own.get(), &status) != 0) return failure("fstat", size, page_size);
        // Beyond the file's end there is nothing but SIGBUS.
        if (S_ISREG(status.st_mode) && static_cast<std::uint64_t>(status.st_size) < offset + size)
            return error(errc::bad_ram, "a file of at least " + std::to_string(offset + size) + " bytes",
                std::to_string(status.st_size));
        return map(size, MAP_SHARED, std::move(own), offset, page_size);
    }
    /// The same by its path, from its beginning; made or lengthened where needed. Of a file in hugetlbfs the pages are
    /// huge.
    static result<ram_memory> file(const std::string& path, std::uint64_t size) {
        const unique_fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        if (!fd) return std::move(failure("open", size, small_page).within(path));
        struct stat status {};
        if (::fstat(fd.get(), &status) != 0) return std::move(failure("fstat", size, small_page).within(path));
        if (static_cast<std::uint64_t>(status.st_size) < size && ::ftruncate(fd.get(), static_cast<off_t>(size)) != 0)
            return std::move(failure("ftruncate", size, page_size_of(fd.get())).within(path));
        result<ram_memory> mapped = file(fd.get(), 0, size);
        if (!mapped) return std::move(mapped.error().within(path));
        return mapped;
    }

    std::span<std::byte> span() const noexcept { return bytes_; }
    std::uint64_t page_size() const noexcept { return page_size_; }
    /// Its descriptor is -1 for anonymous memory.
    ram_file file() const noexcept { return {fd_.get(), offset_}; }

private:
    ram_memory(std::span<std::byte> bytes, std::uint64_t page_size, unique_fd fd, std::uint64_t offset) noexcept
        : bytes_(bytes), page_size_(page_size), fd_(std::move(fd)), offset_(offset) {}

    static result<ram_memory> map(
        std::uint64_t size, int flags, unique_fd fd, std::uint64_t offset, std::uint64_t page_size) {
        void* const address = ::mmap(nullptr, static_cast<std::size_t>(size), PROT_READ | PROT_WRITE, flags, fd.get(),
            static_cast<off_t>(offset));
        if (address == MAP_FAILED) return failure("mmap", size, page_size);
        return ram_memory({static_cast<std::byte*>(address), static_cast<std::size_t>(size)}, page_size, std::move(fd), offset);
    }
    void unmap() noexcept {
        if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
    }

    /// MAP_HUGETLB's and MFD_HUGETLB's way to say which kind: log2 of the size from bit 26 on.
    static int huge_page_flag(std::uint64_t page_size) noexcept { return std::countr_zero(page_size) << 26; }
    static std::uint64_t page_size_of(int fd) noexcept {
        constexpr long hugetlbfs_magic = 0x958458f6;
        struct statfs system {};
        if (::fstatfs(fd, &system) == 0 && static_cast<long>(system.f_type) == hugetlbfs_magic)
            return static_cast<std::uint64_t>(system.f_bsize);
        return small_page;
    }
    static result<void> check(std::uint64_t size, std::uint64_t page_size) {
        if (!std::has_single_bit(page_size) || page_size < small_page)
            return error(errc::bad_ram, "a page size of 4096 bytes, 2 MiB or 1 GiB", std::to_string(page_size));
        if (size == 0 || size % page_size != 0 || size > std::numeric_limits<std::size_t>::max() / 2)
            return bad_size(size, page_size);
        return {};
    }
    static error bad_size(std::uint64_t size, std::uint64_t page_size) {
        return error(errc::bad_ram, "whole pages of " + std::to_string(page_size) + " bytes", std::to_string(size) + " bytes");
    }
    static error failure(std::string_view call, std::uint64_t size, std::uint64_t page_size) {
        const int number = errno;
        return error(errc::bad_ram,
            std::to_string(size) + " bytes of memory in pages of " + std::to_string(page_size) + " bytes",
            std::string(call) + ": " + std::system_category().message(number));
    }

    std::span<std::byte> bytes_;
    std::uint64_t page_size_ = small_page;
    unique_fd fd_;
    std::uint64_t offset_ = 0;
};

/// Asks for transparent huge pages behind the memory, as QEMU does for its own: the first touch of a page then costs a
/// fifth per byte. Harmless where the system gives none.
inline void advise_huge_pages(std::span<std::byte> memory) noexcept {
    constexpr std::uintptr_t huge_page = std::uintptr_t{2} << 20;
    const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
    const std::uintptr_t first = (begin + huge_page - 1) & ~(huge_page - 1);
    const std::uintptr_t last = (begin + memory.size()) & ~(huge_page - 1);
    if (first < last) ::madvise(memory.data() + (first - begin), last - first, MADV_HUGEPAGE);
}

} // namespace vmstate
