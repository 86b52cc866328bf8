// SPDX-License-Identifier: BSL-1.0
//
// Which of the channels that have arrived is which, in whatever order: each says so in its first four bytes. Depends on
// ram/multifd_packet.hpp, machine/wire.hpp and stream/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/stream/channel.hpp>
#include <vmstate/stream/prefixed_channel.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate::migration {

struct incoming_channels {
    std::shared_ptr<input_channel> main;                 ///< its first bytes are still to be read from it
    std::vector<std::shared_ptr<input_channel>> multifd; ///< by their ids; the initial packets have been read
};

/// One main channel and multifd channels with the ids from 0 on, or an error that says which is wrong. A machine without
/// a uuid takes a source with any.
inline result<incoming_channels> tell_apart(const std::vector<std::shared_ptr<input_channel>>& channels,
    const std::optional<std::array<std::uint8_t, 16>>& uuid) {
    incoming_channels found;
    found.multifd.resize(channels.empty() ? 0 : channels.size() - 1);
    for (const std::shared_ptr<input_channel>& channel : channels) {
        std::array<std::byte, multifd_initial_packet::size> first;
        const std::span<std::byte> magic = std::span(first).first(4);
        if (result<void> read = read_exactly(*channel, magic); !read) return std::move(read.error()).within("channel's first bytes");
        const auto number = vmstate::detail::load_big<std::uint32_t>(magic.data());
        if (number == stream_magic) {
            if (found.main) return error(errc::not_a_stream, "one main channel", "a second one");
            found.main = std::make_shared<prefixed_input_channel>(magic, channel);
            continue;
        }
        if (number != multifd_magic)
            return error(errc::not_a_stream, "a main channel (\"QEVM\") or a multifd channel", std::to_string(number));
        if (result<void> read = read_exactly(*channel, std::span(first).subspan(4)); !read)
            return std::move(read.error()).within("multifd channel's first packet");
        const result<multifd_initial_packet> packet = multifd_initial_packet::decode(first);
        if (!packet) return packet.error();
        const std::string name = "multifd channel " + std::to_string(packet->id);
        if (uuid && packet->uuid != *uuid)
            return error(errc::bad_configuration, "this machine's uuid", "another one").within(name);
        if (packet->id >= found.multifd.size())
            return error(errc::not_a_stream, "multifd channels 0 to " + std::to_string(found.multifd.size() - 1),
                std::to_string(packet->id));
        if (found.multifd[packet->id]) return error(errc::not_a_stream, "each multifd channel once", "a second one").within(name);
        found.multifd[packet->id] = channel;
    }
    // As many as there are: without the main channel there is one multifd channel too many, and that has been refused.
    return found;
}

} // namespace vmstate::migration
