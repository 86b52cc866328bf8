// SPDX-License-Identifier: BSL-1.0
// A live migration over a slow and far link: two network namespaces with 100 Mbit/s between them, and before the
// destination a relay that delays by 50 ms each way and stalls at random. A guest moves; a cancelled migration, and one
// whose link goes away, leave it where it is.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <filesystem>
#include <iostream>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "peer_process.hpp"

using namespace vmstate;
using namespace vmstate::tests;

TEST_CASE("peer source", "[.]") { peer::be_source(); }
TEST_CASE("peer destination", "[.]") { peer::be_destination(); }

namespace {

bool run(const std::string& command) { return std::system((command + " >/dev/null 2>&1").c_str()) == 0; }

/// Two network namespaces, 10.77.0.1 and 10.77.0.2, with 100 Mbit/s between them. They go away with this object, and
/// those that a killed test has left go with the next.
class slow_link {
public:
    slow_link() = default;
    ~slow_link() {
        for (const std::string& name : {near, far}) run("ip netns delete " + name);
    }
    slow_link(const slow_link&) = delete;
    slow_link& operator=(const slow_link&) = delete;

    void cut() const { REQUIRE(run("ip -n " + near + " link set link0 down")); }

    const std::string near = prefix() + std::to_string(::getpid()) + "-near";
    const std::string far = prefix() + std::to_string(::getpid()) + "-far";
    const std::string missing = set_up(); ///< why there is no such link on this machine

private:
    static std::string prefix() { return "vmstate-test-"; }
    std::string set_up() const {
        remove_abandoned();
        if (::geteuid() != 0) return "only root can make network namespaces";
        if (!run("ip -V") || !run("tc -V")) return "no ip or tc in $PATH (Debian: iproute2)";
        if (!run("ip netns add " + near) || !run("ip netns add " + far)) return "network namespaces are not permitted here";
        const bool connected = run("ip -n " + near + " link add link0 type veth peer name link0 netns " + far) &&
                               run("ip -n " + near + " address add 10.77.0.1/24 dev link0") &&
                               run("ip -n " + far + " address add 10.77.0.2/24 dev link0") &&
                               run("ip -n " + far + " link set lo up") && run("ip -n " + near + " link set link0 up") &&
                               run("ip -n " + far + " link set link0 up");
        if (!connected) return "no veth pair between network namespaces here";
        for (const std::string& name : {near, far})
            if (!run("ip netns exec " + name + " tc qdisc add dev link0 root tbf rate 100mbit burst 32kb latency 400ms"))
                return "this kernel has no token bucket filter (sch_tbf)";
        return "";
    }
    static void remove_abandoned() {
        std::error_code none;
        for (const auto& entry : std::filesystem::directory_iterator("/run/netns", none)) {
            const std::string name = entry.path().filename().string();
            if (!name.starts_with(prefix())) continue;
            pid_t owner = 0;
            std::from_chars(name.data() + prefix().size(), name.data() + name.size(), owner);
            if (owner > 0 && ::kill(owner, 0) != 0 && errno == ESRCH) run("ip netns delete " + name);
        }
    }
};

/// Takes connections at an address of a namespace and passes what comes on to a port there, 50 ms later each way; at
/// times, not before it has stalled for some more.
class far_relay {
public:
    far_relay(const std::string& name, std::uint16_t to_port, unsigned seed) : to_port_(to_port), seed_(seed) {
        thread_ = std::thread([this, name] { run(name); });
        while (port_ == 0) std::this_thread::sleep_for(1ms);
    }
    ~far_relay() {
        quit_ = true;
        thread_.join();
    }
    /// 1 where it couldn't be set up.
    std::uint16_t port() const { return static_cast<std::uint16_t>(port_.load()); }
    unsigned stalls() const { return stalls_; }

private:
    using clock = std::chrono::steady_clock;
    struct piece {
        clock::time_point due;
        std::vector<std::byte> bytes;
    };
    static constexpr std::size_t most_under_way = 1 << 20; ///< each way, as a router has so much memory and no more

