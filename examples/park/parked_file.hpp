// SPDX-License-Identifier: BSL-1.0
//
// The file that a machine is kept in: under another name until it is whole and on the disk. Depends on the library and POSIX.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/stream/fd_channel.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace park {

class parked_file {
public:
    /// Makes `path`.partial, so that what would keep it from being made shows before a machine comes. What has the name
    /// `path` stays until `keep`.
    static vmstate::result<parked_file> create(const std::string& path) {
        struct stat status {};
        if (::stat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode))
            return vmstate::error(vmstate::errc::invalid_argument, "a name for a new file", "something else than a file");
        parked_file made(path);
        made.fd_.reset(::open(made.partial_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
        if (!made.fd_) return failure(made.partial_);
        return made;
    }
    parked_file(parked_file&&) noexcept = default;
    parked_file& operator=(parked_file&&) = delete;
    ~parked_file() {
        if (fd_) ::unlink(partial_.c_str());
    }

    /// Once: writes the machine. When it returns `path` has all of it, whatever happens to this computer.
    vmstate::result<void> keep(vmstate::machine& machine) {
        vmstate::unique_fd own(::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
        if (!own) return failure(partial_);
        const vmstate::result<void> written =
            vmstate::save(machine, std::make_unique<vmstate::fd_output_channel>(std::move(own)));
        if (!written) return vmstate::error(vmstate::errc::io, {}, partial_ + ": " + written.error().message());
        if (::fsync(fd_.get()) != 0) return failure(partial_ + ": fsync");
        if (::rename(partial_.c_str(), path_.c_str()) != 0) return failure(path_ + ": rename");
        fd_.reset();
        is_kept_ = true;
        // The name, too. Some file systems don't know this for directories.
        const std::filesystem::path folder = std::filesystem::path(path_).parent_path();
        const vmstate::unique_fd directory(::open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        if (directory && ::fsync(directory.get()) != 0 && errno != EINVAL) return failure(path_ + ": fsync");
        return {};
    }
    /// The machine isn't ours after all.
    void discard() noexcept {
        if (std::exchange(is_kept_, false)) ::unlink(path_.c_str());
    }

private:
    static vmstate::error failure(const std::string& what) {
        return vmstate::error(vmstate::errc::io, {}, what + ": " + std::system_category().message(errno));
    }
    explicit parked_file(const std::string& path) : path_(path), partial_(path + ".partial") {}

    std::string path_;
    std::string partial_;
    vmstate::unique_fd fd_; ///< of partial_, while there is one
    bool is_kept_ = false;
};

} // namespace park
