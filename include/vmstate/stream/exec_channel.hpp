// SPDX-License-Identifier: BSL-1.0
//
// A stream to or from a command of the shell: `exec:zstd -dc vm.state.zst`. Depends on fd_channel.hpp.
#pragma once

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>

#include <vmstate/stream/fd_channel.hpp>

namespace vmstate {

namespace detail {

/// A command that runs.
class child_process {
public:
    explicit child_process(pid_t pid) noexcept : pid_(pid) {}
    child_process(child_process&& other) noexcept : pid_(std::exchange(other.pid_, -1)) {}
    child_process& operator=(child_process&&) = delete;
    ~child_process() = default;

    /// Waits for its end, at most so long where it isn't 0: then it is ended. `may_lose_reader`: dying of SIGPIPE is no
    /// failure, since we stopped reading first.
    result<void> wait(bool may_lose_reader, std::chrono::milliseconds at_most) {
        if (pid_ < 0) return {};
        if (at_most.count() > 0 && !ends_within(at_most)) {
            stop();
            return error(errc::io, "a command that ends", "timed out after " + std::to_string(at_most.count()) + " ms");
        }
        int status = 0;
        pid_t ended = 0;
        do ended = ::waitpid(pid_, &status, 0);
        while (ended < 0 && errno == EINTR);
        pid_ = -1;
        if (ended < 0) return system_error("waitpid");
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return {};
        if (WIFEXITED(status)) {
            const int code = WEXITSTATUS(status);
            if (may_lose_reader && code == 128 + SIGPIPE) return {};
            return error(errc::io, "a command that succeeds", "exit status " + std::to_string(code));
        }
        if (may_lose_reader && WTERMSIG(status) == SIGPIPE) return {};
        return error(errc::io, "a command that succeeds", "signal " + std::to_string(WTERMSIG(status)));
    }
    /// Leaves what it ended with for waitpid.
    bool ends_within(std::chrono::milliseconds time) const {
        const auto deadline = std::chrono::steady_clock::now() + time;
        std::chrono::milliseconds pause{1};
        for (;;) {
            siginfo_t ended{};
            if (::waitid(P_PID, static_cast<id_t>(pid_), &ended, WEXITED | WNOHANG | WNOWAIT) != 0 || ended.si_pid != 0)
                return true;
            if (std::chrono::steady_clock::now() >= deadline) return false;
            std::this_thread::sleep_for(pause);
            pause = std::min(pause * 2, std::chrono::milliseconds(50));
        }
    }
    /// Ends it if it doesn't end on its own within a second.
    void stop() noexcept {
        for (int tenths = 0; pid_ >= 0; ++tenths) {
            const pid_t ended = ::waitpid(pid_, nullptr, WNOHANG);
            if (ended != 0 && !(ended < 0 && errno == EINTR))
                pid_ = -1;
            else if (tenths == 10)
                ::kill(pid_, SIGTERM);
            else if (tenths == 20)
                ::kill(pid_, SIGKILL);
            if (pid_ >= 0) std::this_thread::sleep_for(std::chrono::milliseconds(tenths < 1 ? 1 : 100));
        }
    }

private:
    pid_t pid_;
};

struct spawned {
    unique_fd ours;
    child_process child;
};

/// Runs `/bin/sh -c command` with a pipe as its standard input (`child_fd` 0) or output (1).
inline result<spawned> spawn_shell(const std::string& command, int child_fd) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return system_error("pipe");
    unique_fd ours(child_fd == STDIN_FILENO ? ends[1] : ends[0]);
    const unique_fd theirs(child_fd == STDIN_FILENO ? ends[0] : ends[1]);

    posix_spawn_file_actions_t actions;
    ::posix_spawn_file_actions_init(&actions);
    if (child_fd == STDOUT_FILENO)
        ::posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    ::posix_spawn_file_actions_adddup2(&actions, theirs.get(), child_fd);
    // Whatever this process does with its signals, the command gets them as a shell would give them.
    posix_spawnattr_t attributes;
    ::posix_spawnattr_init(&attributes);
    sigset_t signals;
    ::sigemptyset(&signals);
    ::posix_spawnattr_setsigmask(&attributes, &signals);
    ::sigaddset(&signals, SIGPIPE);
    ::posix_spawnattr_setsigdefault(&attributes, &signals);
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);

    std::string shell = "/bin/sh";
    std::string flag = "-c";
    std::string text = command;
    char* arguments[] = {shell.data(), flag.data(), text.data(), nullptr};
    pid_t pid = -1;
    const int failed = ::posix_spawn(&pid, shell.c_str(), &actions, &attributes, arguments, environ);
    ::posix_spawn_file_actions_destroy(&actions);
    ::posix_spawnattr_destroy(&attributes);
    if (failed != 0) return system_error("/bin/sh", failed);
    return spawned{std::move(ours), child_process(pid)};
}

} // namespace detail

/// Writes to a command's standard input. `close` waits for the command and reports its failure.
class exec_output_channel final : public fd_output_channel {
public:
    explicit exec_output_channel(detail::spawned command) noexcept
        : fd_output_channel(std::move(command.ours)), child_(std::move(command.child)) {}
    /// Waits too: the command may still have to store what it got.
    ~exec_output_channel() override { (void)exec_output_channel::close(); }

    result<void> close() override {
        const result<void> closed = fd_output_channel::close();
        // Who was shut down is no longer waited for: what it has got isn't all.
        if (was_shut_down()) {
            child_.stop();
            return closed;
        }
        result<void> ended = child_.wait(false, timeout());
        return ended ? closed : ended;
    }

private:
    detail::child_process child_;
};

/// Reads a command's standard output. `close` waits for the command and reports its failure.
class exec_input_channel final : public fd_input_channel {
public:
    explicit exec_input_channel(detail::spawned command) noexcept
        : fd_input_channel(std::move(command.ours)), child_(std::move(command.child)) {}
    ~exec_input_channel() override {
        (void)fd_input_channel::close();
        child_.stop();
    }

    result<void> close() override {
        (void)fd_input_channel::close();
        if (was_shut_down()) {
            child_.stop();
            return {};
        }
        return child_.wait(true, timeout());
    }

private:
    detail::child_process child_;
};

/// Starts a command that gets the stream on its standard input.
inline result<std::unique_ptr<output_channel>> open_output_command(const std::string& command) {
    result<detail::spawned> started = detail::spawn_shell(command, STDIN_FILENO);
    if (!started) return started.error();
    return std::unique_ptr<output_channel>(std::make_unique<exec_output_channel>(std::move(*started)));
}

/// Starts a command whose standard output is the stream.
inline result<std::unique_ptr<input_channel>> open_input_command(const std::string& command) {
    result<detail::spawned> started = detail::spawn_shell(command, STDOUT_FILENO);
    if (!started) return started.error();
    return std::unique_ptr<input_channel>(std::make_unique<exec_input_channel>(std::move(*started)));
}

} // namespace vmstate
