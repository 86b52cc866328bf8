// SPDX-License-Identifier: BSL-1.0
//
// A split virtqueue (virtio 1.2, section 2.7) with a thread that works on it while it is started. The rings are in guest
// memory, so this is the thread that waits in postcopy. Depends on guest_buffers.hpp and vmstate/vhost_user.
#pragma once

#include "disk.hpp"

#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/client.hpp>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>

namespace disk {

/// The payload of SET_VRING_ADDR: addresses of the VMM's, and for the log a guest-physical one.
struct vring_addresses {
    std::uint32_t index;
    std::uint32_t flags;
    std::uint64_t descriptors;
    std::uint64_t used;
    std::uint64_t available;
    std::uint64_t log;
};
static_assert(sizeof(vring_addresses) == 40);

/// All but the thread's own function is called by the thread that reads the VMM's messages.
class virtqueue {
public:
    virtqueue(vmstate::vhost_user::client& client, file_disk& disk);
    ~virtqueue() { stop(); }
    virtqueue(const virtqueue&) = delete;
    virtqueue& operator=(const virtqueue&) = delete;

    /// The number of descriptors, a power of two. False where it is no such number.
    bool set_size(std::uint32_t size);
    void set_addresses(const vring_addresses& addresses);
    void set_base(std::uint16_t base);
    void set_call(vmstate::unique_fd call);
    void set_error(vmstate::unique_fd error);
    void set_enabled(bool enabled);
    /// Has it look for requests without a kick.
    void wake() const;

    /// Begins to work, whenever `kick` can be read.
    void start(vmstate::unique_fd kick);
    /// Returns when the request under way, if any, is done, or its page is known never to come: with the index of the first
    /// that wasn't done.
    std::uint16_t stop();

private:
    /// What the VMM has set.
    struct ring {
        std::uint32_t size = 0;
        vring_addresses addresses{};
        std::uint16_t next = 0; ///< the request that is worked on next
        bool enabled = false;
        bool broken = false; ///< by what the guest wrote
    };

    void work(std::stop_token stopping);
    void work_off(const std::stop_token& stopping);
    enum class step { done, nothing_there, no_memory, broken };
    step work_off_one(const ring& now);

    vmstate::vhost_user::client& client_;
    file_disk& disk_;

    // Never held while guest memory is touched: the thread of the messages would wait for a page.
    std::mutex ring_mutex_; // guards these
    ring ring_;
    vmstate::unique_fd call_;
    vmstate::unique_fd error_;

    vmstate::unique_fd kick_; // the thread's, while there is one
    vmstate::unique_fd wake_; // an eventfd of ours, for what isn't the guest's kick
    std::jthread worker_;
};

} // namespace disk
