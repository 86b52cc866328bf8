// SPDX-License-Identifier: BSL-1.0
//
// What a multifd channel carries: one initial packet, then packets of pages (QEMU: migration/multifd.c, MultiFDInit_t and
// MultiFDPacket_t). Nothing that a packet says is trusted. Depends on codec/byte_order.hpp and support/.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

inline constexpr std::uint32_t multifd_magic = 0x11223344;
inline constexpr std::uint32_t multifd_version = 1;

/// The most guest memory in one packet (QEMU: MULTIFD_PACKET_SIZE), and so many pages it is.
inline constexpr std::size_t multifd_packet_memory = 512 * 1024;
constexpr std::size_t multifd_pages_per_packet(std::size_t page_size) noexcept {
    return multifd_packet_memory / page_size;
}

namespace multifd_flag {
inline constexpr std::uint32_t sync = 0x01;         ///< the main channel has a sync point that belongs to it
inline constexpr std::uint32_t compression = 0x3e;  ///< mask: how the pages are compressed, see `multifd_method`
inline constexpr std::uint32_t device_state = 0x40; ///< a device's state in place of pages, of VFIO (QEMU 10.0)
} // namespace multifd_flag

/// How pages are compressed, as the flags say it.
namespace multifd_method {
inline constexpr std::uint32_t none = 0 << 1;
inline constexpr std::uint32_t zlib = 1 << 1;
inline constexpr std::uint32_t zstd = 2 << 1;
inline constexpr std::uint32_t qpl = 4 << 1;
inline constexpr std::uint32_t uadk = 8 << 1;
inline constexpr std::uint32_t qatzip = 16 << 1;
} // namespace multifd_method

constexpr std::string_view multifd_method_name(std::uint32_t flags) noexcept {
    switch (flags & multifd_flag::compression) {
    case multifd_method::none: return "none";
    case multifd_method::zlib: return "zlib";
    case multifd_method::zstd: return "zstd";
    case multifd_method::qpl: return "qpl";
    case multifd_method::uadk: return "uadk";
    case multifd_method::qatzip: return "qatzip";
    default: return "an unknown method";
    }
}

/// The first packet of a channel: to which migration it belongs, and which of its channels it is.
struct multifd_initial_packet {
    static constexpr std::size_t size = 64;

    std::array<std::uint8_t, 16> uuid{}; ///< the machine's, zeros where it has none
    std::uint8_t id = 0;

    std::array<std::byte, size> encode() const noexcept {
        std::array<std::byte, size> bytes{};
        std::byte* p = detail::store_big(bytes.data(), multifd_magic);
        p = detail::store_big(p, multifd_version);
        std::memcpy(p, uuid.data(), uuid.size());
        p[uuid.size()] = static_cast<std::byte>(id);
        return bytes;
    }
    static result<multifd_initial_packet> decode(std::span<const std::byte, size> bytes) {
        const auto magic = detail::load_big<std::uint32_t>(bytes.data());
        if (magic != multifd_magic) return error(errc::not_a_stream, "a multifd channel's first packet", std::to_string(magic));
        const auto version = detail::load_big<std::uint32_t>(bytes.data() + 4);
        if (version != multifd_version) return error(errc::not_a_stream, "multifd version 1", std::to_string(version));
        multifd_initial_packet packet;
        std::memcpy(packet.uuid.data(), bytes.data() + 8, packet.uuid.size());
        packet.id = std::to_integer<std::uint8_t>(bytes[24]);
        return packet;
    }
};

/// What stands before a packet's pages.
struct multifd_packet_header {
    static constexpr std::size_t fixed_size = 320;
    /// What has to be there before anything else of a packet may be waited for: another kind of packet is shorter.
    static constexpr std::size_t kind_size = 12;

    std::uint32_t flags = 0;
    std::uint32_t next_packet_size = 0; ///< bytes of page data behind this
    std::uint64_t packet_num = 0;
    std::string_view block{};                ///< points into what was decoded
    std::span<const std::uint64_t> normal{}; ///< offsets in the block, of the pages with data
    std::span<const std::uint64_t> zero{};   ///< of pages that are zero, without data (QEMU 9.0)

    bool is_sync() const noexcept { return (flags & multifd_flag::sync) != 0; }

