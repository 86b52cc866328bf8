// SPDX-License-Identifier: BSL-1.0
#include "disk.hpp"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/virtio_blk.h>
#include <linux/virtio_config.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace disk {

using vmstate::errc;
using vmstate::error;
using vmstate::result;
using vmstate::vhost_user::memory_access;

namespace {

constexpr std::uint64_t sector_size = 512;
/// What a request moves at a time. Guest memory is copied to and from it, and no system call is given an address in guest
/// memory: in postcopy only this program's own instructions then wait for pages.
constexpr std::size_t room_size = 64 * 1024;

constexpr unsigned indirect_descriptors = 28; // VIRTIO_RING_F_INDIRECT_DESC; <linux/virtio_ring.h> is no C++
constexpr std::uint64_t bit(unsigned number) { return std::uint64_t{1} << number; }

bool read_file(int file, std::span<std::byte> into, std::uint64_t offset) {
    while (!into.empty()) {
        const ssize_t got = ::pread(file, into.data(), into.size(), static_cast<off_t>(offset));
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return false;
        into = into.subspan(static_cast<std::size_t>(got));
        offset += static_cast<std::uint64_t>(got);
    }
    return true;
}

bool write_file(int file, std::span<const std::byte> from, std::uint64_t offset) {
    while (!from.empty()) {
        const ssize_t put = ::pwrite(file, from.data(), from.size(), static_cast<off_t>(offset));
        if (put < 0 && errno == EINTR) continue;
        if (put <= 0) return false;
        from = from.subspan(static_cast<std::size_t>(put));
        offset += static_cast<std::uint64_t>(put);
    }
    return true;
}

} // namespace

