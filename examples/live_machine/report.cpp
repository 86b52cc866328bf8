// SPDX-License-Identifier: BSL-1.0
#include "report.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <numeric>
#include <utility>

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

using faults = vmstate::postcopy_fault_status;

std::uint64_t count_of(const faults& all) {
    return std::accumulate(all.latencies.begin(), all.latencies.end(), std::uint64_t{0});
}
double microseconds(std::chrono::nanoseconds time) { return std::chrono::duration<double, std::micro>(time).count(); }
double mean_us(const faults& all) {
    const std::uint64_t count = count_of(all);
    return count != 0 ? microseconds(all.latency_total) / static_cast<double>(count) : 0;
}
/// What so many percent of the waits stayed below, in microseconds: the end of a bucket, a power of two.
std::uint64_t below_us(const faults& all, std::uint64_t percent) {
    const std::uint64_t needed = (count_of(all) * percent + 99) / 100;
    std::uint64_t seen = 0;
    for (std::size_t i = 0; i != all.latencies.size(); ++i)
        if ((seen += all.latencies[i]) >= needed) return std::uint64_t{1} << i;
    return 0;
}

std::string describe(const faults& all) {
    const std::uint64_t count = count_of(all);
    if (count == 0) return "the guest waited for no page";
    std::array<char, 256> text{};
    std::snprintf(text.data(), text.size(),
        "the guest waited for %llu pages: %.0f us on average, half of the waits below %llu us, 99 %% below %llu us, the "
        "longest %.1f ms",
        static_cast<unsigned long long>(count), mean_us(all), static_cast<unsigned long long>(below_us(all, 50)),
        static_cast<unsigned long long>(below_us(all, 99)), microseconds(all.latency_max) / 1000);
    return text.data();
}
/// A line for each length of waits, from the shortest to the longest that there were.
std::string draw(const faults& all) {
    const auto is_used = [](std::uint64_t count) { return count != 0; };
    const auto first = std::find_if(all.latencies.begin(), all.latencies.end(), is_used);
    const auto last = std::find_if(all.latencies.rbegin(), all.latencies.rend(), is_used).base();
    if (first == all.latencies.end()) return {};
    constexpr std::uint64_t width = 50;
    const std::uint64_t most = *std::max_element(first, last);
    std::string lines;
    for (auto bucket = first; bucket != last; ++bucket) {
        std::array<char, 128> line{};
        std::snprintf(line.data(), line.size(), "\n    below %7llu us %7llu ", 1ull << (bucket - all.latencies.begin()),
            static_cast<unsigned long long>(*bucket));
        lines += line.data() + std::string(static_cast<std::size_t>((*bucket * width + most - 1) / most), '#');
    }
    return lines;
}
/// A line for each backend that shares the memory.
std::string describe(const vmstate::postcopy_client_status& one) {
    std::array<char, 160> text{};
    std::snprintf(text.data(), text.size(), " waited for %llu pages, %.1f ms in all, the longest time %.1f ms",
        static_cast<unsigned long long>(one.faults), microseconds(one.blocked) / 1000, microseconds(one.longest) / 1000);
    return '\n' + one.name + text.data();
}
boost::json::array clients_of(const faults& all) {
    boost::json::array clients;
    for (const vmstate::postcopy_client_status& one : all.clients)
        clients.push_back({{"name", one.name}, {"faults", one.faults}, {"already-received", one.already_received},
            {"blocked-us", microseconds(one.blocked)}, {"longest-us", microseconds(one.longest)}});
    return clients;
}
/// In the n-th place, the waits below 2^n microseconds that aren't in one before it.
boost::json::array histogram(const faults& all) {
    boost::json::array counts(all.latencies.begin(), all.latencies.end());
    while (!counts.empty() && counts.back() == 0u) counts.pop_back();
    return counts;
}

} // namespace

void report::leaving(const vmstate::migration::status& at) {
    pass(at);
    postcopy(at, mib(at.ram.remaining) + " to send; the guest runs there");
}

void report::coming(const vmstate::migration::status& at) { postcopy(at, "the guest runs here, without all of its memory"); }

