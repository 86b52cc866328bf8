// SPDX-License-Identifier: BSL-1.0
//
// The pages that a destination waits for: each is asked for once, and again after a recovery, until it comes. Depends on
// page_request.hpp and received_pages.hpp.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>
#include <utility>

#include <vmstate/postcopy/page_request.hpp>
#include <vmstate/postcopy/received_pages.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// What became of a request.
enum class page_request_outcome {
    asked,           ///< sent now
    asked_before,    ///< it is on its way, or will be asked for when there is a connection again
    kept,            ///< there is no connection: it will be asked for when there is one
    already_received ///< the page came meanwhile
};

/// Any thread asks, and any thread tells of pages that came; offsets are those of host pages. `sending_mutex_` is held
/// while a request is sent: it makes the order on the return path the order of the "block of the request before". Who
/// sends must not wait for a page of guest memory. A channel that no longer takes anything holds up who asks: shutting it
/// down frees them. Who tells of a page never waits for a request to be sent: to send wakes the source, and with it often
/// another thread in the sender's place.
class page_requests {
public:
    using send_function = std::function<result<void>(const page_request_message& message)>;

    /// `received` has to outlive this. Without a connection at first.
    explicit page_requests(const received_pages& received) noexcept : received_(received) {}
    page_requests(const page_requests&) = delete;
    page_requests& operator=(const page_requests&) = delete;

    /// A return path, the first or, after a recovery, another: the next request names its block, and whatever is wanted is
    /// asked for through it. After an error there is no connection, and everything is still wanted.
    result<void> connect(send_function send) {
        const std::lock_guard lock(sending_mutex_);
        send_ = std::move(send);
        last_ = nullptr;
        const auto wanted = [this] {
            const std::lock_guard looking(wanted_mutex_);
            return wanted_;
        }();
        for (const auto& [block, offset] : wanted)
            if (result<void> sent = send_locked(*block, offset); !sent) return sent;
        return {};
    }
    /// The return path is gone: pages are noted and not asked for.
    void disconnect() {
        const std::lock_guard lock(sending_mutex_);
        send_ = nullptr;
    }
    /// Wants the host page at `offset`. An error is the connection's, and disconnects: the page stays wanted.
    result<page_request_outcome> request(ram_block& block, std::uint64_t offset) {
        const std::lock_guard lock(sending_mutex_);
        {
            const std::lock_guard noting(wanted_mutex_);
            // Whoever places pages marks this one before `placed` takes the lock: it is seen here, or `placed` and the
            // others that are told come later. Also where it is wanted already: they may be on their way.
            if (received_.has(block, offset, block.options.host_page_size)) return page_request_outcome::already_received;
            if (!wanted_.emplace(&block, offset).second) return page_request_outcome::asked_before;
        }
        if (!send_) return page_request_outcome::kept;
        if (result<void> sent = send_locked(block, offset); !sent) return sent.error();
        return page_request_outcome::asked;
    }
    /// The host page has come and is marked as received: for `page_placer::on_placed`.
    void placed(ram_block& block, std::uint64_t offset) {
        const std::lock_guard lock(wanted_mutex_);
        wanted_.erase({&block, offset});
    }

    /// Host pages that are wanted and haven't come.
    std::size_t waiting() const {
        const std::lock_guard lock(wanted_mutex_);
        return wanted_.size();
    }
    /// Requests sent, those after a recovery included.
    std::uint64_t sent() const {
        return sent_.load();
    }

private:
    result<void> send_locked(const ram_block& block, std::uint64_t offset) {
        const page_request_message message(offset, static_cast<std::uint32_t>(block.options.host_page_size),
            &block == last_ ? std::string_view() : std::string_view(block.name));
        if (result<void> sent = send_(message); !sent) {
            send_ = nullptr;
            return sent;
        }
        last_ = &block;
        ++sent_;
        return {};
    }

    const received_pages& received_;
    std::mutex sending_mutex_;         // send_, last_; taken before the other
    send_function send_;               // empty without a connection
    const ram_block* last_ = nullptr;  // of the last request on this connection
    std::atomic<std::uint64_t> sent_ = 0;
    mutable std::mutex wanted_mutex_;  // wanted_
    std::set<std::pair<ram_block*, std::uint64_t>> wanted_;
};

} // namespace vmstate
