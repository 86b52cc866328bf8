// SPDX-License-Identifier: BSL-1.0
#include "report.hpp"

#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>

namespace live {

namespace {

std::string mib(double bytes) {
    std::array<char, 32> text{};
    std::snprintf(text.data(), text.size(), "%.1f MiB", bytes / (1 << 20));
    return text.data();
}
std::string mib(std::uint64_t bytes) { return mib(static_cast<double>(bytes)); }

double seconds(std::chrono::milliseconds time) { return std::chrono::duration<double>(time).count(); }

/// Bytes per second over all of it; within a millisecond there is nothing to divide by.
double throughput(const vmstate::migration::status& at) {
    return at.total_time.count() > 0 ? static_cast<double>(at.ram.transferred) / seconds(at.total_time) : 0;
}

} // namespace

void report::progress(const vmstate::migration::status& at) {
    using vmstate::migration::state;
    if (!passes_ || (at.state != state::active && at.state != state::device)) return;
    {
        const std::lock_guard lock(mutex_);
        if (at.ram.dirty_sync_count == last_pass_) return;
        last_pass_ = at.ram.dirty_sync_count;
    }
    const bool stands_still = at.state == state::device;
    const double written = static_cast<double>(at.ram.dirty_pages_rate * at.ram.page_size);
    const double sent = at.ram.mbps * 1e6 / 8;
    const double left = sent > 0 ? static_cast<double>(at.ram.remaining) / sent : 0;
    std::array<char, 32> time_left{};
    if (sent > 0) std::snprintf(time_left.data(), time_left.size(), ", %.2f s left", left);
    const std::string guest = stands_still ? "stands still" : "writes " + mib(written) + "/s";
    boost::json::object object{{"event", "pass"}, {"pass", at.ram.dirty_sync_count}, {"state", to_string(at.state)},
        {"transferred", at.ram.transferred}, {"remaining", at.ram.remaining},
        {"dirty-pages-rate", at.ram.dirty_pages_rate}, {"dirty-bytes-per-second", written},
        {"bytes-per-second", sent}};
    if (sent > 0) object["seconds-left"] = left;
    say("pass " + std::to_string(at.ram.dirty_sync_count) + ": " + mib(at.ram.transferred) + " sent, " +
            mib(at.ram.remaining) + " to send; the guest " + guest + time_left.data(),
        object);
}

void report::left(const vmstate::migration::status& last) {
    {
        const std::lock_guard lock(mutex_);
        last_pass_ = 0;
    }
    const double rate = throughput(last);
    say("migrated in " + std::to_string(last.total_time.count()) + " ms, of which the guest stood still for " +
            std::to_string(last.downtime.count()) + " ms; " + std::to_string(last.ram.dirty_sync_count) +
            " passes, " + mib(last.ram.transferred) + ", " + mib(rate) + "/s",
        {{"event", "migrated"}, {"total-time-ms", last.total_time.count()}, {"downtime-ms", last.downtime.count()},
            {"setup-time-ms", last.setup_time.count()}, {"passes", last.ram.dirty_sync_count},
            {"transferred", last.ram.transferred}, {"precopy-bytes", last.ram.precopy_bytes},
            {"downtime-bytes", last.ram.downtime_bytes}, {"normal", last.ram.normal},
            {"duplicate", last.ram.duplicate}, {"skipped", last.ram.skipped}, {"bytes-per-second", rate}});
}

void report::arrived(const vmstate::migration::status& last) {
    say("arrived: " + mib(last.ram.transferred) + "; the guest runs here",
        {{"event", "arrived"}, {"transferred", last.ram.transferred}});
}

void report::write(std::string line) {
    line += '\n';
    const std::lock_guard lock(mutex_);
    // In one piece, and at once: somebody may wait for it.
    std::fwrite(line.data(), 1, line.size(), stderr);
    std::fflush(stderr);
}

} // namespace live
