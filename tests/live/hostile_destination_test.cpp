// SPDX-License-Identifier: BSL-1.0
// A source of ours and a destination that stops, goes away, or says what it should not, at each stage: the migration ends
// in bounded time with an error that names the stage, the source's guest runs on with its memory as it was, and nothing
// is left behind.
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <ostream>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/migration/source.hpp>

#include <support/temporary_directory.hpp>

#include "footprint.hpp"
#include "small_machine.hpp"
#include "tcp_pair.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

using migration::return_message;
using migration::state;

/// When it happens: as soon as the source's migration is there.
enum class stage { connected, active, pre_switchover, device, last_word };
std::ostream& operator<<(std::ostream& out, stage at) {
    constexpr const char* names[] = {"connected", "active", "pre-switchover", "device", "waiting for the last word"};
    return out << names[static_cast<std::size_t>(at)];
}

/// What the destination does then.
enum class deed {
    stops,          // neither reads nor writes, and stays connected
    never_answers,  // reads all, says nothing
    closes,
    resets,
    half_closes,    // says nothing more, and reads on
    garbage,
    wrong_length,   // a PONG of five bytes
    unknown_type,
    asks_for_pages, // nothing that belongs into precopy
    half_a_message,
    failed_shut,
    early_shut,
    pongs,          // and no end of them
};
std::ostream& operator<<(std::ostream& out, deed what) {
    constexpr const char* names[] = {"stops", "never answers", "closes", "resets", "half closes", "garbage", "wrong length",
        "unknown type", "asks for pages", "half a message", "failed SHUT", "early SHUT", "PONGs without end"};
    return out << names[static_cast<std::size_t>(what)];
}

/// A destination that reads, until it does its deed.
class hostile_destination {
public:
    explicit hostile_destination(unique_fd fd) : fd_(std::move(fd)), thread_([this] { run(); }) {}
    ~hostile_destination() {
        quit_ = true;
        thread_.join();
    }
    /// Returns when it is done, or begun.
    void commit(deed what) {
        what_ = static_cast<int>(what);
        while (!committed_.load()) std::this_thread::sleep_for(100us);
    }

private:
    void run() {
        std::vector<std::byte> bytes(64 * 1024);
        bool reads = true, pongs = false;
        while (!quit_.load()) {
            if (const int what = what_.exchange(-1); what >= 0) {
                reads = false;
                switch (static_cast<deed>(what)) {
                case deed::stops: break;
                case deed::never_answers: reads = true; break;
                case deed::closes: fd_.reset(); break;
                case deed::resets: reset_connection(fd_); break;
                case deed::half_closes: ::shutdown(fd_.get(), SHUT_WR), reads = true; break;
                case deed::garbage: {
                    std::uint32_t x = 1;
                    for (std::byte& one : bytes) one = static_cast<std::byte>((x = x * 1664525 + 1013904223) >> 24);
                    say(std::span(bytes).first(4096));
                    reads = true;
                    break;
                }
                case deed::wrong_length: say({0, 2, 0, 5, 0, 0, 0, 1, 0}), reads = true; break;
                case deed::unknown_type: say({0, 99, 0, 0}), reads = true; break;
                case deed::asks_for_pages: say({0, 4, 0, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0}), reads = true; break;
                case deed::half_a_message: say({0, 1, 0, 4, 0, 0}), ::shutdown(fd_.get(), SHUT_WR), reads = true; break;
                case deed::failed_shut: say({0, 1, 0, 4, 0, 0, 0, 1}), reads = true; break;
                case deed::early_shut: say({0, 1, 0, 4, 0, 0, 0, 0}), reads = true; break;
                case deed::pongs: pongs = reads = true; break;
                }
                committed_ = true;
            }
            if (pongs)
                for (int i = 0; i != 100; ++i) say({0, 2, 0, 4, 0, 0, 0, 1, 0, 2, 0, 4, 0x76, 0x30, 0xff, 0xff}); // "block 65535 is zero"
            if (!fd_ || !reads) {
                std::this_thread::sleep_for(100us);
                continue;
            }
            pollfd ready{fd_.get(), POLLIN, 0};
            if (::poll(&ready, 1, 1) <= 0) continue;
            if (::recv(fd_.get(), bytes.data(), bytes.size(), MSG_DONTWAIT) == 0) std::this_thread::sleep_for(100us);
        }
    }
    void say(std::span<const std::byte> bytes) const { (void)::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT); }
    void say(std::initializer_list<unsigned char> bytes) const { say(std::as_bytes(std::span(bytes.begin(), bytes.size()))); }

    unique_fd fd_;
    std::atomic<int> what_ = -1;
    std::atomic<bool> committed_ = false;
    std::atomic<bool> quit_ = false;
    std::thread thread_;
};