result<file_disk> file_disk::open(const std::string& path, bool read_only, std::uint16_t queues) {
    vmstate::unique_fd file(::open(path.c_str(), (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC));
    struct stat status {};
    if (!file || ::fstat(file.get(), &status) != 0)
        return error(errc::io, "a file that can be opened", path + ": " + std::system_category().message(errno));
    auto size = static_cast<std::uint64_t>(status.st_size);
    if (S_ISBLK(status.st_mode) && ::ioctl(file.get(), BLKGETSIZE64, &size) != 0)
        return error(errc::io, "a block device that knows its size", path);
    size -= size % sector_size;
    if (size == 0) return error(errc::invalid_argument, "a disk of at least one sector", path);
    return file_disk(std::move(file), size, read_only, queues);
}

file_disk::file_disk(vmstate::unique_fd file, std::uint64_t size, bool read_only, std::uint16_t queues)
    : file_(std::move(file)), size_(size), read_only_(read_only), queues_(queues) {}
file_disk::file_disk(file_disk&& other) noexcept
    : file_(std::move(other.file_)), size_(other.size_), read_only_(other.read_only_), queues_(other.queues_) {}

std::uint64_t file_disk::features() const noexcept {
    return bit(VIRTIO_F_VERSION_1) | bit(indirect_descriptors) | bit(VIRTIO_BLK_F_SEG_MAX) | bit(VIRTIO_BLK_F_BLK_SIZE)
         | bit(VIRTIO_BLK_F_FLUSH) | (queues_ > 1 ? bit(VIRTIO_BLK_F_MQ) : 0) | (read_only_ ? bit(VIRTIO_BLK_F_RO) : 0);
}

std::vector<std::byte> file_disk::configuration(std::size_t offset, std::size_t size) const {
    virtio_blk_config whole{};
    whole.capacity = size_ / sector_size;
    whole.seg_max = 126; // with a request's header and status, a queue of 128
    whole.blk_size = static_cast<std::uint32_t>(sector_size);
    whole.num_queues = queues_;
    std::vector<std::byte> part(size);
    if (offset < sizeof whole)
        std::memcpy(part.data(), reinterpret_cast<const std::byte*>(&whole) + offset, std::min(size, sizeof whole - offset));
    return part;
}

std::optional<std::uint32_t> file_disk::execute(const memory_access& memory, request_buffers& buffers, complaint& why) {
    const std::uint64_t readable = buffers.readable.size();
    const std::optional<std::uint64_t> status_at = buffers.writable.take_last();
    virtio_blk_outhdr header{};
    if (!status_at || readable < sizeof header) {
        why = "a request without header or status";
        return std::nullopt;
    }
    if (!buffers.readable.read(memory, std::as_writable_bytes(std::span(&header, 1)))) {
        why = "a request's header outside guest memory";
        return std::nullopt;
    }

    std::uint8_t status = VIRTIO_BLK_S_UNSUPP;
    std::uint32_t written = 0;
    switch (header.type) {
    case VIRTIO_BLK_T_IN:
        status = read(memory, header.sector, buffers.writable, written);
        done_.reads += status == VIRTIO_BLK_S_OK;
        break;
    case VIRTIO_BLK_T_OUT:
        status = write(memory, header.sector, buffers.readable, readable - sizeof header);
        done_.writes += status == VIRTIO_BLK_S_OK;
        break;
    case VIRTIO_BLK_T_FLUSH:
        status = ::fdatasync(file_.get()) == 0 ? VIRTIO_BLK_S_OK : VIRTIO_BLK_S_IOERR;
        done_.flushes += status == VIRTIO_BLK_S_OK;
        break;
    case VIRTIO_BLK_T_GET_ID: status = identify(memory, buffers.writable, written); break;
    default: break;
    }

    guest_bytes last;
    last.append({*status_at, 1});
    if (!last.write(memory, std::as_bytes(std::span(&status, 1)))) {
        why = "a request's status outside guest memory";
        return std::nullopt;
    }
    return written + 1;
}

bool file_disk::fits(std::uint64_t sector, std::uint64_t size) const noexcept {
    return size % sector_size == 0 && sector <= size_ / sector_size && size <= size_ - sector * sector_size;
}

std::uint8_t file_disk::read(
    const memory_access& memory, std::uint64_t sector, guest_bytes& into, std::uint32_t& written) {
    const std::uint64_t size = into.size();
    if (!fits(sector, size) || size >= UINT32_MAX) return VIRTIO_BLK_S_IOERR;
    std::vector<std::byte> room(std::min<std::uint64_t>(size, room_size));
    for (std::uint64_t done = 0; done < size;) {
        const std::span<std::byte> part(room.data(), std::min<std::uint64_t>(size - done, room.size()));
        if (!read_file(file_.get(), part, sector * sector_size + done) || !into.write(memory, part)) return VIRTIO_BLK_S_IOERR;
        done += part.size();
        written += static_cast<std::uint32_t>(part.size());
    }
    return VIRTIO_BLK_S_OK;
}

std::uint8_t file_disk::write(
    const memory_access& memory, std::uint64_t sector, guest_bytes& from, std::uint64_t size) {
    if (read_only_ || !fits(sector, size)) return VIRTIO_BLK_S_IOERR;
    std::vector<std::byte> room(std::min<std::uint64_t>(size, room_size));
    for (std::uint64_t done = 0; done < size;) {
        const std::span<std::byte> part(room.data(), std::min<std::uint64_t>(size - done, room.size()));
        // A VMM that died in postcopy took pages with it, and zeros stand where they should have been.
        if (!from.read(memory, part) || !memory.intact()) return VIRTIO_BLK_S_IOERR;
        if (!write_file(file_.get(), part, sector * sector_size + done)) return VIRTIO_BLK_S_IOERR;
        done += part.size();
    }
    return VIRTIO_BLK_S_OK;
}

std::uint8_t file_disk::identify(const memory_access& memory, guest_bytes& into, std::uint32_t& written) {
    std::array<char, VIRTIO_BLK_ID_BYTES> id{"vmstate-disk"};
    const std::uint64_t size = std::min<std::uint64_t>(into.size(), id.size());
    if (!into.write(memory, std::as_bytes(std::span(id)).first(size))) return VIRTIO_BLK_S_IOERR;
    written = static_cast<std::uint32_t>(size);
    return VIRTIO_BLK_S_OK;
}

} // namespace disk
