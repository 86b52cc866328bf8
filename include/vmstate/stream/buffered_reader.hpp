// SPDX-License-Identifier: BSL-1.0
//
// The reader over a channel. Reads ahead into a buffer; a block that is larger than what is there is read to where it
// belongs, and what follows it into the buffer, in one vectored call. Depends on codec/reader.hpp and channel.hpp.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <limits>
#include <memory>
#include <span>
#include <string>

#include <vmstate/codec/reader.hpp>
#include <vmstate/stream/channel.hpp>

namespace vmstate {

class buffered_reader final : public reader {
public:
    static constexpr std::size_t default_window = 64 * 1024;

    /// `channel` has to outlive the reader. `window` is at least `max_window`.
    explicit buffered_reader(input_channel& channel, std::size_t window = default_window)
        : channel_(channel)
        , size_(std::max(window, max_window))
        , buffer_(std::make_unique_for_overwrite<std::byte[]>(size_)) {
        set_window(buffer_.get(), buffer_.get(), buffer_.get(), 0);
    }

    std::uint64_t remaining() const noexcept override {
        const std::uint64_t ahead = ended_ ? 0 : channel_.remaining();
        return ahead > std::numeric_limits<std::uint64_t>::max() - window() ? ahead : ahead + window();
    }

private:
    void refill(std::size_t count) override {
        const std::size_t left = window();
        const std::uint64_t base = offset();
        if (left != 0) std::memmove(buffer_.get(), cursor(), left);
        std::byte* const begin = buffer_.get();
        set_window(begin, begin, begin + left, base);
        while (window() < count && !ended_ && !failed()) {
            const std::span<std::byte> free(begin + window(), size_ - window());
            const std::size_t got = read_from_channel({&free, 1});
            set_window(begin, begin, begin + window() + got, base);
        }
    }
    bool read_through(std::byte* data, std::size_t count) override {
        const std::size_t first = window();
        if (first != 0) std::memcpy(data, cursor(), first);
        std::size_t done = first;
        std::uint64_t base = offset() + first;
        std::byte* const begin = buffer_.get();
        set_window(begin, begin, begin, base);
        while (done < count) {
            const std::array<std::span<std::byte>, 2> parts{
                std::span<std::byte>(data + done, count - done), std::span<std::byte>(begin, size_)};
            const std::size_t got = ended_ ? 0 : read_from_channel(parts);
            const std::size_t taken = std::min(got, count - done);
            done += taken;
            base += taken;
            set_window(begin, begin, begin + (got - taken), base);
            if (failed()) return false;
            if (got == 0)
                return fail(error(errc::truncated, std::to_string(count) + " bytes", std::to_string(done)));
        }
        return true;
    }
    /// 0 at the end of the stream and after an error.
    std::size_t read_from_channel(std::span<const std::span<std::byte>> parts) {
        result<std::size_t> got = channel_.read_some(parts);
        if (!got) {
            fail(got.error());
            return 0;
        }
        if (*got == 0) ended_ = true;
        return *got;
    }

    input_channel& channel_;
    std::size_t size_;
    std::unique_ptr<std::byte[]> buffer_;
    bool ended_ = false;
};

} // namespace vmstate
