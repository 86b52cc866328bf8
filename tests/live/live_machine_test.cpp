// SPDX-License-Identifier: BSL-1.0
// examples/live_machine: a guest moves between processes while it counts and checks its memory. No tick is lost, none
// comes twice, and no page is lost or stale; whatever becomes of the destination, the guest goes on somewhere. In postcopy it
// goes on while its memory follows, also over connections that break.
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <boost/json.hpp>

#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/socket_channel.hpp>

#include <support/catch.hpp>
#include <support/huge_pages.hpp>
#include <support/qemu.hpp>

using namespace vmstate::tests;
using namespace std::chrono_literals;

#ifndef LIVE_MACHINE
TEST_CASE("live_machine") { skip("live_machine was not built: no examples in this build, or no clang or objcopy to assemble its guests"); }
#else

namespace {

/// Longer than anything takes, on any machine.
constexpr auto patience = 60s;

/// A run of live_machine, or of another program that says what happens as it does; ends with the test.
class process {
public:
    /// `prepare` is called in the child before; false ends it.
    explicit process(const std::vector<std::string>& arguments, bool (*prepare)() = nullptr, const char* program = LIVE_MACHINE) {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
        child_ = ::fork();
        if (child_ < 0) throw std::runtime_error("fork");
        if (child_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            ::dup2(ends[1], STDERR_FILENO);
            if (prepare != nullptr && !prepare()) ::_exit(126);
            std::vector<char*> argv{const_cast<char*>(program)};
            for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
            argv.push_back(nullptr);
            ::execv(program, argv.data());
            ::_exit(127);
        }
        ::close(ends[1]);
        events_ = ends[0];
    }
    ~process() {
        if (child_ > 0) {
            ::kill(child_, SIGKILL);
            ::waitpid(child_, nullptr, 0);
        }
        ::close(events_);
    }
    process(const process&) = delete;
    process& operator=(const process&) = delete;

    void send(int signal) const { ::kill(child_, signal); }

    /// Its next event of this name; those before it are counted.
    boost::json::object wait_for(std::string_view name) {
        for (;;) {
            const std::string line = next_line();
            if (line.empty()) throw std::runtime_error("it ended before \"" + std::string(name) + "\":\n" + said_);
            const boost::json::value event = note(line);
            if (event.at("event").as_string() == boost::json::string_view(name.data(), name.size()))
                return event.as_object();
        }
    }
    std::size_t count(const std::string& name) const {
        const auto found = counts_.find(name);
        return found == counts_.end() ? 0 : found->second;
    }
    /// Reads the rest of its events; its exit status.
    int wait() {
        for (std::string line = next_line(); !line.empty(); line = next_line()) note(line);
        int status = 0;
        ::waitpid(std::exchange(child_, -1), &status, 0);
        return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    }
    const std::string& said() const { return said_; }

private:
    boost::json::value note(std::string_view line) {
        boost::json::value event;
        try {
            event = boost::json::parse(boost::json::string_view(line.data(), line.size()));
        } catch (const std::exception&) {
            throw std::runtime_error("not an event:\n" + said_);
        }
        ++counts_[std::string(event.at("event").as_string())];
        return event;
    }
    /// Empty at the end.
    std::string next_line() {
        const auto deadline = std::chrono::steady_clock::now() + patience;
        for (;;) {
            if (const std::size_t end = unread_.find('\n'); end != std::string::npos) {
                const std::string line = unread_.substr(0, end);
                unread_.erase(0, end + 1);
                said_ += line + '\n';
                return line;
            }
            ::pollfd ready{events_, POLLIN, 0};
            const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
            if (left <= 0ms || ::poll(&ready, 1, static_cast<int>(left.count())) == 0)
                throw std::runtime_error("it says nothing any more, after:\n" + said_);
            char bytes[4096];
            const ssize_t got = ::read(events_, bytes, sizeof bytes);
            if (got <= 0) return std::exchange(unread_, {});
            unread_.append(bytes, static_cast<std::size_t>(got));
        }
    }

