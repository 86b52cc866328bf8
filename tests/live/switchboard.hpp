// SPDX-License-Identifier: BSL-1.0
// Connections between a source and a destination in one process, each of which can be made to break after so many bytes.
// Depends on breakable_channel.hpp and Linux.
#pragma once

#include <sys/socket.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <stop_token>
#include <utility>

#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/socket_channel.hpp>

#include "breakable_channel.hpp"

namespace vmstate::tests {

/// Pairs of sockets: whoever connects gets one end, whoever accepts gets the other. Channels have numbers, from 0 on, in the
/// order in which the source connects.
class switchboard {
public:
    /// What the channel of that number carries, at either end, before it breaks; it may not be there yet.
    carried_bytes& at_source(std::size_t number) { return *line(number).source; }
    carried_bytes& at_destination(std::size_t number) { return *line(number).destination; }
    /// The channels arrive at the destination in another order.
    void reverse_after(std::size_t count) { reversed_ = count; }
    /// No more than so many come about.
    void limit(std::size_t count) { most_ = count; }

    channel_connector connector() {
        return [this](const opening_options&) -> result<std::unique_ptr<output_channel>> {
            const std::lock_guard lock(lines_mutex_);
            if (opened_ >= most_) return error(errc::io, {}, "nobody there");
            int ends[2];
            if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return error(errc::io, {}, "socketpair");
            const ends_of_line& both = line_locked(opened_++);
            waiting_.push_back(
                std::make_unique<breakable_channel>(std::make_unique<socket_channel>(unique_fd(ends[1])), both.destination));
            if (reversed_ != 0 && waiting_.size() == reversed_) {
                std::reverse(waiting_.begin(), waiting_.end());
                reversed_ = 0;
            }
            arrived_.notify_all();
            return std::unique_ptr<output_channel>(
                std::make_unique<breakable_channel>(std::make_unique<socket_channel>(unique_fd(ends[0])), both.source));
        };
    }
    channel_acceptor acceptor() {
        return [this](const opening_options& options) -> result<std::unique_ptr<input_channel>> {
            const std::stop_callback wake(options.stop, [this] {
                { const std::lock_guard lock(lines_mutex_); }
                arrived_.notify_all();
            });
            std::unique_lock lock(lines_mutex_);
            const auto ready = [&] { return options.stop.stop_requested() || (!waiting_.empty() && reversed_ == 0); };
            if (options.timeout.count() == 0) arrived_.wait(lock, ready);
            else if (!arrived_.wait_for(lock, options.timeout, ready)) return error(errc::io, {}, "timed out");
            if (waiting_.empty()) return error(errc::io, {}, "cancelled");
            std::unique_ptr<duplex_channel> next = std::move(waiting_.front());
            waiting_.pop_front();
            return std::unique_ptr<input_channel>(std::move(next));
        };
    }
    /// The destination is gone: what waits for it is closed, and nobody connects any more.
    void hang_up() {
        const std::lock_guard lock(lines_mutex_);
        waiting_.clear();
        most_ = 0;
    }
    /// How many bytes have left the source over the channel of that number, where it was to carry all.
    std::size_t written(std::size_t number) { return carried_bytes::all - at_source(number).written; }
    /// And how many have come back.
    std::size_t read_back(std::size_t number) { return carried_bytes::all - at_source(number).read; }

private:
    struct ends_of_line {
        std::shared_ptr<carried_bytes> source = std::make_shared<carried_bytes>();
        std::shared_ptr<carried_bytes> destination = std::make_shared<carried_bytes>();
    };
    ends_of_line& line(std::size_t number) {
        const std::lock_guard lock(lines_mutex_);
        return line_locked(number);
    }
    ends_of_line& line_locked(std::size_t number) {
        while (lines_.size() <= number) lines_.emplace_back();
        return lines_[number];
    }

    std::mutex lines_mutex_; // all below
    std::condition_variable arrived_;
    std::deque<std::unique_ptr<duplex_channel>> waiting_;
    std::deque<ends_of_line> lines_; // they stay where they are
    std::size_t opened_ = 0;
    std::size_t reversed_ = 0;
    std::size_t most_ = ~std::size_t{0};
};

} // namespace vmstate::tests
