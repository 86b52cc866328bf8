// SPDX-License-Identifier: BSL-1.0
// Sockets: their URIs, listeners, connecting, both directions at once, bounds on waiting, and what ends a wait.
#include <support/bytes.hpp>
#include <support/catch.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

#include <vmstate/migrate.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/buffered_writer.hpp>
#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/socket_channel.hpp>

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

using namespace vmstate;
using namespace std::chrono_literals;
using namespace vmstate::tests;

namespace {

/// The descriptors that this process has open, with what they are.
std::set<std::pair<std::string, std::string>> descriptors() {
    std::set<std::pair<std::string, std::string>> found;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
        std::error_code gone; // the directory's own
        const auto target = std::filesystem::read_symlink(entry.path(), gone);
        if (!gone && target.string().find("/proc/") != 0) found.emplace(entry.path().filename(), target);
    }
    return found;
}

std::span<const std::byte> bytes_of(std::string_view text) { return std::as_bytes(std::span(text)); }

using channel_pointer = std::unique_ptr<duplex_channel>;

/// Both ends of a connection.
struct connection {
    channel_pointer source;      // connected
    channel_pointer destination; // accepted
};
connection connect_by(socket_listener& listener) {
    // The system completes a connection that waits in the backlog, so that one thread will do.
    auto source = connect(listener.uri());
    REQUIRE(message_of(source) == "");
    auto destination = listener.accept();
    REQUIRE(message_of(destination) == "");
    return {std::move(*source), std::move(*destination)};
}
connection socket_pair() {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    return {std::make_unique<socket_channel>(unique_fd(ends[0])), std::make_unique<socket_channel>(unique_fd(ends[1]))};
}

bool has_ipv6() {
    const auto listener = socket_listener::listen("tcp:[::1]:0");
    return listener.has_value();
}

std::string uri_of_kind(const std::string& kind, const temporary_directory& scratch) {
    if (kind == "unix") return "unix:" + scratch.file("socket");
    if (kind == "IPv6") return "tcp:[::1]:0";
    if (kind == "name") return "tcp:localhost:0";
    if (kind == "all") return "tcp::0";
    return "tcp:127.0.0.1:0";
}

} // namespace

TEST_CASE("tcp: and unix: URIs are taken apart as QEMU does it") {
    const auto tcp = [](std::string_view text) { return std::get<tcp_uri>(parse_uri(text).value()); };
    CHECK(tcp("tcp:localhost:4444").host == "localhost");
    CHECK(tcp("tcp:localhost:4444").port == 4444);
    CHECK(tcp("tcp:192.168.1.2:1").host == "192.168.1.2");
    CHECK(tcp("tcp:[fe80::1%eth0]:65535").host == "fe80::1%eth0");
    CHECK(tcp("tcp:[fe80::1%eth0]:65535").port == 65535);
    CHECK(tcp("tcp::0").host.empty());
    CHECK(std::get<unix_uri>(parse_uri("unix:/run/a,b:c").value()).path == "/run/a,b:c");

    const std::string too_long = "unix:/" + std::string(107, 'x');
    for (const std::string bad : {"tcp:", "tcp:host", "tcp:host:", "tcp:host:x", "tcp:host:65536", "tcp:host:-1", "tcp:::1:80",
             "tcp:[::1]", "tcp:[::1]80", "tcp:[]:80", "tcp:host:80x", "unix:", too_long.c_str()}) {
        CAPTURE(bad);
        const auto parsed = parse_uri(bad);
        REQUIRE(parsed.has_error());
        CHECK(parsed.error() == errc::bad_uri);
    }
    CHECK(message_of(parse_uri(too_long.substr(0, too_long.size() - 1))) == "");
    const auto option = parse_uri("tcp:localhost:0,to=100,ipv4=on");
    REQUIRE(option.has_error());
    CHECK(option.error() == errc::unsupported);
    CHECK_THAT(option.error().message(), contains("to=100,ipv4=on"));
    for (const char* known : {"vsock:1:2", "rdma:host:1"})
        CHECK(parse_uri(known).error() == errc::unsupported);
    CHECK(parse_uri("udp:host:1").error() == errc::bad_uri);

    CHECK(connect("tcp::4444").error() == errc::bad_uri);
    CHECK(connect("tcp:localhost:0").error() == errc::bad_uri);
    CHECK(connect("file:/tmp/x").error() == errc::unsupported);
    CHECK(socket_listener::listen("exec:cat").error() == errc::unsupported);
}