    pid_t child_ = -1;
    int events_ = -1;
    std::string unread_;
    std::string said_;
    std::map<std::string, std::size_t> counts_;
};

std::string text_of(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

/// How many ticks a guest has printed. Throws unless they are 1, 2, 3 and so on, and nothing else: a "BAD page" is not.
std::uint64_t count_ticks(const std::string& serial) {
    std::uint64_t ticks = 0;
    for (std::size_t at = 0; at < serial.size();) {
        const std::size_t end = serial.find('\n', at);
        const std::string line = serial.substr(at, end - at);
        const std::string expected = "tick " + std::to_string(ticks + 1);
        if (end == std::string::npos) { // on its way
            if (!std::string_view(expected).starts_with(line)) throw std::runtime_error("not a tick: " + line);
            break;
        }
        if (line != expected) throw std::runtime_error("\"" + line + "\" instead of \"" + expected + "\"");
        ++ticks;
        at = end + 1;
    }
    return ticks;
}

/// Waits until the guest has printed `more` ticks more than `before`.
void wait_for_ticks(const std::function<std::string()>& serial, std::uint64_t before, std::uint64_t more) {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (count_ticks(serial()) < before + more) {
        if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("the guest doesn't tick");
        std::this_thread::sleep_for(10ms);
    }
}

using arguments = std::vector<std::string>;
arguments operator+(arguments some, const arguments& more) {
    some.insert(some.end(), more.begin(), more.end());
    return some;
}

/// A machine: which processor it has, and how its writes are found.
struct machine_kind {
    std::string cpu;
    std::string log;

    bool is_kvm() const { return cpu == "kvm"; }
    arguments as_arguments() const { return {"--cpu", cpu, "--dirty-log", log}; }
    /// For `run`: work enough that pages go more than once. Where KVM is itself emulated, a guest takes its time.
    arguments busy() const {
        if (is_kvm()) return {"--tick-interval", "20", "--dirty-rate", "500", "--dirty-share", "25", "--work-memory", "2M"};
        return {"--tick-interval", "20", "--dirty-rate", "2000", "--dirty-share", "25"};
    }
    /// The same, of a guest that touches its memory faster than it comes in postcopy.
    arguments hasty() const {
        if (is_kvm()) return {"--tick-interval", "20", "--dirty-rate", "2000", "--dirty-share", "25", "--work-memory", "6M"};
        return busy();
    }
};
const machine_kind riscv{"riscv", "marked"};
const machine_kind kvm{"kvm", "kvm-bitmap"};

/// For `run`: the guest goes when it has filled its memory and begun to tick, however long that takes it.
const arguments when_it_ticks{"--after", "0", "--after-lines", "3"};

/// Why there can't be such a machine here; empty where there can. Throws where it fails for another reason than that the
/// kernel lacks something.
std::string missing(const machine_kind& kind) {
    process one(arguments{"run", "--json", "--for", "0", "--serial", "/dev/null"} + kind.as_arguments());
    if (one.wait() == 0) return "";
    const std::string why = kind.cpu + " with " + kind.log + " can't be used here: " + one.said();
    if (why.find("unsupported") == std::string::npos && why.find("/dev/kvm") == std::string::npos)
        throw std::runtime_error(why);
    return why;
}

/// Writes to `path` the stream of a guest whose last page isn't what the guest has put there.
void write_bad_stream(const machine_kind& kind, const std::filesystem::path& path, const arguments& common) {
    process source(arguments{"run", "--serial", path.string() + ".serial", "--migrate-to", "file:" + path.string()} + when_it_ticks +
                   common + kind.busy());
    if (source.wait() != 0) throw std::runtime_error(source.said());

    // The last page's first word, as the guests make it.
    std::string stream = text_of(path);
    const std::uint32_t address = kind.is_kvm() ? (2u << 20) - 4096 : 0x80000000u + (4u << 20) - 4096;
    const std::uint32_t word = address * 0x9e3779b1u;
    std::string bytes;
    for (unsigned i = 0; i != 4; ++i) bytes += static_cast<char>(word >> 8 * i & 0xff);
    const std::size_t at = stream.find(bytes);
    if (at == std::string::npos) throw std::runtime_error("the last page isn't in the stream");
    stream[at] = static_cast<char>(stream[at] ^ 1);
    std::ofstream(path, std::ios::binary) << stream;
}

} // namespace

TEST_CASE("a guest goes from one process to another without a lost tick") {
    const std::string address = GENERATE(as<std::string>(), "unix", "tcp");
    const machine_kind kind = GENERATE(as<machine_kind>(), riscv, machine_kind{"riscv", "pagemap"},
        machine_kind{"kvm", "kvm-bitmap"}, machine_kind{"kvm", "kvm-ring"}, machine_kind{"kvm", "pagemap"});
    // The channel is none of the processor's business.
    if (kind.is_kvm() && (address == "tcp") != (kind.log == "kvm-ring")) return;
    CAPTURE(address, kind.cpu, kind.log);
    if (const std::string why = missing(kind); !why.empty()) return skip(why);
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    const arguments common = arguments{"--json", "--memory", "16M"} + kind.as_arguments();

    process destination(arguments{"incoming", address == "unix" ? "unix:" + path("socket") : "tcp:127.0.0.1:0",
                            "--serial", path("after")} + common);
    const std::string uri(destination.wait_for("waiting").at("uri").as_string());
    process source(arguments{"run", "--serial", path("before"), "--migrate-to", uri, "--max-bandwidth", kind.is_kvm() ? "4M" : "32M",
                       "--downtime-limit", "20"} + when_it_ticks + common + kind.busy());
    const boost::json::object summary = source.wait_for("migrated");
    CHECK(source.wait() == 0);
    CHECK(source.count("pass") == summary.at("passes").to_number<std::size_t>());
    CHECK(source.count("pass") >= 3);
    CHECK(summary.at("transferred").to_number<std::uint64_t>() > (kind.is_kvm() ? 2u : 16u) << 20);
    // What KVM's guest leaves alone is there on neither side, and doesn't go at all.
    if (kind.is_kvm()) CHECK(summary.at("skipped").to_number<std::uint64_t>() >= (14u << 20) / 4096);
    destination.wait_for("arrived");

    const std::string before = text_of(directory / "before");
    wait_for_ticks([&] { return before + text_of(directory / "after"); }, count_ticks(before), 10);
    destination.send(SIGTERM);
    CHECK(destination.wait() == 0);
    CHECK(count_ticks(before) > 0);
    CHECK(count_ticks(before + text_of(directory / "after")) >= count_ticks(before) + 10);
}

TEST_CASE("a guest goes back and forth again and again") {
    const std::string cpu = GENERATE(as<std::string>(), "riscv", "kvm");
    CAPTURE(cpu);
    const machine_kind here = cpu == "kvm" ? kvm : riscv;
    const machine_kind there = cpu == "kvm" ? machine_kind{"kvm", "kvm-ring"} : riscv;
    for (const machine_kind& kind : {here, there})
        if (const std::string why = missing(kind); !why.empty()) return skip(why);
    const std::string times = std::getenv("VMSTATE_SOAK") != nullptr ? "100" : "5"; // each way
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    // Both append to one file: it is one guest's output.
    const arguments common{"--json", "--memory", "8M", "--serial", path("serial"), "--times", times, "--after", "0.05",
        "--after-lines", "4", "--max-bandwidth", "128M", "--downtime-limit", "10"};

    process other(arguments{"incoming", "unix:" + path("there"), "--migrate-to", "unix:" + path("back")} + common +
                  there.as_arguments());
    other.wait_for("waiting");
    // Two ways of sending: as differences, from a guest that is slowed down, and as it comes.
    process one(arguments{"run", "--migrate-to", "unix:" + path("there"), "--come-back", "unix:" + path("back"),
                    "--xbzrle", "--auto-converge"} + common + here.as_arguments() + here.busy());
    for (std::size_t i = 0; i != std::stoul(times); ++i) {
        one.wait_for("migrated");
        other.wait_for("migrated");
        one.wait_for("arrived");
    }
    CHECK(other.wait() == 0);
    const auto serial = [&] { return text_of(directory / "serial"); };
    // So long that all of its memory has been checked once more.
    wait_for_ticks(serial, count_ticks(serial()), 60);
    one.send(SIGTERM);
    CHECK(one.wait() == 0);
    CHECK(std::to_string(one.count("migrated")) == times);
    CHECK(std::to_string(other.count("migrated")) == times);
    CHECK(one.count("failed") + other.count("failed") == 0);
}

TEST_CASE("the guest ticks on where it is when the destination is killed") {
    const machine_kind kind = GENERATE(as<machine_kind>(), riscv, kvm, machine_kind{"kvm", "kvm-ring"});
    CAPTURE(kind.cpu, kind.log);
    if (const std::string why = missing(kind); !why.empty()) return skip(why);
    const temporary_directory directory;
    const std::string uri = "unix:" + (directory / "socket").string();
    const arguments common = arguments{"--json", "--memory", "16M"} + kind.as_arguments();
    process destination(arguments{"incoming", uri, "--serial", (directory / "after").string()} + common);
    destination.wait_for("waiting");
    // Two or four seconds for the first pass alone.
    process source(arguments{"run", "--serial", (directory / "before").string(), "--migrate-to", uri, "--max-bandwidth",
                       kind.is_kvm() ? "1M" : "4M", "--downtime-limit", "20"} + when_it_ticks + common + kind.busy());
    source.wait_for("pass");
    destination.send(SIGKILL);
    source.wait_for("failed");
    source.wait_for("running");
    const auto serial = [&] { return text_of(directory / "before"); };
    wait_for_ticks(serial, count_ticks(serial()), 20);
    source.send(SIGTERM);
    CHECK(source.wait() == 1);
    CHECK(source.count("migrated") == 0);
    CHECK(text_of(directory / "after").empty());
}

TEST_CASE("the guest ticks on where it is when the destination refuses it") {
    const temporary_directory directory;
    const std::string uri = "unix:" + (directory / "socket").string();
    machine_kind here = riscv;
    machine_kind there = riscv;
    std::string memory = "16M";
    std::string reason;
    SECTION("for its memory") {
        memory = "8M";
        reason = "ram";
    }
    SECTION("for its processor, which is RISC-V") {
        there = kvm;
        reason = "live-machine-riscv";
    }
    SECTION("for its processor, which is KVM's") {
        here = kvm;
        reason = "live-machine-kvm";
    }
    for (const machine_kind& kind : {here, there})
        if (const std::string why = missing(kind); !why.empty()) return skip(why);
    process destination(arguments{"incoming", uri, "--json", "--memory", memory, "--serial",
                            (directory / "after").string()} + there.as_arguments());
    destination.wait_for("waiting");
    process source(arguments{"run", "--json", "--memory", "16M", "--serial", (directory / "before").string(),
                       "--migrate-to", uri, "--after", "0.1"} + here.as_arguments() + here.busy());
    const boost::json::object refused = destination.wait_for("failed");
    CHECK_THAT(std::string(refused.at("error").as_string()), contains(reason));
    CHECK(destination.wait() == 1);
    source.wait_for("failed");
    source.wait_for("running");
    const auto serial = [&] { return text_of(directory / "before"); };
    wait_for_ticks(serial, count_ticks(serial()), 10);
    source.send(SIGTERM);
    CHECK(source.wait() == 1);
}

TEST_CASE("the guest finds a page that isn't what it was") {
    const machine_kind kind = GENERATE(as<machine_kind>(), riscv, kvm);
    CAPTURE(kind.cpu);
    if (const std::string why = missing(kind); !why.empty()) return skip(why);
    const temporary_directory directory;
    const arguments common = arguments{"--json", "--memory", "4M"} + kind.as_arguments();
    write_bad_stream(kind, directory / "stream", common);

    process destination(arguments{"incoming", "file:" + (directory / "stream").string(), "--serial",
                            (directory / "after").string()} + common);
    destination.wait_for("arrived");
    destination.wait_for("halted");
    CHECK(destination.wait() == 1);
    CHECK_THAT(text_of(directory / "after"), contains(kind.is_kvm() ? "BAD page 001ff000 " : "BAD page 803ff000 "));
}

TEST_CASE("a guest that halts while it migrates has halted") {
    const machine_kind kind = GENERATE(as<machine_kind>(), riscv, kvm);
    const bool goes = GENERATE(true, false);
    CAPTURE(kind.cpu, goes);
    if (const std::string why = missing(kind); !why.empty()) return skip(why);
    const temporary_directory directory;
    const auto path = [&](const char* name) { return "'" + (directory / name).string() + "'"; };
    const arguments common = arguments{"--json", "--memory", "4M"} + kind.as_arguments();
    write_bad_stream(kind, directory / "stream", common);

    // It takes the guest only when that has said what it found, and a while later: then it has stopped itself.
    std::string taken = "exec:until grep -q '^BAD page .' " + path("after") + "; do sleep 0.1; done; sleep 1; ";
    taken += goes ? "exec cat > " + path("halted") : "exit 1";
    process source(arguments{"incoming", "file:" + (directory / "stream").string(), "--serial",
                       (directory / "after").string(), "--migrate-to", taken, "--after", "0"} + common);
    source.wait_for("halted");
    CHECK(source.wait() == 1);
    CHECK(source.count("migrated") == 0);
    CHECK(source.count("running") == 0);
    CHECK(source.count("failed") == (goes ? 0 : 1));
    if (!goes) return;

    // It isn't any better where it has gone.
    process destination(arguments{"incoming", "file:" + (directory / "halted").string(), "--serial", "/dev/null"} + common);
    destination.wait_for("arrived");
    destination.wait_for("halted");
    CHECK(destination.wait() == 1);
}

TEST_CASE("what KVM doesn't take of a stream is refused by its name") {
    if (const std::string why = missing(kvm); !why.empty()) return skip(why);
    const temporary_directory directory;
    const std::string uri = "file:" + (directory / "stream").string();
    const arguments common = arguments{"--json", "--memory", "4M", "--serial", "/dev/null"} + kvm.as_arguments();
    process source(arguments{"run", "--migrate-to", uri, "--after", "0"} + common + kvm.busy());
    CHECK(source.wait() == 0);
    std::string stream = text_of(directory / "stream");
    const std::string name = "kvm-vcpu";
    std::size_t at = stream.find(name);
    REQUIRE(at != std::string::npos);
    at += name.size() + 4 + 4; // instance and version
    const auto be32 = [&](std::size_t place) {
        std::uint32_t value = 0;
        for (unsigned i = 0; i != 4; ++i) value = value << 8 | static_cast<std::uint8_t>(stream[place + i]);
        return value;
    };
    const std::uint32_t nr_cpuid = be32(at);
    std::string reason;
    SECTION("another processor") {
        stream[at + 4 + 7] ^= 1; // the first leaf's number
        reason = "by CPUID";
    }
    SECTION("XCR0 without x87") {
        constexpr std::size_t cpuid_size = 28;
        constexpr std::size_t sregs_size = 8 * 23 + 2 * 10 + 7 * 8 + 32;
        at += 4 + nr_cpuid * cpuid_size + sregs_size;
        REQUIRE(be32(at) == 1);     // one register,
        REQUIRE(be32(at + 4) == 0); // no flags,
        REQUIRE(be32(at + 8) == 0); // number 0
        stream[at + 12 + 7] &= ~1;
        reason = "KVM_SET_XCRS";
    }
    std::ofstream(directory / "stream", std::ios::binary) << stream;
    process destination(arguments{"incoming", uri} + common);
    const std::string refused(destination.wait_for("failed").at("error").as_string());
    CHECK_THAT(refused, contains("kvm-vcpu"));
    CHECK_THAT(refused, contains(reason));
    CHECK(destination.wait() == 1);
    CHECK(destination.count("arrived") == 0);
}

TEST_CASE("the processor is KVM's where there is one, and fits the dirty log") {
    const auto processor = [](const arguments& more) {
        process one(arguments{"run", "--json", "--for", "0", "--memory", "1M", "--serial", "/dev/null"} + more);
        const boost::json::object said = one.wait_for("processor");
        CHECK(one.wait() == 0);
        return std::pair(std::string(said.at("cpu").as_string()), std::string(said.at("why").as_string()));
    };
    const bool has_kvm = missing(kvm).empty();
    CHECK(processor({}).first == (has_kvm ? "kvm" : "riscv"));
    CHECK(processor({}).second.empty() == has_kvm);
    CHECK(processor({"--dirty-log", "marked"}).first == "riscv");
    CHECK(processor({"--cpu", "riscv"}) == std::pair<std::string, std::string>("riscv", ""));
    for (const machine_kind& kind : {machine_kind{"riscv", "kvm-bitmap"}, machine_kind{"kvm", "marked"}}) {
        CAPTURE(kind.cpu, kind.log);
        if (kind.is_kvm() && !has_kvm) continue;
        process one(arguments{"run", "--json", "--for", "0", "--serial", "/dev/null"} + kind.as_arguments());
        CHECK_THAT(std::string(one.wait_for("failed").at("error").as_string()), contains("dirty log"));
        CHECK(one.wait() == 1);
    }
}

namespace {

/// Between two processes that are connected: unix sockets, and all that is connected breaks when it is told to.
class wire {
public:
    wire(const std::string& here, std::string there) : there_(std::move(there)), listener_(listen(here)) {
        accepting_ = std::thread([this] { accept(); });
    }
    ~wire() {
        listener_.cancel();
        accepting_.join();
        cut();
        for (std::thread& one : carriers_) one.join();
    }
    wire(const wire&) = delete;
    wire& operator=(const wire&) = delete;

