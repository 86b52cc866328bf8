// SPDX-License-Identifier: BSL-1.0
//
// A stream in a file, from an offset on, or in a FIFO. Depends on fd_channel.hpp and connector.hpp.
#pragma once

#include <fcntl.h>

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <limits>
#include <memory>
#include <string>
#include <thread>

#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/fd_channel.hpp>

namespace vmstate {

namespace detail {

/// Waits for a FIFO's other end, if the path is one: a writer waits until it can be opened, a reader until somebody has
/// written, or has closed it.
inline result<unique_fd> open_fifo_or_file(const std::string& path, int flags, const opening_options& options) {
    using clock = std::chrono::steady_clock;
    constexpr std::chrono::milliseconds nap{5};
    const clock::time_point deadline = clock::now() + options.timeout;
    unique_fd fd;
    for (;;) {
        if (!fd) fd.reset(::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK, 0600));
        if (!fd && errno != ENXIO) return system_error(path);
        struct stat status {};
        const bool is_fifo = fd ? ::fstat(fd.get(), &status) == 0 && S_ISFIFO(status.st_mode)
                                : ::stat(path.c_str(), &status) == 0 && S_ISFIFO(status.st_mode);
        if (!fd && !is_fifo) return system_error(path, ENXIO);
        if (fd && (!is_fifo || (flags & O_ACCMODE) != O_RDONLY)) break;
        if (options.stop.stop_requested()) return error(errc::io, {}, path + ": waiting for the FIFO's other end was cancelled");
        if (options.timeout.count() > 0 && clock::now() >= deadline)
            return error(errc::io, {},
                path + ": no other end of the FIFO: timed out after " + std::to_string(options.timeout.count()) + " ms");
        if (!fd) {
            std::this_thread::sleep_for(nap);
            continue;
        }
        // One that no writer has opened yet is neither readable nor hung up.
        pollfd polled{fd.get(), POLLIN, 0};
        if (::poll(&polled, 1, static_cast<int>(nap.count())) > 0) break;
    }
    if (const int set = ::fcntl(fd.get(), F_GETFL); set < 0 || ::fcntl(fd.get(), F_SETFL, set & ~O_NONBLOCK) < 0)
        return system_error(path);
    return fd;
}

inline result<unique_fd> open_file_at(
    const std::string& path, std::uint64_t offset, int flags, const opening_options& options = {}) {
    if (offset > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max()))
        return error(errc::invalid_argument, "a file offset below 2^63", std::to_string(offset));
    result<unique_fd> opened = open_fifo_or_file(path, flags, options);
    if (!opened) return opened;
    unique_fd fd = std::move(*opened);
    const auto position = static_cast<off_t>(offset);
    // What is before the offset belongs to somebody else, who put something there first; what is after it is old.
    struct stat status {};
    if ((flags & O_CREAT) != 0 && ::fstat(fd.get(), &status) == 0 && S_ISREG(status.st_mode) &&
        ::ftruncate(fd.get(), position) != 0)
        return system_error(path + ": truncate");
    if (position != 0 && ::lseek(fd.get(), position, SEEK_SET) < 0) return system_error(path + ": seek");
    return fd;
}

} // namespace detail

/// A new file, readable for its owner alone as QEMU makes it, or an existing one, whose bytes before `offset` stay.
/// `options` say how long a FIFO may be without a reader.
inline result<std::unique_ptr<output_channel>> open_output_file(
    const std::string& path, std::uint64_t offset = 0, const opening_options& options = {}) {
    result<unique_fd> fd = detail::open_file_at(path, offset, O_WRONLY | O_CREAT, options);
    if (!fd) return fd.error();
    return std::unique_ptr<output_channel>(std::make_unique<fd_output_channel>(std::move(*fd)));
}

/// A file to read, from `offset` on. `options` say how long a FIFO may be without a writer's first byte.
inline result<std::unique_ptr<input_channel>> open_input_file(
    const std::string& path, std::uint64_t offset = 0, const opening_options& options = {}) {
    result<unique_fd> fd = detail::open_file_at(path, offset, O_RDONLY, options);
    if (!fd) return fd.error();
    return std::unique_ptr<input_channel>(std::make_unique<fd_input_channel>(std::move(*fd)));
}

} // namespace vmstate
