// SPDX-License-Identifier: BSL-1.0
//
// Channels over a file descriptor: regular files, pipes, and sockets that somebody else connected. Depends on
// channel.hpp, support/ and Linux.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

#include <vmstate/stream/channel.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate {

namespace detail {

/// `errno` as an error: what was tried, and what the system said.
inline error system_error(std::string_view what, int number = errno) {
    return error(errc::io, {}, std::string(what) + ": " + std::system_category().message(number));
}

/// While it lives, writing to a pipe without a reader gives EPIPE to this thread and no signal to the process.
class sigpipe_guard {
public:
    explicit sigpipe_guard(bool wanted) noexcept : active_(wanted) {
        if (!active_) return;
        sigset_t pending;
        ::sigemptyset(&pending);
        ::sigpending(&pending);
        // One that was pending before belongs to somebody else: leave it.
        if (::sigismember(&pending, SIGPIPE) == 1) {
            active_ = false;
            return;
        }
        sigset_t pipe;
        ::sigemptyset(&pipe);
        ::sigaddset(&pipe, SIGPIPE);
        ::pthread_sigmask(SIG_BLOCK, &pipe, &saved_);
    }
    sigpipe_guard(const sigpipe_guard&) = delete;
    sigpipe_guard& operator=(const sigpipe_guard&) = delete;
    ~sigpipe_guard() {
        if (!active_) return;
        const int saved_errno = errno;
        sigset_t pipe;
        ::sigemptyset(&pipe);
        ::sigaddset(&pipe, SIGPIPE);
        const timespec at_once{0, 0};
        while (::sigtimedwait(&pipe, nullptr, &at_once) < 0 && errno == EINTR) {
        }
        ::pthread_sigmask(SIG_SETMASK, &saved_, nullptr);
        errno = saved_errno;
    }

private:
    bool active_;
    sigset_t saved_{};
};

/// What both directions share: the descriptor, what kind it is, whether `shutdown` was called, and how long to wait.
class fd_end {
public:
    explicit fd_end(unique_fd fd) noexcept : fd_(std::move(fd)) {
        struct stat status {};
        if (::fstat(fd_.get(), &status) == 0) mode_ = status.st_mode;
        if (is_pipe()) make_pollable();
    }
    int get() const noexcept { return fd_.get(); }
    bool is_socket() const noexcept { return S_ISSOCK(mode_); }
    bool is_pipe() const noexcept { return S_ISFIFO(mode_); }
    bool is_regular_file() const noexcept { return S_ISREG(mode_); }
    bool was_shut_down() const noexcept { return shut_.load(std::memory_order_relaxed); }
    void reset() noexcept { fd_.reset(); }
    /// Closes it; the error is that of a write which the system has put off. Closing twice is harmless.
    result<void> close() {
        const int fd = fd_.release();
        // After EINTR, too, the descriptor is gone.
        if (fd >= 0 && ::close(fd) != 0 && errno != EINTR) return system_error("close");
        return {};
    }

    void shutdown() noexcept {
        shut_.store(true, std::memory_order_relaxed);
        if (is_socket()) ::shutdown(fd_.get(), SHUT_RDWR);
        const std::uint64_t one = 1;
        while (wake_ && ::write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
        }
    }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept {
        timeout_ = std::max(timeout, std::chrono::milliseconds(0));
        return static_cast<bool>(wake_);
    }
    std::chrono::milliseconds timeout() const noexcept { return timeout_; }
    /// Fails on a channel that was shut down or closed.
    result<void> usable() const {
        if (was_shut_down()) return error(errc::io, {}, "channel was shut down");
        if (!fd_) return error(errc::io, {}, "channel is closed");
        return {};
    }
    /// After EAGAIN, on a pipe of ours or a descriptor that was handed over as non-blocking: until it is ready, or fails.
    result<void> wait_for(short events, const char* what) const {
        using clock = std::chrono::steady_clock;
        const clock::time_point deadline = clock::now() + timeout_;
        for (;;) {
            int patience = -1;
            if (timeout_.count() > 0) {
                const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - clock::now()).count();
                patience = static_cast<int>(std::clamp<std::int64_t>(left, 0, std::numeric_limits<int>::max()));
            }
            std::array<pollfd, 2> polled{{{fd_.get(), events, 0}, {wake_.get(), POLLIN, 0}}};
            const int ready = ::poll(polled.data(), wake_ ? 2 : 1, patience);
            if (result<void> still = usable(); !still) return still;
            if (ready > 0) return {};
            if (ready < 0 && errno != EINTR) return system_error("poll");
            if (ready == 0 && clock::now() >= deadline)
                return error(errc::io, {}, std::string(what) + ": timed out after " + std::to_string(timeout_.count()) + " ms");
        }
    }

private:
    /// Whether it blocks belongs to the open file, which other processes may share: this one gets an open file of its own,
    /// on the same pipe. Where that can't be had it blocks for as long as it takes.
    void make_pollable() noexcept {
        const int flags = ::fcntl(fd_.get(), F_GETFL);
        if (flags < 0) return;
        unique_fd wake(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        char path[32];
        std::snprintf(path, sizeof path, "/proc/self/fd/%d", fd_.get());
        const unique_fd own(::open(path, (flags & O_ACCMODE) | O_NONBLOCK | O_CLOEXEC));
        if (wake && own && ::dup3(own.get(), fd_.get(), O_CLOEXEC) >= 0) wake_ = std::move(wake);
    }

    unique_fd fd_;
    unique_fd wake_; ///< of a pipe that doesn't block: readable after `shutdown`
    mode_t mode_ = 0;
    std::chrono::milliseconds timeout_{0};
    std::atomic<bool> shut_ = false;
};

/// Parts as the system wants them, as many as fit into one call.
constexpr std::size_t max_parts = 256;

} // namespace detail

