// SPDX-License-Identifier: BSL-1.0
//
// The state and the status of a migration, shared by its threads and the user's. Depends on status.hpp and support/.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <utility>

#include <vmstate/migration/status.hpp>
#include <vmstate/support/guarded.hpp>

namespace vmstate::migration {

/// Told of every change of a migration: state, pass, progress. Called from the migration's threads, without a lock held;
/// it may ask for the status, and must not wait for the migration. What it throws is lost.
using observer = std::function<void(const status&)>;

namespace detail {

class monitor {
public:
    using clock = std::chrono::steady_clock;

    status snapshot() const {
        const std::lock_guard lock(status_mutex_);
        return current();
    }
    state now() const {
        const std::lock_guard lock(status_mutex_);
        return status_.state;
    }
    /// Goes to `next` if it may follow; says whether it did.
    bool enter(state next) { return enter_unless(state::none, next); }
    /// The same, but not from `unless`.
    bool enter_unless(state unless, state next) {
        {
            const std::lock_guard lock(status_mutex_);
            if (!may_follow(status_.state, next)) return false;
            if (unless != state::none && status_.state == unless) return false;
            if (next == state::setup) {
                status_ = {};
                started_ = clock::now();
            } else if (status_.state == state::setup) {
                status_.setup_time = elapsed();
            }
            if (is_final(next)) status_.total_time = elapsed();
            status_.state = next;
        }
        changed_.notify_all();
        tell();
        return true;
    }
    template <class Change>
    void update(Change change) {
        {
            const std::lock_guard lock(status_mutex_);
            change(status_);
        }
        tell();
    }
    /// Waits until `done` says so of the status.
    template <class Done>
    void wait_until(Done done) const {
        std::unique_lock lock(status_mutex_);
        changed_.wait(lock, [&] { return done(status_); });
    }
    /// The same, at most until `deadline`.
    template <class Done>
    bool wait_until(clock::time_point deadline, Done done) const {
        std::unique_lock lock(status_mutex_);
        return changed_.wait_until(lock, deadline, [&] { return done(status_); });
    }
    /// The same, for at most `patience`; 0 is for as long as it takes.
    template <class Done>
    bool wait_for(std::chrono::milliseconds patience, Done done) const {
        if (patience.count() != 0) return wait_until(clock::now() + patience, done);
        wait_until(done);
        return true;
    }
    /// For whoever waits on something that isn't in the status.
    void wake() const {
        { const std::lock_guard lock(status_mutex_); }
        changed_.notify_all();
    }
    /// Takes `inside` back. Who waits for that may destroy this as soon as it is done.
    void leave(std::atomic<bool>& inside) const {
        const std::lock_guard lock(status_mutex_);
        inside.store(false);
        changed_.notify_all();
    }
    void observe(observer who) {
        const std::lock_guard lock(observer_mutex_);
        observer_ = std::move(who);
    }

private:
    status current() const {
        status copy = status_;
        if (copy.state != state::none && !is_final(copy.state)) copy.total_time = elapsed();
        return copy;
    }
    std::chrono::milliseconds elapsed() const {
        return std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - started_);
    }
    /// Whatever becomes of the telling, the change has come about, and the migration goes on.
    void tell() const {
        static_cast<void>(vmstate::detail::guarded([&]() -> result<void> {
            observer who;
            {
                const std::lock_guard lock(observer_mutex_);
                who = observer_;
            }
            if (who) who(snapshot());
            return {};
        }));
    }

    mutable std::mutex status_mutex_; ///< status_, started_
    mutable std::condition_variable changed_;
    status status_;
    clock::time_point started_{};
    mutable std::mutex observer_mutex_; ///< observer_
    observer observer_;
};

} // namespace detail
} // namespace vmstate::migration
