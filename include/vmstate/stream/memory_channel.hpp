// SPDX-License-Identifier: BSL-1.0
//
// Channels over memory: a stream kept in a vector, a stream that is there already. Depends on channel.hpp.
#pragma once

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>
#include <vector>

#include <vmstate/stream/channel.hpp>

namespace vmstate {

/// Keeps what is written to it.
class memory_output_channel final : public output_channel {
public:
    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        for (const std::span<const std::byte> part : parts)
            bytes_.insert(bytes_.end(), part.begin(), part.end());
        return {};
    }
    std::span<const std::byte> written() const noexcept { return bytes_; }
    /// Hands over what was written; the channel is empty afterwards.
    std::vector<std::byte> take() noexcept { return std::exchange(bytes_, {}); }

private:
    std::vector<std::byte> bytes_;
};

/// Reads memory, which has to stay.
class memory_input_channel final : public input_channel {
public:
    explicit memory_input_channel(std::span<const std::byte> memory) noexcept : rest_(memory) {}

    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        std::size_t total = 0;
        for (const std::span<std::byte> part : parts) {
            const std::size_t count = std::min(part.size(), rest_.size());
            if (count != 0) std::memcpy(part.data(), rest_.data(), count);
            rest_ = rest_.subspan(count);
            total += count;
        }
        return total;
    }
    std::uint64_t remaining() const noexcept override { return rest_.size(); }

private:
    std::span<const std::byte> rest_;
};

} // namespace vmstate
