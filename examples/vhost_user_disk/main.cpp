// SPDX-License-Identifier: BSL-1.0
//
// vhost_user_disk: a disk for a virtual machine, in a process of its own. It serves a file as a vhost-user block device,
// and its VMM may migrate, precopy or postcopy: what is special about that is in vmstate/vhost_user, and here only in
// the places that touch guest memory (guest_buffers.cpp, virtqueue.cpp).
#include "device.hpp"

#include <CLI/CLI.hpp>

#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <system_error>

namespace {

constexpr int exit_failed = 1;

/// The socket that SIGTERM shuts down: the one listened at, and then the connection.
std::atomic<int> socket_to_end = -1;
std::atomic<bool> told_to_end = false;

extern "C" void end_it(int) {
    told_to_end = true;
    ::shutdown(socket_to_end, SHUT_RDWR);
}

vmstate::error failure(const std::string& what) {
    return {vmstate::errc::io, {}, what + ": " + std::system_category().message(errno)};
}

/// Waits for a VMM to connect.
vmstate::result<vmstate::unique_fd> accept_at(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path)
        return vmstate::error(vmstate::errc::invalid_argument, "a path of a socket", path);
    std::memcpy(address.sun_path, path.data(), path.size());
    const vmstate::unique_fd listening(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ::unlink(path.c_str());
    if (!listening || ::bind(listening.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0
        || ::listen(listening.get(), 1) != 0)
        return failure(path);
    socket_to_end = listening.get();
    vmstate::unique_fd connection;
    do
        connection.reset(::accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC));
    while (!connection && errno == EINTR && !told_to_end);
    ::unlink(path.c_str());
    if (!connection && !told_to_end) return failure("accept");
    return connection;
}

} // namespace

int main(int argc, char** argv) {
    CLI::App app{"Serves a file as a vhost-user block device to one virtual machine, until that goes away.", "vhost_user_disk"};
    std::string socket_path, file;
    int fd = -1;
    unsigned queues = 1;
    bool read_only = false, whole_tables = false, print_capabilities = false;
    CLI::Option* const at = app.add_option("--socket-path", socket_path, "Listen at this unix socket");
    app.add_option("--fd", fd, "Or serve this connected socket")->excludes(at);
    app.add_option("--blk-file", file, "The disk: a file of whole sectors, or a block device");
    app.add_flag("--read-only", read_only, "The guest may not write");
    app.add_option("--queues", queues, "Queues that the VMM may use")->check(CLI::Range(1, 64))->capture_default_str();
    app.add_flag("--whole-tables", whole_tables,
        "Don't offer CONFIGURE_MEM_SLOTS: the VMM sends its memory table as a whole, and not region by region");
    app.add_flag("--print-capabilities", print_capabilities, "Print what vhost-user.json says of a backend, and end");
    CLI11_PARSE(app, argc, argv);
    if (print_capabilities) {
        std::puts(R"({"type": "block", "features": ["read-only", "blk-file"]})");
        return 0;
    }
    if (file.empty() || (socket_path.empty() && fd < 0)) {
        std::fputs("vhost_user_disk: --blk-file is needed, and --socket-path or --fd\n", stderr);
        return exit_failed;
    }

    struct sigaction action {};
    action.sa_handler = end_it;
    ::sigaction(SIGTERM, &action, nullptr);
    ::sigaction(SIGINT, &action, nullptr);

    const auto fail = [](const vmstate::error& why) {
        std::fprintf(stderr, "vhost_user_disk: %s\n", why.message().c_str());
        return exit_failed;
    };
    vmstate::result<disk::file_disk> opened = disk::file_disk::open(file, read_only, static_cast<std::uint16_t>(queues));
    if (!opened) return fail(opened.error());
    vmstate::result<vmstate::unique_fd> connection =
        fd >= 0 ? vmstate::result<vmstate::unique_fd>(vmstate::unique_fd(fd)) : accept_at(socket_path);
    if (!connection) return fail(connection.error());
    socket_to_end = connection->get();

    disk::device device(std::move(*opened), static_cast<std::uint16_t>(queues), !whole_tables);
    const vmstate::result<void> served = *connection && !told_to_end ? device.serve(connection->get()) : vmstate::result<void>();
    const disk::file_disk::counts& done = device.disk().done();
    std::printf("reads %llu writes %llu flushes %llu postcopy %s\n", static_cast<unsigned long long>(done.reads.load()),
        static_cast<unsigned long long>(done.writes.load()), static_cast<unsigned long long>(done.flushes.load()),
        device.was_in_postcopy() ? "yes" : "no");
    if (!served && !told_to_end) return fail(served.error());
    return 0;
}
