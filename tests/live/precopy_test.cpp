// SPDX-License-Identifier: BSL-1.0
// Live migration between two machines of ours in one process: the guest is threads that write memory all the time. What
// arrives is what was there when they stopped, and whatever fails leaves the source's guest running.
#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>

#include "small_machine.hpp"
#include "support/temporary_directory.hpp"

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;

TEST_CASE("a running guest arrives as it was when it stopped") {
    const bool xbzrle = GENERATE(false, true);
    CAPTURE(xbzrle);
    small_machine from(4096);
    small_machine to(4096);
    fill(from);
    from.start();
    channel_pair channels = make_pair();

    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    // What the guest writes fits into the downtime however slow this build is: 2 MiB, and the limit allows for 6.
    migration::source source(from.state, from.control,
                             {.downtime_limit = 100ms, .max_bandwidth = xbzrle ? 64u << 20 : 0u, .xbzrle = xbzrle});
    std::vector<std::string> states;
    std::mutex states_mutex;
    source.observe([&](const migration::status& at) {
        const std::lock_guard lock(states_mutex);
        if (states.empty() || states.back() != to_string(at.state)) states.emplace_back(to_string(at.state));
    });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    const result<void> left = source.wait();
    receiving.join();
    to.stop();
    INFO((left ? std::string("ok") : left.error().message()));
    INFO((arrived ? std::string("ok") : arrived.error().message()));
    REQUIRE(left);
    REQUIRE(arrived);
    CHECK(states == std::vector<std::string>{"setup", "active", "device", "completed"});

    CHECK_FALSE(from.runs());
    CHECK(from.stops == 1);
    CHECK(from.starts == 0);
    CHECK(to.starts == 1);
    const migration::status last = source.status();
    CHECK(last.ram.total == from.memory().size());
    CHECK(last.ram.remaining == 0);
    CHECK(last.ram.dirty_sync_count >= 2);
    CHECK(last.ram.duplicate > 0);
    // Pages that went a second time are new to the cache; those of a third pass, if there was one, are in it.
    CHECK((last.xbzrle_cache.cache_miss + last.xbzrle_cache.pages > 0) == xbzrle);
    CHECK(last.ram.normal * page == last.ram.normal_bytes);
    CHECK(last.ram.transferred == last.ram.precopy_bytes + last.ram.downtime_bytes);
    CHECK(last.ram.transferred == destination.status().ram.transferred);
    // The destination's guest has gone on writing its first eighth; what it doesn't write is what was sent.
    CHECK(to.card.writes >= from.card.writes);
    CHECK(std::memcmp(from.memory().data() + from.memory().size() / 8, to.memory().data() + to.memory().size() / 8,
                      from.memory().size() * 7 / 8) == 0);
    for (std::size_t i = 0; i != 4096 / 8; ++i) {
        std::uint64_t before = 0, after = 0, end = 0;
        std::memcpy(&before, from.memory().data() + i * page, 8);
        std::memcpy(&after, to.memory().data() + i * page, 8);
        std::memcpy(&end, to.memory().data() + (i + 1) * page - 8, 8);
        if (after < before || after != end) FAIL("page " << i << " is stale or torn: " << before << ", " << after << ", " << end);
    }
}

TEST_CASE("a destination that refuses leaves the source's guest running") {
    small_machine from(256);
    small_machine to(128);
    from.start();
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from.state, from.control);
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    const result<void> left = source.wait();
    receiving.join();
    CHECK(arrived.error() == errc::bad_ram);
    CHECK(left.has_error());
    CHECK(source.status().state == migration::state::failed);
    CHECK(destination.status().state == migration::state::failed);
    CHECK(from.runs());
    CHECK(to.starts == 0);
}

