// SPDX-License-Identifier: BSL-1.0
//
// The guest's RAM: a memfd, mapped, in small pages or huge ones. Depends on vmstate's machine/ and support/.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/support/result.hpp>

namespace live {

static_assert(std::endian::native == std::endian::little, "words of the guest are read as they are");

class memory {
public:
    static constexpr std::uint64_t small_page = vmstate::ram_memory::small_page;
    static constexpr std::uint64_t huge_page = std::uint64_t{2} << 20;

    static vmstate::result<memory> make(std::uint64_t size, std::uint64_t page_size) {
        vmstate::result<vmstate::ram_memory> mapped = vmstate::ram_memory::memfd("guest-ram", size, page_size);
        if (!mapped && page_size == huge_page)
            return vmstate::error(mapped.error().code(),
                std::to_string(size / page_size) + " free huge pages of 2 MiB (vm.nr_hugepages)", std::string(mapped.error().found()));
        if (!mapped) return mapped.error();
        return memory(std::move(*mapped));
    }

    std::span<std::byte> bytes() const noexcept { return mapped_.span(); }
    /// With the file behind it: of pages that were never touched, a migration needs to read and send nothing.
    const vmstate::ram_memory& mapping() const noexcept { return mapped_; }

    /// 1, 2 or 4 bytes inside of the memory, at a multiple of their size. A migration reads pages while they are written,
    /// and reads them again when it learns of that: a race by design, of which a thread sanitizer is not told.
    [[gnu::no_sanitize_thread]] std::uint32_t load(std::uint64_t offset, std::uint32_t size) const {
        const std::byte* const at = bytes().data() + offset;
        switch (size) {
        case 1: return *reinterpret_cast<const volatile std::uint8_t*>(at);
        case 2: return *reinterpret_cast<const volatile std::uint16_t*>(at);
        default: return *reinterpret_cast<const volatile std::uint32_t*>(at);
        }
    }
    [[gnu::no_sanitize_thread]] void store(std::uint64_t offset, std::uint32_t size, std::uint32_t value) const {
        std::byte* const at = bytes().data() + offset;
        switch (size) {
        case 1: *reinterpret_cast<volatile std::uint8_t*>(at) = static_cast<std::uint8_t>(value); break;
        case 2: *reinterpret_cast<volatile std::uint16_t*>(at) = static_cast<std::uint16_t>(value); break;
        default: *reinterpret_cast<volatile std::uint32_t*>(at) = value; break;
        }
    }

private:
    explicit memory(vmstate::ram_memory mapped) noexcept : mapped_(std::move(mapped)) {}

    vmstate::ram_memory mapped_;
};

} // namespace live
