// SPDX-License-Identifier: BSL-1.0
//
// Connects to a `tcp:` or `unix:` URI, by Boost.Asio; the channel that comes out needs no Asio. Depends on
// socket_channel.hpp, connector.hpp and endpoints.hpp.
#pragma once

#include <sys/socket.h>

#include <boost/asio/basic_stream_socket.hpp>

#include <chrono>
#include <exception>
#include <memory>
#include <optional>
#include <stop_token>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <variant>

#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/endpoints.hpp>
#include <vmstate/stream/socket_channel.hpp>

namespace vmstate {

/// `timeout` is of connecting alone, all addresses of a name together; 0 is as long as the system tries (for TCP to a
/// silent host, two minutes). It doesn't bound the resolver, and is not the channel's timeout afterwards.
using connect_options = opening_options;

namespace detail {

inline error cancelled_connect(const std::string& text) {
    return error(errc::io, {}, text + ": connecting was cancelled");
}
inline error late_connect(const std::string& text, const connect_options& options) {
    return error(
        errc::io, {}, text + ": connecting timed out after " + std::to_string(options.timeout.count()) + " ms");
}

/// One attempt; no descriptor where there is to be another. The socket is Asio's while it connects, and ours afterwards.
inline result<unique_fd> connect_once(asio::io_context& io, const socket_endpoint& endpoint, const std::string& text,
    const connect_options& options, std::chrono::steady_clock::time_point deadline) {
    result<unique_fd> made = make_socket(endpoint);
    if (!made) return made.error();
    asio::basic_stream_socket<socket_protocol> socket(io);
    boost::system::error_code failed;
    socket.assign(endpoint.protocol(), made->get(), failed);
    if (failed) return asio_error(text, failed);
    (void)made->release();

    std::optional<boost::system::error_code> outcome;
    socket.async_connect(endpoint, [&](const boost::system::error_code& ended) { outcome = ended; });
    io.restart();
    {
        // stop() is what another thread may call on a context; the request may have come before restart(), or come now.
        const std::stop_callback end(options.stop, [&] { io.stop(); });
        if (options.timeout.count() > 0)
            io.run_until(deadline);
        else
            io.run();
    }
    if (!outcome) {
        // The handler refers to this frame: it runs now, or never.
        socket.cancel(failed);
        io.restart();
        io.poll();
        return options.stop.stop_requested() ? cancelled_connect(text) : late_connect(text, options);
    }
    if (*outcome) return asio_error(text, *outcome);
    unique_fd fd(socket.release(failed));
    if (failed) return asio_error(text, failed);
    // Linux refuses a unix socket that has to wait for a place in the backlog, and never says when there is one; Asio takes
    // that for a connection.
    sockaddr_storage peer{};
    socklen_t size = sizeof peer;
    if (::getpeername(fd.get(), reinterpret_cast<sockaddr*>(&peer), &size) != 0) return unique_fd();
    prepare_connected(fd.get());
    return fd;
}

template <class Address>
    requires socket_address<Address>
result<std::unique_ptr<duplex_channel>> connect_to(const Address& address, const connect_options& options) try {
    const std::string text = text_of(address);
    if constexpr (std::same_as<Address, tcp_uri>)
        if (address.host.empty() || address.port == 0)
            return error(errc::bad_uri, "a host and a port to connect to", text);
    asio::io_context io(1);
    const result<std::vector<socket_endpoint>> endpoints = resolve(io, address, false);
    if (!endpoints) return endpoints.error();
    const auto deadline = std::chrono::steady_clock::now() + options.timeout;
    error last;
    for (const socket_endpoint& endpoint : *endpoints) {
        result<unique_fd> connected = connect_once(io, endpoint, text, options, deadline);
        while (connected && !*connected) {
            if (options.stop.stop_requested()) return cancelled_connect(text);
            if (options.timeout.count() > 0 && std::chrono::steady_clock::now() >= deadline)
                return late_connect(text, options);
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
            connected = connect_once(io, endpoint, text, options, deadline);
        }
        if (connected)
            return std::unique_ptr<duplex_channel>(std::make_unique<socket_channel>(std::move(*connected)));
        last = connected.error();
        if (options.stop.stop_requested()) break;
    }
    return last;
} catch (const std::exception& thrown) {
    return error(errc::io, {}, text_of(address) + ": " + thrown.what()); // Asio, without a descriptor left to work with
}

} // namespace detail

/// Connects to `tcp:host:port`, trying all addresses of the host in turn, or to `unix:path`. `errc::bad_uri`,
/// `errc::unsupported` for other URIs, or `errc::io` with the system's words.
inline result<std::unique_ptr<duplex_channel>> connect(std::string_view text, const connect_options& options = {}) {
    const result<uri> where = parse_uri(text);
    if (!where) return where.error();
    return std::visit(
        [&](const auto& address) -> result<std::unique_ptr<duplex_channel>> {
            if constexpr (detail::socket_address<std::remove_cvref_t<decltype(address)>>)
                return detail::connect_to(address, options);
            else
                return error(errc::unsupported, "tcp:host:port or unix:path", std::string(text));
        },
        *where);
}

} // namespace vmstate