    /// On the wire. The room for offsets is always there in full.
    static constexpr std::size_t wire_size(std::size_t page_size) noexcept {
        return fixed_size + 8 * multifd_pages_per_packet(page_size);
    }
    /// `bytes` has `wire_size` bytes, `block` at most 255.
    void encode(std::span<std::byte> bytes, std::size_t page_size) const noexcept {
        std::byte* p = detail::store_big(bytes.data(), multifd_magic);
        p = detail::store_big(p, multifd_version);
        p = detail::store_big(p, flags);
        p = detail::store_big(p, static_cast<std::uint32_t>(multifd_pages_per_packet(page_size)));
        p = detail::store_big(p, static_cast<std::uint32_t>(normal.size()));
        p = detail::store_big(p, next_packet_size);
        p = detail::store_big(p, packet_num);
        p = detail::store_big(p, static_cast<std::uint32_t>(zero.size()));
        std::memset(p, 0, static_cast<std::size_t>(bytes.data() + bytes.size() - p));
        if (!block.empty()) std::memcpy(bytes.data() + name_at, block.data(), block.size());
        p = bytes.data() + fixed_size;
        for (const std::uint64_t offset : normal) p = detail::store_big(p, offset);
        for (const std::uint64_t offset : zero) p = detail::store_big(p, offset);
    }

    /// Looks at the first `kind_size` bytes: whether a packet of pages begins there.
    static result<void> check_kind(std::span<const std::byte> bytes) {
        const auto magic = detail::load_big<std::uint32_t>(bytes.data());
        if (magic != multifd_magic) return error(errc::bad_ram, "a packet's magic number", std::to_string(magic));
        const auto version = detail::load_big<std::uint32_t>(bytes.data() + 4);
        if (version != multifd_version) return error(errc::bad_ram, "multifd version 1", std::to_string(version));
        const auto flags = detail::load_big<std::uint32_t>(bytes.data() + 8);
        if ((flags & multifd_flag::device_state) != 0) return error(errc::unsupported, {}, "DEVICE_STATE packet");
        if ((flags & ~(multifd_flag::sync | multifd_flag::compression)) != 0)
            return error(errc::bad_ram, "flags of a packet of pages", std::to_string(flags));
        return {};
    }
    /// `bytes` has `wire_size` bytes and has passed `check_kind`. Checks numbers and name; whether the block exists, and
    /// where in it the pages lie, is `check_offsets`' business. `offsets` keeps what `normal` and `zero` refer to.
    static result<multifd_packet_header> decode(
        std::span<const std::byte> bytes, std::size_t page_size, std::vector<std::uint64_t>& offsets) {
        const std::size_t most = multifd_pages_per_packet(page_size);
        multifd_packet_header header;
        header.flags = detail::load_big<std::uint32_t>(bytes.data() + 8);
        const auto allocated = detail::load_big<std::uint32_t>(bytes.data() + 12);
        const auto normal_count = detail::load_big<std::uint32_t>(bytes.data() + 16);
        header.next_packet_size = detail::load_big<std::uint32_t>(bytes.data() + 20);
        header.packet_num = detail::load_big<std::uint64_t>(bytes.data() + 24);
        const auto zero_count = detail::load_big<std::uint32_t>(bytes.data() + 32);
        // With more, its header is longer than ours.
        if (allocated > most)
            return error(errc::bad_ram, "room for at most " + std::to_string(most) + " pages", std::to_string(allocated));
        if (normal_count > allocated || zero_count > allocated - normal_count)
            return error(errc::bad_ram, "at most " + std::to_string(allocated) + " pages",
                std::to_string(normal_count) + " and " + std::to_string(zero_count) + " zero pages");
        // What a packet without pages says of a size is left over from the one before.
        if (normal_count == 0) header.next_packet_size = 0;
        if (normal_count + zero_count == 0) return header;

        const char* const name = reinterpret_cast<const char*>(bytes.data() + name_at);
        const void* const end = std::memchr(name, 0, fixed_size - name_at);
        if (end == nullptr) return error(errc::bad_ram, "a block's name that ends", "256 bytes without an end");
        header.block = {name, static_cast<std::size_t>(static_cast<const char*>(end) - name)};
        offsets.resize(normal_count + zero_count);
        for (std::size_t i = 0; i != offsets.size(); ++i)
            offsets[i] = detail::load_big<std::uint64_t>(bytes.data() + fixed_size + 8 * i);
        header.normal = std::span<const std::uint64_t>(offsets).first(normal_count);
        header.zero = std::span<const std::uint64_t>(offsets).subspan(normal_count);
        return header;
    }
    /// Every page has to be a page of a block with so many bytes in use.
    result<void> check_offsets(std::uint64_t used_length, std::size_t page_size) const {
        for (const std::span<const std::uint64_t> pages : {normal, zero})
            for (const std::uint64_t offset : pages)
                if (used_length < page_size || offset > used_length - page_size || offset % page_size != 0)
                    return error(errc::bad_ram, "a page within " + std::to_string(used_length) + " bytes",
                        "offset " + std::to_string(offset));
        return {};
    }

private:
    static constexpr std::size_t name_at = 64;
};

} // namespace vmstate
