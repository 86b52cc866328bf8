// SPDX-License-Identifier: BSL-1.0
//
// Guest memory as the threads of a backend see it: the table of mapped regions and the log of dirty pages, which change
// only while nobody is in them. Depends on mapped_region.hpp and dirty_pages.hpp.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <span>
#include <utility>

#include <vmstate/vhost_user/dirty_pages.hpp>
#include <vmstate/vhost_user/memory_table.hpp>

namespace vmstate::vhost_user {

class guest_memory;

/// While it lives, guest memory stays mapped as it is. Short-lived (one request of a queue), and one per thread: a second
/// one would wait for a change that waits for the first.
class memory_access {
public:
    memory_access(memory_access&& other) noexcept : memory_(std::exchange(other.memory_, nullptr)) {}
    memory_access& operator=(memory_access&&) = delete;
    inline ~memory_access();

    inline const memory_table& table() const noexcept;
    /// Has to follow each write to guest memory, before the guest is told of it. Costs a comparison where nobody logs.
    inline void mark_dirty(std::uint64_t guest_address, std::uint64_t size) const noexcept;
    /// False when the connection to the VMM is gone, and with it pages that had not come yet: what was read here may be zeros
    /// that the guest never wrote, and what was written is lost. To be asked after reading and before doing anything with
    /// what was read, and before anything that was written is taken for done.
    inline bool intact() const noexcept;

private:
    friend class guest_memory;
    explicit memory_access(guest_memory& memory) noexcept : memory_(&memory) {}
    guest_memory* memory_;
};

/// Owns no mapping: client.hpp does. One thread changes it, any may use it.
class guest_memory {
public:
    explicit guest_memory(std::size_t most_regions) : table_(most_regions) {}
    guest_memory(const guest_memory&) = delete;
    guest_memory& operator=(const guest_memory&) = delete;

    /// Nothing where no guest memory may be touched now, or it isn't intact any more. Waits for a change under way.
    std::optional<memory_access> access() {
        std::unique_lock lock(users_mutex_);
        no_change_.wait(lock, [&] { return !changing_; });
        if (!open_ || broken_.load() != 0) return std::nullopt;
        ++users_;
        return memory_access(*this);
    }

    /// Waits until nobody is in it (for a thread that waits for a page: until that is there), and runs `change(table, log)`.
    /// Afterwards threads are let in if `open`.
    template <class Change>
    auto change(bool open, Change change) {
        {
            std::unique_lock lock(users_mutex_);
            changing_ = true; // new ones wait, so that it ends
            no_users_.wait(lock, [&] { return users_ == 0; });
        }
        struct leave {
            guest_memory& memory;
            bool open;
            ~leave() {
                const std::lock_guard lock(memory.users_mutex_);
                memory.changing_ = false;
                memory.open_ = open;
                memory.no_change_.notify_all();
            }
        } leave{*this, open};
        return change(table_, log_);
    }
    /// Whether `memory_access::mark_dirty` marks.
    void set_logging(bool logging) noexcept { logging_.store(logging, std::memory_order_relaxed); }
    /// What `memory_access::intact` says.
    void set_intact(bool intact) noexcept { broken_.store(intact ? 0 : 1); }

    /// For the thread that changes it.
    const memory_table& table() const noexcept { return table_; }
    const dirty_pages& log() const noexcept { return log_; }

private:
    friend class memory_access;
    void leave() noexcept {
        const std::lock_guard lock(users_mutex_);
        if (--users_ == 0) no_users_.notify_all();
    }

    std::mutex users_mutex_; // guards the four below
    unsigned users_ = 0;
    bool changing_ = false;
    bool open_ = false;
    std::condition_variable no_users_, no_change_;

    memory_table table_; // changed while there are no users
    dirty_pages log_;    // likewise
    std::atomic<bool> logging_ = false;
    std::atomic<unsigned> broken_ = 0;
};

inline memory_access::~memory_access() {
    if (memory_ != nullptr) memory_->leave();
}
inline const memory_table& memory_access::table() const noexcept { return memory_->table_; }
inline void memory_access::mark_dirty(std::uint64_t guest_address, std::uint64_t size) const noexcept {
    if (memory_->logging_.load(std::memory_order_relaxed)) memory_->log_.mark(guest_address, size);
}
inline bool memory_access::intact() const noexcept {
    // Adding nothing, unlike loading, lets no read of guest memory before it move behind it.
    return memory_->broken_.fetch_add(0, std::memory_order_acq_rel) == 0;
}

} // namespace vmstate::vhost_user
