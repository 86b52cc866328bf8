// SPDX-License-Identifier: BSL-1.0
// A destination of ours and a source that stops, goes away, sends garbage or another machine's stream: it ends in bounded
// time with an error that names the stage, tells a source that still listens, doesn't start the guest, and leaves nothing
// behind.
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/stream/memory_channel.hpp>

#include "footprint.hpp"
#include "small_machine.hpp"
#include "tcp_pair.hpp"

using namespace vmstate;
using namespace vmstate::tests;

namespace {

using bytes = std::vector<std::byte>;

// Without the description at the end, of which nobody looks at every byte.
const small_options plain{.machine = {.name = "small", .suppress_vmdesc = true}};

void append(bytes& to, std::initializer_list<unsigned> more) {
    for (const unsigned one : more) to.push_back(static_cast<std::byte>(one));
}
void append_be64(bytes& to, std::uint64_t value) {
    for (int shift = 56; shift >= 0; shift -= 8) to.push_back(static_cast<std::byte>(value >> shift));
}

/// Keeps what it takes.
struct recorder {
    bytes& into;
    result<std::size_t> write_some(std::span<const std::byte> from) {
        into.insert(into.end(), from.begin(), from.end());
        return from.size();
    }
};

/// Where the configuration "small" ends.
constexpr std::size_t commands_at = 8 + 1 + 4 + 5;

/// The stream of a source of ours, which opens a return path and asks for an answer.
bytes record(small_machine& from) {
    bytes stream;
    migration::source source(from.state, from.control, {.downtime_limit = 1000ms});
    REQUIRE(source.start(make_output_channel(recorder{stream})));
    REQUIRE(source.wait());
    bytes commands;
    append(commands, {8, 0, 1, 0, 0});             // OPEN_RETURN_PATH
    append(commands, {8, 0, 2, 0, 4, 0, 0, 0, 1}); // PING 1
    stream.insert(stream.begin() + commands_at, commands.begin(), commands.end());
    return stream;
}

/// What a source does once it has sent its bytes.
enum class deed { stops, closes, resets, garbage, pings };
std::ostream& operator<<(std::ostream& out, deed what) {
    constexpr const char* names[] = {"stops", "closes", "resets", "garbage", "PINGs without end"};
    return out << names[static_cast<std::size_t>(what)];
}

/// What came of it.
struct outcome {
    bool in_time = false;
    result<void> arrived;
    bytes answers; // where the source still listened
};

outcome receive(small_machine& to, std::span<const std::byte> sent, deed then) {
    tcp_pair ends = connect_tcp();
    migration::destination destination(to.state, to.control, {.peer_timeout = 200ms});
    outcome ended;
    std::thread receiving([&] {
        ended.arrived = destination.run(std::unique_ptr<input_channel>(std::make_unique<socket_channel>(std::move(ends.one))));
    });
    unique_fd& fd = ends.other;
    const auto deadline = std::chrono::steady_clock::now() + 60s; // 200 ms and a little, and whatever this machine is busy with
    const auto is_over = [&] { return is_final(destination.status().state); };
    // Whoever gives up early doesn't take all.
    const auto send_all = [&](std::span<const std::byte> some) {
        while (!some.empty() && !is_over()) {
            pollfd ready{fd.get(), POLLOUT, 0};
            if (::poll(&ready, 1, 1) <= 0) continue;
            const ssize_t count = ::send(fd.get(), some.data(), some.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
            if (count < 0) break;
            some = some.subspan(static_cast<std::size_t>(count));
        }
    };
    send_all(sent);
    if (then == deed::closes) fd.reset();
    if (then == deed::resets) reset_connection(fd);
    if (then == deed::garbage) {
        bytes noise;
        std::uint32_t x = 1;
        for (std::size_t i = 0; i != 64 * 1024; ++i) noise.push_back(static_cast<std::byte>((x = x * 1664525 + 1013904223) >> 24));
        noise.front() = std::byte{0xff}; // 0 would be an end
        send_all(noise);
        ::shutdown(fd.get(), SHUT_WR);
    }
    if (then == deed::pings) {
        bytes many;
        for (int i = 0; i != 1000; ++i) append(many, {8, 0, 2, 0, 4, 0, 0, 0, 1});
        while (!is_over() && std::chrono::steady_clock::now() < deadline) send_all(many);
    }
    while (!is_over() && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(100us);
    ended.in_time = is_over();
    if (!ended.in_time) destination.cancel();
    receiving.join();
    std::byte some[256];
    for (ssize_t count = 0; fd && (count = ::recv(fd.get(), some, sizeof some, MSG_DONTWAIT)) > 0;)
        ended.answers.insert(ended.answers.end(), some, some + count);
    return ended;
}

/// The last message is SHUT, and it says that something went wrong.
bool says_failed(const bytes& answers) {
    bytes shut;
    append(shut, {0, 1, 0, 4, 0, 0, 0, 1});
    return answers.size() >= shut.size() && std::equal(shut.begin(), shut.end(), answers.end() - static_cast<std::ptrdiff_t>(shut.size()));
}

} // namespace

TEST_CASE("whatever the source does, and where: the destination ends with an error that names the stage, and starts no guest") {
    small_machine from(64, plain);
    fill(from);
    const bytes stream = record(from);
    small_machine to(64, plain);
    REQUIRE(receive(to, stream, deed::stops).arrived); // whole
    REQUIRE(to.starts == 1);
    to.stop();
    const leak_check leaks;
    std::size_t migrations = 0;
    for (const deed then : {deed::stops, deed::closes, deed::resets, deed::garbage, deed::pings}) {
        std::vector<std::size_t> places;
        // Commands come between two sections: before the RAM's first, and after all of them.
        if (then == deed::pings) places = {commands_at + 5, stream.size() - 1};
        const std::size_t count = then == deed::pings ? 0 : then == deed::stops ? 6 : 100;
        for (std::size_t i = 0; i != count; ++i) places.push_back(stream.size() * i / count);
        for (const std::size_t n : places) {
            CAPTURE(then, n, stream.size());
            const outcome ended = receive(to, std::span(stream).first(n), then);
            ++migrations;
            CHECK(ended.in_time);
            REQUIRE(ended.arrived.has_error());
            const error& why = ended.arrived.error();
            CAPTURE(why.message());
            CHECK(why.path().starts_with("active"));
            CHECK(to.starts == 1);
            switch (then) {
            case deed::stops: CHECK_THAT(why.message(), contains("read: timed out")); break;
            // With an answer that it hasn't read, closing is resetting.
            case deed::closes:
            case deed::resets: CHECK_THAT(why.message(),
                    contains("too early") || contains("Connection reset") || contains("Broken pipe"));
                break;
            case deed::pings: CHECK_THAT(why.message(), contains("write: timed out")); break;
            case deed::garbage: CHECK(why != errc::io); break;
            }
            if ((then == deed::stops || then == deed::garbage) && n >= commands_at + 5) CHECK(says_failed(ended.answers));
        }
    }
    leaks.check(migrations);
}

TEST_CASE("whoever connects besides the source isn't waited for, and nobody is let in once it has opened its channels") {
    small_machine from(64, plain);
    fill(from);
    const bytes stream = record(from);
    small_machine to(64, plain);
    migration::destination destination(to.state, to.control);
    REQUIRE(destination.listen("tcp:127.0.0.1:0"));
    const std::string uri = destination.uri();
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(); });
    auto main = connect(uri);
    REQUIRE(main);
    const auto send = [&](std::size_t begin, std::size_t end) {
        const std::span<const std::byte> some = std::span<const std::byte>(stream).subspan(begin, end - begin);
        CHECK((*main)->writev({&some, 1}));
    };
    send(0, commands_at);
    while (destination.status().state != migration::state::active) std::this_thread::sleep_for(100us);
    // Silent ones, one that says something else, and one that breaks off.
    std::vector<std::unique_ptr<duplex_channel>> strangers;
    for (int i = 0; i != 10; ++i) {
        auto one = connect(uri);
        REQUIRE(one);
        strangers.push_back(std::move(*one));
    }
    const bytes noise(100, std::byte{0x42});
    const std::span<const std::byte> said(noise);
    CHECK(strangers.front()->writev({&said, 1}));
    strangers.back().reset();
    // The setup's end is the first end of a section.
    bytes end;
    append_be64(end, 0x10);
    append(end, {0x7e});
    const auto found = std::search(stream.begin(), stream.end(), end.begin(), end.end());
    REQUIRE(found != stream.end());
    const auto setup = static_cast<std::size_t>(found - stream.begin()) + 9 + 4;
    send(commands_at, setup);
    const auto deadline = std::chrono::steady_clock::now() + 60s;
    std::string refusal;
    while (refusal.empty() && std::chrono::steady_clock::now() < deadline)
        if (auto late = connect(uri, {.timeout = 1s}); !late) refusal = late.error().message();
    CHECK_THAT(refusal, contains("Connection refused"));
    CHECK(destination.status().state == migration::state::active);
    send(setup, stream.size());
    receiving.join();
    INFO((arrived ? std::string("ok") : arrived.error().message()));
    CHECK(arrived);
    CHECK(to.starts == 1);
    to.stop();
}

