// SPDX-License-Identifier: BSL-1.0
//
// The messages that a destination sends back (WIRE: be16 type, be16 length, payload; QEMU: migration/migration.c,
// rp_cmd_args). Depends on codec/ and support/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <string_view>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/codec/reader.hpp>
#include <vmstate/stream/channel.hpp>

namespace vmstate::migration {

enum class return_message : std::uint16_t {
    shut = 1,           ///< be32: 0 when everything was loaded. The last one
    pong = 2,           ///< be32: the value of the PING
    req_pages_id = 3,   ///< be64 start, be32 length, counted block name
    req_pages = 4,      ///< be64 start, be32 length, of the block of the request before
    recv_bitmap = 5,    ///< counted block name; the bitmap follows outside of the length
    resume_ack = 6,     ///< be32: 1
    switchover_ack = 7, ///< empty
};

/// The value of a PING by which a source of ours asks which RAM blocks are zero at the destination: pages that are zero
/// in both need not be sent. Any destination gives it back in a PONG, and that is all a QEMU does. One of ours sends
/// before that a PONG of its own for each such block: `pong_block_is_zero` with the block's number in the stream's list.
inline constexpr std::uint32_t ping_which_blocks_are_zero = 0x766d7a3f; // "vmz?"
inline constexpr std::uint32_t pong_block_is_zero = 0x76300000;         // "v0"
inline constexpr std::uint32_t pong_block_number = 0xffff;

/// The value of the PING by which a source of ours that may go on in postcopy asks whether the setup was taken. Any
/// destination gives it back. One of ours, before that, sends a PONG of its own: its package may come without POSTCOPY_RUN,
/// which it then waits for. So the source sends that only when it has heard that the devices are loaded, and until then its
/// own guest can go on; a QEMU gets RUN in the package, and whether it was run there may remain unknown.
inline constexpr std::uint32_t ping_setup = 0x766d7321;         // "vms!"
inline constexpr std::uint32_t pong_waits_for_run = 0x766d7721; // "vmw!"

/// The value of the PING by which a source of ours says that it reads requests for pages from the preempt channel, too.
/// Any destination gives it back. One of ours, before that, sends a PONG of its own: it may ask there, on every connection.
inline constexpr std::uint32_t ping_preempt_requests = 0x766d753f; // "vmu?"
inline constexpr std::uint32_t pong_preempt_requests = 0x766d7521; // "vmu!"

/// What QEMU accepts as the longest payload.
inline constexpr std::size_t max_return_payload = 512;

/// Sends messages; any thread may.
class return_path_sender {
public:
    /// `way_back` has to outlive this.
    explicit return_path_sender(output_channel& way_back) : channel_(way_back) {}

    result<void> send(return_message type, std::span<const std::byte> payload) { return send(type, payload, {}); }
    /// `behind` follows the message, outside of its length, and nothing comes between.
    result<void> send(return_message type, std::span<const std::byte> payload, std::span<const std::byte> behind) {
        std::array<std::byte, 4 + max_return_payload> message;
        if (payload.size() > max_return_payload)
            return error(errc::invalid_argument, "a message of at most 512 bytes", std::to_string(payload.size()));
        std::byte* p = vmstate::detail::store_big(message.data(), static_cast<std::uint16_t>(type));
        p = vmstate::detail::store_big(p, static_cast<std::uint16_t>(payload.size()));
        for (const std::byte b : payload) *p++ = b;
        const std::array<std::span<const std::byte>, 2> parts{std::span<const std::byte>(message.data(), p), behind};
        const std::lock_guard lock(channel_mutex_);
        return channel_.writev(std::span(parts).first(behind.empty() ? 1 : 2));
    }
    result<void> send(return_message type) { return send(type, std::span<const std::byte>()); }
    result<void> send(return_message type, std::uint32_t value) {
        std::array<std::byte, 4> payload;
        vmstate::detail::store_big(payload.data(), value);
        return send(type, payload);
    }

private:
    std::mutex channel_mutex_;
    output_channel& channel_;
};

/// A destination's way back, through one connection and, in postcopy, the ones after it. Any thread sends; all messages
/// go through one mutex. Requests for pages may go over the preempt channel instead.
class return_path {
public:
    /// Opens that of `channel`, in place of an earlier one.
    result<void> open(input_channel& channel) {
        result<std::unique_ptr<duplex_channel>> back = channel.get_return_path();
        if (!back) return back.error();
        const std::lock_guard lock(sender_mutex_);
        sender_.reset();
        way_back_ = std::move(*back);
        sender_ = std::make_unique<return_path_sender>(*way_back_);
        return {};
    }
    bool is_open() const {
        const std::lock_guard lock(sender_mutex_);
        return sender_ != nullptr;
    }
    /// Waits for a message that is being sent: where the peer takes nothing, shut the channel down first.
    void close() {
        const std::lock_guard lock(sender_mutex_);
        sender_.reset();
        way_back_.reset();
    }
    /// What `return_path_sender::send` takes. `errc::io` where there is no way back.
    template <class... Content>
    result<void> send(return_message type, const Content&... content) {
        const std::lock_guard lock(sender_mutex_);
        if (sender_ == nullptr) return error(errc::io, {}, "no return path");
        return sender_->send(type, content...);
    }

private:
    mutable std::mutex sender_mutex_; ///< both below
    std::unique_ptr<duplex_channel> way_back_;
    std::unique_ptr<return_path_sender> sender_;
};

/// A message that has arrived.
struct received_message {
    return_message type{};
    std::size_t size = 0;
    std::array<std::byte, max_return_payload> payload;

    std::uint32_t value() const { return vmstate::detail::load_big<std::uint32_t>(payload.data()); }
};

/// Reads the next message. `errc::bad_command` for one that QEMU doesn't know, or of another length than it has.
inline result<void> read_return_message(reader& in, received_message& message) {
    const std::uint64_t position = in.offset();
    const std::uint16_t type = in.get_be16();
    const std::uint16_t length = in.get_be16();
    if (in.failed()) return error(in.failure()).within("return path");
    const auto refuse = [&](std::string expected, std::string found) {
        return error(errc::bad_command, std::move(expected), std::move(found)).within("return path").at_offset(position);
    };
    bool fits = false;
    switch (static_cast<return_message>(type)) {
    case return_message::shut:
    case return_message::pong:
    case return_message::resume_ack: fits = length == 4; break;
    case return_message::req_pages: fits = length == 12; break;
    // A name of one byte at least.
    case return_message::req_pages_id: fits = length >= 14 && length <= 12 + 1 + 255; break;
    case return_message::recv_bitmap: fits = length >= 2 && length <= 1 + 255; break;
    case return_message::switchover_ack: fits = length == 0; break;
    default: return refuse("a message from 1 to 7", std::to_string(type));
    }
    if (!fits) return refuse("another length for message " + std::to_string(type), std::to_string(length));
    message.type = static_cast<return_message>(type);
    message.size = length;
    if (!in.read(message.payload.data(), length)) return error(in.failure()).within("return path");
    return {};
}

} // namespace vmstate::migration
