// SPDX-License-Identifier: BSL-1.0
//
// Which pages of a block are there at all: memory that nobody has touched is zero, and need not be read to know it.
// Depends on machine/ram_block.hpp, page_bitmap.hpp, dirty_log.hpp, pagemap_scan.hpp.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/ram/pagemap_scan.hpp>
#include <vmstate/support/zero_bytes.hpp>

namespace vmstate {

namespace detail {

enum class memory_kind {
    private_anonymous, ///< what isn't in the page table is zero
    private_hugetlb,   ///< huge pages without a file
    shared,            ///< others may have put something where this process's page table has nothing
    other,
};

/// What kind of mappings `memory` lies in, by /proc/self/maps.
inline memory_kind memory_kind_of(std::span<const std::byte> memory) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> maps(std::fopen("/proc/self/maps", "re"), std::fclose);
    if (!maps) return memory_kind::other;
    const auto begin = reinterpret_cast<std::uintptr_t>(memory.data());
    const std::uint64_t end = begin + memory.size();
    std::uint64_t reached = begin;
    bool shared = false;
    bool is_private = false;
    bool huge = false;
    char line[512];
    for (bool whole_line = true; reached < end && std::fgets(line, sizeof line, maps.get()) != nullptr;) {
        const bool first_part = std::exchange(whole_line, std::string_view(line).ends_with('\n'));
        if (!first_part) continue;
        std::uint64_t from = 0;
        std::uint64_t to = 0;
        std::uint64_t inode = 0;
        char permissions[5] = {};
        if (std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s %*x %*x:%*x %" SCNu64, &from, &to, permissions, &inode) != 4)
            return memory_kind::other;
        if (to <= reached) continue;
        if (from > reached) return memory_kind::other;
        if (permissions[3] == 's') shared = true;
        else if (inode == 0) is_private = true;
        // The kernel's own file for MAP_HUGETLB without one.
        else if (std::string_view(line).find(" /anon_hugepage (deleted)\n") != std::string_view::npos) huge = true;
        else return memory_kind::other;
        reached = to;
    }
    if (reached < end || shared + is_private + huge != 1) return memory_kind::other;
    if (huge) return memory_kind::private_hugetlb;
    return shared ? memory_kind::shared : memory_kind::private_anonymous;
}

/// Calls `found` for the stretches of the file that hold data.
template <class Found>
result<void> find_data(ram_file file, std::uint64_t size, Found found) {
    for (std::uint64_t done = 0; done < size;) {
        const off_t data = ::lseek(file.fd, static_cast<off_t>(file.offset + done), SEEK_DATA);
        if (data < 0) {
            if (errno == ENXIO) return {}; // nothing but a hole up to the file's end
            return error(errc::io, {}, "SEEK_DATA: " + std::system_category().message(errno));
        }
        const off_t hole = ::lseek(file.fd, data, SEEK_HOLE);
        if (hole < 0) return error(errc::io, {}, "SEEK_HOLE: " + std::system_category().message(errno));
        const std::uint64_t first = static_cast<std::uint64_t>(data) - file.offset;
        if (first >= size) return {};
        done = static_cast<std::uint64_t>(hole) - file.offset;
        found(first, std::min(done, size) - first);
    }
    return {};
}

} // namespace detail

/// Sets in `into`, a bit per target page of `memory`, the pages that may hold something; the others are zero, and
/// reading them would only make them present. How many bits became set.
///
/// Where the memory is written meanwhile, start its dirty log first: a page that comes later is in that. Of a shared
/// mapping nothing is known without its `file`, nor of a private mapping of a file: all pages are set.
inline result<std::uint64_t> find_present_pages(std::span<const std::byte> memory, std::size_t page_size,
    page_bitmap& into, const ram_file& file = {}) {
    const detail::block_pages pages(memory.size(), page_size);
    if (result<void> fits = pages.check(into); !fits) return fits.error();
    std::uint64_t added = 0;
    const auto found = [&](std::uint64_t offset, std::uint64_t length) {
        added += pages.mark(into, offset, length);
    };
    switch (detail::memory_kind_of(memory)) {
    case detail::memory_kind::private_anonymous: {
        const result<pagemap> map = pagemap::open();
        if (!map) break;
        if (map->scan(memory,
                {.any_of = page_category::present | page_category::swapped, .none_of = page_category::zero_frame},
                found))
            return added;
        const long host_page_size = ::sysconf(_SC_PAGESIZE);
        if (map->read_entries(memory, static_cast<std::size_t>(host_page_size), found)) return added;
        break;
    }
    case detail::memory_kind::shared:
        if (file.fd < 0) break;
        if (result<void> looked = detail::find_data(file, memory.size(), found); !looked) return looked.error();
        return added;
    case detail::memory_kind::private_hugetlb:
    case detail::memory_kind::other:
        break;
    }
    found(0, memory.size());
    return added;
}

/// Whether `memory` is known to be zero at little cost: no more than a few of its pages are there, and those are zero.
/// False also where nobody knows.
inline bool is_known_to_be_zero(
    std::span<const std::byte> memory, std::size_t page_size, const ram_file& file = {}) {
    constexpr std::size_t most_bytes_read = std::size_t{64} << 20;
    const detail::memory_kind kind = detail::memory_kind_of(memory);
    if (kind != detail::memory_kind::private_anonymous && (kind != detail::memory_kind::shared || file.fd < 0))
        return false;
    page_bitmap present(detail::block_pages(memory.size(), page_size).count());
    const result<std::uint64_t> count = find_present_pages(memory, page_size, present, file);
    if (!count || *count * page_size > most_bytes_read) return false;
    for (page_run run = present.find_next_run(0); run.count != 0; run = present.find_next_run(run.first + run.count)) {
        const std::size_t begin = run.first * page_size;
        if (!are_zero(memory.subspan(begin, std::min(run.count * page_size, memory.size() - begin)))) return false;
    }
    return true;
}

} // namespace vmstate