/// How the source's migration to such a destination ended.
struct outcome {
    bool in_time = false;
    std::string last_state; // before failed
    error why;
};
outcome migrate_to(small_machine& from, stage when, deed what) {
    auto [ours, theirs] = connect_tcp();
    hostile_destination destination(std::move(theirs));
    const int to_us = ours.get();
    migration::source source(from.state, from.control,
        {.downtime_limit = 1ms, .max_bandwidth = 4 << 20, .pause_before_switchover = when == stage::pre_switchover,
            .peer_timeout = 200ms});
    outcome ended;
    std::mutex ended_mutex; // ended
    std::atomic<bool> committed = false;
    std::atomic<bool> heard = false; // of what came too early
    source.observe([&](const migration::status& at) {
        {
            const std::lock_guard lock(ended_mutex);
            if (!is_final(at.state)) ended.last_state = to_string(at.state);
        }
        const bool now = [&] {
            switch (when) {
            case stage::connected: return at.state == state::setup;
            case stage::active: return at.state == state::active;
            case stage::pre_switchover: return at.state == state::pre_switchover;
            case stage::device: return at.state == state::device;
            case stage::last_word: return at.state == state::device && at.ram.downtime_bytes != 0;
            }
            return false;
        }();
        if (now && !committed.exchange(true)) destination.commit(what);
        // Too early means that the source hears of it before it has sent all. In setup it doesn't listen yet.
        if (what == deed::early_shut && at.state != state::setup && committed && !heard.exchange(true)) {
            int unread = 1;
            while (unread != 0) {
                ::ioctl(to_us, FIONREAD, &unread);
                std::this_thread::sleep_for(50ms);
            }
        }
        // Now it may hurry.
        if (now) source.set_parameters({.downtime_limit = 1000ms, .max_bandwidth = 0});
        if (at.state == state::active && when > stage::active) source.set_parameters({.downtime_limit = 1000ms, .max_bandwidth = 0});
    });
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::make_unique<socket_channel>(std::move(ours)))));
    const auto deadline = std::chrono::steady_clock::now() + 60s; // 200 ms and a little, and whatever this machine is busy with
    bool resumed = false;
    while (!is_final(source.status().state) && std::chrono::steady_clock::now() < deadline) {
        // Nobody can tell a destination that has stopped from one that has nothing to say.
        if (!resumed && source.status().state == state::pre_switchover && committed) {
            std::this_thread::sleep_for(20ms);
            resumed = source.resume().has_value();
        }
        std::this_thread::sleep_for(1ms);
    }
    ended.in_time = is_final(source.status().state);
    const result<void> left = source.wait();
    const std::lock_guard lock(ended_mutex);
    if (!left) ended.why = left.error();
    CHECK(source.status().state == state::failed);
    return ended;
}

} // namespace

