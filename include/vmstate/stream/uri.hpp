// SPDX-License-Identifier: BSL-1.0
//
// QEMU's migration URIs, taken apart: `file:path[,offset=n]`, `exec:command`, `fd:n`. Depends on support/.
#pragma once

#include <charconv>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <system_error>
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

using uri = std::variant<file_uri, exec_uri, fd_uri>;

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
    for (const std::string_view known : {"tcp", "unix", "vsock", "rdma"})
        if (scheme == known) return error(errc::unsupported, "file:, exec: or fd:", std::string(text));
    return error(errc::bad_uri, "file:path[,offset=n], exec:command or fd:n", std::string(text));
}

} // namespace vmstate