void report::postcopy(const vmstate::migration::status& at, const std::string& begun) {
    using vmstate::migration::state;
    const std::string why = at.state == state::postcopy_paused ? at.error_desc.message() : std::string();
    bool recovered = false;
    {
        const std::lock_guard lock(mutex_);
        // What another thread saw before may be told after.
        const bool is_stale = is_postcopy(last_state_) ? !is_postcopy(at.state) && !is_final(at.state)
                                                       : is_final(last_state_) && is_postcopy(at.state);
        if (is_stale || last_state_ == at.state) return;
        const state before = std::exchange(last_state_, at.state);
        recovered = before == state::postcopy_recover;
        if (at.state == state::postcopy_active) last_trouble_.clear();
        else if (at.state != state::postcopy_paused || std::exchange(last_trouble_, why) == why) return;
    }
    if (at.state == state::postcopy_paused) return say("paused: " + why, {{"event", "paused"}, {"error", why}});
    if (recovered) return say("recovered: it goes on", {{"event", "recovered"}});
    say("postcopy: " + begun, {{"event", "postcopy"}});
}

void report::cannot_recover(const std::string& what, const vmstate::error& why) {
    {
        const std::lock_guard lock(mutex_);
        if (std::exchange(last_trouble_, why.message()) == why.message()) return;
    }
    say(what + ": " + why.message(), {{"event", "paused"}, {"what", what}, {"error", why.message()}});
}

void report::pass(const vmstate::migration::status& at) {
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
    boost::json::object object{{"event", "migrated"}, {"total-time-ms", last.total_time.count()},
        {"downtime-ms", last.downtime.count()}, {"setup-time-ms", last.setup_time.count()},
        {"passes", last.ram.dirty_sync_count}, {"transferred", last.ram.transferred},
        {"precopy-bytes", last.ram.precopy_bytes}, {"downtime-bytes", last.ram.downtime_bytes},
        {"normal", last.ram.normal}, {"duplicate", last.ram.duplicate}, {"skipped", last.ram.skipped},
        {"bytes-per-second", rate}};
    std::string afterwards;
    if (last.ram.postcopy_bytes != 0) {
        object["postcopy-bytes"] = last.ram.postcopy_bytes;
        object["postcopy-requests"] = last.ram.postcopy_requests;
        afterwards = "; " + mib(last.ram.postcopy_bytes) + " of it after the guest had left, which asked for " +
                     std::to_string(last.ram.postcopy_requests) + " pages";
    }
    say("migrated in " + std::to_string(last.total_time.count()) + " ms, of which the guest stood still for " +
            std::to_string(last.downtime.count()) + " ms; " + std::to_string(last.ram.dirty_sync_count) +
            " passes, " + mib(last.ram.transferred) + ", " + mib(rate) + "/s" + afterwards,
        object);
}

void report::arrived(const vmstate::migration::status& last) {
    boost::json::object object{{"event", "arrived"}, {"transferred", last.ram.transferred}};
    std::string waits;
    if (last.postcopy.state == vmstate::postcopy_state::end) {
        const faults& all = last.postcopy.faults;
        object["requests"] = last.postcopy.requests;
        object["interruptions"] = last.postcopy.interruptions;
        object["faults"] = all.faults;
        object["already-received"] = all.already_received;
        object["latency-mean-us"] = mean_us(all);
        object["latency-median-below-us"] = below_us(all, 50);
        object["latency-99-percent-below-us"] = below_us(all, 99);
        object["latency-max-us"] = microseconds(all.latency_max);
        object["latencies"] = histogram(all);
        object["blocktime-us"] = microseconds(all.blocktime);
        waits += '\n';
        waits += describe(all) + draw(all);
        if (!all.clients.empty()) object["clients"] = clients_of(all);
        for (const vmstate::postcopy_client_status& one : all.clients) waits += describe(one);
    }
    say("arrived: " + mib(last.ram.transferred) + "; the guest runs here" + waits, object);
}

void report::write(std::string line) {
    line += '\n';
    const std::lock_guard lock(mutex_);
    // In one piece, and at once: somebody may wait for it.
    std::fwrite(line.data(), 1, line.size(), stderr);
    std::fflush(stderr);
}

} // namespace live
