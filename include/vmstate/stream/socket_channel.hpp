// SPDX-License-Identifier: BSL-1.0
//
// Channels over a connected stream socket: both directions, vectored and blocking on the descriptor itself. How the
// socket was connected is connect.hpp's and listener.hpp's business. Depends on channel.hpp, fd_channel.hpp and Linux.
#pragma once

#include <limits.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include <vmstate/stream/channel.hpp>
#include <vmstate/stream/fd_channel.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate {

namespace detail {

/// A socket and those who use it: a channel and its return paths. It is closed when the last of them is closed.
class shared_socket {
public:
    explicit shared_socket(unique_fd fd) noexcept : fd_(std::move(fd)) {}

    /// Only for users that are not closed: as long as there is one, the descriptor stays what it is.
    int get() const noexcept { return fd_.get(); }
    bool was_shut_down() const noexcept { return shut_.load(std::memory_order_relaxed); }

    void add_user() noexcept {
        const std::lock_guard lock(closing_);
        ++users_;
    }
    result<void> drop_user() {
        const std::lock_guard lock(closing_);
        if (--users_ != 0 || !fd_) return {};
        if (!was_shut_down()) drop_what_arrived();
        const int fd = fd_.release();
        if (::close(fd) != 0 && errno != EINTR) return system_error("close");
        return {};
    }
    void end_output() noexcept {
        const std::lock_guard lock(closing_);
        if (fd_) ::shutdown(fd_.get(), SHUT_WR);
    }
    void shutdown() noexcept {
        const std::lock_guard lock(closing_);
        shut_.store(true, std::memory_order_relaxed);
        if (fd_) ::shutdown(fd_.get(), SHUT_RDWR);
    }

private:
    /// Closing a TCP socket with something unread makes it a reset, and the peer then loses what is still under way to it.
    void drop_what_arrived() const noexcept {
        std::array<std::byte, 16 * 1024> nowhere;
        for (int most = 64; most > 0; --most)
            if (::recv(fd_.get(), nowhere.data(), nowhere.size(), MSG_DONTWAIT) <= 0) return;
    }

    std::mutex closing_; // so that nobody shuts down a descriptor that is somebody else's by now
    unique_fd fd_;
    unsigned users_ = 1;
    std::atomic<bool> shut_ = false;
};

} // namespace detail

/// Reads from and writes to a connected stream socket. The return path has the same socket and a bound on waiting of its
/// own (at first the one that its origin had): on a source it waits as long as the destination has nothing to say.
class socket_channel final : public duplex_channel {
public:
    /// Parts that one call of the system takes; more parts are more calls.
    static constexpr std::size_t max_parts = IOV_MAX;

