// SPDX-License-Identifier: BSL-1.0
// One end of a migration is a process that is killed, or stopped, at each stage: the other end notices within its
// peer_timeout and says at which stage it was; the guest runs on at the source, or isn't started at the destination.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>

#include <support/temporary_directory.hpp>

#include "footprint.hpp"
#include "peer_process.hpp"
#include "small_machine.hpp"

using namespace vmstate;
using namespace vmstate::tests;

TEST_CASE("peer source", "[.]") { peer::be_source(); }
TEST_CASE("peer destination", "[.]") { peer::be_destination(); }

TEST_CASE("the destination's process is killed or stopped: the source says at which stage, and its guest runs on") {
    using migration::state;
    const temporary_directory directory;
    small_machine from(256);
    fill(from);
    from.start();
    const std::vector<std::byte> before = from.memory();
    std::size_t number = 0;
    // "": in device, when all has been sent and the destination has loaded it, but not said so.
    const auto migrate = [&](const std::string& when, bool kill) {
        CAPTURE(when, kill);
        peer_process other("peer destination",
            {.uri = "unix:" + (directory / std::to_string(++number)).string(), .hold = when.empty() ? "device" : ""});
        const std::string uri = other.wait_for("uri");
        migration::source source(from.state, from.control,
            {.downtime_limit = 1ms, .max_bandwidth = 1 << 20, .pause_before_switchover = when == "pre-switchover", .peer_timeout = 300ms});
        std::atomic<bool> done = false;
        std::string last_state;
        std::mutex state_mutex; // last_state
        source.observe([&](const migration::status& at) {
            {
                const std::lock_guard lock(state_mutex);
                if (!is_final(at.state)) last_state = to_string(at.state);
            }
            const bool now = when.empty() ? at.state == state::device && at.ram.downtime_bytes != 0 : to_string(at.state) == when;
            if (at.state == state::active && (now || when != "active"))
                source.set_parameters({.downtime_limit = 1000ms, .max_bandwidth = 0});
            if (!now || done.exchange(true)) return;
            if (kill) other.kill();
            else other.stop();
        });
        REQUIRE(source.start(uri));
        const auto deadline = std::chrono::steady_clock::now() + 60s;
        while (!is_final(source.status().state) && std::chrono::steady_clock::now() < deadline) {
            // A stopped process says as little as one that has nothing to say.
            if (!kill && done && source.status().state == state::pre_switchover) (void)source.resume();
            std::this_thread::sleep_for(1ms);
        }
        CHECK(source.status().state == state::failed);
        const result<void> left = source.wait();
        REQUIRE(left.has_error());
        CAPTURE(left.error().message());
        const std::string path(left.error().path());
        if (path == "return path") CHECK(last_state == "device");
        else CHECK(path.substr(0, path.find('/')) == last_state);
        if (when.empty()) CHECK(path == "return path");
        if (kill && !when.empty()) CHECK(path.substr(0, path.find('/')) == when);
        CHECK(from.runs());
        CHECK(std::memcmp(before.data() + before.size() / 8, from.memory().data() + before.size() / 8, before.size() * 7 / 8) == 0);
    };
    migrate("active", true);
    const leak_check leaks;
    for (const char* when : {"active", "pre-switchover", "device", ""})
        for (const bool kill : {true, false}) migrate(when, kill);
    leaks.check(8);
}

TEST_CASE("the source's process is killed or stopped: the destination says so, and starts no guest") {
    const temporary_directory directory;
    small_machine to(256);
    std::size_t number = 0;
    const auto migrate = [&](const std::string& when, bool kill) {
        CAPTURE(when, kill);
        migration::destination destination(to.state, to.control, {.peer_timeout = kill ? 30'000ms : 300ms});
        REQUIRE(destination.listen("unix:" + (directory / std::to_string(++number)).string()));
        result<void> arrived;
        std::thread receiving([&] { arrived = destination.run(); });
        {
            peer_process other("peer source", {.uri = destination.uri(), .hold = when});
            other.wait_for("state " + when);
            if (kill) other.kill();
            else other.stop();
            receiving.join();
        }
        REQUIRE(arrived.has_error());
        CAPTURE(arrived.error().message());
        CHECK(destination.status().state == migration::state::failed);
        CHECK(arrived.error().path().starts_with("active"));
        if (!kill) CHECK_THAT(arrived.error().message(), contains("timed out"));
        CHECK(to.starts == 0);
    };
    migrate("active", true);
    const leak_check leaks;
    for (const char* when : {"active", "pre-switchover", "device"})
        for (const bool kill : {true, false}) migrate(when, kill);
    leaks.check(6);
}
