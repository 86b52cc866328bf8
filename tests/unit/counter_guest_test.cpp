// SPDX-License-Identifier: BSL-1.0
// The judge of the counter guest's memory and output is itself judged, on memory made by hand.
#include "support/catch.hpp"
#include "support/counter.hpp"

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace counter = vmstate::tests::counter;
using vmstate::tests::contains;

namespace {

void put(std::vector<std::byte>& memory, std::uint64_t at, std::uint32_t value) {
    for (unsigned i = 0; i < 4; ++i)
        memory[at + i] = static_cast<std::byte>(value >> (8 * i));
}

/// In `round`, which has come as far as the address `reached`.
std::vector<std::byte> memory_in(std::uint32_t round, std::uint64_t reached) {
    std::vector<std::byte> memory(counter::working_set_at + counter::working_set_size);
    put(memory, counter::variables_at, counter::magic);
    put(memory, counter::variables_at + 4, round);
    for (auto at = counter::working_set_at; at < memory.size(); at += 4)
        put(memory, at, static_cast<std::uint32_t>(at) + (at < reached ? round : round - 1));
    return memory;
}

} // namespace

TEST_CASE("memory in the middle of a round is right") {
    std::uint32_t round = 0;
    CHECK(counter::check_memory(memory_in(7, 0x23458), round).empty());
    CHECK(round == 7);
    CHECK(counter::check_memory(memory_in(7, 0)).empty());
    CHECK(counter::check_memory(memory_in(0xffffffff, 0x60000)).empty());
}

TEST_CASE("one wrong dword is noticed, and its address is named") {
    auto memory = memory_in(7, 0x23458);
    put(memory, 0x23000, 0x23000 + 6); // not rewritten, although the round was past it
    CHECK_THAT(counter::check_memory(memory), contains("address 2300"));
    memory = memory_in(7, 0x23458);
    memory[0x5ffff] ^= std::byte{1};
    CHECK_THAT(counter::check_memory(memory), contains("address 5fffc"));
    memory = memory_in(7, 0);
    put(memory, counter::variables_at, 0);
    CHECK_THAT(counter::check_memory(memory), contains("magic"));
}

TEST_CASE("output is read line by line, and what isn't a line of the program is refused") {
    const auto lines = counter::parse_output("counter 1 ticks 0\ncounter 2 ticks 5\ncounter 3 ti");
    REQUIRE(lines.size() == 2);
    CHECK(lines[1].round == 2);
    CHECK(lines[1].ticks == 5);
    CHECK_THROWS_AS(counter::parse_output("counter 1 ticks 0\nBAD 131072\n"), std::runtime_error);
    CHECK_THROWS_AS(counter::parse_output("counter 1ticks 0\n"), std::runtime_error);
}