    void cut() {
        const std::lock_guard lock(ends_mutex_);
        for (const auto& end : ends_) ::shutdown(end->native_handle(), SHUT_RDWR);
    }

private:
    static vmstate::socket_listener listen(const std::string& uri) {
        auto listener = vmstate::socket_listener::listen(uri);
        if (!listener) throw std::runtime_error(listener.error().message());
        return std::move(*listener);
    }
    static std::shared_ptr<vmstate::socket_channel> socket_of(std::unique_ptr<vmstate::duplex_channel> channel) {
        return std::shared_ptr<vmstate::socket_channel>(dynamic_cast<vmstate::socket_channel*>(channel.release()));
    }
    void accept() {
        for (;;) {
            auto accepted = listener_.accept();
            if (!accepted) return;
            auto connected = vmstate::connect(there_);
            if (!connected) continue; // and who connected here finds it closed
            const auto one = socket_of(std::move(*accepted));
            const auto other = socket_of(std::move(*connected));
            const std::lock_guard lock(ends_mutex_);
            ends_.insert(ends_.end(), {one, other});
            carriers_.emplace_back([one, other] { carry(one->native_handle(), other->native_handle()); });
            carriers_.emplace_back([one, other] { carry(other->native_handle(), one->native_handle()); });
        }
    }
    static void carry(int from, int to) {
        std::vector<char> bytes(64 << 10);
        for (ssize_t got = 0; (got = ::recv(from, bytes.data(), bytes.size(), 0)) > 0;)
            for (ssize_t done = 0; done < got;) {
                const ssize_t sent = ::send(to, bytes.data() + done, static_cast<std::size_t>(got - done), MSG_NOSIGNAL);
                if (sent <= 0) {
                    ::shutdown(from, SHUT_RDWR);
                    break;
                }
                done += sent;
            }
        for (const int end : {from, to}) ::shutdown(end, SHUT_RDWR);
    }

