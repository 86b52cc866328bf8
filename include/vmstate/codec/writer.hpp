// SPDX-License-Identifier: BSL-1.0
//
// Where bytes go: a window of memory that generated code fills with straight-line stores, and that its owner empties
// when it is full. The first error is kept and everything after it is a no-op, so that only the end of a sequence has
// to be checked. Depends on support/.
#pragma once

#include <boost/endian/conversion.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/support/result.hpp>

namespace vmstate {

/// The base of every writer. What derives from it supplies `make_room`, and `write_through` where large blocks need not
/// be copied.
class writer {
public:
    /// The most that `reserve` can be asked for.
    static constexpr std::size_t max_reserve = 4096;

    writer(const writer&) = delete;
    writer& operator=(const writer&) = delete;
    virtual ~writer() = default;

    /// Room for `count` bytes in one piece (at most `max_reserve`), or null once the writer has failed.
    std::byte* reserve(std::size_t count) {
        if (static_cast<std::size_t>(end_ - cursor_) >= count) [[likely]] return cursor_;
        return make_room_or_fail(count);
    }
    /// Takes what was stored between the last `reserve` and `end` as written.
    void commit(std::byte* end) noexcept { cursor_ = end; }
    /// Bytes that fit without a call to the owner.
    std::size_t room() const noexcept { return static_cast<std::size_t>(end_ - cursor_); }
    /// The first byte of the window's free part.
    std::byte* cursor() const noexcept { return cursor_; }
    std::byte* window_end() const noexcept { return end_; }

    void write(const void* data, std::size_t count) {
        if (count <= room()) [[likely]] {
            if (count != 0) std::memcpy(cursor_, data, count);
            cursor_ += count;
        } else if (!failed()) {
            write_through(static_cast<const std::byte*>(data), count);
        }
    }
    void write(std::span<const std::byte> bytes) { write(bytes.data(), bytes.size()); }
    void fill(std::byte value, std::size_t count) {
        while (count != 0) {
            const std::size_t piece = std::min(count, std::max(room(), std::size_t{1}));
            std::byte* p = reserve(piece);
            if (p == nullptr) return;
            std::memset(p, static_cast<int>(value), piece);
            commit(p + piece);
            count -= piece;
        }
    }
    void put_u8(std::uint8_t value) {
        if (std::byte* p = reserve(1)) {
            *p = std::byte{value};
            commit(p + 1);
        }
    }
    void put_be16(std::uint16_t value) { put_big<std::uint16_t>(value); }
    void put_be32(std::uint32_t value) { put_big<std::uint32_t>(value); }
    void put_be64(std::uint64_t value) { put_big<std::uint64_t>(value); }
    /// A length byte and as many bytes: how names travel. Longer than 255 fails.
    void put_counted_string(std::string_view text) {
        if (text.size() > 255) return fail(error(errc::invalid_argument, "a name of at most 255 bytes", std::to_string(text.size())));
        put_u8(static_cast<std::uint8_t>(text.size()));
        write(text.data(), text.size());
    }

    /// Bytes written since the start of the stream.
    std::uint64_t offset() const noexcept { return base_ + static_cast<std::uint64_t>(cursor_ - begin_); }

    bool failed() const noexcept { return static_cast<bool>(error_); }
    const error& failure() const noexcept { return error_; }
    error& failure() noexcept { return error_; }
    result<void> status() const {
        if (error_) return error_;
        return {};
    }
    /// Latches `failure` unless there is one already, with the current offset if it has none.
    void fail(error failure) {
        if (error_) return;
        error_ = std::move(failure);
        error_.at_offset(offset());
        on_failure();
    }

protected:
    writer() = default;

    /// The memory to fill next. `base` is the stream offset of `begin`.
    void set_window(std::byte* begin, std::byte* cursor, std::byte* end, std::uint64_t base) noexcept {
        begin_ = begin;
        cursor_ = cursor;
        end_ = end;
        base_ = base;
    }
    std::byte* window_begin() const noexcept { return begin_; }
    std::uint64_t window_base() const noexcept { return base_; }

    /// Makes the window hold at least `count` more bytes, or calls `fail`.
    virtual void make_room(std::size_t count) = 0;
    /// Writes a block that does not fit into the window.
    virtual void write_through(const std::byte* data, std::size_t count) {
        while (count != 0 && !failed()) {
            const std::size_t piece = std::min(count, std::max(room(), std::size_t{1}));
            std::byte* p = reserve(piece);
            if (p == nullptr) return;
            std::memcpy(p, data, piece);
            commit(p + piece);
            data += piece;
            count -= piece;
        }
    }

private:
    template <class Integer>
    void put_big(Integer value) {
        if (std::byte* p = reserve(sizeof(Integer))) {
            boost::endian::endian_store<Integer, sizeof(Integer), boost::endian::order::big>(
                reinterpret_cast<unsigned char*>(p), value);
            commit(p + sizeof(Integer));
        }
    }
    BOOST_NOINLINE std::byte* make_room_or_fail(std::size_t count) {
        if (failed()) return nullptr;
        make_room(count);
        return failed() ? nullptr : cursor_;
    }
    /// An empty window makes every later `reserve` take the slow path, which sees the error.
    void on_failure() noexcept {
        base_ = offset();
        begin_ = cursor_ = end_;
    }

    std::byte* cursor_ = nullptr;
    std::byte* end_ = nullptr;
    std::byte* begin_ = nullptr;
    std::uint64_t base_ = 0;
    error error_;
};

/// Writes into memory that is there already; more than fits is `errc::no_space`.
class memory_writer final : public writer {
public:
    explicit memory_writer(std::span<std::byte> memory) noexcept : memory_(memory) {
        set_window(memory.data(), memory.data(), memory.data() + memory.size(), 0);
    }
    /// What has been written so far.
    std::span<std::byte> written() const noexcept { return memory_.first(static_cast<std::size_t>(offset())); }

private:
    void make_room(std::size_t count) override {
        fail(error(errc::no_space, std::to_string(count) + " bytes of room", std::to_string(room())));
    }
    void write_through(const std::byte*, std::size_t count) override { make_room(count); }

    std::span<std::byte> memory_;
};

/// Writes into a vector that grows.
class vector_writer final : public writer {
public:
    explicit vector_writer(std::size_t capacity = 0) : bytes_(capacity) { reset_window(0); }
    /// What was written; the writer is empty afterwards.
    std::vector<std::byte> take() {
        // Not resize(): g++ 14 warns of what that would do where it made the vector larger.
        bytes_.erase(bytes_.begin() + static_cast<std::ptrdiff_t>(offset()), bytes_.end());
        std::vector<std::byte> taken = std::move(bytes_);
        bytes_.clear();
        reset_window(0);
        return taken;
    }
    std::span<const std::byte> written() const noexcept { return {bytes_.data(), static_cast<std::size_t>(offset())}; }

private:
    void make_room(std::size_t count) override {
        const auto used = static_cast<std::size_t>(offset());
        bytes_.resize(std::max(used + count, bytes_.size() + bytes_.size() / 2 + 64));
        reset_window(used);
    }
    void write_through(const std::byte* data, std::size_t count) override {
        make_room(count);
        std::memcpy(cursor(), data, count);
        commit(cursor() + count);
    }
    void reset_window(std::size_t used) noexcept {
        set_window(bytes_.data(), bytes_.data() + used, bytes_.data() + bytes_.size(), 0);
    }

    std::vector<std::byte> bytes_;
};

} // namespace vmstate
