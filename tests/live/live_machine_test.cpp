// SPDX-License-Identifier: BSL-1.0
// examples/live_machine: a guest moves between processes while it counts and checks its memory. No tick is lost, none
// comes twice, and no page is lost or stale; whatever becomes of the destination, the guest goes on somewhere.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <boost/json.hpp>

#include <support/catch.hpp>
#include <support/qemu.hpp>

using namespace vmstate::tests;
using namespace std::chrono_literals;

#ifndef LIVE_MACHINE
TEST_CASE("live_machine") { skip("live_machine was not built: no examples in this build, or no clang or objcopy to assemble its guests"); }
#else

namespace {

/// Longer than anything takes, on any machine.
constexpr auto patience = 60s;

/// A run of live_machine; ends with the test.
class process {
public:
    explicit process(const std::vector<std::string>& arguments) {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
        child_ = ::fork();
        if (child_ < 0) throw std::runtime_error("fork");
        if (child_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            ::dup2(ends[1], STDERR_FILENO);
            std::vector<char*> argv{const_cast<char*>("live_machine")};
            for (const std::string& argument : arguments) argv.push_back(const_cast<char*>(argument.c_str()));
            argv.push_back(nullptr);
            ::execv(LIVE_MACHINE, argv.data());
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
};
const machine_kind riscv{"riscv", "marked"};
const machine_kind kvm{"kvm", "kvm-bitmap"};

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
    process source(arguments{"run", "--serial", path.string() + ".serial", "--migrate-to", "file:" + path.string(),
                       "--after", kind.is_kvm() ? "0.8" : "0.3"} + common + kind.busy());
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
    process source(arguments{"run", "--serial", path("before"), "--migrate-to", uri, "--after", kind.is_kvm() ? "1" : "0.3",
                       "--max-bandwidth", kind.is_kvm() ? "4M" : "32M", "--downtime-limit", "20"} + common + kind.busy());
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
    process source(arguments{"run", "--serial", (directory / "before").string(), "--migrate-to", uri, "--after",
                       kind.is_kvm() ? "0.6" : "0.2", "--max-bandwidth", kind.is_kvm() ? "1M" : "4M", "--downtime-limit",
                       "20"} + common + kind.busy());
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

#endif
