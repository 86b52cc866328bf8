// SPDX-License-Identifier: BSL-1.0
//
// A reader over another reader that keeps a copy of what is read. Depends on codec/reader.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <vmstate/codec/reader.hpp>

namespace vmstate {

/// While it lives nobody else reads from the other reader, which goes on behind what was read when `take` is called.
class capturing_reader final : public reader {
public:
    explicit capturing_reader(reader& from) noexcept : from_(from) { look_ahead(); }

    /// Everything read so far.
    std::vector<std::byte> take() {
        hand_back();
        return std::exchange(captured_, {});
    }
    std::uint64_t remaining() const noexcept override {
        const std::uint64_t all = from_.remaining();
        const auto read = static_cast<std::uint64_t>(cursor() - window_begin());
        return all == std::numeric_limits<std::uint64_t>::max() ? all : all - std::min(all, read);
    }

private:
    void refill(std::size_t count) override {
        hand_back();
        from_.peek(count);
        look_ahead();
        if (from_.failed()) fail(from_.failure());
    }
    void hand_back() {
        captured_.insert(captured_.end(), window_begin(), cursor());
        from_.seek(cursor());
        look_ahead();
    }
    void look_ahead() noexcept {
        set_window(from_.cursor(), from_.cursor(), from_.window_end(), from_.offset());
    }

    reader& from_;
    std::vector<std::byte> captured_;
};

} // namespace vmstate
