// SPDX-License-Identifier: BSL-1.0
// Wherever a migration ends, the guest runs at one side: not at both when the source gives up while the destination still
// loads, and not at none when a command that was to store it fails.
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/stream/tls.hpp>

#include <support/catch.hpp>
#include <support/certificates.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

#include "small_machine.hpp"
#include "tcp_pair.hpp"

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

/// What one end of `pair` sends arrives at the other so much later, an end of its output, too.
class long_way {
public:
    explicit long_way(std::chrono::milliseconds delay) : delay_(delay) {
        int near[2], far[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, near) == 0);
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, far) == 0);
        ends.one = std::make_unique<socket_channel>(unique_fd(near[0]));
        ends.other = std::make_unique<socket_channel>(unique_fd(far[0]));
        near_.reset(near[1]);
        far_.reset(far[1]);
        there_ = std::thread([this] { pass(near_.get(), far_.get()); });
        back_ = std::thread([this] { pass(far_.get(), near_.get()); });
    }
    ~long_way() {
        ends = {};
        ::shutdown(near_.get(), SHUT_RDWR);
        ::shutdown(far_.get(), SHUT_RDWR);
        there_.join();
        back_.join();
    }
    long_way(const long_way&) = delete;
    long_way& operator=(const long_way&) = delete;

    channel_pair ends;

private:
    using clock = std::chrono::steady_clock;
    struct piece {
        clock::time_point due;
        std::vector<std::byte> bytes; ///< none at the end
    };

    void pass(int from, int to) const {
        std::deque<piece> under_way;
        for (bool ended = false; !ended || !under_way.empty();) {
            const auto until_due = [&] { return std::chrono::ceil<std::chrono::milliseconds>(under_way.front().due - clock::now()); };
            if (!under_way.empty() && until_due() <= 0ms) {
                const piece next = std::move(under_way.front());
                under_way.pop_front();
                if (next.bytes.empty()) ::shutdown(to, SHUT_WR);
                for (std::span<const std::byte> rest(next.bytes); !rest.empty();) {
                    const ssize_t sent = ::send(to, rest.data(), rest.size(), MSG_NOSIGNAL);
                    if (sent <= 0) return;
                    rest = rest.subspan(static_cast<std::size_t>(sent));
                }
                continue;
            }
            pollfd ready{ended ? -1 : from, POLLIN, 0};
            if (::poll(&ready, 1, under_way.empty() ? -1 : static_cast<int>(until_due().count())) <= 0) continue;
            std::vector<std::byte> bytes(64 * 1024);
            const ssize_t got = ::recv(from, bytes.data(), bytes.size(), MSG_DONTWAIT);
            ended = got <= 0;
            bytes.resize(got > 0 ? static_cast<std::size_t>(got) : 0);
            under_way.push_back({clock::now() + delay_, std::move(bytes)});
        }
    }

    std::chrono::milliseconds delay_;
    unique_fd near_;
    unique_fd far_;
    std::thread there_;
    std::thread back_;
};

/// The same channels, with TLS.
channel_pair with_tls(channel_pair plain) {
    const temporary_directory directory;
    write_keys(directory.path(), "qemu:5ca1ab1e5ca1ab1e5ca1ab1e5ca1ab1e\n");
    const auto client = tls_credentials::psk(directory.path(), tls_endpoint::client);
    const auto server = tls_credentials::psk(directory.path(), tls_endpoint::server);
    REQUIRE(message_of(client) == "");
    REQUIRE(message_of(server) == "");
    result<std::unique_ptr<duplex_channel>> accepted = error(errc::io);
    std::thread accepting([&] { accepted = tls_server(std::move(plain.other), *server); });
    result<std::unique_ptr<duplex_channel>> connected = tls_client(std::move(plain.one), *client, "");
    accepting.join();
    REQUIRE(message_of(connected) == "");
    REQUIRE(message_of(accepted) == "");
    return {std::move(*connected), std::move(*accepted)};
}
channel_pair connect_tcp_channels() {
    tcp_pair ends = connect_tcp();
    return {std::make_unique<socket_channel>(std::move(ends.one)), std::make_unique<socket_channel>(std::move(ends.other))};
}