/// Writes to a descriptor that it owns.
class fd_output_channel : public output_channel {
public:
    explicit fd_output_channel(unique_fd fd) noexcept : end_(std::move(fd)) {}

    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        if (result<void> usable = end_.usable(); !usable) return usable;
        const detail::sigpipe_guard guard(end_.is_pipe());
        std::size_t done = 0; // bytes of parts.front() that are written
        while (!parts.empty()) {
            std::array<iovec, detail::max_parts> vector;
            std::size_t count = 0;
            for (const std::span<const std::byte> part : parts.first(std::min(parts.size(), vector.size()))) {
                const std::size_t skip = count == 0 ? done : 0;
                vector[count++] = {const_cast<std::byte*>(part.data()) + skip, part.size() - skip};
            }
            const ssize_t written = write_once(vector.data(), count);
            if (written < 0) {
                if (errno == EINTR) continue;
                if (errno == EAGAIN || errno == EWOULDBLOCK) {
                    if (result<void> ready = end_.wait_for(POLLOUT, "write"); !ready) return ready;
                    continue;
                }
                return detail::system_error("write");
            }
            done += static_cast<std::size_t>(written);
            while (!parts.empty() && done >= parts.front().size()) {
                done -= parts.front().size();
                parts = parts.subspan(1);
            }
        }
        return {};
    }
    result<void> close() override {
        return end_.close();
    }
    void shutdown() noexcept override { end_.shutdown(); }
    /// Pipes have it.
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override { return end_.set_timeout(timeout); }

protected:
    bool was_shut_down() const noexcept { return end_.was_shut_down(); }
    std::chrono::milliseconds timeout() const noexcept { return end_.timeout(); }

private:
    ssize_t write_once(iovec* vector, std::size_t count) const noexcept {
        if (!end_.is_socket()) return ::writev(end_.get(), vector, static_cast<int>(count));
        msghdr message{};
        message.msg_iov = vector;
        message.msg_iovlen = count;
        return ::sendmsg(end_.get(), &message, MSG_NOSIGNAL);
    }

    detail::fd_end end_;
};

/// Reads from a descriptor that it owns.
class fd_input_channel : public input_channel {
public:
    explicit fd_input_channel(unique_fd fd) noexcept : end_(std::move(fd)) {}

    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        if (result<void> usable = end_.usable(); !usable) return usable.error();
        std::array<iovec, detail::max_parts> vector;
        std::size_t count = 0;
        for (const std::span<std::byte> part : parts.first(std::min(parts.size(), vector.size())))
            vector[count++] = {part.data(), part.size()};
        for (;;) {
            const ssize_t got = ::readv(end_.get(), vector.data(), static_cast<int>(count));
            if (got >= 0) return static_cast<std::size_t>(got);
            if (errno == EINTR) continue;
            if (errno != EAGAIN && errno != EWOULDBLOCK) return detail::system_error("read");
            if (result<void> ready = end_.wait_for(POLLIN, "read"); !ready) return ready.error();
        }
    }
    std::uint64_t remaining() const noexcept override {
        struct stat status {};
        if (!end_.is_regular_file() || ::fstat(end_.get(), &status) != 0) return input_channel::remaining();
        const off_t position = ::lseek(end_.get(), 0, SEEK_CUR);
        // Files of /proc have no size and bytes all the same.
        if (position < 0 || status.st_size == 0) return input_channel::remaining();
        return position >= status.st_size ? 0 : static_cast<std::uint64_t>(status.st_size - position);
    }
    result<void> close() override {
        end_.reset();
        return {};
    }
    void shutdown() noexcept override { end_.shutdown(); }
    /// Pipes have it.
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override { return end_.set_timeout(timeout); }

protected:
    bool was_shut_down() const noexcept { return end_.was_shut_down(); }
    std::chrono::milliseconds timeout() const noexcept { return end_.timeout(); }

private:
    detail::fd_end end_;
};

} // namespace vmstate
