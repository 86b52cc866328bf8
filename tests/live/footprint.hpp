// SPDX-License-Identifier: BSL-1.0
// What this process holds: threads, descriptors, mappings. After a migration it is what it was before. Depends on Linux.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>

#include <support/catch.hpp>

namespace vmstate::tests {

struct footprint {
    std::size_t threads = 0;
    std::size_t descriptors = 0;
    std::size_t mappings = 0;

    static footprint now() {
        const auto entries = [](const char* directory) {
            using iterator = std::filesystem::directory_iterator;
            return static_cast<std::size_t>(std::distance(iterator(directory), iterator()));
        };
        std::ifstream maps("/proc/self/maps");
        footprint found{entries("/proc/self/task"), entries("/proc/self/fd"), 0};
        found.mappings = static_cast<std::size_t>(
            std::count(std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>(), '\n'));
        return found;
    }
};

/// What the allocator may map for itself meanwhile: a sanitizer's does so piece by piece.
#if defined(__has_feature)
#    if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#        define VMSTATE_TESTS_SANITIZED
#    endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || defined(VMSTATE_TESTS_SANITIZED)
inline constexpr std::size_t mappings_of_allocator = 256;
#else
inline constexpr std::size_t mappings_of_allocator = 16;
#endif

/// Take one after a first migration, when the allocator has what it needs; then `check` after `migrations` more. Threads
/// and descriptors are exactly as many; of mappings the allocator may have made some, but not one for every migration, nor
/// for every second one.
class leak_check {
public:
    void check(std::size_t migrations) const {
        // A thread that was joined stays in the list until the kernel has buried it.
        footprint after = footprint::now();
        for (int tenths = 0; after.threads > before_.threads && tenths != 100; ++tenths) {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            after = footprint::now();
        }
        CHECK(after.threads == before_.threads);
        CHECK(after.descriptors == before_.descriptors);
        CHECK(after.mappings <= before_.mappings + mappings_of_allocator + migrations / 2);
    }

private:
    footprint before_ = footprint::now();
};

} // namespace vmstate::tests
