// SPDX-License-Identifier: BSL-1.0
#include "virtqueue.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

namespace disk {

using vmstate::vhost_user::memory_access;

namespace {

constexpr std::uint32_t most_entries = 32768;
/// Of both rings: flags and index, then the entries.
constexpr std::uint64_t ring_head = 4;
constexpr std::uint64_t used_entry_size = 8;
/// VHOST_VRING_F_LOG in SET_VRING_ADDR.
constexpr std::uint32_t log_used_ring = 1;

void notify(const vmstate::unique_fd& event) {
    const std::uint64_t one = 1;
    if (event) (void)!::write(event.get(), &one, sizeof one);
}

/// The guest writes these while we read them, so each is read once, as a whole.
std::uint16_t load(std::span<std::byte> ring, std::uint64_t offset) {
    return std::atomic_ref(reinterpret_cast<std::uint16_t&>(ring[offset])).load(std::memory_order_acquire);
}

} // namespace

virtqueue::virtqueue(vmstate::vhost_user::client& client, file_disk& disk)
    : client_(client), disk_(disk), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {}

bool virtqueue::set_size(std::uint32_t size) {
    const std::lock_guard lock(ring_mutex_);
    if (!std::has_single_bit(size) || size > most_entries) return false;
    size_ = size;
    return true;
}
void virtqueue::set_addresses(const vring_addresses& addresses) {
    const std::lock_guard lock(ring_mutex_);
    addresses_ = addresses;
}
void virtqueue::set_base(std::uint16_t base) {
    const std::lock_guard lock(ring_mutex_);
    next_ = base;
    broken_ = false;
}
void virtqueue::set_call(vmstate::unique_fd call) {
    const std::lock_guard lock(ring_mutex_);
    call_ = std::move(call);
}
void virtqueue::set_error(vmstate::unique_fd error) {
    const std::lock_guard lock(ring_mutex_);
    error_ = std::move(error);
}
void virtqueue::set_enabled(bool enabled) {
    const std::lock_guard lock(ring_mutex_);
    enabled_ = enabled;
    wake(); // requests may be there already
}
void virtqueue::wake() const { notify(wake_); }

void virtqueue::start(vmstate::unique_fd kick) {
    stop();
    kick_ = std::move(kick);
    worker_ = std::jthread([this](std::stop_token stopping) { work(std::move(stopping)); });
}

std::uint16_t virtqueue::stop() {
    if (worker_.joinable()) {
        worker_.request_stop();
        notify(wake_);
        worker_.join();
    }
    kick_.reset();
    const std::lock_guard lock(ring_mutex_);
    return next_;
}

/// The queue's thread. It takes `ring_mutex_` for each request, and owns nothing but `kick_` until it is joined.
void virtqueue::work(std::stop_token stopping) {
    notify(wake_); // requests may be there from before
    while (!stopping.stop_requested()) {
        pollfd events[] = {{kick_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
        if (::poll(events, 2, -1) < 0) continue;
        for (const pollfd& event : events) {
            std::uint64_t count = 0;
            if ((event.revents & POLLIN) != 0) (void)!::read(event.fd, &count, sizeof count);
        }
        if ((events[0].revents & (POLLERR | POLLNVAL)) != 0) return;
        work_off(stopping);
    }
}

void virtqueue::work_off(const std::stop_token& stopping) {
    bool interrupt = false;
    while (!stopping.stop_requested()) {
        const std::lock_guard lock(ring_mutex_);
        const step last = work_off_one();
        if (last == step::broken) notify(error_);
        if (last != step::done) break;
        interrupt = true;
    }
    const std::lock_guard lock(ring_mutex_);
    // Whether it wants to be interrupted, the guest says in its ring; an interrupt too many does no harm.
    if (interrupt) notify(call_);
}

virtqueue::step virtqueue::work_off_one() {
    if (!enabled_ || broken_ || size_ == 0) return step::nothing_there;
    // One access per request: between two, the table of memory may change.
    const std::optional<memory_access> memory = client_.access();
    if (!memory) return step::no_memory;
    const auto table = memory->table().at_user(addresses_.descriptors, size_ * sizeof(descriptor));
    const auto available = memory->table().at_user(addresses_.available, ring_head + size_ * sizeof(std::uint16_t));
    const auto used = memory->table().at_user(addresses_.used, ring_head + size_ * used_entry_size);
    if (table.size() != size_ * sizeof(descriptor) || available.size() != ring_head + size_ * sizeof(std::uint16_t)
        || used.size() != ring_head + size_ * used_entry_size)
        return break_down("rings outside guest memory");
    if (addresses_.descriptors % 16 != 0 || addresses_.available % 2 != 0 || addresses_.used % 4 != 0)
        return break_down("rings that aren't aligned");

    const std::uint16_t end = load(available, 2);
    if (end == next_) return step::nothing_there;
    if (static_cast<std::uint16_t>(end - next_) > size_) return break_down("more requests than the ring holds");
    const std::uint16_t head = load(available, ring_head + next_ % size_ * sizeof(std::uint16_t));

    request_buffers buffers;
    complaint why = find_buffers(*memory, table, head, buffers);
    const std::optional<std::uint32_t> written = why ? std::nullopt : disk_.execute(*memory, buffers, why);
    if (!written) return break_down(why);
    // Nobody is there any more to be told.
    if (!memory->intact()) return step::no_memory;

    // Requests are done in their order, one at a time: as many are used as were taken.
    const std::uint64_t entry = ring_head + next_ % size_ * used_entry_size;
    const std::uint32_t words[] = {head, *written};
    std::memcpy(used.data() + entry, words, sizeof words);
    ++next_;
    std::atomic_ref(reinterpret_cast<std::uint16_t&>(used[2])).store(next_, std::memory_order_release);
    if ((addresses_.flags & log_used_ring) != 0) {
        memory->mark_dirty(addresses_.log + entry, used_entry_size);
        memory->mark_dirty(addresses_.log + 2, sizeof(std::uint16_t));
    }
    return step::done;
}

virtqueue::step virtqueue::break_down(complaint why) {
    std::fprintf(stderr, "vhost_user_disk: a queue stands still: %s\n", why);
    broken_ = true;
    return step::broken;
}

} // namespace disk
