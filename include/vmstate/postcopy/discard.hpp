// SPDX-License-Identifier: BSL-1.0
//
// Which pages a destination has to throw away before postcopy, since they come again or for the first time, and how
// POSTCOPY_RAM_DISCARD says so. Depends on ram/page_bitmap.hpp, machine/ and codec/.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// A part of a block, in bytes.
struct ram_range {
    std::uint64_t start = 0;
    std::uint64_t length = 0;

    friend bool operator==(const ram_range&, const ram_range&) = default;
};

/// How many pairs QEMU puts into a command (MAX_DISCARDS_PER_COMMAND); it reads any number.
inline constexpr std::size_t max_discards_per_command = 12;

// ---- source

/// The ranges of `dirty`, a bit per target page of `block`, rounded out to the pages that back it; ascending, apart from
/// each other. `page_size` is the target's.
inline std::vector<ram_range> discard_ranges(const page_bitmap& dirty, const ram_block& block, std::size_t page_size) {
    const std::uint64_t unit = std::max<std::uint64_t>(block.options.host_page_size, page_size);
    std::vector<ram_range> ranges;
    for (page_run run = dirty.find_next_run(0); run.count != 0; run = dirty.find_next_run(run.first + run.count)) {
        const std::uint64_t start = run.first * std::uint64_t{page_size} / unit * unit;
        const std::uint64_t end = ((run.first + run.count) * std::uint64_t{page_size} + unit - 1) / unit * unit;
        if (!ranges.empty() && start <= ranges.back().start + ranges.back().length)
            ranges.back().length = end - ranges.back().start;
        else
            ranges.push_back({start, end - start});
    }
    return ranges;
}

/// Makes whole host pages dirty: in postcopy all target pages of one go together. How many bits became set.
inline std::uint64_t widen_to_host_pages(page_bitmap& dirty, const ram_block& block, std::size_t page_size) {
    if (block.options.host_page_size <= page_size) return 0;
    std::uint64_t added = 0;
    for (const ram_range& range : discard_ranges(dirty, block, page_size)) {
        const std::size_t first = static_cast<std::size_t>(range.start / page_size);
        const std::size_t end = std::min(dirty.size(), static_cast<std::size_t>((range.start + range.length) / page_size));
        added += dirty.set_range(first, end - first);
    }
    return added;
}

/// Calls `emit(payload)`, which returns `result<void>`, with the payload of each command that the ranges take. The
/// payload is valid during the call.
template <class Emit>
result<void> encode_discards(std::string_view block, std::span<const ram_range> ranges, Emit emit) {
    std::array<std::byte, 3 + max_name_size + 16 * max_discards_per_command> payload;
    while (!ranges.empty()) {
        const std::span<const ram_range> now = ranges.first(std::min(ranges.size(), max_discards_per_command));
        ranges = ranges.subspan(now.size());
        memory_writer out(payload);
        out.put_u8(0); // the payload's version
        out.put_counted_string(block);
        out.put_u8(0);
        for (const ram_range& range : now) {
            out.put_be64(range.start);
            out.put_be64(range.length);
        }
        if (out.failed()) return out.failure();
        if (result<void> emitted = emit(std::span<const std::byte>(out.written())); !emitted) return emitted;
    }
    return {};
}

// ---- destination

/// A command as it was read: a block of this machine, ranges inside it, whole host pages each.
struct discard_command {
    ram_block* block = nullptr;
    std::vector<ram_range> ranges;
};

/// Reads a payload. `errc::bad_command` for one that is malformed, `errc::bad_ram` for one that doesn't fit the blocks;
/// offsets count from `offset`, the payload's place in the stream.
inline result<discard_command> decode_discard(
    std::span<const std::byte> payload, const ram_section& ram, std::uint64_t offset = 0) {
    memory_reader in(payload, offset);
    const auto refuse = [](errc code, std::string expected, std::string found, std::uint64_t where) {
        return std::move(error(code, std::move(expected), std::move(found)).at_offset(where));
    };
    const std::uint8_t version = in.get_u8();
    if (!in.failed() && version != 0) return refuse(errc::bad_command, "payload version 0", std::to_string(version), offset);
    const std::string name = in.get_counted_string();
    const std::uint8_t nul = in.get_u8();
    if (in.failed()) return in.failure();
    if (nul != 0)
        return refuse(errc::bad_command, "a zero byte behind the name", std::to_string(nul), in.offset() - 1);
    if (in.remaining() == 0 || in.remaining() % 16 != 0)
        return refuse(errc::bad_command, "pairs of start and length", std::to_string(in.remaining()) + " bytes", in.offset());
    discard_command command;
    command.block = ram.find(name);
    if (command.block == nullptr) return refuse(errc::bad_ram, "a block of this machine", '"' + name + '"', offset + 1);
    const std::uint64_t unit = command.block->options.host_page_size;
    const std::uint64_t used = command.block->used_length;
    command.ranges.reserve(static_cast<std::size_t>(in.remaining() / 16));
    while (in.remaining() != 0) {
        const std::uint64_t where = in.offset();
        ram_range range;
        range.start = in.get_be64();
        range.length = in.get_be64();
        const auto wrong = [&](std::string expected) {
            return std::move(refuse(errc::bad_ram, std::move(expected),
                std::to_string(range.start) + "+" + std::to_string(range.length), where)
                                 .within(name));
        };
        if (range.length == 0) return wrong("a range that isn't empty");
        if (range.start % unit != 0 || range.length % unit != 0)
            return wrong("whole pages of " + std::to_string(unit) + " bytes");
        if (range.start > used || range.length > used - range.start)
            return wrong("a range within " + std::to_string(used) + " bytes");
        command.ranges.push_back(range);
    }
    return command;
}

} // namespace vmstate
