// SPDX-License-Identifier: BSL-1.0
//
// The writer over a channel. Small things gather in a buffer; a block that doesn't fit goes out together with them, in
// one vectored call and uncopied. Depends on codec/writer.hpp and channel.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>

#include <vmstate/codec/writer.hpp>
#include <vmstate/stream/channel.hpp>

namespace vmstate {

/// Call `flush` at the end: the destructor doesn't, since it could not report a failure.
class buffered_writer final : public writer {
public:
    static constexpr std::size_t default_window = 64 * 1024;

    /// `channel` has to outlive the writer. `window` is at least `max_reserve`.
    explicit buffered_writer(output_channel& channel, std::size_t window = default_window)
        : channel_(channel)
        , size_(std::max(window, max_reserve))
        , buffer_(std::make_unique_for_overwrite<std::byte[]>(size_)) {
        set_window(buffer_.get(), buffer_.get(), buffer_.get() + size_, 0);
    }

    /// Everything written so far goes to the channel.
    result<void> flush() {
        if (!failed()) send({});
        return status();
    }

private:
    /// Blocks from here on are worth a call of their own rather than a copy.
    static constexpr std::size_t large_block = 4096;

    void make_room(std::size_t) override { send({}); }
    void write_through(const std::byte* data, std::size_t count) override {
        if (count >= large_block) return send({data, count});
        const std::size_t first = room();
        std::memcpy(cursor(), data, first);
        commit(cursor() + first);
        send({});
        if (failed()) return;
        std::memcpy(cursor(), data + first, count - first);
        commit(cursor() + (count - first));
    }
    void send(std::span<const std::byte> block) {
        const std::span<const std::byte> buffered(window_begin(), cursor());
        if (buffered.empty() && block.empty()) return;
        const std::array<std::span<const std::byte>, 2> parts{buffered, block};
        const std::span<const std::span<const std::byte>> both(parts);
        result<void> sent = channel_.writev(buffered.empty() ? both.last(1)
                                            : block.empty()  ? both.first(1)
                                                             : both);
        if (!sent) return fail(sent.error());
        set_window(buffer_.get(), buffer_.get(), buffer_.get() + size_, offset() + block.size());
    }

    output_channel& channel_;
    std::size_t size_;
    std::unique_ptr<std::byte[]> buffer_;
};

} // namespace vmstate
