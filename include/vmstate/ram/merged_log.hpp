// SPDX-License-Identifier: BSL-1.0
//
// One dirty log of several, for a block that is written in several ways: by vCPUs, and by backends that map it, too.
// Depends on dirty_log.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// A page is dirty where one of the logs says so. They are of the same block.
class merged_log {
public:
    explicit merged_log(std::vector<any_dirty_log> logs) : logs_(std::move(logs)) {}

    /// All of them, or none.
    result<void> start() {
        for (std::size_t i = 0; i != logs_.size(); ++i)
            if (result<void> started = logs_[i].start(); !started) {
                while (i-- != 0) static_cast<void>(logs_[i].stop());
                return started;
            }
        return {};
    }
    result<std::uint64_t> collect(page_bitmap& into) {
        std::uint64_t all = 0;
        for (any_dirty_log& one : logs_) {
            const result<std::uint64_t> found = one.collect(into);
            if (!found) return found;
            all += *found;
        }
        return all;
    }
    /// All of them, whatever becomes of the others; the first failure.
    result<void> stop() {
        result<void> done;
        for (any_dirty_log& one : logs_)
            if (result<void> stopped = one.stop(); !stopped && done) done = std::move(stopped);
        return done;
    }

private:
    std::vector<any_dirty_log> logs_;
};

} // namespace vmstate