    const std::string there_;
    vmstate::socket_listener listener_;
    std::mutex ends_mutex_; ///< ends_
    std::vector<std::shared_ptr<vmstate::socket_channel>> ends_;
    std::vector<std::thread> carriers_; ///< the accepting thread's
    std::thread accepting_;
};

/// Why there can't be a postcopy of such a machine to here.
std::string cannot_postcopy(const machine_kind& kind) {
    if (const std::string why = missing(kind); !why.empty()) return why;
    process one(arguments{"run", "--json", "--for", "0", "--serial", "/dev/null", "--migrate-to", "file:/dev/null", "--come-back",
                    "unix:/nowhere", "--after", "0", "--times", "0", "--postcopy"} + kind.as_arguments());
    if (one.wait() == 0) return "";
    if (one.said().find("userfaultfd") == std::string::npos) throw std::runtime_error(one.said());
    return "postcopy can't be had here: " + one.said();
}

std::uint64_t number(const boost::json::object& event, const char* name) { return event.at(name).to_number<std::uint64_t>(); }

/// What a guest that came by postcopy has waited for, with its parts in keeping with each other.
std::uint64_t count_waits(const boost::json::object& arrived) {
    std::uint64_t waits = 0;
    for (const boost::json::value& one : arrived.at("latencies").as_array()) waits += one.to_number<std::uint64_t>();
    CHECK(waits + number(arrived, "already-received") == number(arrived, "faults"));
    if (waits != 0) CHECK(arrived.at("latency-mean-us").to_number<double>() <= arrived.at("latency-max-us").to_number<double>());
    CHECK(number(arrived, "latency-median-below-us") <= number(arrived, "latency-99-percent-below-us"));
    return waits;
}

} // namespace

TEST_CASE("a guest runs on at the destination before its memory is there, without a lost tick") {
    struct way {
        machine_kind kind;
        bool preempt;
        std::string after; ///< what the precopy lasts
        bool huge = false;
    };
    const way how = GENERATE(way{riscv, false, "1"}, way{riscv, true, "0.1s"}, way{kvm, false, "0"}, way{{"kvm", "kvm-ring"}, true, "0.1s"},
        way{riscv, false, "0", true}, way{kvm, true, "0", true});
    CAPTURE(how.kind.cpu, how.kind.log, how.preempt, how.after, how.huge);
    if (const std::string why = cannot_postcopy(how.kind); !why.empty()) return skip(why);
    const huge_pages reserved(how.huge ? 16 : 0); // of both sides
    if (!reserved.enough()) return skip("no 16 huge pages of 2 MiB to be had");
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    const std::string uri = "unix:" + path("socket");
    arguments common = arguments{"--json", "--memory", "16M", how.preempt ? "--postcopy-preempt" : "--postcopy"} + how.kind.as_arguments();
    if (how.huge) common = common + arguments{"--huge-pages"};

    process destination(arguments{"incoming", uri, "--serial", path("after")} + common);
    destination.wait_for("waiting");
    process source(arguments{"run", "--serial", path("before"), "--migrate-to", uri, "--postcopy-after", how.after,
                       "--max-bandwidth", how.after == "1" ? "32M" : "4M", "--max-postcopy-bandwidth", how.kind.is_kvm() ? "4M" : "8M",
                       "--downtime-limit", "0"} + when_it_ticks + common + how.kind.hasty());
    source.wait_for("postcopy");
    const boost::json::object left = source.wait_for("migrated");
    CHECK(source.wait() == 0);
    CHECK(source.count("postcopy") == 1);
    CHECK(source.count("paused") == 0);
    // The pass that is begun when it is time, and the last one, of the guest that stands still.
    if (how.after == "1") CHECK(number(left, "passes") >= 3);
    CHECK(number(left, "postcopy-bytes") > 0);
    const boost::json::object arrived = destination.wait_for("arrived");
    CHECK(destination.count("postcopy") == 1);
    CHECK(number(arrived, "requests") == number(left, "postcopy-requests"));
    // After a pass there may be little left for it to wait for.
    CHECK((count_waits(arrived) > 0 || how.after == "1"));

    const std::string before = text_of(directory / "before");
    const auto serial = [&] { return before + text_of(directory / "after"); };
    wait_for_ticks(serial, count_ticks(before), 1);
    wait_for_ticks(serial, count_ticks(serial()), 20);
    destination.send(SIGTERM);
    CHECK(destination.wait() == 0);
}

TEST_CASE("a connection that breaks in postcopy is made again, as often as it breaks") {
    const machine_kind kind = GENERATE(as<machine_kind>(), riscv, kvm);
    CAPTURE(kind.cpu);
    if (const std::string why = cannot_postcopy(kind); !why.empty()) return skip(why);
    const std::size_t breaks = std::getenv("VMSTATE_SOAK") != nullptr ? 25 : 3;
    const temporary_directory directory;
    const auto unix_at = [&](const char* name) { return "unix:" + (directory / name).string(); };
    const arguments common = arguments{"--json", "--memory", "16M", kind.is_kvm() ? "--postcopy-preempt" : "--postcopy"} + kind.as_arguments();

    process destination(arguments{"incoming", unix_at("main"), "--recover", unix_at("again"), "--serial", (directory / "after").string()} + common);
    destination.wait_for("waiting");
    wire main_wire(unix_at("to-main"), unix_at("main"));
    wire again(unix_at("to-again"), unix_at("again"));
    // For 16 MiB, so many seconds and more: whatever else is going on, it isn't over before the last of them.
    process source(arguments{"run", "--serial", (directory / "before").string(), "--migrate-to", unix_at("to-main"), "--recover",
                       unix_at("to-again"), "--postcopy-after", "0", "--max-postcopy-bandwidth", breaks > 3 ? "1M" : "4M",
                       "--downtime-limit", "0", "--tick-interval", "20", "--dirty-rate", "200", "--work-memory", "14M"} +
                   when_it_ticks + common);
    destination.wait_for("postcopy");
    for (std::size_t i = 0; i != breaks; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20 + 37 * i % 100));
        main_wire.cut();
        again.cut();
        destination.wait_for("recovered");
    }
    source.wait_for("migrated");
    CHECK(source.wait() == 0);
    CHECK(source.count("recovered") == breaks);
    CHECK(source.count("paused") >= breaks);
    CHECK(source.count("running") == 1); // at first
    const boost::json::object arrived = destination.wait_for("arrived");
    CHECK(number(arrived, "interruptions") >= breaks);
    CHECK(count_waits(arrived) > 0);

    const std::string before = text_of(directory / "before");
    const auto serial = [&] { return before + text_of(directory / "after"); };
    wait_for_ticks(serial, count_ticks(serial()), 20);
    destination.send(SIGTERM);
    CHECK(destination.wait() == 0);
}

