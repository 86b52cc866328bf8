// SPDX-License-Identifier: BSL-1.0
//
// A file descriptor with one owner. Depends on POSIX alone.
#pragma once

#include <unistd.h>

#include <utility>

namespace vmstate {

/// Owns a file descriptor, or nothing (-1), and closes it in its destructor.
class unique_fd {
public:
    unique_fd() noexcept = default;
    explicit unique_fd(int fd) noexcept : fd_(fd) {}
    unique_fd(unique_fd&& other) noexcept : fd_(other.release()) {}
    unique_fd& operator=(unique_fd&& other) noexcept {
        if (this != &other) reset(other.release());
        return *this;
    }
    ~unique_fd() { reset(); }

    int get() const noexcept { return fd_; }
    explicit operator bool() const noexcept { return fd_ >= 0; }
    /// Gives the descriptor away.
    int release() noexcept { return std::exchange(fd_, -1); }
    /// Closes the descriptor held so far and takes `fd`.
    void reset(int fd = -1) noexcept {
        // Linux closes the descriptor even where close() says EINTR: never close twice.
        if (const int old = std::exchange(fd_, fd); old >= 0) ::close(old);
    }

private:
    int fd_ = -1;
};

} // namespace vmstate
