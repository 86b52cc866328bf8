// SPDX-License-Identifier: BSL-1.0
//
// A channel of which the first bytes have been read already, to see what it is: they come again. Works for any channel,
// where peeking works for sockets alone. Depends on channel.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/stream/channel.hpp>

namespace vmstate {

/// Fills `bytes`; `errc::truncated` where the stream ends before.
inline result<void> read_exactly(input_channel& from, std::span<std::byte> bytes) {
    const std::size_t wanted = bytes.size();
    while (!bytes.empty()) {
        const result<std::size_t> got = from.read_some({&bytes, 1});
        if (!got) return got.error();
        if (*got == 0)
            return error(errc::truncated, std::to_string(wanted) + " bytes", std::to_string(wanted - bytes.size()));
        bytes = bytes.subspan(*got);
    }
    return {};
}

class prefixed_input_channel final : public input_channel {
public:
    prefixed_input_channel(std::span<const std::byte> prefix, std::shared_ptr<input_channel> rest)
        : prefix_(prefix.begin(), prefix.end()), rest_(std::move(rest)) {}

    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        if (begin_ == prefix_.size()) return rest_->read_some(parts);
        std::size_t total = 0;
        for (const std::span<std::byte> part : parts) {
            const std::size_t count = std::min(part.size(), prefix_.size() - begin_);
            if (count != 0) std::memcpy(part.data(), prefix_.data() + begin_, count);
            begin_ += count;
            total += count;
        }
        return total;
    }
    std::uint64_t remaining() const noexcept override {
        const std::uint64_t rest = rest_->remaining();
        const std::uint64_t ahead = prefix_.size() - begin_;
        return rest > std::numeric_limits<std::uint64_t>::max() - ahead ? rest : rest + ahead;
    }
    void limit_unread(std::size_t bytes) noexcept override { rest_->limit_unread(bytes); }
    result<void> close() override { return rest_->close(); }
    void shutdown() noexcept override { rest_->shutdown(); }
    void end_output() noexcept override { rest_->end_output(); }
    bool is_ended() noexcept override { return rest_->is_ended(); }
    result<std::unique_ptr<duplex_channel>> get_return_path() override { return rest_->get_return_path(); }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override { return rest_->set_timeout(timeout); }

private:
    std::vector<std::byte> prefix_;
    std::size_t begin_ = 0;
    std::shared_ptr<input_channel> rest_;
};

} // namespace vmstate
