// SPDX-License-Identifier: BSL-1.0
// A place for a test's files. Depends on the standard library alone.
#pragma once

#include <filesystem>
#include <string>
#include <utility>

namespace vmstate::tests {

/// A directory that is removed with this object, unless $VMSTATE_KEEP is set. Its path is short enough for unix sockets.
class temporary_directory {
public:
    temporary_directory();
    ~temporary_directory();
    temporary_directory(temporary_directory&& other) noexcept : path_(std::exchange(other.path_, {})) {}
    temporary_directory& operator=(temporary_directory&&) = delete;

    const std::filesystem::path& path() const noexcept { return path_; }
    std::filesystem::path operator/(const std::filesystem::path& name) const { return path_ / name; }
    /// The path of a file in it, for URIs and commands.
    std::string file(const std::string& name) const { return (path_ / name).string(); }
    /// Makes a directory in it.
    std::filesystem::path subdirectory(const std::string& name) const {
        std::filesystem::create_directory(path_ / name);
        return path_ / name;
    }

private:
    std::filesystem::path path_;
};

} // namespace vmstate::tests
