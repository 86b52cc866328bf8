// SPDX-License-Identifier: BSL-1.0
//
// Channels: where a stream's bytes leave and arrive, blocking, in as few calls as possible. What is inside (a file, a
// pipe to a command, memory, something of the user's) the rest of the library never knows. Depends on support/.
#pragma once

#include <chrono>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include <vmstate/support/result.hpp>

namespace vmstate {

class duplex_channel;

/// What every channel can do. One thread uses a channel at a time; `shutdown` alone may come from another one.
class channel {
public:
    channel(const channel&) = delete;
    channel& operator=(const channel&) = delete;
    virtual ~channel() = default;

    /// Ends the channel and reports what shows only now: a command's exit status, data that didn't reach the disk.
    /// Closing twice is harmless.
    virtual result<void> close() { return {}; }
    /// Makes a read or write that blocks in another thread, and every later one, fail; does nothing on channels that
    /// can't block for long.
    virtual void shutdown() noexcept {}
    /// Tells the peer that nothing more will come, and goes on reading what it says; from any thread. Does nothing where
    /// the two directions can't be ended one by one.
    virtual void end_output() noexcept {}
    /// Whether the peer is known, without waiting, to have ended its output or to be gone; what it wrote before may still
    /// be there to be read.
    virtual bool is_ended() noexcept { return false; }
    /// The other direction of the same connection, for another thread to use at the same time: the source's forward
    /// channel gives what the destination writes back, the destination's gives the way to write it. Each of the two is
    /// closed on its own; `shutdown` of one ends both. `errc::unsupported` where there is no way back. (QEMU:
    /// qemu_file_get_return_path.)
    virtual result<std::unique_ptr<duplex_channel>> get_return_path();
    /// The longest that a later read or write may wait for the peer without a byte moved; then it fails with `errc::io`,
    /// "timed out". 0, as it is at first, is for ever. False where this channel can't bound its waits.
    virtual bool set_timeout(std::chrono::milliseconds) noexcept { return false; }

protected:
    channel() = default;
};

/// A channel to read from.
class input_channel : public virtual channel {
public:
    /// Fills `parts` one after the other with what is there, at least one byte, and says how many bytes it was. Waits
    /// for the first byte; 0 at the end of the stream. `parts` hold at least one byte together.
    virtual result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) = 0;
    /// An upper bound of the bytes still to come, the largest value where nobody knows.
    virtual std::uint64_t remaining() const noexcept { return std::numeric_limits<std::uint64_t>::max(); }
    /// About how many bytes may have arrived and wait to be read: with more than that the peer's writes wait. For what is
    /// wanted as soon as it was written. Not kept where a connection with so little under way would be slow. Does nothing
    /// where nothing queues on this side, or nobody can tell.
    virtual void limit_unread(std::size_t) noexcept {}
};

/// A channel to write to.
class output_channel : public virtual channel {
public:
    /// Writes all of `parts`, in order.
    virtual result<void> writev(std::span<const std::span<const std::byte>> parts) = 0;
    /// About how many bytes that the peer's system has no room for yet may wait on this side: a write returns only when
    /// fewer do. For what is to be answered soon, rather than queued behind much else. Does nothing where nothing queues,
    /// or nobody can tell.
    virtual void limit_unsent(std::size_t) noexcept {}
};

/// A channel with both directions, such as a socket: the way back carries the return path.
class duplex_channel : public input_channel, public output_channel {};

inline result<std::unique_ptr<duplex_channel>> channel::get_return_path() {
    return error(errc::unsupported, "a channel with a return path", "one that goes in one direction");
}

/// A user's own type to read from: `read_some(into)` fills a part of `into` and returns how much, 0 at the end.
template <class Source>
concept byte_source =
    !std::derived_from<Source, input_channel> && requires(Source & source, std::span<std::byte> into) {
    { source.read_some(into) } -> std::convertible_to<result<std::size_t>>;
};

