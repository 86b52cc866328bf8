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
    /// A log that the VMM makes: nothing is marked in it. `file` is for SET_LOG_BASE, from its beginning on.
    struct shared;
    static inline result<shared> make(std::uint64_t end);
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
    /// Of its bitmap, in bytes.
    std::uint64_t size() const noexcept { return size_; }
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

    /// Takes the marks of a range away, and calls `found(address)` for each page that had one, in their order. What was
    /// written to such a page before it was marked is seen by who reads it from then on.
    template <class Found>
    void take(std::uint64_t address, std::uint64_t size, Found found) noexcept {
        if (mapping_ == nullptr || size == 0 || address >= end()) return;
        const std::uint64_t first = address / page_size;
        const std::uint64_t last = (size > end() - address ? end() - 1 : address + size - 1) / page_size;
        for (std::uint64_t byte = first / 8; byte <= last / 8; ++byte) {
            // Most of a log is empty; what is marked right now comes the next time.
            constexpr std::uint64_t word = sizeof(std::uint64_t);
            if ((head_ + byte) % word == 0 && byte + word <= size_ && is_empty(head_ + byte)) {
                byte += word - 1;
                continue;
            }
            unsigned mask = 0xff;
            if (byte == first / 8) mask &= 0xffU << first % 8;
            if (byte == last / 8) mask &= 0xffU >> (7 - last % 8);
            const unsigned taken = mask & std::atomic_ref(reinterpret_cast<unsigned char&>(mapping_[head_ + byte]))
                                              .fetch_and(static_cast<unsigned char>(~mask), std::memory_order_acq_rel);
            for (unsigned bit = 0; bit < 8; ++bit)
                if ((taken >> bit & 1) != 0) found((byte * 8 + bit) * page_size);
        }
    }

private:
    bool is_empty(std::uint64_t at) const noexcept {
        return std::atomic_ref(reinterpret_cast<std::uint64_t&>(mapping_[at])).load(std::memory_order_relaxed) == 0;
    }
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

struct dirty_pages::shared {
    dirty_pages log;
    unique_fd file;
};

inline result<dirty_pages::shared> dirty_pages::make(std::uint64_t end) {
    // Whole words: there are those who clear it by them.
    const std::uint64_t pages_of_a_word = 64;
    const std::uint64_t pages = (end + page_size - 1) / page_size;
    const std::uint64_t size = (pages + pages_of_a_word - 1) / pages_of_a_word * sizeof(std::uint64_t);
    unique_fd file(::memfd_create("vhost-log", MFD_CLOEXEC));
    if (!file || ::ftruncate(file.get(), static_cast<off_t>(size)) != 0) return userfault::failure("memfd of the log");
    result<dirty_pages> mapped = map(size, 0, file);
    if (!mapped) return mapped.error();
    return shared{std::move(*mapped), std::move(file)};
}

} // namespace vmstate::vhost_user