TEST_CASE("a guest goes back and forth again and again by postcopy") {
    const std::string cpu = GENERATE(as<std::string>(), "riscv", "kvm");
    CAPTURE(cpu);
    const machine_kind here = cpu == "kvm" ? kvm : riscv;
    const machine_kind there = cpu == "kvm" ? machine_kind{"kvm", "pagemap"} : riscv;
    for (const machine_kind& kind : {here, there})
        if (const std::string why = cannot_postcopy(kind); !why.empty()) return skip(why);
    const std::string times = std::getenv("VMSTATE_SOAK") != nullptr ? "50" : "2"; // each way
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    const arguments common{"--json", "--memory", "8M", "--serial", path("serial"), "--times", times, "--after", "0.05",
        "--after-lines", "4", "--postcopy-preempt", "--postcopy-after", "0", "--max-postcopy-bandwidth", "32M", "--downtime-limit", "0"};

    process other(arguments{"incoming", "unix:" + path("there"), "--migrate-to", "unix:" + path("back")} + common + there.as_arguments());
    other.wait_for("waiting");
    process one(arguments{"run", "--migrate-to", "unix:" + path("there"), "--come-back", "unix:" + path("back")} + common +
                here.as_arguments() + here.busy());
    for (std::size_t i = 0; i != std::stoul(times); ++i) {
        one.wait_for("migrated");
        other.wait_for("migrated");
        one.wait_for("arrived");
    }
    CHECK(other.wait() == 0);
    const auto serial = [&] { return text_of(directory / "serial"); };
    // So long that all of its memory has been checked once more.
    wait_for_ticks(serial, count_ticks(serial()), 60);
    one.send(SIGTERM);
    CHECK(one.wait() == 0);
    // As source and as destination.
    CHECK(one.count("postcopy") == 2 * std::stoul(times));
    CHECK(other.count("postcopy") == 2 * std::stoul(times));
    CHECK(one.count("failed") + other.count("failed") == 0);
}

