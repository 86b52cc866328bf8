// SPDX-License-Identifier: BSL-1.0
// A migration with a return path over a channel that fails after n bytes, for n over all of it, in both directions and at
// both ends: the source's guest runs on with its memory as it was, the destination's starts only after all has come, and
// nothing is left behind.
#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>

#include "breakable_channel.hpp"
#include "footprint.hpp"
#include "small_machine.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

constexpr std::size_t pages = 64;
constexpr std::size_t places = 500;

/// What each end's channel carries before it fails.
struct breaks {
    std::size_t source_writes = carried_bytes::all;
    std::size_t source_reads = carried_bytes::all;
    std::size_t destination_writes = carried_bytes::all;
    std::size_t destination_reads = carried_bytes::all;
};

struct ends {
    result<void> left;
    result<void> arrived;
    std::string last_state; // of the source, before the final one
    std::size_t transferred = 0;
};

ends migrate(small_machine& from, small_machine& to, const breaks& after) {
    channel_pair channels = make_pair();
    const auto carry = [](std::unique_ptr<duplex_channel> channel, std::size_t writes, std::size_t reads) {
        auto left = std::make_shared<carried_bytes>();
        left->written = writes;
        left->read = reads;
        return std::make_unique<breakable_channel>(std::move(channel), std::move(left));
    };
    std::unique_ptr<input_channel> in = carry(std::move(channels.other), after.destination_writes, after.destination_reads);
    std::unique_ptr<output_channel> out = carry(std::move(channels.one), after.source_writes, after.source_reads);

    ends both{error(errc::io), error(errc::io), {}, 0};
    migration::destination destination(to.state, to.control, {.peer_timeout = 30s});
    std::thread receiving([&] { both.arrived = destination.run(std::move(in)); });
    migration::source source(from.state, from.control, {.downtime_limit = 1000ms, .peer_timeout = 30s});
    std::mutex state_mutex; // both.last_state
    source.observe([&](const migration::status& at) {
        const std::lock_guard lock(state_mutex);
        if (!is_final(at.state)) both.last_state = to_string(at.state);
    });
    const result<void> started = source.start(std::move(out));
    both.left = started ? source.wait() : started;
    receiving.join();
    to.stop();
    both.transferred = static_cast<std::size_t>(source.status().ram.transferred);
    return both;
}

/// Two machines, and what has to hold after each migration between them.
struct two_machines {
    two_machines() {
        fill(from);
        before = from.memory();
        from.start();
    }
    bool is_intact(const small_machine& machine) const {
        return std::memcmp(before.data() + before.size() / 8, machine.memory().data() + before.size() / 8, before.size() * 7 / 8) == 0;
    }
    /// For both ends the same, wherever it broke.
    ends check(const breaks& after) {
        // Not zero, of which it would have more to say: how long the way back is should not depend on the kernel.
        std::memset(to.memory().data(), 1, to.memory().size());
        const int there = to.starts;
        const ends both = migrate(from, to, after);
        INFO((both.left ? std::string("left") : both.left.error().message()));
        INFO((both.arrived ? std::string("arrived") : both.arrived.error().message()));
        // Where it left, it has arrived. Where it arrived, the source may not have heard of it.
        if (both.left) REQUIRE(both.arrived);
        REQUIRE(to.starts - there == (both.arrived ? 1 : 0));
        if (both.arrived) REQUIRE(is_intact(to));
        REQUIRE(from.runs() == both.left.has_error());
        REQUIRE(is_intact(from));
        if (both.left.has_error()) {
            const std::string path(both.left.error().path());
            if (path == "return path") REQUIRE(both.last_state == "device");
            else REQUIRE(path.substr(0, path.find('/')) == both.last_state);
        }
        if (both.arrived.has_error()) {
            const std::string path(both.arrived.error().path());
            REQUIRE((path.starts_with("active") || path == "return path"));
        }
        from.start();
        return both;
    }

    small_machine from{pages};
    small_machine to{pages};
    std::vector<std::byte> before;
};

/// How many bytes go forward.
std::size_t length_of(two_machines& machines) {
    const ends both = machines.check({});
    REQUIRE(both.left);
    REQUIRE(both.transferred > 1000);
    return both.transferred;
}

/// Two PONGs and SHUT.
constexpr std::size_t way_back_length = 24;

} // namespace

TEST_CASE("wherever the source's way there breaks, its guest runs on") {
    two_machines machines;
    const std::size_t whole = length_of(machines);
    const leak_check leaks;
    std::size_t broken = 0;
    for (std::size_t i = 0; i != places; ++i) {
        const std::size_t n = whole * i / places;
        CAPTURE(n, whole);
        const ends both = machines.check({.source_writes = n});
        // The guest has its own mind: sometimes it writes less.
        if (both.left) {
            REQUIRE(both.transferred <= n);
            continue;
        }
        ++broken;
        REQUIRE(both.arrived.has_error());
    }
    CHECK(broken > places * 4 / 5);
    leaks.check(places);
}

TEST_CASE("wherever the source's way back breaks, its guest runs on") {
    two_machines machines;
    length_of(machines);
    const leak_check leaks;
    for (std::size_t n = 0; n != way_back_length; ++n) {
        CAPTURE(n);
        const ends both = machines.check({.source_reads = n});
        REQUIRE(both.left.has_error());
        CHECK(both.left.error().path().ends_with("return path"));
    }
    CHECK(machines.check({.source_reads = way_back_length}).left);
    leaks.check(way_back_length);
}

TEST_CASE("wherever the destination's input breaks, its guest isn't started and the source's runs on") {
    two_machines machines;
    const std::size_t whole = length_of(machines);
    const leak_check leaks;
    std::size_t broken = 0;
    for (std::size_t i = 0; i != places; ++i) {
        const std::size_t n = whole * i / places;
        CAPTURE(n, whole);
        const ends both = machines.check({.destination_reads = n});
        if (both.left) {
            REQUIRE(both.transferred <= n);
            continue;
        }
        ++broken;
        REQUIRE(both.arrived.has_error());
        CHECK(both.arrived.error().path().starts_with("active"));
        CHECK_THAT(both.arrived.error().message(), contains("broken"));
    }
    CHECK(broken > places * 4 / 5);
    leaks.check(places);
}

TEST_CASE("wherever the destination's way back breaks, its guest isn't started and the source's runs on") {
    two_machines machines;
    length_of(machines);
    const leak_check leaks;
    for (std::size_t n = 0; n != way_back_length; ++n) {
        CAPTURE(n);
        const ends both = machines.check({.destination_writes = n});
        REQUIRE(both.left.has_error());
        REQUIRE(both.arrived.has_error());
        CHECK_THAT(both.arrived.error().message(), contains("broken"));
        CHECK(both.arrived.error().path() == (n < 16 ? "active/PING" : "return path"));
    }
    CHECK(machines.check({.destination_writes = way_back_length}).arrived);
    leaks.check(way_back_length);
}
