// SPDX-License-Identifier: BSL-1.0
//
// Listens on a `tcp:` or `unix:` URI and accepts connections, by Boost.Asio; a destination takes several from one
// listener (multifd, postcopy-preempt). Depends on socket_channel.hpp and endpoints.hpp.
#pragma once

#include <netinet/in.h>
#include <sys/stat.h>
#include <unistd.h>

#include <boost/asio/basic_socket_acceptor.hpp>
#include <boost/asio/ip/v6_only.hpp>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <vmstate/stream/endpoints.hpp>
#include <vmstate/stream/socket_channel.hpp>

namespace vmstate {

/// Accepts connections, one thread at a time; `cancel` alone may come from another one. Its sockets close with it, and a
/// unix socket's path goes away. What was accepted lives on.
class socket_listener {
public:
    static constexpr int default_backlog = 128;

    /// On all addresses of the host in `tcp:host:port`; without a host, on all of the machine's, IPv6 and IPv4. Port 0
    /// lets the system choose one, which `uri` then tells. A unix socket that nobody listens on any more is replaced;
    /// any other file is left alone, and an error. `backlog`: how many may wait to be accepted.
    static result<socket_listener> listen(std::string_view text, int backlog = default_backlog) {
        const result<vmstate::uri> where = parse_uri(text);
        if (!where) return where.error();
        return std::visit(
            [&](const auto& address) -> result<socket_listener> {
                if constexpr (detail::socket_address<std::remove_cvref_t<decltype(address)>>)
                    return listen_at(address, backlog);
                else
                    return error(errc::unsupported, "tcp:host:port or unix:path", std::string(text));
            },
            *where);
    }
    static result<socket_listener> listen_at(const tcp_uri& address, int backlog = default_backlog) {
        return start(address, backlog);
    }
    static result<socket_listener> listen_at(const unix_uri& address, int backlog = default_backlog) {
        return start(address, backlog);
    }

    /// Waits for the next connection.
    result<std::unique_ptr<duplex_channel>> accept() {
        result<unique_fd> fd = state_->accept();
        if (!fd) return fd.error();
        return std::unique_ptr<duplex_channel>(std::make_unique<socket_channel>(std::move(*fd)));
    }

    /// One that is there already; null where none is.
    result<std::unique_ptr<socket_channel>> accept_waiting() {
        result<unique_fd> fd = state_->accept_waiting();
        if (!fd) return fd.error();
        if (!*fd) return std::unique_ptr<socket_channel>();
        return std::make_unique<socket_channel>(std::move(*fd));
    }

    /// Makes an `accept` that waits in another thread, and every later one, fail.
    void cancel() noexcept { state_->cancel(); }
    /// The longest that a later `accept` waits before it fails with `errc::io`, "timed out"; 0, as at first, is for ever.
    void set_timeout(std::chrono::milliseconds timeout) noexcept { state_->timeout = timeout; }
    /// Where it really listens, as a URI to connect to: of a host with several addresses the first, with its port.
    const std::string& uri() const noexcept { return state_->uri; }

private:
    template <class Address>
    static result<socket_listener> start(const Address& address, int backlog) {
        try {
            auto made = std::make_unique<state>();
            if (result<void> listening = made->listen(address, backlog); !listening) return listening.error();
            return socket_listener(std::move(made));
        } catch (const std::exception& thrown) {
            return error(errc::io, {}, detail::text_of(address) + ": " + thrown.what()); // Asio, without a descriptor left
        }
    }

    using acceptor_type = boost::asio::basic_socket_acceptor<detail::socket_protocol>;

    struct state {
        boost::asio::io_context io{1};
        std::vector<acceptor_type> acceptors;
        std::vector<bool> waiting; // whether Asio watches the acceptor of that number
        std::string uri;
        std::string path; // of a unix socket that is ours
        struct stat made {};
        std::chrono::milliseconds timeout{0};
        std::atomic<bool> cancelled = false;

        state() = default;
        state(const state&) = delete;
        state& operator=(const state&) = delete;
        ~state() {
            // Somebody may have replaced it; theirs stays.
            struct stat found {};
            if (!path.empty() && ::lstat(path.c_str(), &found) == 0 && found.st_ino == made.st_ino &&
                found.st_dev == made.st_dev)
                ::unlink(path.c_str());
        }

        result<void> listen(const tcp_uri& tcp, int backlog) {
            uri = detail::text_of(tcp);
            if (tcp.host.empty()) {
                // One IPv6 socket takes IPv4, too. A system without IPv6 says so, and has IPv4 alone.
                if (result<void> both = listen_on_all({"::", tcp.port}, backlog); both) return both;
                return listen_on_all({"0.0.0.0", tcp.port}, backlog);
            }
            // A port that the system chose for the first address of a host may be taken on the next.
            result<void> listening = listen_on_all(tcp, backlog);
            for (int again = 0; !listening && tcp.port == 0 && acceptors.size() > 0 && again < 16; ++again)
                listening = listen_on_all(tcp, backlog);
            return listening;
        }
        result<void> listen_on_all(const tcp_uri& tcp, int backlog) {
            acceptors.clear();
            const result<std::vector<detail::socket_endpoint>> endpoints = detail::resolve(io, tcp, true);
            if (!endpoints) return endpoints.error();
            std::uint16_t port = tcp.port;
            for (detail::socket_endpoint endpoint : *endpoints) {
                set_port(endpoint, port);
                if (result<void> one = add(endpoint, endpoints->size() > 1, backlog); !one) return one;
                const tcp_uri address = address_of(acceptors.back());
                if (acceptors.size() == 1) uri = detail::text_of(address);
                port = address.port;
            }
            return {};
        }
        result<void> listen(const unix_uri& socket, int backlog) {
            uri = detail::text_of(socket);
            if (result<void> free = remove_stale(socket.path); !free) return free;
            const detail::socket_endpoint endpoint{
                boost::asio::local::stream_protocol::endpoint(socket.path)};
            if (result<void> one = add(endpoint, false, backlog); !one) return one;
            if (::lstat(socket.path.c_str(), &made) == 0) path = socket.path;
            return {};
        }

