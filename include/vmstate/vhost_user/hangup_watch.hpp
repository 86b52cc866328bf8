// SPDX-License-Identifier: BSL-1.0
//
// Hears of the end of a connection while the thread that reads it is busy elsewhere. Depends on ram/userfault.hpp (for
// errors) and Linux.
#pragma once

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate::vhost_user {

/// A thread that reads nothing and waits for one thing: the peer is gone or sends no more, or this side was shut down. One
/// thread starts and stops it.
class hangup_watch {
public:
    hangup_watch() = default;
    hangup_watch(const hangup_watch&) = delete;
    hangup_watch& operator=(const hangup_watch&) = delete;
    ~hangup_watch() { stop(); }

    /// `gone` is called once, by the thread, at the end of the connection. The socket stays open until `stop`. Where it runs
    /// already, it goes on as it was.
    result<void> start(int socket, std::function<void()> gone) {
        if (thread_.joinable()) return {};
        stop_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!stop_) return userfault::failure("eventfd");
        try {
            thread_ = std::thread([this, socket, told = std::move(gone)] {
                std::array<pollfd, 2> events{{{stop_.get(), POLLIN, 0}, {socket, POLLRDHUP, 0}}};
                while (::poll(events.data(), events.size(), -1) < 0)
                    if (errno != EINTR) return;
                if (events[0].revents == 0) told();
            });
        } catch (const std::system_error& refused) {
            return error(errc::io, {}, std::string("thread: ") + refused.what());
        }
        return {};
    }
    /// `gone` isn't called any more, or has returned. Harmless twice.
    void stop() noexcept {
        if (!thread_.joinable()) return;
        const std::uint64_t one = 1;
        while (::write(stop_.get(), &one, sizeof one) < 0 && errno == EINTR) {
        }
        thread_.join();
    }

private:
    unique_fd stop_;
    std::thread thread_;
};

} // namespace vmstate::vhost_user