TEST_CASE("a guest that has left by postcopy isn't given up by one signal, and is by two") {
    if (const std::string why = cannot_postcopy(riscv); !why.empty()) return skip(why);
    const temporary_directory directory;
    const std::string uri = "unix:" + (directory / "socket").string();
    const arguments common = arguments{"--json", "--memory", "16M", "--postcopy"} + riscv.as_arguments();
    process destination(arguments{"incoming", uri, "--serial", (directory / "after").string()} + common);
    destination.wait_for("waiting");
    process source(arguments{"run", "--serial", (directory / "before").string(), "--migrate-to", uri, "--postcopy-after", "0",
                       "--max-postcopy-bandwidth", "1M"} + when_it_ticks + common + riscv.busy());
    source.wait_for("postcopy");
    source.send(SIGTERM);
    source.wait_for("interrupted");
    const std::string before = text_of(directory / "before");
    wait_for_ticks([&] { return before + text_of(directory / "after"); }, count_ticks(before), 5);
    source.send(SIGTERM);
    source.wait_for("failed");
    CHECK(source.wait() == 1);
    CHECK(source.count("running") == 1); // at first
    // There is no --recover over there, either.
    destination.wait_for("given-up");
    destination.wait_for("failed");
    CHECK(destination.wait() == 1);
}

