// SPDX-License-Identifier: BSL-1.0
//
// What postcopy costs the guest: how many pages it had to wait for, for how long, and how long each of its threads stood
// still (QEMU: postcopy-blocktime, postcopy-latency). Depends on machine/ram_block.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/machine/ram_block.hpp>

namespace vmstate {

/// What one thread waited for.
struct postcopy_thread_status {
    std::uint32_t thread_id = 0; ///< as gettid says it
    bool is_vcpu = false;
    std::uint64_t faults = 0;
    std::chrono::nanoseconds blocked{0}; ///< of a wait that lasts still, the time until now
};

/// What another process that shares the memory waited for. Pages that several of its threads wait for at once count once.
struct postcopy_client_status {
    std::string name;
    bool has_left = false;
    std::uint64_t faults = 0;           ///< pages that it had to wait for
    std::uint64_t already_received = 0; ///< of which the page came before the fault was seen
    std::chrono::nanoseconds blocked{0}; ///< the waits for its pages, added up; of those that last still, the time until now
    std::chrono::nanoseconds longest{0}; ///< of the waits that are over
};

/// A consistent snapshot.
struct postcopy_fault_status {
    /// Buckets of `latencies`.
    static constexpr std::size_t buckets = 32;

    std::uint64_t faults = 0;           ///< of threads that had to wait for a page
    std::uint64_t already_received = 0; ///< of which the page came before the fault was seen: no wait of the network's
    /// From the fault seen to its page placed: bucket 0 below a microsecond, bucket n from 2^(n-1) up to 2^n, the last
    /// one whatever is longer.
    std::array<std::uint64_t, buckets> latencies{};
    std::chrono::nanoseconds latency_total{0}; ///< of those in `latencies`
    std::chrono::nanoseconds latency_max{0};
    std::vector<postcopy_thread_status> threads; ///< by thread_id; empty where the kernel tells no thread ids
    std::chrono::nanoseconds blocktime{0};       ///< during which all vCPU threads stood still
    std::vector<postcopy_client_status> clients; ///< in the order in which they came; their faults are in `faults`, too
};

/// Any thread calls anything. `when` is given, so that who sees many faults asks for the time once.
class postcopy_statistics {
public:
    using clock = std::chrono::steady_clock;

    /// The threads whose standing still all together is `blocktime`. Before the first fault.
    void set_vcpu_threads(const std::vector<std::uint32_t>& thread_ids) {
        const std::lock_guard lock(faults_mutex_);
        vcpus_ = {thread_ids.begin(), thread_ids.end()};
        for (const std::uint32_t id : vcpus_) threads_[id].is_vcpu = true;
    }
    /// Another process shares the memory: a number for its faults.
    unsigned add_client(std::string name) {
        const std::lock_guard lock(faults_mutex_);
        clients_.push_back({.name = std::move(name)});
        return static_cast<unsigned>(clients_.size());
    }
    /// It waits for nothing any more.
    void remove_client(unsigned number, clock::time_point when) {
        const std::lock_guard lock(faults_mutex_);
        clients_[number - 1].has_left = true;
        std::erase_if(waiting_, [&](const wait& one) {
            if (one.client != number) return false;
            leave(one, when);
            return true;
        });
    }
    /// A thread of another process waits for the host page at `offset`.
    void client_fault(unsigned number, const ram_block& block, std::uint64_t offset, clock::time_point when) {
        const std::lock_guard lock(faults_mutex_);
        // Another of its threads, or the same one that a signal made try again.
        for (const wait& one : waiting_)
            if (one.client == number && one.block == &block && one.offset == offset) return;
        ++faults_;
        ++clients_[number - 1].faults;
        waiting_.push_back({0, number, &block, offset, when});
    }
    /// A thread (0: nobody knows which) waits for the host page at `offset`.
    void fault(std::uint32_t thread_id, const ram_block& block, std::uint64_t offset, clock::time_point when) {
        const std::lock_guard lock(faults_mutex_);
        if (thread_id != 0) {
            const auto waits = std::find_if(
                waiting_.begin(), waiting_.end(), [&](const wait& one) { return one.thread_id == thread_id; });
            if (waits != waiting_.end()) {
                // A signal made it try again: it still waits.
                if (waits->block == &block && waits->offset == offset) return;
                // It goes on already, and who placed the page hasn't come to say so.
                leave(*waits, when);
                count(since(waits->begin, when));
                waiting_.erase(waits);
            }
        }
        ++faults_;
        waiting_.push_back({thread_id, 0, &block, offset, when});
        if (thread_id == 0) return;
        thread& stopped = threads_[thread_id];
        ++stopped.faults;
        if (stopped.is_vcpu && ++blocked_vcpus_ == vcpus_.size()) all_blocked_since_ = when;
    }
    /// It came: who waited for it goes on.
    void placed(const ram_block& block, std::uint64_t offset, clock::time_point when) {
        finish(block, offset, when, true);
    }
    /// It had come before the fault was seen.
    void already_received(const ram_block& block, std::uint64_t offset, clock::time_point when) {
        const std::lock_guard lock(faults_mutex_);
        already_received_ += finish_locked(block, offset, when, false);
    }

