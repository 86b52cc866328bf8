// SPDX-License-Identifier: BSL-1.0
//
// vhost_user_worker: a vhost-user backend, in a process of its own, that works in the memory which its VMM shares, and
// checks it: a page that was lost or has become old when the VMM migrated is found. live_machine is such a VMM
// (--vhost-user). What happens it says on stderr, as JSON, one object a line.
#include "worker.hpp"

#include <CLI/CLI.hpp>

#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>
#include <system_error>

namespace {

constexpr int exit_failed = 1;
constexpr int exit_usage = 2;

/// The socket that SIGTERM shuts down: the one listened at, or the connection.
std::atomic<int> socket_to_end = -1;
std::atomic<bool> told_to_end = false;

extern "C" void end_it(int) {
    told_to_end = true;
    ::shutdown(socket_to_end, SHUT_RDWR);
}

void say(const std::string& line) {
    static std::mutex stderr_mutex;
    const std::lock_guard lock(stderr_mutex);
    std::fprintf(stderr, "%s\n", line.c_str());
}

int fail(std::string why) {
    for (char& each : why)
        if (each == '"' || each == '\\') each = '\'';
    say(R"({"event":"failed","error":")" + why + "\"}");
    return exit_failed;
}
int fail_of(const std::string& what) { return fail(what + ": " + std::system_category().message(errno)); }

} // namespace

int main(int argc, char** argv) {
    CLI::App app{"A vhost-user backend that writes and checks the memory which its VMM shares, for one VMM after the other.",
        "vhost_user_worker"};
    std::string path;
    worker::share part;
    unsigned rate = 1000;
    app.add_option("--socket-path", path, "Listen at this unix socket")->required();
    app.add_option("--share", part.number, "Of the memory, the part with this number, from 0 on")->capture_default_str();
    app.add_option("--of", part.of, "How many such parts there are, a worker for each")
        ->check(CLI::PositiveNumber)
        ->capture_default_str();
    app.add_option("--rate", rate, "Pages that it writes in a second")->check(CLI::Range(1, 1'000'000))->capture_default_str();
    app.footer("Exit status: 0 when it was told to end by SIGTERM or SIGINT; 1 when a page was not what it has to be, or the\n"
               "connection failed; 2 for a wrong command line.");
    try {
        app.parse(argc, argv);
    } catch (const CLI::ParseError& failure) {
        return app.exit(failure) == 0 ? 0 : exit_usage;
    }
    if (part.number >= part.of) {
        std::fputs("vhost_user_worker: --share has to be below --of\n", stderr);
        return exit_usage;
    }

    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) return fail("a path of a socket: " + path);
    std::memcpy(address.sun_path, path.data(), path.size());
    const vmstate::unique_fd listening(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ::unlink(path.c_str());
    if (!listening || ::bind(listening.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
        ::listen(listening.get(), 1) != 0)
        return fail_of(path);
    struct sigaction action {};
    action.sa_handler = end_it;
    ::sigaction(SIGTERM, &action, nullptr);
    ::sigaction(SIGINT, &action, nullptr);

    worker::device device(part, rate, say);
    say(R"({"event":"waiting"})");
    while (!told_to_end) {
        socket_to_end = listening.get();
        if (told_to_end) break;
        const vmstate::unique_fd connection(::accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC));
        if (!connection) {
            if (told_to_end || errno == EINTR) continue;
            return fail_of("accept");
        }
        socket_to_end = connection.get();
        const vmstate::result<void> served = told_to_end ? vmstate::result<void>() : device.serve(connection.get());
        socket_to_end = -1;
        if (!served && !told_to_end) return fail(served.error().message());
    }
    ::unlink(path.c_str());
    return 0;
}
