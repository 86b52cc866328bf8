// SPDX-License-Identifier: BSL-1.0
//
// What a migration asks of the guest: to stand still, to go on, and which pages it has written. Depends on ram/.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate::migration {

/// The user's side of a migration. All of it is called from the migration's threads, one call at a time.
struct guest {
    /// All vCPUs stand still when it returns, and devices write no guest memory any more. Called at the source, once
    /// before the last pages and the devices are sent. A failure ends the migration; the guest is then taken to run.
    std::function<result<void>()> stop;
    /// The guest runs. Called at the destination after a complete load, and at the source where a migration has
    /// failed or was cancelled after `stop`.
    std::function<result<void>()> start;
    /// Which pages the guest writes, by the RAM block's name; needed at the source for each block that the guest can
    /// write while it runs. A block without a log is sent once, and again when the guest stands still: that
    /// time is part of the downtime that the migration reckons with, but one that is too large for the limit doesn't hold it up.
    std::map<std::string, any_dirty_log, std::less<>> dirty_logs = {};
    /// Takes `percent` of the guest's time away from it, 0 for none (`auto-converge`); may be empty.
    std::function<void(unsigned percent)> throttle = {};
    /// The threads of the vCPUs, as gettid says them; may be empty. Asked at a destination in postcopy, right before `start`:
    /// how long all of them stood still together is the status's `blocktime`.
    std::function<std::vector<std::uint32_t>()> vcpu_threads = {};
    /// Called at the destination when everything is loaded and valid, before the source is told: the last moment at which the
    /// guest can be left there. A failure does that and ends the migration; may be empty. The source waits meanwhile, for
    /// its `peer_timeout`. That it succeeds isn't the end yet: `run` may still fail, and the guest is the source's then. Not
    /// called where the migration has gone on in postcopy.
    std::function<result<void>()> accept = {};
};

} // namespace vmstate::migration