TEST_CASE("pages that belong nowhere are refused by name, and the source is told") {
    small_machine from(64, plain);
    fill(from);
    const bytes stream = record(from);
    // The list of blocks ends with the first end of section.
    bytes end;
    append_be64(end, 0x10);
    append(end, {0x7e});
    const auto found = std::search(stream.begin(), stream.end(), end.begin(), end.end());
    REQUIRE(found != stream.end());
    const bytes setup(stream.begin(), found + 9 + 4);
    const bytes section_id(found + 9, found + 9 + 4);
    const auto with_page = [&](std::uint64_t offset, std::uint64_t flag, const std::string& name) {
        bytes more = setup;
        append(more, {2});
        more.insert(more.end(), section_id.begin(), section_id.end());
        append_be64(more, offset | flag);
        append(more, {static_cast<unsigned>(name.size())});
        for (const char c : name) append(more, {static_cast<unsigned char>(c)});
        if (flag == 2) append(more, {0});
        else more.resize(more.size() + page, std::byte{1});
        append_be64(more, 0x10);
        append(more, {0x7e});
        more.insert(more.end(), section_id.begin(), section_id.end());
        return more;
    };
    struct {
        std::uint64_t offset;
        std::string name;
        std::string said;
    } const cases[] = {
        {64 * page, "ram", "ram"},                   // just behind the end
        {~std::uint64_t{0} & ~(page - 1), "ram", "ram"},
        {0, "vga.vram", "vga.vram"},                 // no such block
        {0, "ra", "ra"},
        {0, "", "active"},
    };
    small_machine to(64, plain);
    for (const auto& one : cases) {
        for (const std::uint64_t flag : {std::uint64_t{2}, std::uint64_t{8}}) {
            CAPTURE(one.offset, one.name, flag);
            const outcome ended = receive(to, with_page(one.offset, flag, one.name), deed::stops);
            CHECK(ended.in_time);
            REQUIRE(ended.arrived.has_error());
            CAPTURE(ended.arrived.error().message());
            CHECK(ended.arrived.error() == errc::bad_ram);
            CHECK(ended.arrived.error().path().starts_with("active"));
            CHECK_THAT(ended.arrived.error().message(), contains(one.said));
            CHECK(says_failed(ended.answers));
            CHECK(to.starts == 0);
        }
    }
}

