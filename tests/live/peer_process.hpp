// SPDX-License-Identifier: BSL-1.0
// One end of a migration of a small_machine in a process of its own, which a test can stop and kill: this very program,
// run again with nothing but a hidden test case that plays the part. It says what happens in lines that begin with "@ ".
// Depends on Linux.
#pragma once

#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <iostream>
#include <map>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/support/unique_fd.hpp>

#include "small_machine.hpp"

namespace vmstate::tests {

/// What a peer is told, in its environment.
struct peer_options {
    std::string uri;
    std::size_t pages = 256;
    std::size_t written_share = 8;
    std::uint64_t max_bandwidth = 0;
    unsigned downtime_limit = 300; // ms
    unsigned peer_timeout = 30'000;
    std::string hold = {}; ///< the state in which it stays
};

/// Ends with the test, and the test's process.
class peer_process {
public:
    /// `part` is the hidden test case; `within` a command that runs it, such as `ip netns exec name`.
    peer_process(const std::string& part, const peer_options& options, const std::vector<std::string>& within = {}) {
        std::vector<std::string> words = within;
        words.push_back(std::filesystem::read_symlink("/proc/self/exe").string());
        words.push_back(part);
        const std::array<std::string, 7> told{"VMSTATE_PEER_URI=" + options.uri,
            "VMSTATE_PEER_PAGES=" + std::to_string(options.pages), "VMSTATE_PEER_SHARE=" + std::to_string(options.written_share),
            "VMSTATE_PEER_BANDWIDTH=" + std::to_string(options.max_bandwidth),
            "VMSTATE_PEER_DOWNTIME=" + std::to_string(options.downtime_limit),
            "VMSTATE_PEER_TIMEOUT=" + std::to_string(options.peer_timeout), "VMSTATE_PEER_HOLD=" + options.hold};
        std::vector<char*> argv, environment;
        for (std::string& word : words) argv.push_back(word.data());
        argv.push_back(nullptr);
        for (char** one = environ; *one != nullptr; ++one) environment.push_back(*one);
        for (const std::string& one : told) environment.push_back(const_cast<char*>(one.c_str()));
        environment.push_back(nullptr);
        int to[2], from[2];
        if (::pipe2(to, O_CLOEXEC) != 0 || ::pipe2(from, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
        child_ = ::fork();
        if (child_ < 0) throw std::runtime_error("fork");
        if (child_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            ::dup2(to[0], STDIN_FILENO);
            ::dup2(from[1], STDOUT_FILENO);
            ::execvpe(argv[0], argv.data(), environment.data());
            ::_exit(127);
        }
        ::close(to[0]);
        ::close(from[1]);
        orders_.reset(to[1]);
        events_.reset(from[0]);
    }
    ~peer_process() { kill(); }
    peer_process(const peer_process&) = delete;
    peer_process& operator=(const peer_process&) = delete;

    /// Returns when it is dead.
    void kill() {
        if (child_ <= 0) return;
        ::kill(child_, SIGKILL);
        ::waitpid(std::exchange(child_, -1), nullptr, 0);
    }
    /// Returns when it stands still.
    void stop() const {
        ::kill(child_, SIGSTOP);
        ::waitpid(child_, nullptr, WUNTRACED);
    }
    void order(std::string_view line) const { (void)!::write(orders_.get(), (std::string(line) + '\n').c_str(), line.size() + 1); }

    /// The rest of its next line that begins so; those before it are dropped. Throws when it ends before, or says nothing
    /// for a long time.
    std::string wait_for(const std::string& beginning) {
        const std::string wanted = "@ " + beginning;
        const auto deadline = std::chrono::steady_clock::now() + 60s;
        for (;;) {
            if (const std::size_t end = unread_.find('\n'); end != std::string::npos) {
                const std::string line = unread_.substr(0, end);
                unread_.erase(0, end + 1);
                said_ += line + '\n';
                if (line.starts_with(wanted)) return line.substr(std::min(line.size(), wanted.size() + 1));
                continue;
            }
            const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
            pollfd ready{events_.get(), POLLIN, 0};
            if (left <= 0ms || ::poll(&ready, 1, static_cast<int>(left.count())) == 0)
                throw std::runtime_error("no \"" + beginning + "\" after:\n" + said_);
            char some[4096];
            const ssize_t got = ::read(events_.get(), some, sizeof some);
            if (got <= 0) throw std::runtime_error("it ended before \"" + beginning + "\":\n" + said_ + unread_);
            unread_.append(some, static_cast<std::size_t>(got));
        }
    }

private:
    pid_t child_ = -1;
    unique_fd orders_;
    unique_fd events_;
    std::string unread_;
    std::string said_;
};

namespace peer {

inline std::string told(const char* name) {
    const char* const value = std::getenv(name);
    return value != nullptr ? value : "";
}
inline void say(const std::string& line) {
    static std::mutex stdout_mutex;
    const std::lock_guard lock(stdout_mutex);
    const std::string whole = "@ " + line + '\n';
    (void)!::write(STDOUT_FILENO, whole.data(), whole.size());
}
inline std::string checksum(const std::vector<std::byte>& memory) {
    std::uint64_t sum = 14695981039346656037u; // FNV-1a, of words
    for (std::size_t i = 0; i + 8 <= memory.size(); i += 8) {
        std::uint64_t word = 0;
        std::memcpy(&word, memory.data() + i, 8);
        sum = (sum ^ word) * 1099511628211u;
        sum ^= sum >> 29;
    }
    return std::to_string(sum);
}
inline migration::parameters settings() {
    migration::parameters made;
    made.max_bandwidth = std::stoull(told("VMSTATE_PEER_BANDWIDTH"));
    made.downtime_limit = std::chrono::milliseconds(std::stoul(told("VMSTATE_PEER_DOWNTIME")));
    made.peer_timeout = std::chrono::milliseconds(std::stoul(told("VMSTATE_PEER_TIMEOUT")));
    made.pause_before_switchover = told("VMSTATE_PEER_HOLD") == "pre-switchover";
    return made;
}
/// Says each state, and stays in the one that it was told.
inline migration::observer reporter() {
    return [last = std::string(), hold = told("VMSTATE_PEER_HOLD")](const migration::status& at) mutable {
        const std::string name(to_string(at.state));
        if (name == last) return;
        last = name;
        say("state " + name);
        while (name == hold) ::pause();
    };
}

/// Migrates a machine to the URI; says "left" or "failed" with why, and then what its memory is like. Obeys "cancel".
inline void be_source() {
    if (told("VMSTATE_PEER_URI").empty()) return;
    small_machine from(std::stoul(told("VMSTATE_PEER_PAGES")), {.written_share = std::stoul(told("VMSTATE_PEER_SHARE"))});
    fill(from);
    from.start();
    migration::source source(from.state, from.control, settings());
    source.observe(reporter());
    const result<void> started = source.start(told("VMSTATE_PEER_URI"));
    std::string orders;
    while (started && !is_final(source.status().state)) {
        pollfd ready{STDIN_FILENO, POLLIN, 0};
        if (::poll(&ready, 1, 5) <= 0) continue;
        char some[256];
        const ssize_t got = ::read(STDIN_FILENO, some, sizeof some);
        if (got <= 0) ::_exit(1); // the test is gone
        orders.append(some, static_cast<std::size_t>(got));
        if (orders.find("cancel\n") != std::string::npos) source.cancel();
    }
    const result<void> left = started ? source.wait() : started;
    const bool runs = from.runs();
    from.stop();
    const migration::status last = source.status();
    if (left)
        say("left passes " + std::to_string(last.ram.dirty_sync_count) + " downtime " + std::to_string(last.downtime.count()) +
            " total " + std::to_string(last.total_time.count()) + " transferred " + std::to_string(last.ram.transferred));
    else
        say("failed " + left.error().message());
    say(runs ? "runs" : "stands still");
    say("memory " + checksum(from.memory()));
}

/// Waits for a machine at the URI; says where, and "arrived" or "failed" with why.
inline void be_destination() {
    if (told("VMSTATE_PEER_URI").empty()) return;
    small_machine to(std::stoul(told("VMSTATE_PEER_PAGES")), {.written_share = std::stoul(told("VMSTATE_PEER_SHARE"))});
    std::string memory;
    to.control.start = [&]() -> result<void> {
        memory = checksum(to.memory());
        to.start();
        return {};
    };
    migration::destination destination(to.state, to.control, settings());
    destination.observe(reporter());
    if (result<void> listening = destination.listen(told("VMSTATE_PEER_URI")); !listening)
        return say("failed " + listening.error().message());
    say("uri " + destination.uri());
    const result<void> arrived = destination.run();
    say(arrived ? "arrived" : "failed " + arrived.error().message());
    say(to.runs() ? "runs" : "stands still");
    say("memory " + memory);
}

} // namespace peer
} // namespace vmstate::tests
