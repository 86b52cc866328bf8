// SPDX-License-Identifier: BSL-1.0
//
// A stream in a file, from an offset on. Depends on fd_channel.hpp.
#pragma once

#include <fcntl.h>

#include <limits>
#include <memory>
#include <string>

#include <vmstate/stream/fd_channel.hpp>

namespace vmstate {

namespace detail {

inline result<unique_fd> open_file_at(const std::string& path, std::uint64_t offset, int flags) {
    if (offset > static_cast<std::uint64_t>(std::numeric_limits<off_t>::max()))
        return error(errc::invalid_argument, "a file offset below 2^63", std::to_string(offset));
    unique_fd fd(::open(path.c_str(), flags | O_CLOEXEC, 0600));
    if (!fd) return system_error(path);
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
inline result<std::unique_ptr<output_channel>> open_output_file(
    const std::string& path, std::uint64_t offset = 0) {
    result<unique_fd> fd = detail::open_file_at(path, offset, O_WRONLY | O_CREAT);
    if (!fd) return fd.error();
    return std::unique_ptr<output_channel>(std::make_unique<fd_output_channel>(std::move(*fd)));
}

/// A file to read, from `offset` on.
inline result<std::unique_ptr<input_channel>> open_input_file(
    const std::string& path, std::uint64_t offset = 0) {
    result<unique_fd> fd = detail::open_file_at(path, offset, O_RDONLY);
    if (!fd) return fd.error();
    return std::unique_ptr<input_channel>(std::make_unique<fd_input_channel>(std::move(*fd)));
}

} // namespace vmstate
