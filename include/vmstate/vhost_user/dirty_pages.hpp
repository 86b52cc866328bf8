// SPDX-License-Identifier: BSL-1.0
//
// The log of dirty pages that a VMM and its backends write together: a bitmap in shared memory, a bit for each 4 KiB of
// guest-physical addresses (VHOST_LOG_PAGE). Depends on message.hpp and Linux.
#pragma once

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/message.hpp>

namespace vmstate::vhost_user {

class dirty_pages {
public:
    static constexpr std::uint64_t page_size = 4096;

    dirty_pages() noexcept = default;
    /// The log of a SET_LOG_BASE: `size` bytes of bitmap at `offset` in the file.
    static result<dirty_pages> map(std::uint64_t size, std::uint64_t offset, const unique_fd& file) {
        struct stat status {};
        if (!file || ::fstat(file.get(), &status) != 0)
            return error(errc::bad_message, "SET_LOG_BASE with a descriptor", "none that is open");
        const auto length = static_cast<std::uint64_t>(status.st_size);
        if (size == 0 || offset > length || size > length - offset)
            return error(errc::bad_message, "a log within its file of " + std::to_string(length) + " bytes",
                std::to_string(size) + " bytes at " + std::to_string(offset));
        const std::uint64_t head = offset % static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
        void* const at = ::mmap(nullptr, head + size, PROT_READ | PROT_WRITE, MAP_SHARED, file.get(),
            static_cast<off_t>(offset - head));
        if (at == MAP_FAILED) return userfault::failure("mmap of the log");
        return dirty_pages(static_cast<std::byte*>(at), head, size);
    }
    dirty_pages(dirty_pages&& other) noexcept
        : mapping_(std::exchange(other.mapping_, nullptr)), head_(other.head_), size_(std::exchange(other.size_, 0)) {}
    dirty_pages& operator=(dirty_pages&& other) noexcept {
        if (this == &other) return *this;
        unmap();
        mapping_ = std::exchange(other.mapping_, nullptr);
        head_ = other.head_;
        size_ = std::exchange(other.size_, 0);
        return *this;
    }
    ~dirty_pages() { unmap(); }

    bool is_mapped() const noexcept { return mapping_ != nullptr; }
    /// The guest-physical addresses below this have a bit.
    std::uint64_t end() const noexcept { return size_ * 8 * page_size; }

    /// Marks the pages of a range; what has no bit is left out. Any number of threads and processes may do so at once.
    void mark(std::uint64_t address, std::uint64_t size) noexcept {
        if (mapping_ == nullptr || size == 0 || address >= end()) return;
        const std::uint64_t last = (size > end() - address ? end() - 1 : address + size - 1) / page_size;
        for (std::uint64_t page = address / page_size; page <= last; ++page) {
            auto& byte = reinterpret_cast<unsigned char&>(mapping_[head_ + page / 8]);
            // The VMM takes what is marked and then reads the page: the page is written before.
            std::atomic_ref(byte).fetch_or(static_cast<unsigned char>(1U << page % 8), std::memory_order_release);
        }
    }

private:
    dirty_pages(std::byte* mapping, std::uint64_t head, std::uint64_t size) noexcept
        : mapping_(mapping), head_(head), size_(size) {}
    void unmap() noexcept {
        if (mapping_ != nullptr) ::munmap(mapping_, head_ + size_);
        mapping_ = nullptr;
    }

    std::byte* mapping_ = nullptr;
    std::uint64_t head_ = 0; // of its first page, before the log
    std::uint64_t size_ = 0;
};

} // namespace vmstate::vhost_user
