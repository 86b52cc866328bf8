// SPDX-License-Identifier: BSL-1.0
//
// Hears of the end of a connection while the thread that reads it is busy elsewhere. Depends on polling_thread.hpp and Linux.
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <functional>
#include <utility>

#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/polling_thread.hpp>

namespace vmstate::vhost_user {

/// A thread that reads nothing and waits for one thing: the peer is gone or sends no more, or this side was shut down. One
/// thread starts and stops it.
class hangup_watch {
public:
    /// `gone` is called once, by the thread, at the end of the connection. The socket stays open until `stop`. Where it runs
    /// already, it goes on as it was.
    result<void> start(int socket, std::function<void()> gone) {
        if (thread_.is_running()) return {};
        return thread_.start([socket, told = std::move(gone)](int stop) {
            std::array<pollfd, 2> events{{{stop, POLLIN, 0}, {socket, POLLRDHUP, 0}}};
            while (::poll(events.data(), events.size(), -1) < 0)
                if (errno != EINTR) return;
            if (events[0].revents == 0) told();
        });
    }
    /// `gone` isn't called any more, or has returned. Harmless twice.
    void stop() noexcept { thread_.stop(); }

private:
    detail::polling_thread thread_;
};

} // namespace vmstate::vhost_user
