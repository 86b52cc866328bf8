// SPDX-License-Identifier: BSL-1.0
// What the guest program tests/guests/counter.S promises about its memory and its output, for a test to hold it to
// after its machine was stopped, saved, rewritten or moved. Depends on the standard library, and its source on qemu.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace vmstate::tests {
class qemu;
}

namespace vmstate::tests::counter {

/// Where the program keeps its variables (guest physical): u32 magic, u32 round, u32 ticks.
inline constexpr std::uint64_t variables_at = 0x10000;
inline constexpr std::uint32_t magic = 0x746e6376; // "vcnt"

/// The memory that it rewrites in each round. The dword at address a holds round + a, and in a round that isn't
/// finished those from some address on still hold round - 1 + a.
inline constexpr std::uint64_t working_set_at = 0x20000;
inline constexpr std::size_t working_set_size = 0x40000;

/// A line of its output, `counter 12 ticks 40`.
struct line {
    std::uint32_t round = 0;
    std::uint32_t ticks = 0;
};

/// The complete lines of its output. Throws std::runtime_error at the first line that is something else, which
/// includes the "BAD" that the program prints when its own memory is not what it wrote.
std::vector<line> parse_output(std::string_view output);

/// Lets the program go on in `second`, where it has arrived, for a few lines, and stops it: its output here and there.
std::vector<line> output_of_two(const std::string& before, qemu& second);

/// What is wrong with the order of lines, of which those from a second machine follow those from a first: empty when each
/// round is the one before plus one, and the ticks go on.
std::string check_order(const std::vector<line>& lines);

/// What is wrong with the program's memory, of which the machine was stopped: empty when nothing is.
/// `memory` is guest physical memory from address 0 to at least the end of the working set.
std::string check_memory(std::span<const std::byte> memory);

/// The same, and the round in which it was.
std::string check_memory(std::span<const std::byte> memory, std::uint32_t& round);

} // namespace vmstate::tests::counter

namespace vmstate::tests {

/// For qemu::wait_serial: whether a text has that many lines.
inline auto lines(std::ptrdiff_t count) {
    return [count](std::string_view text) { return std::count(text.begin(), text.end(), '\n') >= count; };
}

} // namespace vmstate::tests
