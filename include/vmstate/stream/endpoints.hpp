// SPDX-License-Identifier: BSL-1.0
//
// From `tcp:` and `unix:` URIs to the system's addresses and back, and the making of sockets: what connect.hpp and
// listener.hpp share. Depends on uri.hpp, fd_channel.hpp and Boost.Asio.
#pragma once

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <boost/asio/generic/stream_protocol.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/local/stream_protocol.hpp>
#include <boost/system/error_code.hpp>

#include <concepts>
#include <string>
#include <vector>

#include <vmstate/stream/fd_channel.hpp>
#include <vmstate/stream/uri.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate::detail {

namespace asio = boost::asio;

template <class Address>
concept socket_address = std::same_as<Address, tcp_uri> || std::same_as<Address, unix_uri>;

using socket_protocol = asio::generic::stream_protocol;
using socket_endpoint = socket_protocol::endpoint;

inline std::string text_of(const tcp_uri& tcp) {
    const bool brackets = tcp.host.find(':') != std::string::npos;
    return "tcp:" + (brackets ? '[' + tcp.host + ']' : tcp.host) + ':' + std::to_string(tcp.port);
}
inline std::string text_of(const unix_uri& path) { return "unix:" + path.path; }

inline error asio_error(const std::string& what, const boost::system::error_code& failed) {
    return error(errc::io, {}, what + ": " + failed.message());
}

/// All addresses that a name has, in the resolver's order. It asks at once and waits for the answer.
inline result<std::vector<socket_endpoint>> resolve(asio::io_context& io, const tcp_uri& tcp, bool listening) {
    boost::system::error_code failed;
    asio::ip::tcp::resolver resolver(io);
    const auto flags = asio::ip::resolver_base::numeric_service |
                       (listening ? asio::ip::resolver_base::passive : asio::ip::resolver_base::flags());
    const auto found = resolver.resolve(tcp.host, std::to_string(tcp.port), flags, failed);
    if (failed) return asio_error(text_of(tcp), failed);
    std::vector<socket_endpoint> endpoints;
    for (const auto& entry : found) endpoints.emplace_back(entry.endpoint());
    if (endpoints.empty()) return error(errc::io, {}, text_of(tcp) + ": the name has no address");
    return endpoints;
}
inline result<std::vector<socket_endpoint>> resolve(asio::io_context&, const unix_uri& path, bool) {
    return std::vector<socket_endpoint>{socket_endpoint(asio::local::stream_protocol::endpoint(path.path))};
}

/// A socket that commands started later don't inherit; Asio's own socket() would let them.
inline result<unique_fd> make_socket(const socket_endpoint& endpoint) {
    const socket_protocol protocol = endpoint.protocol();
    unique_fd fd(::socket(protocol.family(), SOCK_STREAM | SOCK_CLOEXEC, protocol.protocol()));
    if (!fd) return system_error("socket");
    return fd;
}

/// As a connected socket is used from here on: blocking, and small messages of the return path leave at once, as in QEMU.
inline void prepare_connected(int fd) noexcept {
    if (const int flags = ::fcntl(fd, F_GETFL); flags >= 0 && (flags & O_NONBLOCK) != 0)
        ::fcntl(fd, F_SETFL, flags & ~O_NONBLOCK);
    const int on = 1;
    if (::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) == 0) return;
    // A unix socket, then: its buffer doesn't grow by itself as TCP's does, and 208 KiB have both sides wait for each other.
    const int size = 1 << 20;
    if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size) != 0)
        ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size); // as much as the system lets anybody have
}

} // namespace vmstate::detail
