// SPDX-License-Identifier: BSL-1.0
//
// The numbers of the container: what a stream begins with, what kinds of items it has, which commands there are. From
// QEMU's migration/qemu-file-types.h, savevm.h and savevm.c. Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string_view>

namespace vmstate {

inline constexpr std::uint32_t stream_magic = 0x5145564d; ///< "QEVM"
inline constexpr std::uint32_t stream_version = 3;
inline constexpr std::uint32_t obsolete_stream_version = 2;

/// The byte that an item of the stream begins with.
enum class section_type : std::uint8_t {
    eof = 0x00,
    start = 0x01,
    part = 0x02,
    end = 0x03,
    full = 0x04,
    subsection = 0x05,
    vmdescription = 0x06,
    configuration = 0x07,
    command = 0x08,
    footer = 0x7e,
};

/// Commands to the destination.
enum class command : std::uint16_t {
    open_return_path = 1,
    ping = 2,
    postcopy_advise = 3,
    postcopy_listen = 4,
    postcopy_run = 5,
    postcopy_ram_discard = 6,
    packaged = 7,
    enable_colo = 8,
    postcopy_resume = 9,
    recv_bitmap = 10,
    switchover_start = 11, ///< from QEMU 10.0 on
};

struct command_format {
    std::string_view name;               ///< empty for a number that is no command
    std::optional<std::uint16_t> length; ///< of the payload, where it is fixed
};

constexpr command_format format_of(command number) noexcept {
    switch (number) {
    case command::open_return_path:
        return {"OPEN_RETURN_PATH", std::uint16_t{0}};
    case command::ping:
        return {"PING", std::uint16_t{4}};
    case command::postcopy_advise:
        return {"POSTCOPY_ADVISE", std::nullopt};
    case command::postcopy_listen:
        return {"POSTCOPY_LISTEN", std::uint16_t{0}};
    case command::postcopy_run:
        return {"POSTCOPY_RUN", std::uint16_t{0}};
    case command::postcopy_ram_discard:
        return {"POSTCOPY_RAM_DISCARD", std::nullopt};
    case command::packaged:
        return {"PACKAGED", std::uint16_t{4}};
    case command::enable_colo:
        return {"ENABLE_COLO", std::uint16_t{0}};
    case command::postcopy_resume:
        return {"POSTCOPY_RESUME", std::uint16_t{0}};
    case command::recv_bitmap:
        return {"RECV_BITMAP", std::nullopt};
    case command::switchover_start:
        return {"SWITCHOVER_START", std::uint16_t{0}};
    }
    return {};
}

/// The longest name that the stream can carry: of a section, of a RAM block, of a capability.
inline constexpr std::size_t max_name_size = 255;

/// VMSTATE_INSTANCE_ID_ANY: the next number that is free for this id. Never on the wire.
inline constexpr std::uint32_t instance_id_any = std::numeric_limits<std::uint32_t>::max();

} // namespace vmstate
