// SPDX-License-Identifier: BSL-1.0
//
// The messages of vhost-user: header, request numbers, feature bits, the payloads that concern memory, and one message
// with its descriptors over a unix socket. Facts from QEMU's docs/interop/vhost-user.rst. Both halves speak through this
// header; everything is in the host's byte order. Depends on support/ and Linux.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <vector>

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate::vhost_user {

/// What the front end (the VMM) asks; the numbers are the wire's.
enum class request : std::uint32_t {
    get_features = 1,
    set_features = 2,
    set_owner = 3,
    reset_owner = 4,
    set_mem_table = 5,
    set_log_base = 6,
    set_log_fd = 7,
    set_vring_num = 8,
    set_vring_addr = 9,
    set_vring_base = 10,
    get_vring_base = 11,
    set_vring_kick = 12,
    set_vring_call = 13,
    set_vring_err = 14,
    get_protocol_features = 15,
    set_protocol_features = 16,
    get_queue_num = 17,
    set_vring_enable = 18,
    set_backend_req_fd = 21,
    get_config = 24,
    set_config = 25,
    postcopy_advise = 28,
    postcopy_listen = 29,
    postcopy_end = 30,
    reset_device = 34,
    get_max_mem_slots = 36,
    add_mem_reg = 37,
    rem_mem_reg = 38,
};

/// The specification's name, without its prefix; "request 99" is what `name_of` makes of a number without one.
constexpr std::string_view to_string(request r) noexcept {
    switch (r) {
    case request::get_features: return "GET_FEATURES";
    case request::set_features: return "SET_FEATURES";
    case request::set_owner: return "SET_OWNER";
    case request::reset_owner: return "RESET_OWNER";
    case request::set_mem_table: return "SET_MEM_TABLE";
    case request::set_log_base: return "SET_LOG_BASE";
    case request::set_log_fd: return "SET_LOG_FD";
    case request::set_vring_num: return "SET_VRING_NUM";
    case request::set_vring_addr: return "SET_VRING_ADDR";
    case request::set_vring_base: return "SET_VRING_BASE";
    case request::get_vring_base: return "GET_VRING_BASE";
    case request::set_vring_kick: return "SET_VRING_KICK";
    case request::set_vring_call: return "SET_VRING_CALL";
    case request::set_vring_err: return "SET_VRING_ERR";
    case request::get_protocol_features: return "GET_PROTOCOL_FEATURES";
    case request::set_protocol_features: return "SET_PROTOCOL_FEATURES";
    case request::get_queue_num: return "GET_QUEUE_NUM";
    case request::set_vring_enable: return "SET_VRING_ENABLE";
    case request::set_backend_req_fd: return "SET_BACKEND_REQ_FD";
    case request::get_config: return "GET_CONFIG";
    case request::set_config: return "SET_CONFIG";
    case request::postcopy_advise: return "POSTCOPY_ADVISE";
    case request::postcopy_listen: return "POSTCOPY_LISTEN";
    case request::postcopy_end: return "POSTCOPY_END";
    case request::reset_device: return "RESET_DEVICE";
    case request::get_max_mem_slots: return "GET_MAX_MEM_SLOTS";
    case request::add_mem_reg: return "ADD_MEM_REG";
    case request::rem_mem_reg: return "REM_MEM_REG";
    }
    return {};
}
/// For errors: the name, or the number where there is no name.
inline std::string name_of(request r) {
    const std::string_view name = to_string(r);
    if (!name.empty()) return std::string(name);
    return "request " + std::to_string(static_cast<std::uint32_t>(r));
}

/// Bits of GET_FEATURES and SET_FEATURES that are vhost's and not the device's.
namespace feature {
inline constexpr std::uint64_t log_all = std::uint64_t{1} << 26;           ///< VHOST_F_LOG_ALL
inline constexpr std::uint64_t protocol_features = std::uint64_t{1} << 30; ///< VHOST_USER_F_PROTOCOL_FEATURES
} // namespace feature

/// Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES.
namespace protocol_feature {
inline constexpr std::uint64_t mq = std::uint64_t{1} << 0;
inline constexpr std::uint64_t log_shmfd = std::uint64_t{1} << 1;       ///< SET_LOG_BASE brings a descriptor
inline constexpr std::uint64_t reply_ack = std::uint64_t{1} << 3;       ///< `message::need_reply` is obeyed
inline constexpr std::uint64_t backend_req = std::uint64_t{1} << 5;     ///< SET_BACKEND_REQ_FD
inline constexpr std::uint64_t pagefault = std::uint64_t{1} << 8;       ///< the three messages of postcopy
inline constexpr std::uint64_t config = std::uint64_t{1} << 9;          ///< GET_CONFIG, SET_CONFIG
inline constexpr std::uint64_t backend_send_fd = std::uint64_t{1} << 10; ///< the backend may send descriptors
inline constexpr std::uint64_t configure_mem_slots = std::uint64_t{1} << 15; ///< ADD_MEM_REG, REM_MEM_REG
} // namespace protocol_feature

/// Bits of a message's flags.
namespace message_flag {
inline constexpr std::uint32_t version_mask = 3;
inline constexpr std::uint32_t version = 1;
inline constexpr std::uint32_t reply = 1U << 2;
inline constexpr std::uint32_t need_reply = 1U << 3;
} // namespace message_flag

/// Most descriptors of one message, and regions of one table: the specification's.
inline constexpr std::size_t max_descriptors = 8;
/// Most bytes of a payload that are taken. The largest of the specification's, the device's configuration, is below 300.
inline constexpr std::size_t max_payload = 4096;
inline constexpr std::size_t header_size = 12;

/// A region of guest memory as it stands in SET_MEM_TABLE, ADD_MEM_REG and REM_MEM_REG.
struct memory_region {
    std::uint64_t guest_address = 0; ///< guest-physical
    std::uint64_t size = 0;          ///< bytes
    std::uint64_t user_address = 0;  ///< where its sender has it mapped
    std::uint64_t mmap_offset = 0;   ///< of the region in its descriptor's file

    friend bool operator==(const memory_region&, const memory_region&) = default;
};
static_assert(sizeof(memory_region) == 32);

/// One message: what was asked (a reply repeats it), its payload and the descriptors that came with it.
struct message {
    vhost_user::request request{};
    std::uint32_t flags = message_flag::version;
    std::vector<std::byte> payload;
    std::vector<unique_fd> descriptors;

    bool is_reply() const noexcept { return (flags & message_flag::reply) != 0; }
    bool needs_reply() const noexcept { return (flags & message_flag::need_reply) != 0; }

    /// The payload as one value of exactly its size: `std::uint64_t`, or a struct of the wire's layout.
    template <class T>
    result<T> as() const {
        static_assert(std::is_trivially_copyable_v<T>);
        if (payload.size() != sizeof(T)) return wrong_size(std::to_string(sizeof(T)));
        T value;
        std::memcpy(&value, payload.data(), sizeof value);
        return value;
    }
    /// A payload that isn't there is an answer, too: POSTCOPY_ADVISE's is its descriptor alone.
    result<void> no_payload() const {
        if (!payload.empty()) return wrong_size("0");
        return {};
    }
    /// Appends a value to the payload.
    template <class T>
    message& put(const T& value) {
        static_assert(std::is_trivially_copyable_v<T>);
        const auto* first = reinterpret_cast<const std::byte*>(&value);
        payload.insert(payload.end(), first, first + sizeof value);
        return *this;
    }
    error wrong_size(std::string expected) const {
        return error(errc::bad_message, name_of(request) + " with a payload of " + std::move(expected) + " bytes",
            std::to_string(payload.size()));
    }
};

/// A request of this kind without payload.
inline message make_request(request r, std::uint32_t more_flags = 0) {
    message made;
    made.request = r;
    made.flags |= more_flags;
    return made;
}
/// A request, or with `message_flag::reply` an answer, that carries one value.
template <class T>
message make_message(request r, const T& value, std::uint32_t more_flags = 0) {
    message made = make_request(r, more_flags);
    made.put(value);
    return made;
}
/// What answers a request that has no answer of its own, when it says `need_reply`: 0 for success.
inline message make_acknowledgement(request r, bool success) {
    return make_message(r, std::uint64_t{success ? 0U : 1U}, message_flag::reply);
}
/// SET_MEM_TABLE: at most `max_descriptors` regions, of which each has one descriptor (an answer has none).
inline message make_memory_table(
    std::span<const memory_region> regions, std::vector<unique_fd> descriptors, std::uint32_t more_flags = 0) {
    message made = make_message(request::set_mem_table, static_cast<std::uint32_t>(regions.size()), more_flags);
    made.put(std::uint32_t{0});
    for (const memory_region& region : regions)
        made.put(region);
    made.descriptors = std::move(descriptors);
    return made;
}
/// ADD_MEM_REG (with one descriptor; an answer has none) or REM_MEM_REG (without).
inline message make_memory_region(
    request r, const memory_region& region, unique_fd descriptor = {}, std::uint32_t more_flags = 0) {
    message made = make_message(r, std::uint64_t{0}, more_flags);
    made.put(region);
    if (descriptor) made.descriptors.push_back(std::move(descriptor));
    return made;
}

/// The regions of a SET_MEM_TABLE, request or answer: `errc::bad_message` where the payload isn't a table. Whether the
/// regions can be meant is memory_table.hpp's question.
inline result<std::vector<memory_region>> memory_regions_of(const message& m) {
    constexpr std::size_t head = 8; // the number of regions, and padding
    std::uint32_t count = 0;
    if (m.payload.size() < head) return m.wrong_size(std::to_string(head) + " and more");
    std::memcpy(&count, m.payload.data(), sizeof count);
    if (count > max_descriptors)
        return error(errc::bad_message, name_of(m.request) + " of at most " + std::to_string(max_descriptors) + " regions",
            std::to_string(count));
    // Room for regions that aren't used may follow, as in a struct that is sent whole.
    const std::size_t used = head + count * sizeof(memory_region);
    if (m.payload.size() < used || m.payload.size() > head + max_descriptors * sizeof(memory_region))
        return m.wrong_size(std::to_string(used));
    std::vector<memory_region> regions(count);
    if (count != 0) std::memcpy(regions.data(), m.payload.data() + head, count * sizeof(memory_region));
    return regions;
}
/// The region of an ADD_MEM_REG or REM_MEM_REG, request or answer.
inline result<memory_region> memory_region_of(const message& m) {
    struct single {
        std::uint64_t padding;
        memory_region region;
    };
    const result<single> read = m.as<single>();
    if (!read) return read.error();
    return read->region;
}

namespace detail {

using steady = std::chrono::steady_clock;

inline error socket_error(std::string_view what, int number = errno) {
    return error(errc::io, {}, "vhost-user " + std::string(what) + ": " + std::system_category().message(number));
}

/// Bounds a message as a whole; without patience, it waits as long as it takes.
class patience {
public:
    explicit patience(std::chrono::milliseconds most)
        : most_(most), deadline_(steady::now() + most) {}

    /// Until the socket can be read (POLLIN) or written (POLLOUT), or its peer is gone.
    result<void> wait(int socket, short events) const {
        for (;;) {
            int left = -1;
            if (most_.count() > 0)
                left = static_cast<int>(std::clamp<std::int64_t>(
                    std::chrono::ceil<std::chrono::milliseconds>(deadline_ - steady::now()).count(), 0, INT_MAX));
            pollfd poll{socket, events, 0};
            const int ready = ::poll(&poll, 1, left);
            if (ready > 0) return {};
            if (ready < 0 && errno != EINTR) return socket_error("poll");
            if (ready == 0 && steady::now() >= deadline_)
                return error(errc::io, events == POLLIN ? "a message" : "a peer that reads",
                    "nothing for " + std::to_string(most_.count()) + " ms");
        }
    }

private:
    std::chrono::milliseconds most_;
    steady::time_point deadline_;
};

/// The descriptors of one receiving call; each has an owner at once, whatever becomes of the message.
inline result<void> take_descriptors(msghdr& received, std::vector<unique_fd>& into) {
    for (cmsghdr* part = CMSG_FIRSTHDR(&received); part != nullptr; part = CMSG_NXTHDR(&received, part)) {
        if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
        const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (std::size_t i = 0; i < count; ++i) {
            int fd = -1;
            std::memcpy(&fd, CMSG_DATA(part) + i * sizeof fd, sizeof fd);
            into.emplace_back(fd);
        }
    }
    // What didn't fit, the kernel has closed.
    if ((received.msg_flags & MSG_CTRUNC) != 0 || into.size() > max_descriptors)
        return error(errc::bad_message, "at most " + std::to_string(max_descriptors) + " descriptors in one message",
            "more");
    return {};
}

/// Fills `room`; how much arrived before the peer closed the connection.
inline result<std::size_t> receive_bytes(
    int socket, std::span<std::byte> room, std::vector<unique_fd>& descriptors, const patience& wait) {
    std::size_t done = 0;
    while (done < room.size()) {
        alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(max_descriptors * sizeof(int))> control;
        iovec part{room.data() + done, room.size() - done};
        msghdr arrived{};
        arrived.msg_iov = &part;
        arrived.msg_iovlen = 1;
        arrived.msg_control = control.data();
        arrived.msg_controllen = control.size();
        const ssize_t got = ::recvmsg(socket, &arrived, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
        if (got > 0) {
            if (result<void> taken = take_descriptors(arrived, descriptors); !taken) return taken.error();
            done += static_cast<std::size_t>(got);
        } else if (got == 0 || errno == ECONNRESET) {
            return done;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (result<void> ready = wait.wait(socket, POLLIN); !ready) return ready.error();
        } else if (errno != EINTR) {
            return socket_error("recvmsg");
        }
    }
    return done;
}

} // namespace detail

/// Reads one message from a connected unix stream socket; nothing where the peer closed the connection before its first
/// byte. `patience` bounds the wait for all of it (0: as long as it takes). `errc::truncated` where the peer went within
/// it, `errc::bad_message` for another version, a payload above `max_payload` or too many descriptors; after an error
/// the stream is at no message's beginning, and the connection is of no more use.
inline result<std::optional<message>> receive_message(int socket, std::chrono::milliseconds patience = {}) {
    const detail::patience wait(patience);
    message got;
    std::array<std::byte, header_size> head;
    const result<std::size_t> arrived = detail::receive_bytes(socket, head, got.descriptors, wait);
    if (!arrived) return arrived.error();
    if (*arrived == 0) return std::optional<message>();
    if (*arrived < head.size())
        return error(errc::truncated, "a header of " + std::to_string(head.size()) + " bytes", std::to_string(*arrived));
    std::array<std::uint32_t, 3> fields{};
    std::memcpy(fields.data(), head.data(), head.size());
    got.request = static_cast<request>(fields[0]);
    got.flags = fields[1];
    if ((got.flags & message_flag::version_mask) != message_flag::version)
        return error(errc::bad_message, name_of(got.request) + " of version 1",
            std::to_string(got.flags & message_flag::version_mask));
    if (fields[2] > max_payload)
        return error(errc::bad_message,
            name_of(got.request) + " with a payload of at most " + std::to_string(max_payload) + " bytes",
            std::to_string(fields[2]));
    got.payload.resize(fields[2]);
    const result<std::size_t> rest = detail::receive_bytes(socket, got.payload, got.descriptors, wait);
    if (!rest) return rest.error();
    if (*rest < got.payload.size())
        return error(errc::truncated, name_of(got.request) + " with a payload of " + std::to_string(fields[2]) + " bytes",
            std::to_string(*rest));
    return std::optional<message>(std::move(got));
}

/// Sends one message; its descriptors stay the caller's. `patience` as above: a peer that reads nothing has its limit.
inline result<void> send_message(int socket, const message& m, std::chrono::milliseconds patience = {}) {
    if (m.payload.size() > max_payload || m.descriptors.size() > max_descriptors)
        return error(errc::invalid_argument, "a message within the limits of vhost-user", name_of(m.request));
    const std::array<std::uint32_t, 3> fields{
        static_cast<std::uint32_t>(m.request), m.flags, static_cast<std::uint32_t>(m.payload.size())};
    std::array<std::byte, header_size + max_payload> bytes;
    std::memcpy(bytes.data(), fields.data(), header_size);
    if (!m.payload.empty()) std::memcpy(bytes.data() + header_size, m.payload.data(), m.payload.size());

    alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(max_descriptors * sizeof(int))> control{};
    std::size_t control_size = 0;
    if (!m.descriptors.empty()) {
        msghdr shape{};
        shape.msg_control = control.data();
        shape.msg_controllen = control_size = CMSG_SPACE(m.descriptors.size() * sizeof(int));
        cmsghdr* part = CMSG_FIRSTHDR(&shape);
        part->cmsg_level = SOL_SOCKET;
        part->cmsg_type = SCM_RIGHTS;
        part->cmsg_len = CMSG_LEN(m.descriptors.size() * sizeof(int));
        for (std::size_t i = 0; i < m.descriptors.size(); ++i) {
            const int fd = m.descriptors[i].get();
            std::memcpy(CMSG_DATA(part) + i * sizeof fd, &fd, sizeof fd);
        }
    }

    const detail::patience wait(patience);
    const std::size_t size = header_size + m.payload.size();
    for (std::size_t done = 0; done < size;) {
        iovec part{bytes.data() + done, size - done};
        msghdr leaving{};
        leaving.msg_iov = &part;
        leaving.msg_iovlen = 1;
        // The descriptors travel with the first byte.
        if (done == 0 && control_size != 0) {
            leaving.msg_control = control.data();
            leaving.msg_controllen = control_size;
        }
        const ssize_t sent = ::sendmsg(socket, &leaving, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0) {
            done += static_cast<std::size_t>(sent);
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            if (result<void> ready = wait.wait(socket, POLLOUT); !ready) return ready;
        } else if (errno != EINTR) {
            return detail::socket_error("sendmsg");
        }
    }
    return {};
}

} // namespace vmstate::vhost_user