TEST_CASE("bytes go both ways over every kind of socket") {
    const std::string kind = GENERATE("IPv4", "IPv6", "name", "all", "unix");
    CAPTURE(kind);
    if (kind == "IPv6" && !has_ipv6()) return vmstate::tests::skip("this machine has no IPv6 loopback address");
    const auto before = descriptors();
    {
        const temporary_directory scratch;
        auto listener = socket_listener::listen(uri_of_kind(kind, scratch));
        REQUIRE(message_of(listener) == "");
        CHECK(message_of(parse_uri(listener->uri())) == "");
        CHECK_THAT(listener->uri(), !Catch::Matchers::EndsWith(":0"));
        connection ends = connect_by(*listener);
        const std::vector<std::byte> forth = pattern(5'000);
        const std::vector<std::byte> back = pattern(3'001);
        REQUIRE(message_of(put(*ends.source, forth)) == "");
        REQUIRE(message_of(put(*ends.destination, back)) == "");
        CHECK(get(*ends.destination, forth.size()).value() == forth);
        CHECK(get(*ends.source, back.size()).value() == back);
        REQUIRE(ends.source->close());
        REQUIRE(ends.source->close());
        std::byte one[1];
        CHECK(get_some(*ends.destination, one).value() == 0);
        CHECK_THAT(message_of(get_some(*ends.source, one)), contains("channel is closed"));
        CHECK_THAT(message_of(put(*ends.source, one)), contains("channel is closed"));
        CHECK_FALSE(ends.source->get_return_path());
        // The peer is gone: an error, and no signal.
        const result<void> written = [&] {
            for (int i = 0; i < 1000; ++i)
                if (auto sent = put(*ends.destination, forth); !sent) return sent;
            return result<void>();
        }();
        CHECK(written.error() == errc::io);
    }
    CHECK(descriptors() == before);
}

TEST_CASE("a listener without a host takes IPv4 and IPv6") {
    auto listener = socket_listener::listen("tcp::0");
    REQUIRE(message_of(listener) == "");
    const std::uint16_t port = std::get<tcp_uri>(parse_uri(listener->uri()).value()).port;
    CHECK(port != 0);
    auto four = connect("tcp:127.0.0.1:" + std::to_string(port));
    REQUIRE(message_of(four) == "");
    CHECK(listener->accept());
    if (has_ipv6()) {
        auto six = connect("tcp:[::1]:" + std::to_string(port));
        REQUIRE(message_of(six) == "");
        CHECK(listener->accept());
    }
}

TEST_CASE("one listener accepts many, and what it accepted lives on without it") {
    const temporary_directory scratch;
    std::vector<connection> all;
    std::string uri;
    {
        auto listener = socket_listener::listen("unix:" + scratch.file("many"));
        REQUIRE(message_of(listener) == "");
        uri = listener->uri();
        for (int i = 0; i < 8; ++i) all.push_back(connect_by(*listener));
        socket_listener moved = std::move(*listener);
        all.push_back(connect_by(moved));
    }
    CHECK_FALSE(std::filesystem::exists(scratch.file("many")));
    CHECK_FALSE(connect(uri));
    for (std::size_t i = 0; i < all.size(); ++i) {
        const std::byte sent[1] = {static_cast<std::byte>(i)};
        REQUIRE(put(*all[i].source, sent));
        CHECK(get(*all[i].destination, 1).value().at(0) == sent[0]);
    }
}

TEST_CASE("a unix socket that is left over is replaced, one in use and other files are not") {
    const temporary_directory scratch;
    const std::string path = scratch.file("socket");
    {
        // As a process that was killed leaves it.
        const unique_fd dead(::socket(AF_UNIX, SOCK_STREAM, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::strcpy(address.sun_path, path.c_str());
        REQUIRE(::bind(dead.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0);
    }
    REQUIRE(std::filesystem::exists(path));
    auto first = socket_listener::listen("unix:" + path);
    REQUIRE(message_of(first) == "");
    const auto second = socket_listener::listen("unix:" + path);
    CHECK_THAT(message_of(second), contains("unix:" + path) && contains("Address already in use"));
    // To have asked was no connection to the one who listens.
    first->set_timeout(50ms);
    CHECK_THAT(message_of(first->accept()), contains("accepting timed out after 50 ms"));
    CHECK(connect("unix:" + path));

    std::ofstream(scratch.file("text")) << "precious";
    CHECK_THAT(message_of(socket_listener::listen("unix:" + scratch.file("text"))), contains("Address already in use"));
    CHECK(std::filesystem::file_size(scratch.file("text")) == 8);

    // Whoever has replaced the path keeps it.
    REQUIRE(std::filesystem::remove(path));
    std::ofstream(path) << "somebody else's";
    { const socket_listener gone = std::move(*first); }
    CHECK(std::filesystem::exists(path));
}

TEST_CASE("an address that is taken, a name that isn't there, a port where nobody listens") {
    auto listener = socket_listener::listen("tcp:127.0.0.1:0");
    REQUIRE(message_of(listener) == "");
    CHECK_THAT(message_of(socket_listener::listen(listener->uri())), contains("Address already in use"));
    const std::string uri = listener->uri();
    { const socket_listener gone = std::move(*listener); }
    CHECK_THAT(message_of(connect(uri)), contains(uri) && contains("Connection refused"));
    CHECK_THAT(message_of(connect("tcp:no-such-host.invalid:1")), contains("tcp:no-such-host.invalid:1"));
    CHECK_THAT(message_of(connect("unix:/nowhere/at/all")), contains("No such file"));
}

TEST_CASE("cancel ends a blocked accept, and every later one") {
    const std::string kind = GENERATE("IPv4", "name", "unix");
    const auto before = descriptors();
    {
        const temporary_directory scratch;
        auto listener = socket_listener::listen(uri_of_kind(kind, scratch));
        REQUIRE(message_of(listener) == "");
        auto accepting = std::async(std::launch::async, [&] { return message_of(listener->accept()); });
        accepting.wait_for(20ms); // usually blocked by then; and if not, the outcome is the same
        listener->cancel();
        CHECK_THAT(accepting.get(), contains("accepting was cancelled"));
        CHECK_THAT(message_of(listener->accept()), contains("accepting was cancelled"));
    }
    CHECK(descriptors() == before);
}

TEST_CASE("connecting can be given up") {
    // A backlog that is full: on a unix socket connecting waits then for as long as it takes.
    const temporary_directory scratch;
    auto listener = socket_listener::listen("unix:" + scratch.file("full"), 0);
    REQUIRE(message_of(listener) == "");
    std::vector<channel_pointer> waiting;
    const auto before = descriptors();
    std::string last;
    for (int i = 0; i < 8 && last.empty(); ++i) {
        auto one = connect(listener->uri(), {.timeout = 100ms});
        last = message_of(one);
        if (one) waiting.push_back(std::move(*one));
    }
    CHECK_THAT(last, contains("connecting timed out after 100 ms"));
    CHECK(descriptors().size() == before.size() + waiting.size());
    std::stop_source stop;
    auto connecting = std::async(
        std::launch::async, [&] { return message_of(connect(listener->uri(), {.stop = stop.get_token()})); });
    connecting.wait_for(20ms);
    stop.request_stop();
    CHECK_THAT(connecting.get(), contains("connecting was cancelled"));
    auto tcp = socket_listener::listen("tcp:127.0.0.1:0");
    REQUIRE(message_of(tcp) == "");
    CHECK_THAT(message_of(connect(tcp->uri(), {.stop = stop.get_token()})), contains("connecting was cancelled"));
}

TEST_CASE("whatever the parts and however small the socket's buffers, all bytes arrive in order") {
    connection ends = socket_pair();
    auto& source = static_cast<socket_channel&>(*ends.source);
    const int tiny = 1;
    REQUIRE(::setsockopt(source.native_handle(), SOL_SOCKET, SO_SNDBUF, &tiny, sizeof tiny) == 0);
    const bool bounded = GENERATE(false, true);
    const bool blocking = GENERATE(false, true);
    if (!blocking) REQUIRE(::fcntl(source.native_handle(), F_SETFL, O_NONBLOCK) == 0);
    if (bounded) REQUIRE(source.set_timeout(60s));
    const std::vector<std::byte> all = pattern(3'000'000);
    // More parts than one call takes, empty ones among them, and one that is larger than any buffer.
    std::vector<std::span<const std::byte>> parts;
    std::size_t cut = 0;
    for (std::size_t i = 0; parts.size() < 3 * socket_channel::max_parts; ++i) {
        const std::size_t size = i * i % 700;
        parts.push_back(std::span(all).subspan(cut, size));
        cut += size;
    }
    REQUIRE(cut < all.size());
    parts.push_back(std::span(all).subspan(cut));
    auto reading = std::async(std::launch::async, [&] { return get(*ends.destination, all.size()); });
    REQUIRE(message_of(source.writev(parts)) == "");
    CHECK(reading.get().value() == all);
    CHECK(source.writev({}));
}

TEST_CASE("a read fills several parts") {
    connection ends = socket_pair();
    const std::vector<std::byte> all = pattern(100);
    REQUIRE(put(*ends.source, all));
    std::vector<std::byte> a(30), b(0), c(50), d(200);
    const std::array<std::span<std::byte>, 4> parts{a, b, c, d};
    CHECK(ends.destination->read_some(parts).value() == 100);
    CHECK(std::equal(a.begin(), a.end(), all.begin()));
    CHECK(std::equal(c.begin(), c.end(), all.begin() + 30));
    CHECK(std::equal(d.begin(), d.begin() + 20, all.begin() + 80));
    CHECK(ends.destination->read_some({&parts[1], 1}).error() == errc::invalid_argument);
}

TEST_CASE("the return path is used while 64 MiB go forward") {
    const std::string kind = GENERATE("IPv4", "unix");
    const auto before = descriptors();
    {
        const temporary_directory scratch;
        auto listener = socket_listener::listen(uri_of_kind(kind, scratch));
        REQUIRE(message_of(listener) == "");
        connection ends = connect_by(*listener);
        auto source_return = ends.source->get_return_path();
        auto destination_return = ends.destination->get_return_path();
        REQUIRE(message_of(source_return) == "");
        REQUIRE(message_of(destination_return) == "");

        // For each MiB that arrives its number goes back.
        constexpr std::size_t mebibyte = 1 << 20;
        const std::vector<std::byte> block = pattern(mebibyte);
        auto receiver = std::async(std::launch::async, [&]() -> std::string {
            for (std::uint8_t i = 0; i < 64; ++i) {
                const auto got = get(*ends.destination, mebibyte);
                if (!got || *got != block) return "forward: " + message_of(got);
                const std::byte number[1] = {static_cast<std::byte>(i)};
                if (auto sent = put(**destination_return, number); !sent) return message_of(sent);
            }
            return message_of(ends.destination->close());
        });
        auto listening = std::async(std::launch::async, [&] { return get(**source_return, 1000); });
        std::string sent;
        for (int i = 0; i < 64 && sent.empty(); ++i) sent = message_of(put(*ends.source, block));
        CHECK(sent == "");
        CHECK(receiver.get() == "");
        // The destination's socket is closed when both of its channels are.
        CHECK((*destination_return)->close());
        const auto numbers = listening.get();
        REQUIRE(message_of(numbers) == "");
        REQUIRE(numbers->size() == 64);
        for (std::size_t i = 0; i < 64; ++i) CHECK((*numbers)[i] == static_cast<std::byte>(i));
    }
    CHECK(descriptors() == before);
}

TEST_CASE("shutdown from another thread ends a read and a write that wait, on both channels and at both ends") {
    const bool bounded = GENERATE(false, true);
    const bool by_return_path = GENERATE(false, true);
    connection ends = socket_pair();
    if (bounded) ends.source->set_timeout(60s);
    auto back = ends.source->get_return_path();
    REQUIRE(message_of(back) == "");
    const std::vector<std::byte> much = pattern(16 << 20);
    auto writing = std::async(std::launch::async, [&] { return message_of(put(*ends.source, much)); });
    auto reading = std::async(std::launch::async, [&] {
        std::byte one[1];
        return message_of(get_some(**back, one));
    });
    writing.wait_for(20ms);
    (by_return_path ? *back : ends.source)->shutdown();
    CHECK_THAT(writing.get(), contains("channel was shut down"));
    CHECK_THAT(reading.get(), contains("channel was shut down"));
    CHECK_THAT(message_of(put(*ends.source, much)), contains("channel was shut down"));
    // The peer reads what was under way, and then the end.
    const auto rest = get(*ends.destination, much.size());
    REQUIRE(message_of(rest) == "");
    CHECK(rest->size() < much.size());
    CHECK(ends.source->close());
    CHECK((*back)->close());
    ends.source->shutdown(); // harmless
}

TEST_CASE("a peer that stops reading or writing is not waited for longer than the timeout") {
    connection ends = socket_pair();
    REQUIRE(ends.source->set_timeout(30ms));
    std::byte one[1] = {};
    CHECK_THAT(message_of(get_some(*ends.source, one)), contains("read: timed out after 30 ms"));
    const std::vector<std::byte> much = pattern(16 << 20);
    const auto written = put(*ends.source, much);
    REQUIRE_FALSE(written);
    CHECK(written.error() == errc::io);
    CHECK_THAT(written.error().message(), contains("write: timed out after 30 ms"));

    // The return path begins with its origin's timeout, and has its own then.
    auto back = ends.source->get_return_path();
    REQUIRE(message_of(back) == "");
    CHECK_THAT(message_of(get_some(**back, one)), contains("read: timed out after 30 ms"));
    REQUIRE((*back)->set_timeout(0ms));
    auto reading = std::async(std::launch::async, [&] { return get_some(**back, one).value(); });
    CHECK(reading.wait_for(100ms) == std::future_status::timeout);
    REQUIRE(put(*ends.destination, bytes_of("x")));
    CHECK(reading.get() == 1);
}

TEST_CASE("a peer that is slow, but moves, is waited for") {
    connection ends = socket_pair();
    auto& source = static_cast<socket_channel&>(*ends.source);
    const int small = 4096;
    REQUIRE(::setsockopt(source.native_handle(), SOL_SOCKET, SO_SNDBUF, &small, sizeof small) == 0);
    REQUIRE(source.set_timeout(10s));
    const std::vector<std::byte> all = pattern(100'000);
    auto reading = std::async(std::launch::async, [&] {
        std::vector<std::byte> got;
        while (got.size() < all.size()) {
            std::this_thread::sleep_for(1ms);
            const auto some = get(*ends.destination, std::min<std::size_t>(2'000, all.size() - got.size()));
            if (!some) break;
            got.insert(got.end(), some->begin(), some->end());
        }
        return got;
    });
    CHECK(message_of(put(source, all)) == "");
    CHECK(reading.get() == all);
}

TEST_CASE("closing doesn't cost the peer what is under way to it, though something it wrote was never read") {
    auto listener = socket_listener::listen("tcp:127.0.0.1:0");
    REQUIRE(message_of(listener) == "");
    connection ends = connect_by(*listener);
    REQUIRE(put(*ends.destination, pattern(1000)));
    const std::vector<std::byte> all = pattern(2 << 20);
    auto writing = std::async(std::launch::async, [&] {
        const auto sent = put(*ends.source, all);
        return sent ? message_of(ends.source->close()) : message_of(sent);
    });
    // Only what the socket's buffers don't hold has to be read before close() is called.
    const auto got = get(*ends.destination, all.size());
    CHECK(writing.get() == "");
    REQUIRE(message_of(got) == "");
    CHECK(*got == all);
}

TEST_CASE("channels in one direction say that they have no return path") {
    int ends[2];
    REQUIRE(::pipe2(ends, O_CLOEXEC) == 0);
    fd_input_channel in{unique_fd(ends[0])};
    fd_output_channel out{unique_fd(ends[1])};
    CHECK(in.get_return_path().error() == errc::unsupported);
    CHECK(out.get_return_path().error() == errc::unsupported);
    // A pipe can bound its waits; a file doesn't wait.
    CHECK(in.set_timeout(1s));
    fd_input_channel file{unique_fd(::open("/dev/null", O_RDONLY | O_CLOEXEC))};
    CHECK_FALSE(file.set_timeout(1s));
}

namespace {

/// A user's type that has all that a channel may have.
struct users_own {
    std::vector<channel_pointer>* given;
    std::chrono::milliseconds* timeout;
    result<std::size_t> write_some(std::span<const std::byte> from) { return from.size(); }
    bool set_timeout(std::chrono::milliseconds wanted) noexcept {
        *timeout = wanted;
        return true;
    }
    result<channel_pointer> get_return_path() {
        channel_pointer last = std::move(given->back());
        given->pop_back();
        return last;
    }
};

} // namespace

TEST_CASE("a channel of the user's own has the return path and the timeout that its type has") {
    connection ends = socket_pair();
    std::vector<channel_pointer> given;
    given.push_back(std::move(ends.source));
    std::chrono::milliseconds timeout{};
    const auto channel = make_output_channel(users_own{&given, &timeout});
    CHECK(channel->set_timeout(7ms));
    CHECK(timeout == 7ms);
    CHECK(channel->get_return_path());
    CHECK(given.empty());
}

namespace {

struct counter_state {
    std::uint32_t value = 0;
    std::vector<std::uint8_t> bytes = std::vector<std::uint8_t>(100'000);
    std::uint32_t size = 100'000;
};
inline constexpr auto vmstate_counter = describe<counter_state>({.name = "counter", .version_id = 1},
    field<&counter_state::value>, field<&counter_state::size>,
    field<&counter_state::bytes, length<&counter_state::size>>);

} // namespace

TEST_CASE("fd: of a socket goes both ways, whoever connected it") {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    opened_output output = open_output("fd:" + std::to_string(ends[0]));
    opened_input input = open_input("fd:" + std::to_string(ends[1]));
    REQUIRE(output.has_value());
    REQUIRE(input.has_value());
    const result<std::unique_ptr<duplex_channel>> answer = (*input)->get_return_path();
    const result<std::unique_ptr<duplex_channel>> heard = (*output)->get_return_path();
    REQUIRE(answer.has_value());
    REQUIRE(heard.has_value());
    const std::array<std::byte, 3> bytes{std::byte{1}, std::byte{2}, std::byte{3}};
    const std::span<const std::byte> whole(bytes);
    REQUIRE((*answer)->writev({&whole, 1}));
    std::array<std::byte, 3> got{};
    std::span<std::byte> room(got);
    REQUIRE((*heard)->read_some({&room, 1}).value() == 3);
    CHECK(got == bytes);
}

TEST_CASE("open_output connects and open_input listens, as in QEMU") {
    const std::string kind = GENERATE("IPv4", "unix");
    const auto before = descriptors();
    {
        const temporary_directory scratch;
        std::string uri = uri_of_kind(kind, scratch);
        if (kind == "IPv4") { // a port that is free now
            auto listener = socket_listener::listen(uri);
            REQUIRE(message_of(listener) == "");
            uri = listener->uri();
        }
        counter_state there;
        auto loading = std::async(std::launch::async, [&] {
            machine destination{{.name = "test"}};
            destination.add_device<vmstate_counter>(there);
            return message_of(load(destination, *open_input(uri)));
        });
        counter_state here;
        here.value = 0x12345678;
        here.bytes[99'999] = 0x5a;
        machine source{{.name = "test"}};
        source.add_device<vmstate_counter>(here);
        // The other thread may not listen yet.
        std::string saved;
        for (int i = 0; i < 2000; ++i) {
            auto out = open_output(uri);
            if (out.has_error()) {
                std::this_thread::sleep_for(5ms);
                continue;
            }
            saved = message_of(save(source, *out));
            break;
        }
        CHECK(saved == "");
        CHECK(loading.get() == "");
        CHECK(there.value == here.value);
        CHECK(there.bytes == here.bytes);
    }
    CHECK(descriptors() == before);
    CHECK_THAT(message_of(open_output("unix:/nowhere/at/all")), contains("No such file"));
}