        result<void> add(const detail::socket_endpoint& endpoint, bool one_of_several, int backlog) {
            result<unique_fd> fd = detail::make_socket(endpoint);
            if (!fd) return error(errc::io, {}, uri + ": " + std::string(fd.error().found()));
            acceptor_type acceptor(io);
            boost::system::error_code failed;
            acceptor.assign(endpoint.protocol(), fd->get(), failed);
            if (failed) return detail::asio_error(uri, failed);
            (void)fd->release();
            const int family = endpoint.protocol().family();
            if (family != AF_UNIX) acceptor.set_option(acceptor_type::reuse_address(true), failed);
            // A host with both kinds of addresses gets a socket for each, and the first must not take the other's port.
            if (!failed && family == AF_INET6)
                acceptor.set_option(boost::asio::ip::v6_only(one_of_several), failed);
            if (!failed) acceptor.bind(endpoint, failed);
            if (!failed) acceptor.listen(backlog, failed);
            // Who was ready a moment ago may have hung up: accepting must not wait for the next.
            if (!failed) acceptor.native_non_blocking(true, failed);
            if (failed) return detail::asio_error(uri, failed);
            acceptors.push_back(std::move(acceptor));
            waiting.assign(acceptors.size(), false);
            return {};
        }

        result<unique_fd> accept() {
            using clock = std::chrono::steady_clock;
            const clock::time_point deadline = clock::now() + timeout;
            for (;;) {
                io.restart();
                // After restart(), which forgets a stop() that came before; cancel() sets this before it stops.
                if (cancelled.load()) return error(errc::io, {}, uri + ": accepting was cancelled");
                if (result<unique_fd> there = accept_waiting(); !there || *there) return there;
                for (std::size_t i = 0; i < acceptors.size(); ++i) {
                    if (waiting[i]) continue;
                    waiting[i] = true;
                    acceptors[i].async_wait(acceptor_type::wait_read,
                        [this, i](const boost::system::error_code&) { waiting[i] = false; });
                }
                if (timeout.count() <= 0)
                    io.run_one();
                else if (io.run_one_until(deadline) == 0 && clock::now() >= deadline)
                    return error(errc::io, {},
                        uri + ": accepting timed out after " + std::to_string(timeout.count()) + " ms");
            }
        }
        result<unique_fd> accept_waiting() {
            for (acceptor_type& acceptor : acceptors) {
                // Not Asio's accept, whose sockets commands that are started later inherit.
                unique_fd fd(::accept4(acceptor.native_handle(), nullptr, nullptr, SOCK_CLOEXEC));
                if (fd) {
                    detail::prepare_connected(fd.get());
                    return fd;
                }
                if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR && errno != ECONNABORTED)
                    return detail::system_error(uri);
            }
            return unique_fd();
        }
        void cancel() noexcept {
            cancelled.store(true);
            io.stop();
        }

        static void set_port(detail::socket_endpoint& endpoint, std::uint16_t port) noexcept {
            const std::uint16_t wire = htons(port);
            char* const data = reinterpret_cast<char*>(endpoint.data());
            const std::size_t at = endpoint.protocol().family() == AF_INET6 ? offsetof(sockaddr_in6, sin6_port)
                                                                            : offsetof(sockaddr_in, sin_port);
            std::memcpy(data + at, &wire, sizeof wire);
        }
        static tcp_uri address_of(const acceptor_type& acceptor) {
            boost::system::error_code failed;
            const detail::socket_endpoint local = acceptor.local_endpoint(failed);
            boost::asio::ip::tcp::endpoint endpoint;
            if (!failed && local.size() <= endpoint.capacity()) {
                std::memcpy(endpoint.data(), local.data(), local.size());
                endpoint.resize(local.size());
            }
            return {endpoint.address().to_string(), endpoint.port()};
        }
        /// A socket that no process holds any more refuses whoever connects. Asked by a datagram socket, one that is in
        /// use answers that it is of another type, and its owner isn't disturbed.
        static result<void> remove_stale(const std::string& path) {
            struct stat found {};
            if (::lstat(path.c_str(), &found) != 0 || !S_ISSOCK(found.st_mode)) return {}; // bind says what is wrong
            const detail::socket_endpoint endpoint{boost::asio::local::stream_protocol::endpoint(path)};
            const unique_fd probe(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
            if (!probe) return detail::system_error("socket");
            const auto size = static_cast<socklen_t>(endpoint.size());
            if (::connect(probe.get(), endpoint.data(), size) == 0 || errno != ECONNREFUSED) return {};
            if (::unlink(path.c_str()) != 0) return detail::system_error("unix:" + path);
            return {};
        }
    };

    explicit socket_listener(std::unique_ptr<state> listening) noexcept : state_(std::move(listening)) {}

    std::unique_ptr<state> state_;
};

} // namespace vmstate