TEST_CASE("a machine that differs is refused by name; the source hears of it and runs on") {
    const small_options usual;
    small_options renamed, large_pages, other_machine, with_uuid;
    renamed.block = "mem";
    large_pages.machine.target_page_bits = 13;
    other_machine.machine.name = "large";
    struct {
        std::size_t from_pages, to_pages;
        small_options from, to;
        errc code;
        std::string said;
    } const cases[] = {
        {64, 64, usual, renamed, errc::bad_ram, "ram"},
        {64, 32, usual, usual, errc::bad_ram, "ram"},
        {32, 64, usual, usual, errc::bad_ram, "ram"},
        {64, 64, large_pages, usual, errc::bad_configuration, "page"},
        {64, 64, usual, large_pages, errc::bad_configuration, "page"},
        {64, 64, other_machine, usual, errc::bad_configuration, "large"},
    };
    for (const auto& one : cases) {
        CAPTURE(one.from.block, one.to.block, one.from_pages, one.to_pages);
        CAPTURE(one.from.machine.name, one.to.machine.name, one.from.machine.guest_page_size(), one.to.machine.guest_page_size());
        small_machine from(one.from_pages, one.from);
        small_machine to(one.to_pages, one.to);
        fill(from);
        from.start();
        const bytes before = from.memory();
        channel_pair channels = make_pair();
        migration::destination destination(to.state, to.control);
        result<void> arrived = error(errc::io);
        std::thread receiving([&] { arrived = destination.run(std::unique_ptr<input_channel>(std::move(channels.other))); });
        migration::source source(from.state, from.control);
        REQUIRE(source.start(std::unique_ptr<output_channel>(std::move(channels.one))));
        const result<void> left = source.wait();
        receiving.join();
        REQUIRE(arrived.has_error());
        CAPTURE(arrived.error().message());
        CHECK(arrived.error() == one.code);
        CHECK_THAT(arrived.error().message(), contains(one.said));
        REQUIRE(left.has_error());
        CAPTURE(left.error().message());
        // It may be refused before it has opened the way to say so.
        CHECK_THAT(left.error().message(), contains("return path"));
        CHECK(to.starts == 0);
        CHECK(from.runs());
        CHECK(std::equal(before.begin() + static_cast<std::ptrdiff_t>(before.size() / 8), before.end(),
            from.memory().begin() + static_cast<std::ptrdiff_t>(before.size() / 8)));
    }
}
