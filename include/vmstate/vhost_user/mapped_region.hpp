// SPDX-License-Identifier: BSL-1.0
//
// A region of guest memory mapped into a backend: from its descriptor to a span, with a userfaultfd or without. Depends
// on memory_table.hpp, ram/userfault.hpp and Linux.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/memory_table.hpp>

namespace vmstate::vhost_user {

/// Owns one mapping. Until `open_up` or `watch`, its pages can't be touched: who does so all the same gets SIGSEGV, and not
/// a page of zeros that the VMM then takes for the guest's.
class mapped_region {
public:
    /// `errc::bad_message` where `file` is no file, or the region isn't in it. The descriptor isn't needed afterwards.
    static result<mapped_region> map(const memory_region& region, const unique_fd& file) {
        struct stat status {};
        if (!file || ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode))
            return refused("a memory region's descriptor that is a file", memory_table::describe(region));
        const auto length = static_cast<std::uint64_t>(status.st_size);
        if (region.mmap_offset > length || region.size > length - region.mmap_offset)
            return refused("a memory region within its file of " + std::to_string(length) + " bytes",
                memory_table::describe(region));
        const std::uint64_t page = page_size_of(file.get());
        const std::uint64_t head = region.mmap_offset % page;
        const std::uint64_t whole = (head + region.size + page - 1) / page * page;
        void* const at = ::mmap(nullptr, whole, PROT_NONE, MAP_SHARED | MAP_NORESERVE, file.get(),
            static_cast<off_t>(region.mmap_offset - head));
        if (at == MAP_FAILED) return userfault::failure("mmap of " + memory_table::describe(region));
        return mapped_region(region, static_cast<std::byte*>(at), whole, head, page);
    }

    mapped_region(mapped_region&& other) noexcept
        : region_(other.region_), mapping_(std::exchange(other.mapping_, nullptr)), length_(other.length_),
          head_(other.head_), page_(other.page_) {}
    mapped_region& operator=(mapped_region&& other) noexcept {
        if (this == &other) return *this;
        unmap();
        region_ = other.region_;
        mapping_ = std::exchange(other.mapping_, nullptr);
        length_ = other.length_;
        head_ = other.head_;
        page_ = other.page_;
        return *this;
    }
    ~mapped_region() { unmap(); }

    const memory_region& region() const noexcept { return region_; }
    /// The region itself, without what its pages have before and behind it.
    std::span<std::byte> memory() const noexcept {
        return {mapping_ + head_, static_cast<std::size_t>(region_.size)};
    }
    /// Of the pages behind it.
    std::uint64_t page_size() const noexcept { return page_; }
    std::uint64_t address() const noexcept { return reinterpret_cast<std::uintptr_t>(mapping_ + head_); }

    /// Permits access to it.
    result<void> open_up() const {
        if (::mprotect(mapping_, length_, PROT_READ | PROT_WRITE) != 0) return userfault::failure("mprotect");
        return {};
    }
    /// `errc::bad_message` where a fault in it couldn't be told apart from one outside: it has to be whole pages.
    result<void> check_whole_pages() const {
        if (head_ == 0 && length_ == region_.size) return {};
        return refused("for postcopy, memory regions of whole pages of " + std::to_string(page_) + " bytes",
            memory_table::describe(region_));
    }
    /// Lets accesses to pages that aren't there wait until whoever has the userfaultfd has seen to them; then permits them.
    /// `mode`: UFFDIO_REGISTER_MODE_*.
    result<void> watch(const userfault& faults, std::uint64_t mode = UFFDIO_REGISTER_MODE_MISSING) const {
        // A huge page would come with one of its small ones, and who waits for the others would sleep on. Without
        // transparent huge pages the kernel refuses the advice, and needs none.
        (void)::madvise(mapping_, length_, MADV_NOHUGEPAGE);
        if (result<void> added = faults.add({mapping_, length_}, mode); !added)
            return std::move(added.error().within(memory_table::describe(region_)));
        return open_up();
    }
    /// The reverse, when every page has come. Whoever waits for one all the same goes on, and makes a page of zeros in the
    /// file, which everybody else then takes for the guest's.
    result<void> unwatch(const userfault& faults) const { return faults.remove({mapping_, length_}); }
    /// When pages are still missing, and nobody will bring them to us: puts private memory in the file's place, and lets who
    /// waits go on there. What they read is nothing, what they write is lost, and the file stays as it is.
    void abandon(const userfault& faults) const noexcept {
        // Not unregistered before: who is woken by that would make a page in the file.
        if (!map_private_memory_over()) (void)::mprotect(mapping_, length_, PROT_NONE); // better this process than the guest
        (void)faults.wake({mapping_, length_});
    }

private:
    bool map_private_memory_over() const noexcept {
        constexpr int protection = PROT_READ | PROT_WRITE;
        constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
#ifdef SYS_mmap
        // Others use the memory meanwhile, which is what this is for; the thread sanitizer takes the function for a write to it.
        return ::syscall(SYS_mmap, mapping_, length_, protection, flags, -1, 0) != -1;
#else
        return ::mmap(mapping_, length_, protection, flags, -1, 0) != MAP_FAILED;
#endif
    }
    mapped_region(const memory_region& region, std::byte* mapping, std::size_t length, std::uint64_t head, std::uint64_t page)
        : region_(region), mapping_(mapping), length_(length), head_(head), page_(page) {}

    static error refused(std::string expected, std::string found) {
        return error(errc::bad_message, std::move(expected), std::move(found));
    }
    /// The unit of a mapping of this file: what it begins at, and what is missing or there as a whole.
    static std::uint64_t page_size_of(int file) noexcept {
        constexpr long hugetlbfs_magic = 0x958458f6;
        struct statfs system {};
        if (::fstatfs(file, &system) == 0 && static_cast<long>(system.f_type) == hugetlbfs_magic)
            return static_cast<std::uint64_t>(system.f_bsize);
        return static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    }
    void unmap() noexcept {
        if (mapping_ != nullptr) ::munmap(mapping_, length_);
        mapping_ = nullptr;
    }

    memory_region region_;
    std::byte* mapping_;
    std::size_t length_;  // whole pages
    std::uint64_t head_;  // of the first page, before the region
    std::uint64_t page_;
};

} // namespace vmstate::vhost_user