TEST_CASE("what postcopy can't be done with is refused, and the guest runs on where it is") {
    if (const std::string why = cannot_postcopy(riscv); !why.empty()) return skip(why);
    const temporary_directory directory;
    const std::string uri = "unix:" + (directory / "socket").string();
    const arguments common = arguments{"--json", "--memory", "16M"} + riscv.as_arguments();
    const huge_pages reserved(8);
    if (!reserved.enough()) return skip("no 8 huge pages of 2 MiB to be had");
    process destination(arguments{"incoming", uri, "--postcopy", "--serial", (directory / "after").string()} + common);
    destination.wait_for("waiting");
    process source(arguments{"run", "--serial", (directory / "before").string(), "--migrate-to", uri, "--after", "0.2",
                       "--postcopy-after", "0", "--huge-pages"} + common + riscv.busy());
    const boost::json::object refused = destination.wait_for("failed");
    CHECK_THAT(std::string(refused.at("error").as_string()), contains("0x200000"));
    CHECK(destination.wait() == 1);
    source.wait_for("failed");
    source.wait_for("running");
    const auto serial = [&] { return text_of(directory / "before"); };
    wait_for_ticks(serial, count_ticks(serial()), 10);
    source.send(SIGTERM);
    CHECK(source.wait() == 1);
    CHECK(source.count("postcopy") == 0);
}

#ifdef VHOST_USER_WORKER

namespace {

/// examples/vhost_user_worker: the two backends of a machine, each in one half of what it shares.
class two_workers {
public:
    explicit two_workers(const std::string& path) {
        for (unsigned i = 0; i != 2; ++i) {
            sockets_.push_back(path + std::to_string(i));
            all_.push_back(std::make_unique<process>(
                arguments{"--socket-path", sockets_.back(), "--share", std::to_string(i), "--of", "2", "--rate", "1000"}, nullptr,
                VHOST_USER_WORKER));
            all_.back()->wait_for("waiting");
        }
    }
    arguments as_arguments() const { return {"--vhost-user", sockets_[0], "--vhost-user", sockets_[1], "--shared-memory", "4M"}; }
    /// The pages of both of them.
    static constexpr std::uint64_t pages = (4u << 20) / 4096;

    /// The sum of what their next events of this name say.
    std::uint64_t wait_for(const char* event, const char* member) {
        std::uint64_t sum = 0;
        for (const auto& one : all_) sum += number(one->wait_for(event), member);
        return sum;
    }
    void kill_one() {
        all_.back()->send(SIGKILL);
        all_.back()->wait();
        all_.pop_back();
    }
    /// They end, and have found nothing wrong.
    void end() {
        for (const auto& one : all_) {
            one->send(SIGTERM);
            const int ended = one->wait();
            CAPTURE(one->said());
            CHECK(ended == 0);
        }
    }

private:
    arguments sockets_;
    std::vector<std::unique_ptr<process>> all_;
};

} // namespace

TEST_CASE("backends go on with the guest where it goes, and none of their pages is lost or stale") {
    struct way {
        machine_kind kind;
        std::string postcopy_after; ///< empty: all in precopy
        std::size_t breaks = 0;
    };
    const way how = GENERATE(way{riscv, ""}, way{riscv, "1"}, way{kvm, ""}, way{kvm, "0.1s"}, way{riscv, "0", 2});
    CAPTURE(how.kind.cpu, how.postcopy_after, how.breaks);
    const bool postcopy = !how.postcopy_after.empty();
    if (const std::string why = postcopy || how.kind.is_kvm() ? cannot_postcopy(how.kind) : missing(how.kind); !why.empty()) return skip(why);
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    const auto unix_at = [&](const char* name) { return "unix:" + path(name); };
    arguments common = arguments{"--json", "--memory", "16M"} + how.kind.as_arguments();
    // Backends that were told of a postcopy that never came are one case more.
    if (postcopy || how.kind.is_kvm()) common = common + arguments{"--postcopy"};
    two_workers here(path("here")), there(path("there"));

    arguments coming{"incoming", unix_at("main"), "--serial", path("after")};
    if (how.breaks != 0) coming = coming + arguments{"--recover", unix_at("again")};
    process destination(coming + common + there.as_arguments());
    destination.wait_for("waiting");
    wire main_wire(unix_at("to-main"), unix_at("main"));
    wire again(unix_at("to-again"), unix_at("again"));
    arguments leaving = arguments{"run", "--serial", path("before"), "--migrate-to", unix_at("to-main"), "--max-bandwidth",
        how.postcopy_after == "0.1s" ? "4M" : "32M", "--downtime-limit", postcopy ? "0" : "50"} + when_it_ticks;
    if (how.breaks != 0) leaving = leaving + arguments{"--recover", unix_at("to-again")};
    if (postcopy)
        leaving = leaving + arguments{"--postcopy-after", how.postcopy_after, "--max-postcopy-bandwidth", how.breaks != 0 ? "4M" : "8M"};
    process source(leaving + common + how.kind.busy() + here.as_arguments());
    CHECK(here.wait_for("verified", "pages") == two_workers::pages);
    for (std::size_t i = 0; i != how.breaks; ++i) {
        if (i == 0) destination.wait_for("postcopy");
        std::this_thread::sleep_for(30ms);
        main_wire.cut();
        again.cut();
        destination.wait_for("recovered");
    }
    source.wait_for("migrated");
    CHECK(source.wait() == 0);
    const boost::json::object arrived = destination.wait_for("arrived");
    // Where they had come to, after a page of each at least, they go on.
    const std::uint64_t steps = here.wait_for("stopped", "steps");
    CHECK(steps > 0);
    CHECK(there.wait_for("started", "steps") == steps);
    CHECK(there.wait_for("verified", "pages") == two_workers::pages);
    if (postcopy) {
        CHECK(number(arrived, "interruptions") >= how.breaks);
        REQUIRE(arrived.contains("clients"));
        const boost::json::array& clients = arrived.at("clients").as_array();
        CHECK(clients.size() == 2);
        for (const boost::json::value& one : clients) {
            CHECK(number(one.as_object(), "faults") > 0);
            CHECK(one.at("blocked-us").to_number<double>() > 0);
            CHECK(one.at("longest-us").to_number<double>() <= one.at("blocked-us").to_number<double>());
        }
    }

    const std::string before = text_of(directory / "before");
    const auto serial = [&] { return before + text_of(directory / "after"); };
    wait_for_ticks(serial, count_ticks(serial()), 20);
    here.end();
    destination.send(SIGTERM);
    CHECK(destination.wait() == 0);
    CHECK(source.count("failed") + destination.count("failed") == 0);
    there.end();
}