/// A user's own type to write to: `write_some(from)` takes a part of `from`, at least one byte, and returns how much.
template <class Sink>
concept byte_sink =
    !std::derived_from<Sink, output_channel> && requires(Sink & sink, std::span<const std::byte> from) {
    { sink.write_some(from) } -> std::convertible_to<result<std::size_t>>;
};

namespace detail {

/// What every channel can do, by the user's type, where it has it. `User` is a value or a reference.
template <class Base, class User>
class user_channel : public Base {
public:
    explicit user_channel(User&& user) : user_(std::forward<User>(user)) {}

    result<void> close() override {
        if constexpr (requires {
                          { user_.close() } -> std::convertible_to<result<void>>;
                      })
            return user_.close();
        else
            return {};
    }
    void shutdown() noexcept override {
        if constexpr (requires { user_.shutdown(); }) user_.shutdown();
    }
    void end_output() noexcept override {
        if constexpr (requires { user_.end_output(); }) user_.end_output();
    }
    bool is_ended() noexcept override {
        if constexpr (requires {
                          { user_.is_ended() } -> std::convertible_to<bool>;
                      })
            return user_.is_ended();
        else
            return Base::is_ended();
    }
    result<std::unique_ptr<duplex_channel>> get_return_path() override {
        if constexpr (requires {
                          { user_.get_return_path() } -> std::convertible_to<result<std::unique_ptr<duplex_channel>>>;
                      })
            return user_.get_return_path();
        else
            return Base::get_return_path();
    }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override {
        if constexpr (requires {
                          { user_.set_timeout(timeout) } -> std::convertible_to<bool>;
                      })
            return user_.set_timeout(timeout);
        else
            return Base::set_timeout(timeout);
    }

protected:
    User user_;
};

template <class Source>
class user_input final : public user_channel<input_channel, Source> {
public:
    using user_channel<input_channel, Source>::user_channel;

    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        for (const std::span<std::byte> part : parts) {
            if (part.empty()) continue;
            result<std::size_t> count = this->user_.read_some(part);
            if (count && *count > part.size())
                return error(errc::invalid_argument, "at most as many bytes read as asked for");
            return count;
        }
        return std::size_t{0};
    }
    std::uint64_t remaining() const noexcept override {
        if constexpr (requires {
                          { this->user_.remaining() } -> std::convertible_to<std::uint64_t>;
                      })
            return this->user_.remaining();
        else
            return input_channel::remaining();
    }
    void limit_unread(std::size_t bytes) noexcept override {
        if constexpr (requires { this->user_.limit_unread(bytes); }) this->user_.limit_unread(bytes);
    }
};

template <class Sink>
class user_output final : public user_channel<output_channel, Sink> {
public:
    using user_channel<output_channel, Sink>::user_channel;

    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        for (std::span<const std::byte> part : parts) {
            while (!part.empty()) {
                const result<std::size_t> count = this->user_.write_some(part);
                if (!count) return count.error();
                if (*count == 0 || *count > part.size())
                    return error(errc::io, "at least one byte written, and no more than given",
                        std::to_string(*count));
                part = part.subspan(*count);
            }
        }
        return {};
    }
    void limit_unsent(std::size_t bytes) noexcept override {
        if constexpr (requires { this->user_.limit_unsent(bytes); }) this->user_.limit_unsent(bytes);
    }
};

} // namespace detail

/// A channel around a user's own type: around a copy of a temporary, around the object itself otherwise.
template <class Source>
    requires byte_source<std::remove_cvref_t<Source>> std::unique_ptr<input_channel> make_input_channel(
        Source&& source) {
        return std::make_unique<detail::user_input<Source>>(std::forward<Source>(source));
    }
template <class Sink>
    requires byte_sink<std::remove_cvref_t<Sink>> std::unique_ptr<output_channel> make_output_channel(
        Sink&& sink) {
        return std::make_unique<detail::user_output<Sink>>(std::forward<Sink>(sink));
    }

} // namespace vmstate
