// SPDX-License-Identifier: BSL-1.0
//
// What the main thread waits for: a signal that ends the program, another thread that has news, or time. Depends on
// vmstate's support/ and Linux.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <optional>

#include <vmstate/support/unique_fd.hpp>

namespace live {

class events {
public:
    using clock = std::chrono::steady_clock;
    enum class what { interrupted, news, time };

    /// Before any thread is made: SIGINT and SIGTERM come here and nowhere else from then on.
    events() {
        ::sigset_t ending;
        ::sigemptyset(&ending);
        ::sigaddset(&ending, SIGINT);
        ::sigaddset(&ending, SIGTERM);
        ::pthread_sigmask(SIG_BLOCK, &ending, nullptr);
        signals_.reset(::signalfd(-1, &ending, SFD_CLOEXEC | SFD_NONBLOCK));
        news_.reset(::eventfd(0, EFD_CLOEXEC));
    }

    /// Any thread: the next `wait` returns.
    void tell() const {
        const std::uint64_t one = 1;
        [[maybe_unused]] const ssize_t written = ::write(news_.get(), &one, sizeof one);
    }
    /// After `interrupted`, which is said again and again otherwise: the next one is of another signal.
    void take_interruption() const {
        ::signalfd_siginfo signal{};
        [[maybe_unused]] const ssize_t taken = ::read(signals_.get(), &signal, sizeof signal);
    }
    /// Without a deadline: for as long as it takes.
    what wait(std::optional<clock::time_point> deadline = {}) const {
        for (;;) {
            int timeout = -1;
            if (deadline) {
                const auto left = std::chrono::ceil<std::chrono::milliseconds>(*deadline - clock::now()).count();
                if (left <= 0) return what::time;
                timeout = left < 3'600'000 ? static_cast<int>(left) : 3'600'000;
            }
            ::pollfd ready[]{{signals_.get(), POLLIN, 0}, {news_.get(), POLLIN, 0}};
            if (::poll(ready, 2, timeout) <= 0) continue;
            if (ready[0].revents != 0) return what::interrupted;
            std::uint64_t count = 0;
            [[maybe_unused]] const ssize_t taken = ::read(news_.get(), &count, sizeof count);
            return what::news;
        }
    }

private:
    vmstate::unique_fd signals_;
    vmstate::unique_fd news_;
};

} // namespace live
