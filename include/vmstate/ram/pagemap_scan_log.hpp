// SPDX-License-Identifier: BSL-1.0
//
// The dirty log of any process, without a hypervisor: the kernel write-protects the pages, notes by itself which were
// written, and tells. Linux 6.7 or newer. Depends on dirty_log.hpp, pagemap_scan.hpp, userfault.hpp.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/ram/pagemap_scan.hpp>
#include <vmstate/ram/userfault.hpp>

namespace vmstate {

/// Sees what is written through this mapping of the memory, by this process, by system calls on its behalf, and by KVM;
/// not what another process writes through its own mapping of shared memory. The memory is anonymous, a memfd or
/// hugetlbfs; it may not be registered with another userfaultfd. A transparent huge page is split when it is written.
class pagemap_scan_log {
public:
    /// `memory` is whole pages of its mapping; `page_size` is the target's.
    explicit pagemap_scan_log(std::span<std::byte> memory, std::size_t page_size = 4096)
        : memory_(memory), pages_(memory.size(), page_size) {}

    /// Whether this kernel can do it, found out by doing it to a few pages of its own. `errc::unsupported` if not.
    static result<void> probe();

    result<void> start() {
        if (active_) return detail::log_started();
        result<userfault> fault = userfault::open(userfault_scope::user_only,
            userfault_feature::pagefault_flag_wp | userfault_feature::wp_async |
                userfault_feature::wp_unpopulated | userfault_feature::wp_hugetlbfs_shmem);
        if (!fault) return fault.error();
        result<pagemap> map = pagemap::open();
        if (!map) return map.error();
        if (result<void> added = fault->add(memory_, UFFDIO_REGISTER_MODE_WP); !added) return added;
        result<std::vector<stretch>> stretches = find_stretches(*map);
        if (!stretches) return stretches.error();
        for (const stretch& one : *stretches)
            if (one.armed)
                if (result<void> armed = map->write_protect(one.memory); !armed) return armed;
        active_.emplace(std::move(*fault), std::move(*map), std::move(*stretches));
        return {};
    }
    result<std::uint64_t> collect(page_bitmap& into) {
        if (!active_) return detail::log_not_started();
        if (result<void> fits = pages_.check(into); !fits) return fits.error();
        if (active_->failure) return active_->failure;
        std::uint64_t added = 0;
        for (const stretch& one : active_->stretches) {
            const auto begin = static_cast<std::uint64_t>(one.memory.data() - memory_.data());
            const auto mark = [&](std::uint64_t offset, std::uint64_t length) {
                added += pages_.mark(into, begin + offset, length);
            };
            const result<void> taken = one.armed ? active_->map.take_written(one.memory, mark)
                                                 : active_->map.take_written_if_present(one.memory, mark);
            // Pages may have been taken from the kernel and not come here: nothing that follows would be complete.
            if (!taken) return active_->failure = taken.error();
        }
        return added;
    }
    result<void> stop() {
        if (!active_) return {};
        const std::optional<active> ended = std::exchange(active_, std::nullopt);
        return ended->fault.remove(memory_);
    }

private:
    /// What a page table maps, 2 MiB on x86: either something was there when the log was started, and all of it is
    /// protected; or nothing was, and it is left alone. A page that comes there later comes unprotected, that is, written.
    struct stretch {
        std::span<std::byte> memory;
        bool armed;
    };
    static constexpr std::uint64_t table_size = std::uint64_t{2} << 20;

    struct active {
        active(userfault f, pagemap m, std::vector<stretch> s) noexcept
            : fault(std::move(f)), map(std::move(m)), stretches(std::move(s)) {}
        userfault fault; // closing it unregisters the memory
        pagemap map;
        std::vector<stretch> stretches; ///< all of the memory, in order
        error failure;
    };

    result<std::vector<stretch>> find_stretches(const pagemap& map) const {
        std::vector<stretch> all;
        std::uint64_t done = 0;
        const auto add = [&](std::uint64_t end, bool armed) {
            if (end <= done) return;
            if (!all.empty() && all.back().armed == armed)
                all.back().memory = {all.back().memory.data(), memory_.data() + end};
            else all.push_back({memory_.subspan(done, end - done), armed});
            done = end;
        };
        const std::uint64_t skew = reinterpret_cast<std::uintptr_t>(memory_.data()) % table_size;
        const result<void> looked = map.scan(memory_, {.any_of = page_category::present | page_category::swapped},
            [&](std::uint64_t offset, std::uint64_t length) {
                const std::uint64_t first = (offset + skew) / table_size * table_size;
                const std::uint64_t end = (offset + skew + length + table_size - 1) / table_size * table_size;
                add(first < skew ? 0 : first - skew, false);
                add(std::min<std::uint64_t>(end - skew, memory_.size()), true);
            });
        if (!looked) return looked.error();
        add(memory_.size(), false);
        return all;
    }

    std::span<std::byte> memory_;
    detail::block_pages pages_;
    std::optional<active> active_;
};

inline result<void> pagemap_scan_log::probe() {
    constexpr std::size_t page = 4096;
    constexpr std::size_t size = 4 * 65536; // at least four pages of every host
    void* const address = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (address == MAP_FAILED) return userfault::failure("mmap");
    struct unmapper {
        void* address;
        ~unmapper() { ::munmap(address, size); }
    } const unmap{address};

    const std::span<std::byte> memory(static_cast<std::byte*>(address), size);
    volatile std::byte* const bytes = memory.data();
    for (std::size_t i = 0; i < size; i += page) bytes[i] = std::byte{1};
    pagemap_scan_log log(memory, page);
    if (result<void> started = log.start(); !started) return started;
    page_bitmap dirty(size / page);
    const auto collected = [&](std::size_t expected) -> result<void> {
        dirty.clear_all();
        const result<std::uint64_t> count = log.collect(dirty);
        if (!count) return count.error();
        const bool right = expected == dirty.size() ? dirty.none() : dirty.test(expected) && *count < dirty.size();
        if (!right) return error(errc::unsupported, {}, "PAGEMAP_SCAN misses writes");
        return {};
    };
    if (result<void> nothing = collected(dirty.size()); !nothing) return nothing;
    for (const std::size_t written : {std::size_t{17}, std::size_t{40}}) {
        bytes[written * page] = std::byte{2};
        if (result<void> found = collected(written); !found) return found;
    }
    return log.stop();
}

} // namespace vmstate
