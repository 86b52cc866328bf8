// SPDX-License-Identifier: BSL-1.0
//
// Where bytes come from: a window of memory that generated code reads with straight-line loads, and that its owner
// refills when it is used up. The first error is kept, so that only the end of a sequence has to be checked. Depends on
// support/.
#pragma once

#include <boost/endian/conversion.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <utility>

#include <vmstate/support/result.hpp>

namespace vmstate {

/// The base of every reader. What derives from it supplies `refill`, and `read_through` where large blocks need not be
/// copied twice.
class reader {
public:
    /// The most that `need` and `peek` can be asked for.
    static constexpr std::size_t max_window = 4096;

    reader(const reader&) = delete;
    reader& operator=(const reader&) = delete;
    virtual ~reader() = default;

    /// The next byte's address. Never null, so that generated code can use null for "failed".
    const std::byte* cursor() const noexcept { return cursor_; }
    const std::byte* window_end() const noexcept { return end_; }
    /// `count` bytes in one piece (at most `max_window`) at the cursor, or null after an error.
    const std::byte* need(std::size_t count) {
        if (static_cast<std::size_t>(end_ - cursor_) >= count) [[likely]] return cursor_;
        return refill_or_fail(count);
    }
    /// Moves on to `position`, which lies in the window.
    void seek(const std::byte* position) noexcept { cursor_ = position; }
    void skip(std::size_t count) {
        while (count > window()) {
            count -= window();
            cursor_ = end_;
            if (need(1) == nullptr) return;
        }
        cursor_ += count;
    }
    /// Bytes that are there without a call to the owner.
    std::size_t window() const noexcept { return static_cast<std::size_t>(end_ - cursor_); }
    /// Brings up to `count` bytes (at most `max_window`) into the window and says how many are there: fewer only at
    /// the end of the stream. Never fails.
    std::size_t peek(std::size_t count) {
        if (window() < count && may_refill_ && !failed()) refill(count);
        return std::min(count, window());
    }

    /// Reads `count` bytes to `data`; on failure the rest of `data` is left as it was.
    bool read(void* data, std::size_t count) {
        if (count <= window()) [[likely]] {
            if (count != 0) std::memcpy(data, cursor_, count);
            cursor_ += count;
            return true;
        }
        return !failed() && read_through(static_cast<std::byte*>(data), count);
    }
    /// The next integers; zero after an error.
    std::uint8_t get_u8() {
        const std::byte* p = need(1);
        if (p == nullptr) return 0;
        cursor_ = p + 1;
        return std::to_integer<std::uint8_t>(*p);
    }
    std::uint16_t get_be16() { return get_big<std::uint16_t>(); }
    std::uint32_t get_be32() { return get_big<std::uint32_t>(); }
    std::uint64_t get_be64() { return get_big<std::uint64_t>(); }
    /// A length byte and as many bytes: how names travel.
    std::string get_counted_string() {
        std::string text(get_u8(), '\0');
        if (!read(text.data(), text.size())) text.clear();
        return text;
    }

    /// Bytes read since the start of the stream.
    std::uint64_t offset() const noexcept { return base_ + static_cast<std::uint64_t>(cursor_ - begin_); }
    std::uint64_t offset_of(const std::byte* position) const noexcept {
        return base_ + static_cast<std::uint64_t>(position - begin_);
    }
    /// An upper bound of the bytes still to come; the largest value where nobody knows. A length in the stream that
    /// asks for more is refused before anything is allocated for it.
    virtual std::uint64_t remaining() const noexcept { return std::numeric_limits<std::uint64_t>::max(); }

    bool failed() const noexcept { return static_cast<bool>(error_); }
    const error& failure() const noexcept { return error_; }
    error& failure() noexcept { return error_; }
    result<void> status() const {
        if (error_) return error_;
        return {};
    }
    /// Latches `failure` unless there is one already, with the current offset if it has none. Always false, so that
    /// `return r.fail(...)` reads well.
    bool fail(error failure) {
        if (!error_) {
            error_ = std::move(failure);
            error_.at_offset(offset());
        }
        return false;
    }

protected:
    reader() = default;

    void set_window(const std::byte* begin, const std::byte* cursor, const std::byte* end, std::uint64_t base) noexcept {
        if (begin == nullptr) begin = cursor = end = nothing();
        begin_ = begin;
        cursor_ = cursor;
        end_ = end;
        base_ = base;
    }
    const std::byte* window_begin() const noexcept { return begin_; }
    std::uint64_t window_base() const noexcept { return base_; }
    /// The window is all there is: nobody need be asked at its end.
    void set_last_window() noexcept { may_refill_ = false; }

    /// Brings at least `count` bytes into the window if the stream still has them. At its end, fewer; an error of the
    /// channel is latched with `fail`.
    virtual void refill(std::size_t count) = 0;
    /// Reads a block that is not in the window.
    virtual bool read_through(std::byte* data, std::size_t count) {
        while (count != 0) {
            if (window() == 0 && need(1) == nullptr) return false;
            const std::size_t piece = std::min(count, window());
            std::memcpy(data, cursor_, piece);
            cursor_ += piece;
            data += piece;
            count -= piece;
        }
        return true;
    }

private:
    template <class Integer>
    Integer get_big() {
        const std::byte* p = need(sizeof(Integer));
        if (p == nullptr) return 0;
        cursor_ = p + sizeof(Integer);
        return boost::endian::endian_load<Integer, sizeof(Integer), boost::endian::order::big>(
            reinterpret_cast<const unsigned char*>(p));
    }
    BOOST_NOINLINE const std::byte* refill_or_fail(std::size_t count) {
        if (failed()) return nullptr;
        refill(count);
        if (window() >= count) return cursor_;
        fail(error(errc::truncated, std::to_string(count) + (count == 1 ? " byte" : " bytes"), std::to_string(window())));
        return nullptr;
    }

    static const std::byte* nothing() noexcept {
        static constexpr std::byte byte{};
        return &byte;
    }

    const std::byte* cursor_ = nothing();
    const std::byte* end_ = cursor_;
    const std::byte* begin_ = cursor_;
    std::uint64_t base_ = 0;
    bool may_refill_ = true;
    error error_;
};

/// Reads memory that is there already.
class memory_reader final : public reader {
public:
    explicit memory_reader(std::span<const std::byte> memory) noexcept {
        set_window(memory.data(), memory.data(), memory.data() + memory.size(), 0);
        set_last_window();
    }
    /// The same, where the memory is a part of a stream that begins at `offset`: errors then name the stream's offsets.
    memory_reader(std::span<const std::byte> memory, std::uint64_t offset) noexcept {
        set_window(memory.data(), memory.data(), memory.data() + memory.size(), offset);
        set_last_window();
    }
    std::uint64_t remaining() const noexcept override { return window(); }

private:
    void refill(std::size_t) override {}
};

} // namespace vmstate