    /// `fd` is a connected stream socket, blocking or not.
    explicit socket_channel(unique_fd fd) : socket_(std::make_shared<detail::shared_socket>(std::move(fd))) {}
    ~socket_channel() override { (void)socket_channel::close(); }

    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        if (result<void> usable = this->usable(); !usable) return usable;
        std::array<iovec, max_parts> room;
        while (!parts.empty()) {
            std::span<iovec> vector(room.data(), std::min(parts.size(), room.size()));
            for (std::size_t i = 0; i < vector.size(); ++i)
                vector[i] = {const_cast<std::byte*>(parts[i].data()), parts[i].size()};
            parts = parts.subspan(vector.size());
            if (result<void> sent = send_all(vector); !sent) return sent;
        }
        return {};
    }

    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        if (result<void> usable = this->usable(); !usable) return usable.error();
        std::array<iovec, max_parts> room;
        const std::size_t count = std::min(parts.size(), room.size());
        std::size_t wanted = 0;
        for (std::size_t i = 0; i < count; ++i) {
            room[i] = {parts[i].data(), parts[i].size()};
            wanted += parts[i].size();
        }
        // The system would answer 0, which says that the stream is at its end.
        if (wanted == 0) return error(errc::invalid_argument, "room for at least one byte");
        msghdr message{};
        message.msg_iov = room.data();
        message.msg_iovlen = count;
        for (;;) {
            // Not to wait in here: both directions wait in one queue, and each time that the other one has room again, the
            // system wakes who waits in recvmsg, and poll only who waits for what there is.
            const ssize_t got = ::recvmsg(socket_->get(), &message, MSG_DONTWAIT);
            if (got > 0) return static_cast<std::size_t>(got);
            if (got == 0) {
                if (socket_->was_shut_down()) return shut_down();
                return std::size_t{0};
            }
            if (result<void> ready = wait_after(errno, POLLIN, "read"); !ready) return ready.error();
        }
    }

    /// The socket itself is closed when its return paths are closed, too.
    result<void> close() override {
        if (std::exchange(closed_, true)) return {};
        return socket_->drop_user();
    }
    void shutdown() noexcept override { socket_->shutdown(); }
    void end_output() noexcept override { socket_->end_output(); }
    bool is_ended() noexcept override {
        if (!usable()) return true;
        pollfd poll{socket_->get(), POLLRDHUP, 0};
        return ::poll(&poll, 1, 0) > 0;
    }

    result<std::unique_ptr<duplex_channel>> get_return_path() override {
        if (result<void> usable = this->usable(); !usable) return usable.error();
        return std::unique_ptr<duplex_channel>(new socket_channel(*this));
    }

    bool set_timeout(std::chrono::milliseconds timeout) noexcept override {
        timeout_ = std::max(timeout, std::chrono::milliseconds(0));
        return true;
    }

    /// For TCP, where what is under way is another matter, TCP_NOTSENT_LOWAT; else SO_SNDBUF, of which Linux takes twice as
    /// much, and lets who writes to a unix socket go on when a quarter is left.
    void limit_unsent(std::size_t bytes) noexcept override {
        if (closed_) return;
        const int limit = static_cast<int>(std::min<std::size_t>(bytes, INT_MAX / 2));
        if (::setsockopt(socket_->get(), IPPROTO_TCP, TCP_NOTSENT_LOWAT, &limit, sizeof limit) == 0) return;
        const int size = 2 * limit;
        (void)::setsockopt(socket_->get(), SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    }

    /// TCP alone: what is written to a unix socket waits on the writer's side. The kernel lets the receive buffer of a
    /// quick reader grow to megabytes; one of a fixed size bounds what is under way, too, and over a longer way than that of
    /// a local network would bound the speed.
    void limit_unread(std::size_t bytes) noexcept override {
        if (closed_) return;
        const std::optional<std::chrono::microseconds> round_trip = shortest_round_trip();
        if (!round_trip || *round_trip > local_round_trip) return;
        const int limit = static_cast<int>(std::min<std::size_t>(bytes, INT_MAX));
        (void)::setsockopt(socket_->get(), SOL_SOCKET, SO_RCVBUF, &limit, sizeof limit);
    }

    /// The socket, for its options (SO_SNDBUF, ...); -1 once it is closed. It stays this channel's.
    int native_handle() const noexcept { return closed_ ? -1 : socket_->get(); }

private:
    socket_channel(const socket_channel& origin) : socket_(origin.socket_), timeout_(origin.timeout_) {
        socket_->add_user();
    }

    /// 10 Gbit/s have 300 KB under way in this time.
    static constexpr std::chrono::microseconds local_round_trip{250};
    /// Of a TCP connection. The C library's tcp_info ends before it: linux/tcp.h, tcpi_min_rtt (Linux 4.6).
    std::optional<std::chrono::microseconds> shortest_round_trip() const noexcept {
        constexpr std::size_t place = 148;
        std::array<std::byte, place + sizeof(std::uint32_t)> information;
        socklen_t length = information.size();
        if (::getsockopt(socket_->get(), IPPROTO_TCP, TCP_INFO, information.data(), &length) != 0) return std::nullopt;
        if (length < information.size()) return std::nullopt;
        std::uint32_t microseconds = 0;
        std::memcpy(&microseconds, information.data() + place, sizeof microseconds);
        return std::chrono::microseconds(microseconds);
    }

    static error shut_down() { return error(errc::io, {}, "channel was shut down"); }
    result<void> usable() const {
        if (closed_) return error(errc::io, {}, "channel is closed");
        if (socket_->was_shut_down()) return shut_down();
        return {};
    }
    // With a bound the waiting is poll's; without one the system's own is a call less, and does what was to be written whole.
    int writing_flags() const noexcept { return timeout_.count() > 0 ? MSG_DONTWAIT : 0; }

    result<void> send_all(std::span<iovec> vector) const {
        while (!vector.empty()) {
            msghdr message{};
            message.msg_iov = vector.data();
            message.msg_iovlen = vector.size();
            const ssize_t sent = ::sendmsg(socket_->get(), &message, MSG_NOSIGNAL | writing_flags());
            if (sent < 0) {
                if (result<void> ready = wait_after(errno, POLLOUT, "write"); !ready) return ready;
                continue;
            }
            std::size_t done = static_cast<std::size_t>(sent);
            while (!vector.empty() && done >= vector.front().iov_len) {
                done -= vector.front().iov_len;
                vector = vector.subspan(1);
            }
            if (done != 0) {
                vector.front().iov_base = static_cast<std::byte*>(vector.front().iov_base) + done;
                vector.front().iov_len -= done;
            }
        }
        return {};
    }

    /// After a call that failed: waits where trying again is worth it, and says why where it isn't.
    result<void> wait_after(int number, short events, const char* what) const {
        if (socket_->was_shut_down()) return shut_down();
        if (number == EINTR) return {};
        if (number != EAGAIN && number != EWOULDBLOCK) return detail::system_error(what, number);
        using clock = std::chrono::steady_clock;
        const clock::time_point deadline = clock::now() + timeout_;
        for (;;) {
            int patience = -1;
            if (timeout_.count() > 0) {
                const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - clock::now());
                patience = static_cast<int>(std::clamp<std::int64_t>(left.count(), 0, INT_MAX));
            }
            pollfd poll{socket_->get(), events, 0};
            const int ready = ::poll(&poll, 1, patience);
            if (socket_->was_shut_down()) return shut_down();
            if (ready > 0) return {};
            if (ready < 0 && errno != EINTR) return detail::system_error("poll");
            // What is longer than poll can count ends early, and begins again.
            if (ready == 0 && clock::now() >= deadline)
                return error(errc::io, {},
                    std::string(what) + ": timed out after " + std::to_string(timeout_.count()) + " ms");
        }
    }

    std::shared_ptr<detail::shared_socket> socket_;
    std::chrono::milliseconds timeout_{0};
    bool closed_ = false;
};

} // namespace vmstate
