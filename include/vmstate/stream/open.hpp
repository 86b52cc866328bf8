// SPDX-License-Identifier: BSL-1.0
//
// From a URI to a channel. Depends on the other headers of stream/.
#pragma once

#include <fcntl.h>
#include <sys/socket.h>

#include <concepts>
#include <memory>
#include <stop_token>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>

#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/exec_channel.hpp>
#include <vmstate/stream/fd_channel.hpp>
#include <vmstate/stream/file_channel.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/uri.hpp>

namespace vmstate {

namespace detail {

/// Fails with the error that it was made from, whatever is asked of it.
class failed_output final : public output_channel {
public:
    explicit failed_output(error failure) noexcept : failure_(std::move(failure)) {}
    result<void> writev(std::span<const std::span<const std::byte>>) override { return failure_; }
    result<void> close() override { return failure_; }
    result<std::unique_ptr<duplex_channel>> get_return_path() override { return failure_; }

private:
    error failure_;
};
class failed_input final : public input_channel {
public:
    explicit failed_input(error failure) noexcept : failure_(std::move(failure)) {}
    result<std::size_t> read_some(std::span<const std::span<std::byte>>) override { return failure_; }
    result<void> close() override { return failure_; }
    result<std::unique_ptr<duplex_channel>> get_return_path() override { return failure_; }

private:
    error failure_;
};

template <class Channel>
struct failed_channel;
template <>
struct failed_channel<output_channel> {
    using type = failed_output;
};
template <>
struct failed_channel<input_channel> {
    using type = failed_input;
};

} // namespace detail

/// A `result` whose `*` may be used unchecked: where opening failed it is a channel that fails with that error, so that
/// `save(machine, *open_output(uri))` reports why the file could not be made.
template <class Channel>
class opened : public result<std::unique_ptr<Channel>> {
    using base = result<std::unique_ptr<Channel>>;

public:
    opened(base outcome) : base(std::move(outcome)) {
        if (base::has_error())
            failed_ = std::make_unique<typename detail::failed_channel<Channel>::type>(base::error());
    }

    std::unique_ptr<Channel>* operator->() noexcept {
        return base::has_error() ? &failed_ : base::operator->();
    }
    std::unique_ptr<Channel>& operator*() & noexcept { return *operator->(); }
    std::unique_ptr<Channel>&& operator*() && noexcept { return std::move(*operator->()); }

private:
    std::unique_ptr<Channel> failed_;
};

/// A channel that may not have been opened, as functions take it.
template <class Outcome, class Channel>
concept opening_of = std::derived_from<std::remove_cvref_t<Outcome>, result<std::unique_ptr<Channel>>>;

using opened_output = opened<output_channel>;
using opened_input = opened<input_channel>;

namespace detail {

inline result<unique_fd> take_descriptor(int number) {
    if (::fcntl(number, F_GETFD) < 0) return system_error("fd:" + std::to_string(number));
    return unique_fd(number);
}

/// A socket has a way back, whoever connected it.
inline bool is_stream_socket(int fd) noexcept {
    int type = 0;
    socklen_t size = sizeof type;
    return ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_STREAM;
}
inline std::unique_ptr<socket_channel> take_socket(unique_fd fd) {
    prepare_connected(fd.get());
    return std::make_unique<socket_channel>(std::move(fd));
}

inline result<std::unique_ptr<output_channel>> open_output_at(const file_uri& file, const opening_options& options) {
    return open_output_file(file.path, file.offset, options);
}
inline result<std::unique_ptr<output_channel>> open_output_at(const exec_uri& exec, const opening_options&) {
    return open_output_command(exec.command);
}
inline result<std::unique_ptr<output_channel>> open_output_at(const fd_uri& number, const opening_options&) {
    result<unique_fd> fd = take_descriptor(number.fd);
    if (!fd) return fd.error();
    if (is_stream_socket(fd->get())) return std::unique_ptr<output_channel>(take_socket(std::move(*fd)));
    return std::unique_ptr<output_channel>(std::make_unique<fd_output_channel>(std::move(*fd)));
}
// As in QEMU the source connects, and the destination listens for it.
template <class Address>
    requires socket_address<Address>
result<std::unique_ptr<output_channel>> open_output_at(const Address& address, const opening_options& options) {
    result<std::unique_ptr<duplex_channel>> connected = connect_to(address, options);
    if (!connected) return connected.error();
    return std::unique_ptr<output_channel>(std::move(*connected));
}

inline result<std::unique_ptr<input_channel>> open_input_at(const file_uri& file, const opening_options& options) {
    return open_input_file(file.path, file.offset, options);
}
inline result<std::unique_ptr<input_channel>> open_input_at(const exec_uri& exec, const opening_options&) {
    return open_input_command(exec.command);
}
inline result<std::unique_ptr<input_channel>> open_input_at(const fd_uri& number, const opening_options&) {
    result<unique_fd> fd = take_descriptor(number.fd);
    if (!fd) return fd.error();
    if (is_stream_socket(fd->get())) return std::unique_ptr<input_channel>(take_socket(std::move(*fd)));
    return std::unique_ptr<input_channel>(std::make_unique<fd_input_channel>(std::move(*fd)));
}
template <class Address>
    requires socket_address<Address>
result<std::unique_ptr<input_channel>> open_input_at(const Address& address, const opening_options& options) {
    result<socket_listener> listener = socket_listener::listen_at(address, 1);
    if (!listener) return listener.error();
    listener->set_timeout(options.timeout);
    const std::stop_callback end(options.stop, [&] { listener->cancel(); });
    result<std::unique_ptr<duplex_channel>> accepted = listener->accept();
    if (!accepted) return accepted.error();
    return std::unique_ptr<input_channel>(std::move(*accepted));
}

} // namespace detail

/// A channel to write a stream to; `tcp:` and `unix:` connect, and `file:` waits for a FIFO's reader, as `options` say. `errc::bad_uri`, `errc::unsupported`, or `errc::io` with the system's words.
inline opened_output open_output(std::string_view text, const opening_options& options = {}) {
    const result<uri> where = parse_uri(text);
    if (!where) return result<std::unique_ptr<output_channel>>(where.error());
    return std::visit([&](const auto& kind) { return detail::open_output_at(kind, options); }, *where);
}

/// A channel to read a stream from; `tcp:` and `unix:` listen, accept one connection, and listen no more. They, and
/// `file:` that is a FIFO, wait as `options` say. To listen for several use `socket_listener`.
inline opened_input open_input(std::string_view text, const opening_options& options = {}) {
    const result<uri> where = parse_uri(text);
    if (!where) return result<std::unique_ptr<input_channel>>(where.error());
    return std::visit([&](const auto& kind) { return detail::open_input_at(kind, options); }, *where);
}

} // namespace vmstate
