// SPDX-License-Identifier: BSL-1.0
// Wherever a migration ends, the guest runs at one side: not at both when the source gives up while the destination still
// loads, and not at none when a command that was to store it fails.
#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>

#include <support/catch.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

#include "small_machine.hpp"

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;

namespace {

/// Takes its time to be loaded.
struct slow_card {
    std::uint32_t value = 0;
    std::chrono::milliseconds takes{0};

    void wait(int) { std::this_thread::sleep_for(takes); }
};
constexpr auto vmstate_slow_card = describe<slow_card>({.name = "slow-card"}, post_load<&slow_card::wait>,
    field<&slow_card::value>, transient<&slow_card::takes>);

} // namespace

TEST_CASE("a destination that is slow to load doesn't start a guest that the source has taken back") {
    const temporary_directory directory;
    const bool tcp = GENERATE(true, false);
    const std::string address = tcp ? "tcp:127.0.0.1:0" : "unix:" + (directory / "socket").string();
    const bool cancels = GENERATE(true, false); // or loses its patience
    CAPTURE(address, cancels);
    small_machine from(64);
    small_machine to(64);
    slow_card here;
    slow_card there{.takes = 1500ms};
    REQUIRE(from.state.add_device<vmstate_slow_card>(here));
    REQUIRE(to.state.add_device<vmstate_slow_card>(there));
    from.start();
    migration::destination destination(to.state, to.control);
    REQUIRE(destination.listen(address));
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, {.peer_timeout = cancels ? 60s : 100ms});
    REQUIRE(source.start(destination.uri()));
    if (cancels) {
        while (source.status().state != migration::state::device && !is_final(source.status().state))
            std::this_thread::sleep_for(1ms);
        std::this_thread::sleep_for(50ms);
        source.cancel();
    }
    const result<void> left = source.wait();
    const bool runs_here = from.runs();
    receiving.join();
    INFO(message_of(left) + "; " + message_of(arrived));
    // One of them, and both say so.
    CHECK(runs_here != (to.starts == 1));
    CHECK(left.has_value() == (to.starts == 1));
    CHECK(arrived.has_value() == (to.starts == 1));
    CHECK_FALSE(left);
}

TEST_CASE("a cancellation that crosses the destination's last word is too late, and says so") {
    // Whatever the moment: either the guest goes on here, or it has gone.
    for (int delay = 0; delay != 40; ++delay) {
        small_machine from(16);
        small_machine to(16);
        from.start();
        migration::destination destination(to.state, to.control);
        REQUIRE(destination.listen("tcp:127.0.0.1:0"));
        result<void> arrived = error(errc::io);
        std::thread receiving([&] { arrived = destination.run(); });
        migration::source source(from.state, from.control);
        REQUIRE(source.start(destination.uri()));
        std::this_thread::sleep_for(std::chrono::microseconds(150 * delay));
        source.cancel();
        const result<void> left = source.wait();
        const bool runs_here = from.runs();
        receiving.join();
        INFO(delay << ": " << message_of(left) + "; " + message_of(arrived));
        REQUIRE(runs_here != (to.starts == 1));
        REQUIRE(left.has_value() == (to.starts == 1));
    }
}

TEST_CASE("a command that fails to store the guest leaves it running") {
    small_machine from(64);
    from.start();
    migration::source source(from.state, from.control);
    REQUIRE(source.start("exec:cat >/dev/null; exit 3"));
    const result<void> left = source.wait();
    REQUIRE_FALSE(left);
    CHECK_THAT(left.error().message(), contains("exit status 3"));
    CHECK(from.runs());
    CHECK(source.status().state == migration::state::failed);
}

TEST_CASE("a start that is refused is what wait says, not the migration before it") {
    small_machine from(16);
    from.start();
    migration::source source(from.state, from.control);
    REQUIRE(source.start("exec:cat >/dev/null"));
    REQUIRE(source.wait());
    source.set_parameters({.xbzrle = true, .multifd = true});
    const result<void> refused = source.start("tcp:127.0.0.1:1");
    REQUIRE_FALSE(refused);
    const result<void> waited = source.wait();
    REQUIRE_FALSE(waited);
    CHECK(waited.error().message() == refused.error().message());
}
