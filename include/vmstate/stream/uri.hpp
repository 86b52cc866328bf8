// SPDX-License-Identifier: BSL-1.0
//
// QEMU's migration URIs, taken apart: `tcp:host:port`, `unix:path`, `file:path[,offset=n]`, `exec:command`, `fd:n`.
// Depends on support/.
#pragma once

#include <charconv>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <variant>

#include <vmstate/support/result.hpp>

namespace vmstate {

/// `file:path[,offset=n]`: the stream begins `offset` bytes into the file.
struct file_uri {
    std::string path;
    std::uint64_t offset = 0;
};
/// `exec:command`: the command goes to the shell.
struct exec_uri {
    std::string command;
};
/// `fd:n`: a descriptor that the process has open already; the channel takes it over.
struct fd_uri {
    int fd = -1;
};

/// `tcp:host:port`: a name or an address, an IPv6 address in brackets in the text and without them here. When listening,
/// the host may be empty (all addresses) and the port 0 (the system chooses one).
struct tcp_uri {
    std::string host;
    std::uint16_t port = 0;
};
/// `unix:path`: a socket in the file system.
struct unix_uri {
    std::string path;
};

using uri = std::variant<file_uri, exec_uri, fd_uri, tcp_uri, unix_uri>;

namespace detail {

/// A size as QEMU's options write it: decimal or 0x, then perhaps one of the suffixes b, k, M, G, T, P, E (powers of 1024).
inline result<std::uint64_t> parse_size(std::string_view text) {
    const std::string_view whole = text;
    const bool hexadecimal = text.starts_with("0x") || text.starts_with("0X");
    if (hexadecimal) text.remove_prefix(2);
    std::uint64_t value = 0;
    const auto [end, failed] =
        std::from_chars(text.data(), text.data() + text.size(), value, hexadecimal ? 16 : 10);
    text.remove_prefix(static_cast<std::size_t>(end - text.data()));
    unsigned shift = 0;
    if (text.size() == 1) {
        constexpr std::string_view suffixes = "bkmgtpe";
        const char lower =
            static_cast<char>(text.front() >= 'A' && text.front() <= 'Z' ? text.front() + 32 : text.front());
        const std::size_t power = suffixes.find(lower);
        if (power != std::string_view::npos && !hexadecimal) {
            shift = static_cast<unsigned>(power) * 10;
            text = {};
        }
    }
    if (failed != std::errc{} || !text.empty() ||
        value > (std::numeric_limits<std::uint64_t>::max() >> shift))
        return error(errc::bad_uri, "a size", std::string(whole));
    return value << shift;
}

/// What comes after `tcp:`. QEMU's options behind a comma (to=, ipv4=, ipv6=, keep-alive=, mptcp=) are refused by name.
inline result<tcp_uri> parse_tcp(std::string_view text) {
    const error malformed(errc::bad_uri, "tcp:host:port, or tcp:[IPv6 address]:port", "tcp:" + std::string(text));
    tcp_uri tcp;
    std::string_view port;
    if (text.starts_with('[')) {
        const std::size_t end = text.find("]:");
        if (end == std::string_view::npos || end == 1) return malformed;
        tcp.host = text.substr(1, end - 1);
        port = text.substr(end + 2);
    } else {
        const std::size_t colon = text.find(':');
        if (colon == std::string_view::npos) return malformed;
        tcp.host = text.substr(0, colon);
        port = text.substr(colon + 1);
    }
    if (tcp.host.find_first_of(",[]") != std::string::npos) return malformed;
    if (const std::size_t comma = port.find(','); comma != std::string_view::npos)
        return error(errc::unsupported, "tcp:host:port without options", std::string(port.substr(comma + 1)));
    const auto [end, failed] = std::from_chars(port.data(), port.data() + port.size(), tcp.port);
    if (failed != std::errc{} || end != port.data() + port.size())
        return error(errc::bad_uri, "a port from 0 to 65535", std::string(port));
    return tcp;
}

/// What comes after `unix:`. A comma is a part of the path, as it is to QEMU.
inline result<unix_uri> parse_unix(std::string_view path) {
    constexpr std::size_t longest = 107; // sizeof(sockaddr_un::sun_path), less the NUL
    if (path.empty() || path.size() > longest)
        return error(errc::bad_uri, "unix: and a path of 1 to 107 bytes", std::string(path));
    return unix_uri{std::string(path)};
}

} // namespace detail

/// Takes a URI apart. `errc::unsupported` for what QEMU has and this library hasn't, `errc::bad_uri` for all else.
inline result<uri> parse_uri(std::string_view text) {
    if (text.find('\0') != std::string_view::npos)
        return error(errc::bad_uri, "text without a NUL byte", "one");
    const std::size_t colon = text.find(':');
    const std::string_view scheme = text.substr(0, colon == std::string_view::npos ? 0 : colon);
    std::string_view rest = colon == std::string_view::npos ? text : text.substr(colon + 1);
    if (scheme == "file") {
        file_uri file;
        constexpr std::string_view option = ",offset=";
        if (const std::size_t at = rest.find(option); at != std::string_view::npos) {
            result<std::uint64_t> offset = detail::parse_size(rest.substr(at + option.size()));
            if (!offset) return offset.error();
            file.offset = *offset;
            rest = rest.substr(0, at);
        }
        if (rest.empty()) return error(errc::bad_uri, "file:path[,offset=n]", std::string(text));
        file.path = rest;
        return uri(std::move(file));
    }
    if (scheme == "exec") {
        if (rest.empty()) return error(errc::bad_uri, "exec:command", std::string(text));
        return uri(exec_uri{std::string(rest)});
    }
    if (scheme == "fd") {
        fd_uri fd;
        const auto [end, failed] = std::from_chars(rest.data(), rest.data() + rest.size(), fd.fd);
        if (failed != std::errc{} || end != rest.data() + rest.size() || fd.fd < 0)
            return error(errc::bad_uri, "fd:n with the number of an open descriptor", std::string(text));
        return uri(fd);
    }
    if (scheme == "tcp") {
        result<tcp_uri> tcp = detail::parse_tcp(rest);
        if (!tcp) return tcp.error();
        return uri(std::move(*tcp));
    }
    if (scheme == "unix") {
        result<unix_uri> path = detail::parse_unix(rest);
        if (!path) return path.error();
        return uri(std::move(*path));
    }
    constexpr std::string_view kinds = "tcp:host:port, unix:path, file:path[,offset=n], exec:command or fd:n";
    for (const std::string_view known : {"vsock", "rdma"})
        if (scheme == known) return error(errc::unsupported, std::string(kinds), std::string(text));
    return error(errc::bad_uri, std::string(kinds), std::string(text));
}

} // namespace vmstate
