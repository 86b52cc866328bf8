// SPDX-License-Identifier: BSL-1.0
//
// A way of our own for a backend's faults, between the two halves of this library: the backend keeps its userfaultfd and
// resolves its faults by itself, and what it exchanges with the VMM are notices of a region and an offset. Depends on
// message.hpp and Linux.
#pragma once

#include <sys/socket.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/message.hpp>

namespace vmstate::vhost_user {

namespace protocol_feature {
/// A bit that no specification has, and that QEMU leaves out of what it agrees upon. With it:
///
/// * POSTCOPY_ADVISE is answered with one end of a SOCK_SEQPACKET pair, and not with a userfaultfd
/// * SET_MEM_TABLE is answered with the table as it came: the VMM learns of no address
/// * the backend sends a `page_notice` of a page that it misses, and gets the same back when the page is in the file that
///   both map; it then maps it with UFFDIO_CONTINUE, which lets its threads go on
/// * a page that is in the file already it maps without asking: that is a fault of the minor kind
inline constexpr std::uint64_t page_notices = std::uint64_t{1} << 62;
} // namespace protocol_feature

/// A host page: the region's place in SET_MEM_TABLE, and the page's offset in it, in bytes.
struct page_notice {
    std::uint64_t region = 0;
    std::uint64_t offset = 0;

    friend bool operator==(const page_notice&, const page_notice&) = default;
    friend auto operator<=>(const page_notice&, const page_notice&) = default;
};
static_assert(sizeof(page_notice) == 16);

/// The most pages that a backend misses at one time: who touches more waits in the kernel until one of them has come. So
/// many notices fit into a socket's smallest buffer, and nobody has to wait to send one.
inline constexpr std::size_t max_missed_pages = 128;

/// Sends one without waiting.
inline result<void> send_notice(int socket, const page_notice& notice) {
    while (::send(socket, &notice, sizeof notice, MSG_DONTWAIT | MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof notice))
        if (errno != EINTR) return userfault::failure("send");
    return {};
}
/// The next one, without waiting; none where there is none.
inline result<std::optional<page_notice>> receive_notice(int socket) {
    for (;;) {
        page_notice notice;
        // One that is longer than it may be is seen by its true length.
        const ssize_t got = ::recv(socket, &notice, sizeof notice, MSG_DONTWAIT | MSG_TRUNC);
        if (got == static_cast<ssize_t>(sizeof notice)) return std::optional(notice);
        if (got == 0) return error(errc::io, "page notices", "the end of the connection");
        if (got > 0) return error(errc::bad_message, "a page notice of " + std::to_string(sizeof notice) + " bytes", std::to_string(got));
        if (errno == EAGAIN || errno == EWOULDBLOCK) return std::optional<page_notice>();
        if (errno != EINTR) return userfault::failure("recv");
    }
}

} // namespace vmstate::vhost_user
