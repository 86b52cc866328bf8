// SPDX-License-Identifier: BSL-1.0
// A channel with both directions that fails after so many bytes, in either. Depends on the library alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <limits>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <vmstate/stream/channel.hpp>

namespace vmstate::tests {

/// How many bytes a channel and its return paths still carry, all together.
struct carried_bytes {
    static constexpr std::size_t all = std::numeric_limits<std::size_t>::max() / 2;
    std::atomic<std::size_t> written = all;
    std::atomic<std::size_t> read = all;
};

/// Passes everything on to another channel, until there is nothing left of `carried_bytes`.
class breakable_channel final : public duplex_channel {
public:
    breakable_channel(std::unique_ptr<duplex_channel> inner, std::shared_ptr<carried_bytes> left)
        : inner_(std::move(inner)), left_(std::move(left)) {}

    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        for (const std::span<const std::byte> part : parts) {
            const std::span<const std::byte> taken = part.first(take(left_->written, part.size()));
            if (!taken.empty())
                if (result<void> written = inner_->writev({&taken, 1}); !written) return written;
            if (taken.size() != part.size()) return broken();
        }
        return {};
    }
    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        if (left_->read == 0) return broken();
        std::vector<std::span<std::byte>> some;
        std::size_t room = left_->read;
        for (const std::span<std::byte> part : parts) {
            const std::span<std::byte> taken = part.first(std::min(part.size(), room));
            if (!taken.empty()) some.push_back(taken);
            room -= taken.size();
        }
        result<std::size_t> got = inner_->read_some(some);
        if (got) take(left_->read, *got);
        return got;
    }
    result<void> close() override { return inner_->close(); }
    void shutdown() noexcept override { inner_->shutdown(); }
    void end_output() noexcept override { inner_->end_output(); }
    bool is_ended() noexcept override { return inner_->is_ended(); }
    void limit_unsent(std::size_t bytes) noexcept override { inner_->limit_unsent(bytes); }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override { return inner_->set_timeout(timeout); }
    result<std::unique_ptr<duplex_channel>> get_return_path() override {
        result<std::unique_ptr<duplex_channel>> back = inner_->get_return_path();
        if (!back) return back;
        return std::unique_ptr<duplex_channel>(std::make_unique<breakable_channel>(std::move(*back), left_));
    }

private:
    /// As a connection breaks: for both ends.
    error broken() {
        inner_->shutdown();
        return error(errc::io, {}, "broken");
    }
    /// At most `wanted` of what is left: of each kind there is one thread that takes.
    static std::size_t take(std::atomic<std::size_t>& left, std::size_t wanted) {
        const std::size_t taken = std::min(left.load(), wanted);
        left -= taken;
        return taken;
    }

    std::unique_ptr<duplex_channel> inner_;
    std::shared_ptr<carried_bytes> left_;
};

} // namespace vmstate::tests
