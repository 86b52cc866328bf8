// SPDX-License-Identifier: BSL-1.0
#include "device.hpp"

#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

namespace disk {

using vmstate::errc;
using vmstate::error;
using vmstate::result;
using namespace vmstate::vhost_user;

namespace {

/// The payload of SET_VRING_NUM, SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE.
struct vring_state {
    std::uint32_t index;
    std::uint32_t number;
};
/// What GET_CONFIG's payload begins with, request and answer; so many bytes follow.
struct config_head {
    std::uint32_t offset;
    std::uint32_t size;
    std::uint32_t flags;
};

} // namespace

device::device(file_disk disk, std::uint16_t queues, bool memory_slots)
    : disk_(std::move(disk)),
      client_({.features = disk_.features(),
          .protocol_features = protocol_feature::mq | protocol_feature::config,
          .memory_slots = memory_slots,
          .faults = vmstate::userfault_scope::user_only, // no system call is given an address in guest memory: disk.cpp
          .on_memory = [this] { look_for_work(); }}) {
    for (std::uint16_t i = 0; i < queues; ++i)
        queues_.push_back(std::make_unique<virtqueue>(client_, disk_));
}

result<void> device::serve(int socket) {
    const result<void> ended = client_.run(socket, [&](message& m) { return handle(socket, m); });
    // Whoever waited for a page has been let go by now.
    for (const std::unique_ptr<virtqueue>& each : queues_)
        each->stop();
    return ended;
}

void device::look_for_work() {
    was_in_postcopy_ = was_in_postcopy_ || client_.postcopy_phase() == phase::running;
    for (const std::unique_ptr<virtqueue>& each : queues_)
        each->wake();
}

result<virtqueue*> device::queue(std::uint64_t index) {
    if (index >= queues_.size())
        return error(errc::bad_message, "a queue below " + std::to_string(queues_.size()), std::to_string(index));
    return queues_[index].get();
}

result<handling> device::handle(int socket, message& m) {
    switch (m.request) {
    case request::set_owner:
    case request::reset_owner: return handling::done;
    case request::get_queue_num: {
        const auto answer = make_message(m.request, std::uint64_t{queues_.size()}, message_flag::reply);
        if (result<void> sent = send_message(socket, answer); !sent) return sent.error();
        return handling::answered;
    }
    case request::get_config: return get_config(socket, m);
    case request::set_config:
        // It is the guest that writes there, and nothing can be written: no reason for its disk to end.
        if (result<void> refused = client_.acknowledge(socket, m, false); !refused) return refused.error();
        return handling::answered;
    case request::set_vring_kick:
    case request::set_vring_call:
    case request::set_vring_err: return set_file(m);
    case request::set_vring_addr: {
        const result<vring_addresses> addresses = m.as<vring_addresses>();
        if (!addresses) return addresses.error();
        const result<virtqueue*> which = queue(addresses->index);
        if (!which) return which.error();
        (*which)->set_addresses(*addresses);
        return handling::done;
    }
    case request::get_vring_base: return stop_queue(socket, m);
    case request::set_vring_num:
    case request::set_vring_base:
    case request::set_vring_enable: {
        const result<vring_state> state = m.as<vring_state>();
        if (!state) return state.error();
        const result<virtqueue*> which = queue(state->index);
        if (!which) return which.error();
        if (m.request == request::set_vring_enable)
            (*which)->set_enabled(state->number != 0);
        else if (m.request == request::set_vring_base)
            (*which)->set_base(static_cast<std::uint16_t>(state->number));
        else if (!(*which)->set_size(state->number))
            return error(errc::bad_message, "a power of two up to 32768", std::to_string(state->number));
        return handling::done;
    }
    default: return handling::not_mine;
    }
}

/// The descriptor of a queue's event: bits 0 to 7 of the payload are the queue, bit 8 says that there is no descriptor.
result<handling> device::set_file(message& m) {
    const result<std::uint64_t> payload = m.as<std::uint64_t>();
    if (!payload) return payload.error();
    const result<virtqueue*> which = queue(*payload & 0xff);
    if (!which) return which.error();
    const bool absent = (*payload & 0x100) != 0;
    if (m.descriptors.size() != (absent ? 0U : 1U))
        return error(errc::bad_message, absent ? "no descriptor" : "one descriptor", std::to_string(m.descriptors.size()));
    vmstate::unique_fd event = absent ? vmstate::unique_fd() : std::move(m.descriptors.front());
    if (m.request == request::set_vring_call) {
        (*which)->set_call(std::move(event));
    } else if (m.request == request::set_vring_err) {
        (*which)->set_error(std::move(event));
    } else {
        if (!event) return error(errc::unsupported, "a descriptor to wait for", "a queue to be polled");
        // Without the feature, nothing enables the queues.
        if ((client_.features() & feature::protocol_features) == 0) (*which)->set_enabled(true);
        (*which)->start(std::move(event));
    }
    return handling::done;
}

result<handling> device::stop_queue(int socket, const message& m) {
    result<vring_state> state = m.as<vring_state>();
    if (!state) return state.error();
    const result<virtqueue*> which = queue(state->index);
    if (!which) return which.error();
    // In postcopy this may have to wait for a page; the VMM serves it meanwhile.
    state->number = (*which)->stop();
    if (result<void> sent = send_message(socket, make_message(m.request, *state, message_flag::reply)); !sent)
        return sent.error();
    return handling::answered;
}

result<handling> device::get_config(int socket, const message& m) {
    config_head head{};
    if (m.payload.size() < sizeof head) return m.wrong_size(std::to_string(sizeof head) + " and more");
    std::memcpy(&head, m.payload.data(), sizeof head);
    if (head.size != m.payload.size() - sizeof head) return m.wrong_size(std::to_string(sizeof head + head.size));
    message answer = make_message(m.request, head, message_flag::reply);
    const std::vector<std::byte> bytes = disk_.configuration(head.offset, head.size);
    answer.payload.insert(answer.payload.end(), bytes.begin(), bytes.end());
    if (result<void> sent = send_message(socket, answer); !sent) return sent.error();
    return handling::answered;
}

} // namespace disk
