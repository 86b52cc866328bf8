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
    ring_.size = size;
    return true;
}
void virtqueue::set_addresses(const vring_addresses& addresses) {
    const std::lock_guard lock(ring_mutex_);
    ring_.addresses = addresses;
}
void virtqueue::set_base(std::uint16_t base) {
    const std::lock_guard lock(ring_mutex_);
    ring_.next = base;
    ring_.broken = false;
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
    ring_.enabled = enabled;
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
    return ring_.next;
}

/// The queue's thread. It takes `ring_mutex_` before and after each request, and owns nothing but `kick_` until it is joined.
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
        ring now;
        {
            const std::lock_guard lock(ring_mutex_);
            now = ring_;
        }
        const step last = work_off_one(now);
        const std::lock_guard lock(ring_mutex_);
        if (last == step::broken) {
            ring_.broken = true;
            notify(error_);
        }
        if (last != step::done) break;
        ring_.next = static_cast<std::uint16_t>(now.next + 1);
        interrupt = true;
        // The next one may wait for a page, and who waits for this one shouldn't.
        if (client_.postcopy_phase() == vmstate::vhost_user::phase::running && std::exchange(interrupt, false)) notify(call_);
    }
    const std::lock_guard lock(ring_mutex_);
    // Whether it wants to be interrupted, the guest says in its ring; an interrupt too many does no harm.
    if (interrupt) notify(call_);
}

virtqueue::step virtqueue::work_off_one(const ring& now) {
    if (!now.enabled || now.broken || now.size == 0) return step::nothing_there;
    // One access per request: between two, the table of memory may change.
    const std::optional<memory_access> memory = client_.access();
    if (!memory) return step::no_memory;
    const auto table = memory->table().at_user(now.addresses.descriptors, now.size * sizeof(descriptor));
    const auto available = memory->table().at_user(now.addresses.available, ring_head + now.size * sizeof(std::uint16_t));
    const auto used = memory->table().at_user(now.addresses.used, ring_head + now.size * used_entry_size);
    // The table is the VMM's, and a region of it may come back: then we are woken.
    if (table.size() != now.size * sizeof(descriptor) || available.size() != ring_head + now.size * sizeof(std::uint16_t)
        || used.size() != ring_head + now.size * used_entry_size)
        return step::no_memory;

    complaint why = nullptr;
    std::uint16_t head = 0;
    std::optional<std::uint32_t> written;
    if (now.addresses.descriptors % 16 != 0 || now.addresses.available % 2 != 0 || now.addresses.used % 4 != 0) {
        why = "rings that aren't aligned";
    } else if (const std::uint16_t end = load(available, 2); end == now.next) {
        return step::nothing_there;
    } else if (static_cast<std::uint16_t>(end - now.next) > now.size) {
        why = "more requests than the ring holds";
    } else {
        head = load(available, ring_head + now.next % now.size * sizeof(std::uint16_t));
        request_buffers buffers;
        why = find_buffers(*memory, table, head, buffers);
        if (!why) written = disk_.execute(*memory, buffers, why);
    }
    // What was read may be nothing of the guest's, and nobody is there any more to be told.
    if (!memory->intact()) return step::no_memory;
    if (!written) {
        std::fprintf(stderr, "vhost_user_disk: a queue stands still: %s\n", why);
        return step::broken;
    }

    // Requests are done in their order, one at a time: as many are used as were taken.
    const auto next = static_cast<std::uint16_t>(now.next + 1);
    const std::uint64_t entry = ring_head + now.next % now.size * used_entry_size;
    const std::uint32_t words[] = {head, *written};
    std::memcpy(used.data() + entry, words, sizeof words);
    std::atomic_ref(reinterpret_cast<std::uint16_t&>(used[2])).store(next, std::memory_order_release);
    if ((now.addresses.flags & log_used_ring) != 0) {
        memory->mark_dirty(now.addresses.log + entry, used_entry_size);
        memory->mark_dirty(now.addresses.log + 2, sizeof(std::uint16_t));
    }
    // These writes may have waited as well, and gone nowhere.
    return memory->intact() ? step::done : step::no_memory;
}

} // namespace disk