    static sockaddr_in address(const char* host, std::uint16_t port) {
        sockaddr_in made{};
        made.sin_family = AF_INET;
        made.sin_port = htons(port);
        ::inet_pton(AF_INET, host, &made.sin_addr);
        return made;
    }
    void run(const std::string& name) {
        // Of this thread alone.
        const unique_fd space(::open(("/run/netns/" + name).c_str(), O_RDONLY | O_CLOEXEC));
        const unique_fd listener(::setns(space.get(), CLONE_NEWNET) == 0 ? ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1);
        sockaddr_in here = address("10.77.0.2", 0);
        socklen_t size = sizeof here;
        if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&here), size) != 0 || ::listen(listener.get(), 4) != 0 ||
            ::getsockname(listener.get(), reinterpret_cast<sockaddr*>(&here), &size) != 0) {
            port_ = 1;
            return;
        }
        port_ = ntohs(here.sin_port);
        while (!quit_) {
            pollfd ready{listener.get(), POLLIN, 0};
            if (::poll(&ready, 1, 10) <= 0) continue;
            const unique_fd near(::accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC));
            const unique_fd far(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
            const sockaddr_in there = address("127.0.0.1", to_port_);
            if (::connect(far.get(), reinterpret_cast<const sockaddr*>(&there), sizeof there) != 0) continue;
            const int on = 1;
            for (const int fd : {near.get(), far.get()}) ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
            std::thread back([&] { pass(far.get(), near.get(), seed_ + 1); });
            pass(near.get(), far.get(), seed_);
            back.join();
        }
    }
    void pass(int from, int to, unsigned seed) {
        std::mt19937 random(seed);
        std::deque<piece> under_way;
        std::size_t size = 0;
        clock::time_point stalled_until{};
        bool ended = false;
        while (!quit_ && !(ended && under_way.empty())) {
            const clock::time_point now = clock::now();
            if (!under_way.empty() && under_way.front().due <= now) {
                const piece& first = under_way.front();
                if (!send_all(to, first.bytes)) break;
                size -= first.bytes.size();
                under_way.pop_front();
                continue;
            }
            const bool reads = !ended && size < most_under_way;
            const auto next = under_way.empty() ? 10ms : std::chrono::ceil<std::chrono::milliseconds>(under_way.front().due - now);
            pollfd ready{reads ? from : -1, POLLIN, 0};
            if (::poll(&ready, 1, static_cast<int>(std::min<std::int64_t>(next.count(), 10))) <= 0) continue;
            std::vector<std::byte> bytes(16 * 1024);
            const ssize_t got = ::recv(from, bytes.data(), bytes.size(), MSG_DONTWAIT);
            if (got < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (got < 0) break;
            ended = got == 0;
            bytes.resize(static_cast<std::size_t>(got));
            clock::time_point due = clock::now() + 50ms;
            if (random() % 64 == 0) {
                ++stalls_;
                stalled_until = due + std::chrono::milliseconds(random() % 200);
            }
            if (!ended) under_way.push_back({std::max(due, stalled_until), std::move(bytes)});
            size += static_cast<std::size_t>(got);
        }
        // What broke on one side has broken on the other.
        if (ended && !quit_) {
            ::shutdown(to, SHUT_WR);
            return;
        }
        ::shutdown(from, SHUT_RDWR);
        ::shutdown(to, SHUT_RDWR);
    }
    bool send_all(int to, const std::vector<std::byte>& bytes) const {
        for (std::size_t done = 0; done != bytes.size();) {
            pollfd ready{to, POLLOUT, 0};
            if (quit_) return false;
            if (::poll(&ready, 1, 10) <= 0) continue;
            const ssize_t sent = ::send(to, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL | MSG_DONTWAIT);
            if (sent < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (sent < 0) return false;
            done += static_cast<std::size_t>(sent);
        }
        return true;
    }

    std::uint16_t to_port_;
    unsigned seed_;
    std::atomic<int> port_ = 0;
    std::atomic<unsigned> stalls_ = 0;
    std::atomic<bool> quit_ = false;
    std::thread thread_;
};

std::vector<std::string> in(const std::string& name) { return {"ip", "netns", "exec", name}; }
std::uint16_t port_of(const std::string& uri) { return static_cast<std::uint16_t>(std::stoul(uri.substr(uri.rfind(':') + 1))); }
std::uint64_t number_after(const std::string& report, std::string_view word) {
    const std::size_t at = report.find(word);
    REQUIRE(at != std::string::npos);
    return std::stoull(report.substr(at + word.size()));
}

} // namespace

TEST_CASE("a guest moves over a slow, far link, and one whose migration ends early stays") {
    const slow_link link;
    if (!link.missing.empty()) return skip(link.missing);
    // Of 16 MiB a third has to go, for half a second and more; the guest writes half a megabyte all the time.
    peer_options there{.uri = "tcp:127.0.0.1:0", .pages = 4096, .written_share = 32};
    peer_options here = there;

    { // It moves.
        peer_process destination("peer destination", there, in(link.far));
        const far_relay relay(link.far, port_of(destination.wait_for("uri")), 1);
        REQUIRE(relay.port() > 1);
        here.uri = "tcp:10.77.0.2:" + std::to_string(relay.port());
        peer_process source("peer source", here, in(link.near));
        const std::string report = source.wait_for("left");
        std::cout << "over 100 Mbit/s, 50 ms away, with " << relay.stalls() << " stalls: " << report << " (ms, bytes)\n";
        CHECK(number_after(report, "passes ") >= 2);
        CHECK(number_after(report, "transferred ") > (16u << 20) / 3);
        // There and back again: nothing can be quicker than that.
        CHECK(number_after(report, "downtime ") >= 100);
        CHECK(number_after(report, "total ") > number_after(report, "downtime "));
        source.wait_for("stands still");
        const std::string memory = source.wait_for("memory");
        destination.wait_for("arrived");
        destination.wait_for("runs");
        CHECK(destination.wait_for("memory") == memory);
    }
    { // It is called back.
        peer_process destination("peer destination", there, in(link.far));
        const far_relay relay(link.far, port_of(destination.wait_for("uri")), 3);
        here.uri = "tcp:10.77.0.2:" + std::to_string(relay.port());
        here.max_bandwidth = 1 << 20;
        peer_process source("peer source", here, in(link.near));
        source.wait_for("state active");
        destination.wait_for("state active");
        source.order("cancel");
        source.wait_for("state cancelled");
        CHECK_THAT(source.wait_for("failed"), contains("cancelled"));
        source.wait_for("runs");
        CHECK_THAT(destination.wait_for("failed"), contains("active"));
        destination.wait_for("stands still");
    }
    { // The link is cut.
        there.peer_timeout = 1000;
        here.peer_timeout = 1000;
        peer_process destination("peer destination", there, in(link.far));
        const far_relay relay(link.far, port_of(destination.wait_for("uri")), 5);
        here.uri = "tcp:10.77.0.2:" + std::to_string(relay.port());
        here.max_bandwidth = 0;
        peer_process source("peer source", here, in(link.near));
        destination.wait_for("state active");
        link.cut();
        const std::string why = source.wait_for("failed");
        CAPTURE(why);
        CHECK((why.starts_with("active") || why.starts_with("device") || why.starts_with("return path")));
        CHECK_THAT(why, contains("timed out") || contains("no answer"));
        source.wait_for("runs");
        CHECK_THAT(destination.wait_for("failed"), contains("timed out"));
        destination.wait_for("stands still");
    }
}
