// SPDX-License-Identifier: BSL-1.0
//
// Who connects to a destination's listener besides the channels that it expects: a source with more channels than that,
// whose pages would be lost, or somebody who has no part in the migration. Depends on codec/,
// ram/, stream/ and Linux.
#pragma once

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/socket_channel.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate::migration::detail {

/// Nobody is waited for: who has nothing to say costs the migration no time.
class uninvited_channels {
public:
    /// Takes those who are there: no more than the listener's backlog may hold, however quickly others follow.
    void take_from(socket_listener& listener) {
        for (int most = socket_listener::default_backlog + 1; most > 0; --most) {
            result<std::unique_ptr<socket_channel>> next = listener.accept_waiting();
            if (!next || !*next) return;
            channels_.push_back(std::move(*next));
        }
    }
    /// Whether one has begun by now as a multifd channel does.
    bool has_multifd() const {
        return std::any_of(channels_.begin(), channels_.end(), [](const std::unique_ptr<socket_channel>& one) {
            std::array<std::byte, 4> magic;
            return ::recv(one->native_handle(), magic.data(), magic.size(), MSG_PEEK | MSG_DONTWAIT) == ssize_t{magic.size()} &&
                   vmstate::detail::load_big<std::uint32_t>(magic.data()) == multifd_magic;
        });
    }
    void close() { channels_.clear(); }

private:
    std::vector<std::unique_ptr<socket_channel>> channels_;
};

} // namespace vmstate::migration::detail