/// A user's own kind of channel, which has what its users need and nothing else.
struct users_own {
    std::unique_ptr<duplex_channel> inner;

    result<std::size_t> write_some(std::span<const std::byte> from) {
        if (result<void> written = inner->writev({&from, 1}); !written) return written.error();
        return from.size();
    }
    result<std::size_t> read_some(std::span<std::byte> into) { return inner->read_some({&into, 1}); }
    void shutdown() noexcept { inner->shutdown(); }
    void end_output() noexcept { inner->end_output(); }
    bool is_ended() noexcept { return inner->is_ended(); }
    result<std::unique_ptr<duplex_channel>> get_return_path() { return inner->get_return_path(); }
};

} // namespace

TEST_CASE("a destination that is slow to load doesn't start a guest that the source has taken back") {
    const std::string kind = GENERATE("tcp", "unix", "tls", "user's own");
    const bool cancels = GENERATE(true, false); // or loses its patience
    if (!cancels && (kind == "unix" || kind == "user's own")) return; // as with tcp
    CAPTURE(kind, cancels);
    channel_pair channels = kind == "tcp" ? connect_tcp_channels() : make_pair();
    if (kind == "tls") channels = with_tls(std::move(channels));
    std::unique_ptr<output_channel> out = std::move(channels.one);
    std::unique_ptr<input_channel> in = std::move(channels.other);
    if (kind == "user's own") {
        out = make_output_channel(users_own{std::unique_ptr<duplex_channel>(dynamic_cast<duplex_channel*>(out.release()))});
        in = make_input_channel(users_own{std::unique_ptr<duplex_channel>(dynamic_cast<duplex_channel*>(in.release()))});
    }
    small_machine from(64);
    small_machine to(64);
    slow_card here;
    slow_card there{.takes = cancels ? 1000ms : 1500ms};
    REQUIRE(from.state.add_device<vmstate_slow_card>(here));
    REQUIRE(to.state.add_device<vmstate_slow_card>(there));
    from.start();
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::move(in)); });
    migration::source source(from.state, from.control, {.peer_timeout = cancels ? 60s : 100ms});
    REQUIRE(source.start(std::move(out)));
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

TEST_CASE("however far away the destination is: a cancellation near the end leaves one guest running") {
    // The answer is on its way for longer than anybody waits who doesn't wait for it.
    const bool tls = GENERATE(false, true);
    CAPTURE(tls);
    small_machine from(64);
    small_machine to(64);
    fill(from);
    from.start();
    long_way way(tls ? 150ms : 600ms); // the handshake goes there and back, too
    slow_card here;
    slow_card there{.takes = tls ? 1000ms : 0ms};
    REQUIRE(from.state.add_device<vmstate_slow_card>(here));
    REQUIRE(to.state.add_device<vmstate_slow_card>(there));
    channel_pair ends = std::move(way.ends);
    if (tls) ends = with_tls(std::move(ends));
    migration::destination destination(to.state, to.control);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(std::move(ends.other)); });
    // The measured rate of a link that holds little is none.
    migration::source source(from.state, from.control, {.downtime_limit = 60s});
    REQUIRE(source.start(std::move(ends.one)));
    while (source.status().ram.downtime_bytes == 0 && !is_final(source.status().state)) std::this_thread::sleep_for(1ms);
    std::this_thread::sleep_for(50ms); // all has been sent
    source.cancel();
    const result<void> left = source.wait();
    const bool runs_here = from.runs();
    receiving.join();
    INFO(message_of(left) + "; " + message_of(arrived));
    CHECK(runs_here != (to.starts == 1));
    CHECK(left.has_value() == (to.starts == 1));
    CHECK(arrived.has_value() == (to.starts == 1));
    CHECK((source.status().state == (tls ? migration::state::cancelled : migration::state::completed)));
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
