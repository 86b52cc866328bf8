// SPDX-License-Identifier: BSL-1.0
//
// The writer over a channel. Small things gather in a buffer; a block that doesn't fit, and what is written by reference,
// goes out together with them, in one vectored call and uncopied. Depends on codec/writer.hpp and channel.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <memory>
#include <span>
#include <utility>

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

    /// Writes `bytes` in their turn without copying them: they stay where they are until `flush`, and what they hold when
    /// they leave is what is written. Many of them leave in one call, with what was written between them.
    void write_reference(std::span<const std::byte> bytes) {
        if (bytes.empty() || failed()) return;
        if (part_count_ + 2 > max_parts) send({});
        if (failed()) return;
        close_part();
        parts_[part_count_++] = bytes;
        // The window's base is where its first byte would be in the stream: the bytes beside the buffer move it.
        set_window(window_begin(), cursor(), window_end(), window_base() + bytes.size());
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
    /// What is in the buffer behind the last reference becomes a part of its own.
    void close_part() noexcept {
        if (cursor() != part_begin_) parts_[part_count_++] = {part_begin_, cursor()};
        part_begin_ = cursor();
    }
    void send(std::span<const std::byte> block) {
        close_part();
        if (!block.empty()) parts_[part_count_++] = block;
        if (part_count_ == 0) return;
        const std::size_t count = std::exchange(part_count_, 0);
        part_begin_ = buffer_.get();
        result<void> sent = channel_.writev(std::span<const std::span<const std::byte>>(parts_.data(), count));
        if (!sent) return fail(sent.error());
        set_window(buffer_.get(), buffer_.get(), buffer_.get() + size_, offset() + block.size());
    }

    /// Pairs of something buffered and something by reference; at the end something buffered and a large block. More than
    /// half a MiB in one call has left the processor's cache when the peer reads it.
    static constexpr std::size_t max_parts = 2 * 128;

    output_channel& channel_;
    std::size_t size_;
    std::unique_ptr<std::byte[]> buffer_;
    std::array<std::span<const std::byte>, max_parts + 2> parts_; ///< what the next call writes, in order
    std::size_t part_count_ = 0;
    std::byte* part_begin_ = buffer_.get(); ///< in the buffer: what comes before it is in `parts_`
};

} // namespace vmstate