TEST_CASE("whatever the destination does, and when: the source ends with an error that names the stage, and its guest runs on") {
    constexpr stage stages[] = {stage::connected, stage::active, stage::pre_switchover, stage::device, stage::last_word};
    constexpr deed deeds[] = {deed::stops, deed::never_answers, deed::closes, deed::resets, deed::half_closes, deed::garbage,
        deed::wrong_length, deed::unknown_type, deed::asks_for_pages, deed::half_a_message, deed::failed_shut, deed::early_shut,
        deed::pongs};
    small_machine from(256);
    fill(from);
    from.start();
    const std::vector<std::byte> before = from.memory();
    migrate_to(from, stage::active, deed::closes);
    const leak_check leaks;
    std::size_t migrations = 0;
    for (const stage when : stages) {
        for (const deed what : deeds) {
            if (when == stage::last_word && what == deed::early_shut) continue; // that is what it should say
            CAPTURE(when, what);
            const int starts = from.starts, stops = from.stops;
            const outcome ended = migrate_to(from, when, what);
            ++migrations;
            CHECK(ended.in_time);
            const std::string path(ended.why.path());
            INFO(ended.why.message() << ", after " << ended.last_state);
            if (path == "return path") CHECK(ended.last_state == "device");
            else CHECK(path.substr(0, path.find('/')) == ended.last_state);
            // It says what the destination did, not what came of it here.
            switch (what) {
            case deed::stops:
            case deed::never_answers:
            case deed::pongs: CHECK_THAT(ended.why.message(), contains("timed out") || contains("no answer")); break;
            case deed::garbage:
            case deed::wrong_length:
            case deed::unknown_type:
            case deed::asks_for_pages: CHECK(ended.why == errc::bad_command); break;
            case deed::half_a_message:
            case deed::half_closes: CHECK(ended.why == errc::truncated); break;
            case deed::failed_shut: CHECK_THAT(ended.why.message(), contains("could not load")); break;
            case deed::early_shut: CHECK_THAT(ended.why.message(), contains("SHUT")); break;
            case deed::closes:
            case deed::resets: CHECK_THAT(ended.why.message(), !contains("was shut down")); break;
            }
            CHECK(from.starts - starts == from.stops - stops);
            CHECK(from.runs());
            CHECK(std::memcmp(before.data() + before.size() / 8, from.memory().data() + before.size() / 8, before.size() * 7 / 8) == 0);
        }
    }
    leaks.check(migrations);
}

TEST_CASE("a destination that doesn't accept: the source gives up in setup, or when it is told to") {
    const temporary_directory directory;
    const std::string path = directory.file("socket");
    // One connection waits to be accepted, and there is no room for another.
    const unique_fd listener(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    const unique_fd waiting(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path.copy(address.sun_path, sizeof address.sun_path - 1);
    REQUIRE(::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    REQUIRE(::listen(listener.get(), 0) == 0);
    REQUIRE(::connect(waiting.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);

    small_machine from(64);
    from.start();
    migration::source hasty(from.state, from.control, {.peer_timeout = 200ms});
    REQUIRE(hasty.start("unix:" + path));
    const result<void> left = hasty.wait();
    REQUIRE(left.has_error());
    CHECK(left.error().path() == "setup");
    CHECK_THAT(left.error().message(), contains("timed out"));
    CHECK(hasty.status().state == state::failed);

    migration::source patient(from.state, from.control, {.peer_timeout = 0ms});
    REQUIRE(patient.start("unix:" + path));
    std::this_thread::sleep_for(20ms);
    patient.cancel();
    CHECK(patient.wait().has_error());
    CHECK(patient.status().state == state::cancelled);
    CHECK(from.runs());
    CHECK(from.stops == 0);
}

TEST_CASE("a source that is made to wait before the switchover is not taken for one that has gone") {
    small_machine from(64);
    small_machine to(64);
    from.start();
    channel_pair channels = make_pair();
    const migration::parameters settings{.pause_before_switchover = true, .peer_timeout = 2000ms};
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
    while (source.status().state != state::pre_switchover && !is_final(source.status().state)) std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(2500ms); // longer than the destination waits for a silent source
    CHECK(source.resume().has_value());
    CHECK(source.wait().has_value());
    receiving.join();
    CAPTURE((arrived ? std::string() : arrived.error().message()));
    CHECK(arrived.has_value());
    CHECK(to.starts == 1);
}