    postcopy_fault_status snapshot(clock::time_point now = clock::now()) const {
        const std::lock_guard lock(faults_mutex_);
        postcopy_fault_status status;
        status.faults = faults_;
        status.already_received = already_received_;
        status.latencies = latencies_;
        status.latency_total = latency_total_;
        status.latency_max = latency_max_;
        status.blocktime = blocktime_;
        if (!vcpus_.empty() && blocked_vcpus_ == vcpus_.size()) status.blocktime += since(all_blocked_since_, now);
        for (const auto& [id, one] : threads_) {
            status.threads.push_back({id, one.is_vcpu, one.faults, one.blocked});
            for (const wait& waits : waiting_)
                if (waits.thread_id == id) status.threads.back().blocked += since(waits.begin, now);
        }
        status.clients = clients_;
        for (const wait& waits : waiting_)
            if (waits.client != 0) status.clients[waits.client - 1].blocked += since(waits.begin, now);
        return status;
    }

private:
    struct wait {
        std::uint32_t thread_id;
        unsigned client; // its number; 0: this process
        const ram_block* block;
        std::uint64_t offset;
        clock::time_point begin;
    };
    struct thread {
        bool is_vcpu = false;
        std::uint64_t faults = 0;
        std::chrono::nanoseconds blocked{0};
    };

    static std::chrono::nanoseconds since(clock::time_point begin, clock::time_point end) noexcept {
        return std::max(std::chrono::nanoseconds(end - begin), std::chrono::nanoseconds(0));
    }
    void finish(const ram_block& block, std::uint64_t offset, clock::time_point when, bool counts) {
        const std::lock_guard lock(faults_mutex_);
        (void)finish_locked(block, offset, when, counts);
    }
    /// How many threads waited for it. There are never more of them than threads, so they are simply looked through.
    std::uint64_t finish_locked(const ram_block& block, std::uint64_t offset, clock::time_point when, bool counts) {
        return std::erase_if(waiting_, [&](const wait& one) {
            if (one.block != &block || one.offset != offset) return false;
            leave(one, when);
            if (counts) count(since(one.begin, when));
            else if (one.client != 0) ++clients_[one.client - 1].already_received;
            return true;
        });
    }
    void leave(const wait& one, clock::time_point when) {
        if (one.client != 0) {
            postcopy_client_status& client = clients_[one.client - 1];
            client.blocked += since(one.begin, when);
            client.longest = std::max(client.longest, since(one.begin, when));
        }
        if (one.thread_id == 0) return;
        thread& gone = threads_[one.thread_id];
        gone.blocked += since(one.begin, when);
        if (gone.is_vcpu && blocked_vcpus_-- == vcpus_.size()) blocktime_ += since(all_blocked_since_, when);
    }
    void count(std::chrono::nanoseconds latency) {
        const auto microseconds = static_cast<std::uint64_t>(latency.count() / 1000);
        ++latencies_[std::min<std::size_t>(static_cast<std::size_t>(std::bit_width(microseconds)), latencies_.size() - 1)];
        latency_total_ += latency;
        latency_max_ = std::max(latency_max_, latency);
    }

    mutable std::mutex faults_mutex_; // all below
    std::vector<wait> waiting_;
    std::map<std::uint32_t, thread> threads_;
    std::vector<postcopy_client_status> clients_; // by their numbers, from 1 on
    std::set<std::uint32_t> vcpus_;
    std::size_t blocked_vcpus_ = 0;
    clock::time_point all_blocked_since_{};
    std::uint64_t faults_ = 0;
    std::uint64_t already_received_ = 0;
    std::array<std::uint64_t, postcopy_fault_status::buckets> latencies_{};
    std::chrono::nanoseconds latency_total_{0};
    std::chrono::nanoseconds latency_max_{0};
    std::chrono::nanoseconds blocktime_{0};
};

} // namespace vmstate
