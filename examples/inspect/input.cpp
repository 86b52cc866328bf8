// SPDX-License-Identifier: BSL-1.0
#include "input.hpp"

#include <vmstate/stream/open.hpp>
#include <vmstate/support/unique_fd.hpp>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace inspect {

namespace {

vmstate::error system_failure(const std::string& name) {
    return vmstate::error(vmstate::errc::io, {}, name + ": " + std::strerror(errno));
}

vmstate::result<std::vector<std::byte>> read_all(vmstate::input_channel& channel) {
    std::vector<std::byte> bytes;
    std::size_t used = 0;
    for (;;) {
        if (used == bytes.size())
            bytes.resize(std::max<std::size_t>(std::size_t{1} << 20, bytes.size() * 2));
        const std::span<std::byte> free(bytes.data() + used, bytes.size() - used);
        const vmstate::result<std::size_t> got = channel.read_some({&free, 1});
        if (!got)
            return got.error();
        if (*got == 0)
            break;
        used += *got;
    }
    bytes.resize(used);
    if (const vmstate::result<void> closed = channel.close(); !closed)
        return closed.error();
    return bytes;
}

} // namespace

input::input(input&& other) noexcept
    : mapping_(std::exchange(other.mapping_, nullptr)), size_(other.size_), read_(std::move(other.read_)) {}

input::~input() {
    if (mapping_ != nullptr)
        ::munmap(const_cast<std::byte*>(mapping_), size_);
}

vmstate::result<input> input::open(const std::string& name) {
    input opened;
    struct stat info {};
    const bool is_path = name != "-" && ::stat(name.c_str(), &info) == 0;
    if (!is_path && name != "-" && name.find(':') == std::string::npos)
        return system_failure(name);

    if (is_path && S_ISREG(info.st_mode)) {
        const vmstate::unique_fd file(::open(name.c_str(), O_RDONLY | O_CLOEXEC));
        if (!file)
            return system_failure(name);
        opened.size_ = static_cast<std::size_t>(info.st_size);
        if (opened.size_ == 0)
            return opened;
        void* const mapping = ::mmap(nullptr, opened.size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
        if (mapping == MAP_FAILED)
            return system_failure(name);
        opened.mapping_ = static_cast<const std::byte*>(mapping);
        return opened;
    }

    const std::string uri = name == "-" ? "fd:0" : is_path ? "file:" + name : name;
    vmstate::opened_input channel = vmstate::open_input(uri);
    if (!channel)
        return channel.error();
    vmstate::result<std::vector<std::byte>> bytes = read_all(**channel);
    if (!bytes)
        return bytes.error();
    opened.read_ = std::move(*bytes);
    return opened;
}

} // namespace inspect
