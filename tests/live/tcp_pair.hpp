// SPDX-License-Identifier: BSL-1.0
// Two ends of a TCP connection, and the ways of a peer to end it. Depends on Linux and support/unique_fd.hpp.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <utility>

#include <vmstate/support/unique_fd.hpp>

#include <support/catch.hpp>

namespace vmstate::tests {

struct tcp_pair {
    unique_fd one;
    unique_fd other;
};

/// With so small buffers that a peer that doesn't read is noticed soon.
inline tcp_pair connect_tcp() {
    const unique_fd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof address;
    const int buffer = 32 * 1024;
    ::setsockopt(listener.get(), SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    ::setsockopt(listener.get(), SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    REQUIRE(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0);
    REQUIRE(::listen(listener.get(), 1) == 0);
    REQUIRE(::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0);
    tcp_pair ends{unique_fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)), {}};
    ::setsockopt(ends.one.get(), SOL_SOCKET, SO_RCVBUF, &buffer, sizeof buffer);
    ::setsockopt(ends.one.get(), SOL_SOCKET, SO_SNDBUF, &buffer, sizeof buffer);
    REQUIRE(::connect(ends.one.get(), reinterpret_cast<const sockaddr*>(&address), size) == 0);
    ends.other.reset(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
    REQUIRE(ends.other);
    return ends;
}

/// Closes it so that the other end is told of a reset, and loses what is under way.
inline void reset_connection(unique_fd& fd) {
    const linger at_once{1, 0};
    ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    fd.reset();
}

} // namespace vmstate::tests
