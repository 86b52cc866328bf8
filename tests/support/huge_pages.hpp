// SPDX-License-Identifier: BSL-1.0
// Huge pages for as long as a test needs them. Depends on Linux and the standard library.
#pragma once

#include <cstdint>
#include <fstream>
#include <string>

namespace vmstate::tests {

/// As many more huge pages, of 2 MiB where nothing else is said, as a test needs, given back at the end; takes root, and memory in such pieces.
/// Programs that do this don't run at the same time: RESOURCE_LOCK huge_pages.
class huge_pages {
public:
    explicit huge_pages(long count, std::uint64_t size = 2 << 20)
        : file_("/sys/kernel/mm/hugepages/hugepages-" + std::to_string(size >> 10) + "kB/nr_hugepages") {
        const long before = read();
        if (count == 0 || before < 0) {
            enough_ = count == 0;
            return;
        }
        write(before + count);
        added_ = read() - before;
        enough_ = added_ >= count;
    }
    huge_pages(const huge_pages&) = delete;
    huge_pages& operator=(const huge_pages&) = delete;
    ~huge_pages() {
        if (added_ > 0) write(read() - added_);
    }
    bool enough() const noexcept { return enough_; }

private:
    long read() const {
        long count = -1;
        std::ifstream(file_) >> count;
        return count;
    }
    void write(long count) const { std::ofstream(file_) << count; }

    std::string file_;
    long added_ = 0;
    bool enough_ = false;
};

} // namespace vmstate::tests
