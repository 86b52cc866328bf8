// SPDX-License-Identifier: BSL-1.0
//
// How more channels to the same peer come about, for those migrations that use several: multifd, postcopy-preempt, and
// the new channel after a postcopy was interrupted. Depends on channel.hpp.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <stop_token>

#include <vmstate/stream/channel.hpp>

namespace vmstate {

/// How one waits for a channel.
struct opening_options {
    /// The longest that it may take; 0 is as long as the system, or the peer, takes.
    std::chrono::milliseconds timeout{0};
    /// Lets another thread end the wait.
    std::stop_token stop{};
};

/// Opens one more channel to the migration's destination each time it is called, TLS handshake and all. Called from the
/// migration's threads, one call at a time.
using channel_connector = std::function<result<std::unique_ptr<output_channel>>(const opening_options&)>;

/// Waits for the next channel from the migration's source. Called like a connector.
using channel_acceptor = std::function<result<std::unique_ptr<input_channel>>(const opening_options&)>;

} // namespace vmstate
