// SPDX-License-Identifier: BSL-1.0
//
// A vhost-user block device: the messages that are the device's own, beside those of the client half of the library.
// Depends on virtqueue.hpp.
#pragma once

#include "disk.hpp"
#include "virtqueue.hpp"

#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/client.hpp>
#include <vmstate/vhost_user/message.hpp>

#include <cstdint>
#include <memory>
#include <vector>

namespace disk {

class device {
public:
    device(file_disk disk, std::uint16_t queues, bool memory_slots);

    /// Serves one VMM until it closes the connection.
    vmstate::result<void> serve(int socket);

    const file_disk& disk() const noexcept { return disk_; }
    /// Whether there was a postcopy.
    bool was_in_postcopy() const noexcept { return was_in_postcopy_; }

private:
    using message = vmstate::vhost_user::message;
    using handling = vmstate::vhost_user::handling;

    vmstate::result<handling> handle(int socket, message& m);
    vmstate::result<handling> set_file(message& m);
    vmstate::result<handling> stop_queue(int socket, const message& m);
    vmstate::result<handling> get_config(int socket, const message& m);
    vmstate::result<virtqueue*> queue(std::uint64_t index);
    void look_for_work();

    file_disk disk_;
    vmstate::vhost_user::client client_;
    std::vector<std::unique_ptr<virtqueue>> queues_;
    bool was_in_postcopy_ = false;
};

} // namespace disk
