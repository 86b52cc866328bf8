// SPDX-License-Identifier: BSL-1.0
//
// SIGTERM, SIGINT and SIGHUP as calls of a function, so that what was begun is cleared away. Depends on POSIX threads.
#pragma once

#include <pthread.h>
#include <signal.h>

#include <array>
#include <atomic>
#include <functional>
#include <thread>
#include <utility>

namespace park {

class ending_signals {
public:
    /// Before any thread is made: they end nothing any more. One that is ignored, as a shell's background job ignores SIGINT,
    /// stays so.
    ending_signals() {
        ::sigemptyset(&ours_);
        for (const int one : std::array{SIGTERM, SIGINT, SIGHUP}) {
            struct sigaction now {};
            if (::sigaction(one, nullptr, &now) == 0 && now.sa_handler != SIG_IGN) ::sigaddset(&ours_, one);
        }
        ::sigaddset(&ours_, waking);
        ::pthread_sigmask(SIG_BLOCK, &ours_, nullptr);
    }

private:
    friend class signal_watch;
    static constexpr int waking = SIGUSR1; ///< a watch's own, to end its wait

    ::sigset_t ours_{};
};

/// While it lives, a thread calls `act` for each of the signals, also for one that has come before.
class signal_watch {
public:
    signal_watch(const ending_signals& signals, std::function<void()> act)
        : watching_([this, ours = signals.ours_, act = std::move(act)] {
            for (int came = 0; ::sigwait(&ours, &came) == 0 && !is_over_.load();)
                if (came != ending_signals::waking) act();
        }) {}
    signal_watch(const signal_watch&) = delete;
    signal_watch& operator=(const signal_watch&) = delete;
    ~signal_watch() {
        is_over_.store(true);
        ::pthread_kill(watching_.native_handle(), ending_signals::waking);
        watching_.join();
    }

private:
    std::atomic<bool> is_over_ = false;
    std::thread watching_;
};

} // namespace park
