// SPDX-License-Identifier: BSL-1.0
// Whether the kernel has a page of zeros. Depends on ram/ and Linux.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include <vmstate/ram/pagemap_scan.hpp>

namespace vmstate::tests {

/// Whether reading anonymous memory that nobody has touched leaves it without memory, but for the kernel's page of zeros. A
/// kernel may be without one (seen under PVM, which runs guests without the processor's help): each page that is read is there
/// then. True where PAGEMAP_SCAN can't tell.
inline bool has_zero_frame() {
    constexpr std::size_t size = 4096;
    void* const address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return true;
    const std::span<const std::byte> page(static_cast<const std::byte*>(address), size);
    static_cast<void>(*static_cast<const volatile std::byte*>(address));
    std::uint64_t present = 0;
    const result<pagemap> map = pagemap::open();
    const bool known = map
        && map->scan(page, {.any_of = page_category::present, .none_of = page_category::zero_frame},
            [&](std::uint64_t, std::uint64_t length) { present += length; });
    ::munmap(address, size);
    return !known || present == 0;
}

} // namespace vmstate::tests
