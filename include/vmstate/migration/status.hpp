// SPDX-License-Identifier: BSL-1.0
//
// What is known of a migration at one moment, under the names of QEMU's `query-migrate`. Depends on state.hpp,
// postcopy/, ram/xbzrle.hpp and support/.
#pragma once

#include <chrono>
#include <cstdint>

#include <vmstate/migration/state.hpp>
#include <vmstate/postcopy/state.hpp>
#include <vmstate/postcopy/statistics.hpp>
#include <vmstate/ram/xbzrle.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate::migration {

/// MigrationStats: of guest memory, in bytes unless said otherwise.
struct ram_status {
    std::uint64_t total = 0;       ///< of all blocks that are sent
    std::uint64_t remaining = 0;   ///< still to be sent, as far as it is known
    std::uint64_t transferred = 0; ///< on the channel, headers and devices included
    std::uint64_t duplicate = 0;   ///< pages sent as zero pages
    std::uint64_t skipped = 0;     ///< zero pages not sent, since they are zero at the destination, too
    std::uint64_t normal = 0;      ///< pages sent whole
    std::uint64_t normal_bytes = 0;
    std::uint64_t multifd_bytes = 0;  ///< of `transferred`, on multifd channels
    std::uint64_t precopy_bytes = 0;  ///< while the guest ran
    std::uint64_t downtime_bytes = 0; ///< while it stood still
    std::uint64_t dirty_pages_rate = 0; ///< pages per second that the guest wrote, between the last two passes
    std::uint64_t dirty_sync_count = 0; ///< passes: how often the dirty logs were read
    std::uint64_t postcopy_requests = 0; ///< for pages, in postcopy
    std::uint64_t postcopy_bytes = 0;    ///< of `transferred`, in postcopy
    std::uint64_t page_size = 0;
    std::uint64_t pages_per_second = 0;
    double mbps = 0; ///< megabits per second on the channel, lately; at the end, of the whole transfer
};

/// A destination in postcopy.
struct postcopy_status {
    postcopy_state state = postcopy_state::none;
    std::uint64_t requests = 0;     ///< pages asked for, those asked for again after a recovery included
    std::uint64_t waiting = 0;      ///< of which so many haven't come yet
    std::uint64_t interruptions = 0; ///< how often a connection broke
    postcopy_fault_status faults;   ///< what the guest waited for (QEMU: postcopy-blocktime, postcopy-latency)
};

/// MigrationInfo: a consistent snapshot.
struct status {
    migration::state state = migration::state::none;
    ram_status ram;
    postcopy_status postcopy;
    xbzrle_counts xbzrle_cache; ///< with the parameter `xbzrle`
    std::chrono::milliseconds total_time{0};        ///< since the start, or in all
    std::chrono::milliseconds setup_time{0};        ///< until the first page
    std::chrono::milliseconds expected_downtime{0}; ///< while active: of a switchover now; before it is known, the limit
    /// How long the guest stood still, seen from here: at the end; of postcopy, until the destination has answered to RUN, or,
    /// where it doesn't wait for that, has loaded the devices.
    std::chrono::milliseconds downtime{0};
    unsigned cpu_throttle_percentage = 0;
    bool has_return_path = false; ///< at a destination: the source has opened it, and waits for "loaded"
    error error_desc; ///< why it failed; in postcopy-paused, why the connection broke or didn't come about
};

} // namespace vmstate::migration
