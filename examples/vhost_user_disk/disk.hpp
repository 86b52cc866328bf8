// SPDX-License-Identifier: BSL-1.0
//
// A virtio block device over a file (virtio 1.2, section 5.2): its features, its configuration, and what it does with a
// request. Depends on guest_buffers.hpp.
#pragma once

#include "guest_buffers.hpp"

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace disk {

class file_disk {
public:
    static vmstate::result<file_disk> open(const std::string& path, bool read_only, std::uint16_t queues);
    file_disk(file_disk&& other) noexcept;

    /// Bits that the device offers to its driver, beside vhost-user's.
    std::uint64_t features() const noexcept;
    /// `size` bytes at `offset` of the configuration space, zeros behind what there is.
    std::vector<std::byte> configuration(std::size_t offset, std::size_t size) const;

    /// Does a request and writes its status; any number of queues may at once. How many bytes were written to guest memory;
    /// nothing where the request makes no sense as one, with the reason in `why`.
    std::optional<std::uint32_t> execute(
        const vmstate::vhost_user::memory_access& memory, request_buffers& buffers, complaint& why);

    struct counts {
        std::atomic<std::uint64_t> reads = 0, writes = 0, flushes = 0;
    };
    const counts& done() const noexcept { return done_; }

private:
    file_disk(vmstate::unique_fd file, std::uint64_t size, bool read_only, std::uint16_t queues);

    bool fits(std::uint64_t sector, std::uint64_t size) const noexcept;
    std::uint8_t read(const vmstate::vhost_user::memory_access&, std::uint64_t sector, guest_bytes&, std::uint32_t& written);
    std::uint8_t write(const vmstate::vhost_user::memory_access&, std::uint64_t sector, guest_bytes&, std::uint64_t size);
    std::uint8_t identify(const vmstate::vhost_user::memory_access&, guest_bytes&, std::uint32_t& written);

    vmstate::unique_fd file_;
    std::uint64_t size_; // bytes, whole sectors
    bool read_only_;
    std::uint16_t queues_;
    counts done_;
};

} // namespace disk
