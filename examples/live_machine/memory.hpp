// SPDX-License-Identifier: BSL-1.0
//
// The guest's RAM: a memfd, mapped. Depends on vmstate's support/ and Linux.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <system_error>

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace live {

static_assert(std::endian::native == std::endian::little, "words of the guest are read as they are");

class memory {
public:
    static vmstate::result<memory> make(std::uint64_t size) {
        const auto failure = [](const char* call) {
            return vmstate::error(vmstate::errc::io, {}, call + (": " + std::system_category().message(errno)));
        };
        vmstate::unique_fd fd(::memfd_create("guest-ram", MFD_CLOEXEC));
        if (!fd) return failure("memfd_create");
        if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0) return failure("ftruncate");
        void* const address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
        if (address == MAP_FAILED) return failure("mmap");
        return memory({static_cast<std::byte*>(address), size});
    }
    memory(memory&& other) noexcept : bytes_(other.bytes_) { other.bytes_ = {}; }
    memory& operator=(memory&&) = delete;
    ~memory() {
        if (!bytes_.empty()) ::munmap(bytes_.data(), bytes_.size());
    }

    std::span<std::byte> bytes() const noexcept { return bytes_; }

    /// 1, 2 or 4 bytes inside of the memory, at a multiple of their size. A migration reads pages while they are written,
    /// and reads them again when it learns of that: a race by design, of which a thread sanitizer is not told.
    [[gnu::no_sanitize_thread]] std::uint32_t load(std::uint64_t offset, std::uint32_t size) const {
        const std::byte* const at = bytes_.data() + offset;
        switch (size) {
        case 1: return *reinterpret_cast<const volatile std::uint8_t*>(at);
        case 2: return *reinterpret_cast<const volatile std::uint16_t*>(at);
        default: return *reinterpret_cast<const volatile std::uint32_t*>(at);
        }
    }
    [[gnu::no_sanitize_thread]] void store(std::uint64_t offset, std::uint32_t size, std::uint32_t value) const {
        std::byte* const at = bytes_.data() + offset;
        switch (size) {
        case 1: *reinterpret_cast<volatile std::uint8_t*>(at) = static_cast<std::uint8_t>(value); break;
        case 2: *reinterpret_cast<volatile std::uint16_t*>(at) = static_cast<std::uint16_t>(value); break;
        default: *reinterpret_cast<volatile std::uint32_t*>(at) = value; break;
        }
    }

private:
    explicit memory(std::span<std::byte> bytes) noexcept : bytes_(bytes) {}

    std::span<std::byte> bytes_;
};

} // namespace live