TEST_CASE("a backend that is gone keeps the guest where it is, if not from running") {
    const bool at_destination = GENERATE(false, true);
    CAPTURE(at_destination);
    if (const std::string why = cannot_postcopy(riscv); !why.empty()) return skip(why);
    const temporary_directory directory;
    const auto path = [&](const char* name) { return (directory / name).string(); };
    const arguments common = arguments{"--json", "--memory", "16M", "--postcopy"} + riscv.as_arguments();
    two_workers here(path("here")), there(path("there"));
    process destination(arguments{"incoming", "unix:" + path("socket"), "--serial", path("after")} + common + there.as_arguments());
    destination.wait_for("waiting");
    if (at_destination) there.kill_one();
    process source(arguments{"run", "--serial", path("before"), "--migrate-to", "unix:" + path("socket"), "--after", "0.3", "--postcopy-after", "0"} +
                   common + riscv.busy() + here.as_arguments());
    here.wait_for("verified", "pages");
    if (!at_destination) here.kill_one();
    // What the one at the source writes can't be logged, or how far it is isn't known; without the one at the destination
    // there is no postcopy.
    const boost::json::object failed = source.wait_for("failed");
    if (!at_destination) CHECK_THAT(std::string(failed.at("error").as_string()), contains("here1/"));
    source.wait_for("running");
    const boost::json::object refused = destination.wait_for("failed");
    if (at_destination) CHECK_THAT(std::string(refused.at("error").as_string()), contains("there1/POSTCOPY_ADVISE"));
    const auto serial = [&] { return text_of(directory / "before"); };
    wait_for_ticks(serial, count_ticks(serial()), 10);
    source.send(SIGTERM);
    CHECK(source.wait() == 1);
    CHECK(destination.wait() == 1);
    here.end();
    there.end();
}

TEST_CASE("backends share whole pages that the guest can do without, and are there") {
    for (const arguments& wrong : {arguments{"--shared-memory", "16M"}, {"--shared-memory", "6000"}, {"--shared-memory", "0"}, {"--shared-memory", "1M"}}) {
        process one(arguments{"run", "--json", "--memory", "16M", "--serial", "/dev/null", "--vhost-user", "/nowhere/socket"} + riscv.as_arguments() + wrong);
        CHECK_THAT(std::string(one.wait_for("failed").at("what").as_string()), contains(wrong[1] == "1M" ? "--vhost-user" : "--shared-memory"));
        CHECK(one.wait() == 1);
        CHECK(one.count("running") == 0);
    }
}

#endif // VHOST_USER_WORKER

namespace {

/// No userfaultfd for this process, whoever it is: neither by the system call nor from /dev/userfaultfd.
bool deny_userfaultfd() {
    if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return false;
    constexpr unsigned command = offsetof(seccomp_data, args[1]); // the low half, on both kinds of processors that matter
    sock_filter program[]{BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 3, 0), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, command), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, _IO(0xAA, 0x00), 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
    sock_fprog filter{sizeof program / sizeof program[0], program};
    return ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}

} // namespace

TEST_CASE("without userfaultfd no guest is waited for that may come by postcopy, and it is said what to change") {
    const temporary_directory directory;
    process one(arguments{"incoming", "unix:" + (directory / "socket").string(), "--json", "--postcopy", "--serial", "/dev/null"} +
                    riscv.as_arguments(), deny_userfaultfd);
    const boost::json::object failed = one.wait_for("failed");
    CHECK_THAT(std::string(failed.at("error").as_string()), contains("userfaultfd"));
    CHECK_THAT(std::string(failed.at("error").as_string()), contains("expected"));
    CHECK(one.wait() == 1);
    CHECK(one.count("waiting") == 0);
}

#endif