TEST_CASE("a destination that can't accept what it has loaded leaves the guest to the source") {
    const bool accepts = GENERATE(false, true);
    small_machine from(256);
    small_machine to(256);
    fill(from);
    from.start();
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    migration::source source(from.state, from.control);
    int asked = 0;
    bool was_loaded = false;
    migration::state source_was{}, destination_was{};
    to.control.accept = [&]() -> result<void> {
        ++asked;
        was_loaded = to.card.writes == from.card.writes && to.starts == 0;
        source_was = source.status().state;
        destination_was = destination.status().state;
        return accepts ? result<void>() : error(errc::io, {}, "no room left");
    };
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    const result<void> left = source.wait();
    receiving.join();
    CHECK(asked == 1);
    CHECK(was_loaded);
    CHECK(source_was == migration::state::device);
    CHECK(destination_was == migration::state::active);
    CHECK(left.has_value() == accepts);
    CHECK(arrived.has_value() == accepts);
    CHECK(from.runs() != accepts);
    CHECK(to.starts == (accepts ? 1 : 0));
    if (accepts) return;
    CHECK(arrived.error().message() == "accept: input/output error: no room left");
    CHECK(left.error().message().find("the destination could not load the stream") != std::string::npos);
    CHECK(from.starts == 1);
}

TEST_CASE("a cancelled migration leaves the source's guest running, and another one may follow") {
    small_machine from(2048);
    small_machine to(2048);
    fill(from);
    from.start();
    migration::source source(from.state, from.control, {.max_bandwidth = 1 << 20});
    {
        channel_pair channels = make_pair();
        migration::destination destination(to.state, to.control);
        result<void> arrived = error(errc::io);
        std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
        REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
        while (source.status().ram.transferred == 0 && !is_final(source.status().state)) std::this_thread::sleep_for(1ms);
        source.cancel();
        CHECK(source.wait().has_error());
        receiving.join();
        CHECK(arrived.has_error());
        CHECK(source.status().state == migration::state::cancelled);
        CHECK(from.runs());
    }
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    source.set_parameters({.max_bandwidth = 0});
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
}

namespace {

/// Takes `left` bytes and then fails.
struct failing_sink {
    std::size_t left;
    result<std::size_t> write_some(std::span<const std::byte> from) {
        if (left == 0) return error(errc::io, {}, "broken");
        const std::size_t taken = std::min(left, from.size());
        left -= taken;
        return taken;
    }
};

} // namespace

TEST_CASE("wherever the channel breaks, the source's guest runs on with its memory intact") {
    small_machine from(64);
    fill(from);
    const std::vector<std::byte> before = from.memory();
    // How long it is: once into a sink that never fails.
    migration::source source(from.state, from.control, {.downtime_limit = 1000ms});
    REQUIRE(source.start(make_output_channel(failing_sink{~std::size_t{0}})));
    REQUIRE(source.wait());
    const auto whole = static_cast<std::size_t>(source.status().ram.transferred);
    REQUIRE(whole > 1000);
    const std::size_t places = 500;
    for (std::size_t i = 0; i != places; ++i) {
        const int starts = from.starts, stops = from.stops;
        REQUIRE(source.start(make_output_channel(failing_sink{whole * i / places})));
        REQUIRE(source.wait().has_error());
        REQUIRE(source.status().state == migration::state::failed);
        // Stopped and started again, or never stopped.
        REQUIRE(from.starts - starts == from.stops - stops);
        from.stop();
        REQUIRE(std::memcmp(before.data() + before.size() / 8, from.memory().data() + before.size() / 8, before.size() * 7 / 8) == 0);
    }
}

TEST_CASE("what a window has carried beyond its share is missing in the next ones") {
    migration::bandwidth_meter meter;
    migration::bandwidth_meter::clock::time_point now{1h};
    meter.start(1000, now);
    CHECK_FALSE(meter.is_spent(1000, 0));
    CHECK(meter.left(1000, 40'000) == 4000); // a tenth of a second's
    CHECK_FALSE(meter.is_spent(2000, 40'000));
    CHECK(meter.left(2000, 40'000) == 3000);
    CHECK(meter.is_spent(11'000, 40'000)); // 10'000: that of two windows and a half
    CHECK(meter.left(11'000, 40'000) == 0);
    CHECK_FALSE(meter.update(11'000, now + 99ms));
    CHECK(meter.update(11'000, now += 100ms));
    CHECK(meter.is_spent(11'000, 40'000));
    CHECK(meter.update(11'000, now += 100ms));
    CHECK_FALSE(meter.is_spent(11'000, 40'000));
    CHECK(meter.left(11'000, 40'000) == 2000);
    // What a window leaves is lost.
    CHECK(meter.update(11'000, now += 500ms));
    CHECK(meter.update(11'000, now += 100ms));
    CHECK(meter.left(11'000, 40'000) == 4000);
    // Without a limit nothing is owed.
    CHECK_FALSE(meter.is_spent(std::uint64_t{1} << 60, 0));
    CHECK_FALSE(meter.is_spent(std::uint64_t{1} << 60, 1));
    CHECK(meter.is_spent(std::uint64_t{1} << 62, 1));
}

TEST_CASE("a bandwidth that is less than a batch of pages in each window is kept") {
    small_machine from(96);
    small_machine to(96);
    for (std::size_t at = 0; at < from.memory().size(); at += page) from.memory()[at] = std::byte{1};
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from.state, from.control, {.downtime_limit = 1ms, .max_bandwidth = 400'000});
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
    // However fast this machine is, that many bytes can't have left sooner.
    const migration::status last = source.status();
    CHECK(last.ram.precopy_bytes > 96 * page);
    CHECK(last.total_time >= 800ms);
}

TEST_CASE("a guest is slowed down where it outruns the channel for two periods of a second, in a row or not") {
    using clock = migration::auto_converge::clock;
    const migration::parameters settings{.cpu_throttle_initial = 30, .cpu_throttle_increment = 40, .max_cpu_throttle = 95};
    migration::auto_converge judge;
    clock::time_point now{1h};
    std::uint64_t sent = 5000;
    judge.start(sent, now);
    const auto second = [&](std::uint64_t written, std::uint64_t more) {
        return judge.judge(written, sent += more, settings, now += 1001ms);
    };
    // Short passes are judged together.
    for (int pass = 0; pass != 10; ++pass) CHECK_FALSE(judge.judge(1000, sent += 100, settings, now += 100ms));
    CHECK_FALSE(judge.judge(0, sent, settings, now += 1ms)); // the first time
    CHECK_FALSE(second(500, 1000));                          // half of it is no more than that
    CHECK_FALSE(second(0, 1000));
    CHECK(second(501, 1000) == 30u);
    CHECK(judge.throttled() == 30);
    CHECK_FALSE(second(501, 1000));
    CHECK(second(501, 1000) == 70u);
    CHECK_FALSE(second(1, 0));
    CHECK(second(1, 0) == 95u);
    for (int more = 0; more != 4; ++more) CHECK_FALSE(second(501, 1000)); // it is the most
    CHECK(judge.throttled() == 95);
    judge.start(sent, now);
    CHECK(judge.throttled() == 0);
    CHECK_FALSE(second(501, 1000));
    CHECK(second(501, 1000) == 30u);
}

TEST_CASE("a guest that outruns the channel is told to slow down, and at the end that it need not any more") {
    small_machine from(512);
    small_machine to(512);
    fill(from);
    from.start();
    std::vector<unsigned> told;
    migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .auto_converge = true,
        .cpu_throttle_initial = 42, .cpu_throttle_increment = 57};
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    std::thread receiving([&] { static_cast<void>(destination.run(std::unique_ptr<input_channel>(std::move(channels.other)))); });
    migration::source source(from.state, from.control, settings);
    unsigned seen = 0;
    from.control.throttle = [&](unsigned percent) {
        told.push_back(percent);
        if (told.size() != 1) return;
        settings.downtime_limit = 60'000ms;
        source.set_parameters(settings);
    };
    source.observe([&](const migration::status& at) { seen = std::max(seen, at.cpu_throttle_percentage); });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(told == std::vector<unsigned>{42, 0});
    CHECK(seen == 42);
    CHECK(source.status().cpu_throttle_percentage == 0);
}

TEST_CASE("a throttle that QEMU refuses is refused") {
    small_machine one(16);
    const auto refused = [&](const migration::parameters& settings) {
        migration::source source(one.state, one.control, settings);
        const result<void> started = source.start("tcp:127.0.0.1:1");
        return started ? std::string() : started.error().message();
    };
    CHECK_THAT(refused({.cpu_throttle_initial = 0}), contains("expected cpu_throttle_initial from 1 to 99, found 0"));
    CHECK_THAT(refused({.cpu_throttle_initial = 100}), contains("expected cpu_throttle_initial from 1 to 99, found 100"));
    CHECK_THAT(refused({.cpu_throttle_increment = 0}), contains("expected cpu_throttle_increment from 1 to 99, found 0"));
    CHECK_THAT(refused({.cpu_throttle_initial = 50, .max_cpu_throttle = 49}),
        contains("expected max_cpu_throttle from cpu_throttle_initial to 99, found 49"));
    CHECK_THAT(refused({.max_cpu_throttle = 100}), contains("expected max_cpu_throttle from cpu_throttle_initial to 99, found 100"));
}

namespace {

/// A guest that writes so many pages before each look at the log, as its plan says, and then none.
class planned_log {
public:
    planned_log(std::span<std::byte> memory, std::vector<std::size_t> plan) : memory_(memory), plan_(std::move(plan)) {}
    result<void> start() { return {}; }
    result<void> stop() { return {}; }
    result<std::uint64_t> collect(page_bitmap& into) {
        const std::size_t time = times_++;
        const std::size_t count = time < plan_.size() ? plan_[time] : 0;
        for (std::size_t i = 0; i != count; ++i) memory_[i * page + 7] = static_cast<std::byte>(2 + time);
        const std::size_t before = into.count();
        into.set_range(0, count);
        return static_cast<std::uint64_t>(into.count() - before);
    }
    std::size_t times() const { return times_; }

private:
    std::span<std::byte> memory_;
    std::vector<std::size_t> plan_;
    std::size_t times_ = 0;
};

} // namespace

TEST_CASE("the status has what QEMU's has, from the beginning and however short the migration was") {
    std::vector<std::byte> memory(64 * page, std::byte{1}), copy(memory.size());
    machine from{{.name = "small"}}, to{{.name = "small"}};
    REQUIRE(from.add_ram("ram", std::span<std::byte>(memory)));
    REQUIRE(to.add_ram("ram", std::span<std::byte>(copy)));
    planned_log log(memory, {10, 10, 10});
    migration::guest guest, nobody;
    guest.dirty_logs.emplace("ram", log);
    channel_pair channels = make_pair();
    migration::destination destination(to, nobody);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from, guest, {.xbzrle = true, .xbzrle_cache_size = 8 << 20});
    migration::parameters settings = source.parameters();
    settings.downtime_limit = 12'345ms;
    source.set_parameters(settings);
    std::mutex seen_mutex;
    std::optional<std::chrono::milliseconds> first_expected;
    double most_missed = 0;
    source.observe([&](const migration::status& at) {
        const std::lock_guard lock(seen_mutex);
        if (!first_expected && at.state == migration::state::active) {
            first_expected = at.expected_downtime;
            settings.downtime_limit = 0ms; // so that each pass is sent
            source.set_parameters(settings);
        }
        most_missed = std::max(most_missed, at.xbzrle_cache.cache_miss_rate);
    });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
    CHECK(copy == memory);
    // What is expected before anything was measured is the most that is allowed.
    REQUIRE(first_expected);
    CHECK(*first_expected == 12'345ms);
    const migration::status last = source.status();
    CHECK(last.ram.mbps > 0); // although there was no window of 100 ms
    // The second pass is the first that the cache sees; in the last ones each page differs in a byte.
    CHECK(most_missed == 1);
    CHECK(last.xbzrle_cache.cache_size == 8 << 20);
    CHECK(last.xbzrle_cache.cache_miss_rate == 0);
    CHECK(last.xbzrle_cache.encoding_rate > 100);
}

TEST_CASE("memory without a dirty log counts in what the downtime has to hold, unless it is too much in any case") {
    // What one can send in the downtime is 1000 pages. Of the logged block 500 are written in each of the first passes.
    const std::size_t unlogged = GENERATE(400u, 800u, 1200u);
    CAPTURE(unlogged);
    std::vector<std::byte> memory((600 + unlogged) * page, std::byte{1}), copy(memory.size());
    machine from{{.name = "small"}}, to{{.name = "small"}};
    for (machine* const one : {&from, &to}) {
        std::vector<std::byte>& all = one == &from ? memory : copy;
        one->add_ram("logged", std::span(all).first(600 * page));
        one->add_ram("rom", std::span(all).subspan(600 * page));
    }
    planned_log log(memory, {500, 500, 500, 500, 500, 500, 100});
    migration::guest guest, nobody;
    guest.dirty_logs.emplace("logged", log);
    std::size_t times_before_stop = 0;
    guest.stop = [&]() -> result<void> {
        times_before_stop = log.times();
        return {};
    };
    channel_pair channels = make_pair();
    migration::destination destination(to, nobody);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from, guest, {.downtime_limit = 100ms, .avail_switchover_bandwidth = 10 * 1000 * page});
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
    if (unlogged == 800) CHECK(times_before_stop >= 7);
    else CHECK(times_before_stop == 1);
    CHECK(copy == memory);
}

TEST_CASE("a FIFO without another end is waited for until one cancels, or no longer than a peer may take") {
    const temporary_directory directory;
    const std::string path = (directory / "fifo").string();
    REQUIRE(::mkfifo(path.c_str(), 0600) == 0);
    small_machine from(64);
    small_machine to(64);
    {
        migration::source source(from.state, from.control, {.peer_timeout = 0ms});
        REQUIRE(source.start("file:" + path));
        std::this_thread::sleep_for(20ms);
        CHECK(source.status().state == migration::state::setup);
        source.cancel();
        CHECK(source.wait().has_error());
        CHECK(source.status().state == migration::state::cancelled);
    }
    {
        migration::source source(from.state, from.control, {.peer_timeout = 50ms});
        REQUIRE(source.start("file:" + path));
        CHECK_THAT(source.wait().error().message(), contains("no other end of the FIFO: timed out after 50 ms"));
    }
    {
        migration::destination destination(to.state, to.control);
        result<void> arrived;
        std::thread receiving([&] { arrived = destination.run("file:" + path); });
        while (destination.status().state != migration::state::setup) std::this_thread::sleep_for(1ms);
        destination.cancel();
        receiving.join();
        CHECK(arrived.has_error());
        CHECK(destination.status().state == migration::state::cancelled);
    }
    // And whichever end comes first.
    const bool source_first = GENERATE(true, false);
    migration::source source(from.state, from.control);
    migration::destination destination(to.state, to.control);
    if (source_first) {
        REQUIRE(source.start("file:" + path));
        std::this_thread::sleep_for(20ms);
    }
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run("file:" + path); });
    if (!source_first) {
        std::this_thread::sleep_for(20ms);
        CHECK(source.start("file:" + path).has_value());
    }
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK((arrived ? std::string() : arrived.error().message()) == "");
    CHECK(to.starts == 1);
}

TEST_CASE("the source waits before the switchover until it is told") {
    small_machine from(256);
    small_machine to(256);
    from.start();
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from.state, from.control, {.pause_before_switchover = true});
    CHECK(source.resume().has_error());
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    while (source.status().state != migration::state::pre_switchover) std::this_thread::sleep_for(1ms);
    CHECK_FALSE(from.runs());
    CHECK(to.starts == 0);
    REQUIRE(source.resume());
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
}

TEST_CASE("a cancellation that comes after the destination's last word changes nothing") {
    small_machine from(64);
    small_machine to(64);
    from.start();
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from.state, from.control);
    // The first that is told with bytes sent in the downtime is that all was sent; the second, that it was loaded.
    int told = 0;
    source.observe([&](const migration::status& at) {
        if (at.state == migration::state::device && at.ram.downtime_bytes != 0 && ++told == 2) source.cancel();
    });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(told == 2);
    CHECK(source.status().state == migration::state::completed);
    CHECK(arrived.has_value());
    CHECK_FALSE(from.runs());
    CHECK(to.starts == 1);
}

TEST_CASE("a run or a listen besides the one that waits is refused, and leaves that alone") {
    small_machine from(64);
    small_machine to(64);
    from.start();
    migration::destination destination(to.state, to.control);
    REQUIRE(destination.listen("tcp:127.0.0.1:0"));
    const std::string uri = destination.uri();
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    while (destination.status().state != migration::state::setup) std::this_thread::sleep_for(1ms);
    const result<void> again = destination.run("tcp:127.0.0.1:0");
    REQUIRE_FALSE(again);
    CHECK_THAT(again.error().message(), contains("no migration under way, found setup"));
    CHECK(destination.listen("tcp:127.0.0.1:0").error() == errc::invalid_argument);
    CHECK(destination.status().state == migration::state::setup);
    CHECK(destination.uri() == uri);
    migration::source source(from.state, from.control);
    REQUIRE(source.start(uri));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
}

TEST_CASE("what an observer throws is lost, and the guest moves") {
    small_machine from(64);
    small_machine to(64);
    from.start();
    channel_pair channels = make_pair();
    migration::destination destination(to.state, to.control);
    migration::source source(from.state, from.control);
    const auto throws = [](const migration::status&) { throw std::runtime_error("an observer's"); };
    destination.observe(throws);
    source.observe(throws);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    CHECK(source.wait().has_value());
    receiving.join();
    CHECK(arrived.has_value());
    CHECK(to.starts == 1);
}

namespace {

/// Of a guest that writes every page all the time.
struct restless_log {
    result<void> start() { return {}; }
    result<std::uint64_t> collect(page_bitmap& into) { return std::uint64_t{into.set_range(0, into.size())}; }
    result<void> stop() { return {}; }
};

} // namespace

TEST_CASE("what the guest's hooks throw while a migration fails doesn't end the process") {
    small_machine from(256);
    fill(from);
    SECTION("start") {
        from.control.stop = [] { return result<void>(); };
        from.control.start = []() -> result<void> { throw std::runtime_error("no way to start"); };
        migration::source source(from.state, from.control, {.pause_before_switchover = true});
        REQUIRE(source.start(make_output_channel(failing_sink{~std::size_t{0}})));
        while (source.status().state != migration::state::pre_switchover) std::this_thread::sleep_for(1ms);
        source.cancel();
        CHECK(source.wait().has_error());
        CHECK(source.status().state == migration::state::cancelled);
    }
    SECTION("throttle") {
        from.control.dirty_logs.clear();
        from.control.dirty_logs.emplace("ram", restless_log{});
        from.control.throttle = [](unsigned) { throw std::runtime_error("no way to throttle"); };
        migration::source source(from.state, from.control, {.downtime_limit = 0ms, .max_bandwidth = 4 << 20, .auto_converge = true});
        REQUIRE(source.start(make_output_channel(failing_sink{~std::size_t{0}})));
        const result<void> left = source.wait();
        REQUIRE_FALSE(left);
        CHECK_THAT(left.error().message(), contains("no way to throttle"));
        CHECK(from.stops == 0);
    }
}

TEST_CASE("a source that waits for the SWITCHOVER_ACK says that it is there, and doesn't wait for ever") {
    small_machine from(64);
    fill(from);
    channel_pair channels = make_pair();
    std::vector<std::byte> sent;
    std::thread reading([&] {
        std::vector<std::byte> room(64 * 1024);
        const std::span<std::byte> part(room);
        for (result<std::size_t> got = std::size_t{0}; got = channels.other->read_some({&part, 1}), got && *got != 0;)
            sent.insert(sent.end(), room.begin(), room.begin() + static_cast<std::ptrdiff_t>(*got));
    });
    migration::source source(from.state, from.control, {.switchover_ack = true, .peer_timeout = 800ms});
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    const result<void> left = source.wait();
    reading.join();
    REQUIRE_FALSE(left);
    CHECK_THAT(left.error().message(), contains("no SWITCHOVER_ACK from the destination"));
    CHECK(from.stops == 0);
    // PING 1: in the setup, and after the last page.
    constexpr std::array<unsigned char, 9> ping{8, 0, 2, 0, 4, 0, 0, 0, 1};
    const std::span<const std::byte> wanted = std::as_bytes(std::span(ping));
    std::size_t pings = 0;
    for (auto at = sent.begin(); (at = std::search(at, sent.end(), wanted.begin(), wanted.end())) != sent.end(); ++at) ++pings;
    CHECK(pings >= 2);
}
