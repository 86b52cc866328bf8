// SPDX-License-Identifier: BSL-1.0
//
// How fast memory goes from one process to another: ours, QEMU's, and three bare loops of system calls that carry the same
// bytes (an 8-byte header and a page, again and again) and do nothing else. Memory is random, and nobody has touched the
// destination's before. The contenders take turns within each round, so that a machine whose speed drifts treats them
// alike; compare within one run.
//
//     ours      source and destination of migration/, from start() until the source has the destination's word
//     qemu      two QEMUs, by query-migrate: normal-bytes over total-time less setup-time
//     writev    64 pairs of header and page by writev, and readv to where they belong
//     vmsplice  the same reader; the writer gives its pages to a pipe and the pipe to the socket
//     buffer    copied into 256 KiB, written; read into 256 KiB, copied to where it belongs
//
// Counters: `X` is GB/s of X by the median of its times. `vs_loops` is ours over the best of the three loops (the limit: 0.9
// at least), `vs_qemu` ours over QEMU's; `fastest_vs_loops` and `fastest_vs_qemu` say the same of the shortest times, which
// other load on the machine disturbs less.
//
// huge_pages: both sides' memory is advised to be of 2 MiB pages, as QEMU's is. small_pages: it is of 4 KiB ones, and our
// destination is told not to ask for others; what a QEMU can't be told, so it isn't compared there. VMSTATE_BENCH_MIB sets how much memory goes over (1536), and
// VMSTATE_BENCH_ROUNDS how often (7). It takes three times the memory, four times with QEMU.
#include "support/two_processes.hpp"

#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <memory>
#include <optional>

namespace {

using namespace bench;

std::size_t memory_size() { return environment_or("VMSTATE_BENCH_MIB", 1536) << 20; }

struct way {
    bool tcp;
    backing pages;
};

// ---- the loops

struct sockets {
    explicit sockets(bool tcp) {
        if (!tcp) {
            expect(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
            return;
        }
        const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        sockaddr_in where{};
        where.sin_family = AF_INET;
        where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        socklen_t length = sizeof where;
        auto* const address = reinterpret_cast<sockaddr*>(&where);
        expect(::bind(listener, address, length) == 0 && ::listen(listener, 1) == 0 &&
                   ::getsockname(listener, address, &length) == 0,
            "listen");
        ends[0] = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        expect(::connect(ends[0], address, length) == 0, "connect");
        ends[1] = ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
        expect(ends[1] >= 0, "accept");
        ::close(listener);
        const int on = 1;
        ::setsockopt(ends[0], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    }
    sockets(const sockets&) = delete;
    sockets& operator=(const sockets&) = delete;
    ~sockets() {
        ::close(ends[0]);
        ::close(ends[1]);
    }
    int ends[2];
};

constexpr std::size_t pairs = 64;
constexpr std::size_t record = 8 + page_size;
constexpr std::size_t buffer_size = 256 * 1024;

std::uint64_t header_of(std::size_t offset) { return offset | 0x28; } // RAM_SAVE_FLAG_PAGE and CONTINUE

/// Takes `done` bytes off the front.
std::span<iovec> behind(std::span<iovec> parts, std::size_t done) {
    while (!parts.empty() && done >= parts.front().iov_len) {
        done -= parts.front().iov_len;
        parts = parts.subspan(1);
    }
    if (done != 0) {
        parts.front().iov_base = static_cast<std::byte*>(parts.front().iov_base) + done;
        parts.front().iov_len -= done;
    }
    return parts;
}
std::size_t moved(ssize_t bytes, const char* what) {
    expect(bytes > 0, what);
    return static_cast<std::size_t>(bytes);
}
/// The pairs of the pages from `offset` on.
std::size_t gather(std::span<std::byte> memory, std::size_t offset, std::uint64_t* headers, iovec* parts) {
    const std::size_t count = std::min(pairs, (memory.size() - offset) / page_size);
    for (std::size_t i = 0; i != count; ++i) {
        parts[2 * i] = {headers + i, 8};
        parts[2 * i + 1] = {memory.data() + offset + i * page_size, page_size};
    }
    return count;
}

void send_by_writev(int fd, std::span<std::byte> memory) {
    std::uint64_t headers[pairs];
    iovec parts[2 * pairs];
    for (std::size_t offset = 0; offset != memory.size();) {
        const std::size_t count = gather(memory, offset, headers, parts);
        for (std::size_t i = 0; i != count; ++i) headers[i] = header_of(offset + i * page_size);
        for (std::span<iovec> left(parts, 2 * count); !left.empty();)
            left = behind(left, moved(::writev(fd, left.data(), static_cast<int>(left.size())), "writev"));
        offset += count * page_size;
    }
}
void receive_by_readv(int fd, std::span<std::byte> memory) {
    std::uint64_t headers[pairs];
    iovec parts[2 * pairs];
    for (std::size_t offset = 0; offset != memory.size();) {
        const std::size_t count = gather(memory, offset, headers, parts);
        for (std::span<iovec> left(parts, 2 * count); !left.empty();)
            left = behind(left, moved(::readv(fd, left.data(), static_cast<int>(left.size())), "readv"));
        for (std::size_t i = 0; i != count; ++i)
            if (headers[i] != header_of(offset + i * page_size)) throw std::runtime_error("another header");
        offset += count * page_size;
    }
}
void send_by_vmsplice(int fd, std::span<std::byte> memory) {
    int pipe_ends[2];
    expect(::pipe2(pipe_ends, O_CLOEXEC) == 0, "pipe");
    ::fcntl(pipe_ends[1], F_SETPIPE_SZ, 1 << 20);
    // The socket refers to the headers, too, for as long as they are on their way: they are written to pages that are
    // given up, rather than used again.
    const mapping headers(std::size_t{1} << 20, backing::small_pages);
    auto* const first = reinterpret_cast<std::uint64_t*>(headers.begin());
    std::size_t used = 0;
    iovec parts[2 * pairs];
    for (std::size_t offset = 0; offset != memory.size();) {
        if ((used + pairs) * 8 > headers.size) {
            ::madvise(headers.begin(), headers.size, MADV_DONTNEED);
            used = 0;
        }
        const std::size_t count = gather(memory, offset, first + used, parts);
        for (std::size_t i = 0; i != count; ++i) first[used++] = header_of(offset + i * page_size);
        for (std::span<iovec> left(parts, 2 * count); !left.empty();) {
            std::size_t given = moved(::vmsplice(pipe_ends[1], left.data(), left.size(), 0), "vmsplice");
            left = behind(left, given);
            while (given != 0) given -= moved(::splice(pipe_ends[0], nullptr, fd, nullptr, given, SPLICE_F_MORE), "splice");
        }
        offset += count * page_size;
    }
    ::close(pipe_ends[0]);
    ::close(pipe_ends[1]);
}
void send_by_buffer(int fd, std::span<std::byte> memory) {
    const auto buffer = std::make_unique_for_overwrite<std::byte[]>(buffer_size);
    for (std::size_t offset = 0; offset != memory.size();) {
        std::size_t end = 0;
        for (; offset != memory.size() && end + record <= buffer_size; offset += page_size, end += record) {
            const std::uint64_t header = header_of(offset);
            std::memcpy(buffer.get() + end, &header, 8);
            std::memcpy(buffer.get() + end + 8, memory.data() + offset, page_size);
        }
        for (std::size_t sent = 0; sent != end;) sent += moved(::write(fd, buffer.get() + sent, end - sent), "write");
    }
}
void receive_by_buffer(int fd, std::span<std::byte> memory) {
    const auto buffer = std::make_unique_for_overwrite<std::byte[]>(buffer_size);
    std::size_t at = 0;
    std::size_t end = 0;
    for (std::size_t offset = 0; offset != memory.size(); offset += page_size, at += record) {
        while (end - at < record) {
            std::memmove(buffer.get(), buffer.get() + at, end - at);
            end -= std::exchange(at, std::size_t{0});
            end += moved(::read(fd, buffer.get() + end, buffer_size - end), "read");
        }
        std::uint64_t header = 0;
        std::memcpy(&header, buffer.get() + at, 8);
        if (header != header_of(offset)) throw std::runtime_error("another header");
        std::memcpy(memory.data() + offset, buffer.get() + at + 8, page_size);
    }
}

/// How long it takes, from the first byte until the other process has the last one where it belongs.
double time_of_loop(way how, std::span<std::byte> memory, void (*send)(int, std::span<std::byte>),
    void (*receive)(int, std::span<std::byte>)) {
    const sockets between(how.tcp);
    child destination([&](bench::pipe& parent) {
        const mapping into(memory.size(), how.pages);
        parent.put(0.0);
        receive(between.ends[1], into.span());
        parent.put(now());
        if (std::memcmp(into.begin(), memory.data(), memory.size()) != 0) throw std::runtime_error("other memory");
    });
    destination.from.take<double>();
    const double begin = now();
    send(between.ends[0], memory);
    const double end = destination.from.take<double>();
    destination.join();
    return end - begin;
}

// ---- ours

double time_of_ours(way how, std::span<std::byte> memory, const std::string& uri) {
    child destination([&](bench::pipe& parent) {
        const mapping into(memory.size(), how.pages);
        vmstate::machine machine({.name = "bench"});
        machine.add_ram("ram", into.span());
        vmstate::migration::guest guest{.stop = {}, .start = {}};
        vmstate::migration::destination receiver(
            machine, guest, {.advise_huge_pages = how.pages == backing::huge_pages});
        check(receiver.listen(uri));
        parent.put(make_address(receiver.uri()));
        check(receiver.run());
        if (std::memcmp(into.begin(), memory.data(), memory.size()) != 0) throw std::runtime_error("other memory");
    });
    const auto where = destination.from.take<address>();
    vmstate::machine machine({.name = "bench"});
    machine.add_ram("ram", memory);
    vmstate::marked_log log(memory.size());
    vmstate::migration::guest guest{.stop = {}, .start = {}};
    guest.dirty_logs.emplace("ram", log);
    vmstate::migration::source sender(machine, guest);
    const double begin = now();
    check(sender.start(where.uri));
    check(sender.wait());
    const double end = now();
    destination.join();
    return end - begin;
}

// ---- QEMU

class qemu_source {
public:
    explicit qemu_source(std::span<const std::byte> memory) : size_(memory.size()) {
        const std::filesystem::path file = directory_ / "memory";
        vmstate::tests::write_file(file, memory);
        vmstate::tests::qemu_options options = this->options();
        options.stopped = true;
        options.arguments = {"-device", "loader,force-raw=on,addr=0x1000000,file=" + file.string()};
        qemu_.emplace(std::move(options));
        std::filesystem::remove(file);
        set_parameters(*qemu_, 1000);
    }
    /// Seconds for as many bytes as ours.
    double time(bool tcp) {
        // A QEMU that has migrated has to run before it may again.
        if (std::exchange(has_migrated_, true)) {
            qemu_->cont();
            qemu_->stop();
        }
        const std::string socket = (directory_ / "migrate").string();
        std::filesystem::remove(socket);
        vmstate::tests::qemu_options options = this->options();
        options.incoming = tcp ? "tcp:127.0.0.1:0" : "unix:" + socket;
        options.stopped = true;
        vmstate::tests::qemu destination(options);
        // QEMU takes memory for itself as it starts.
        warm_up_free_memory(size_);
        const vmstate::tests::migration_outcome outcome = qemu_->migrate(incoming_uri(destination, options.incoming));
        if (!outcome.completed) throw std::runtime_error("QEMU: " + outcome.error);
        const boost::json::object state = qemu_->execute("query-migrate").as_object();
        const double ms = number(state.at("total-time")) - number(state.at("setup-time"));
        const double bytes = number(state.at("ram").as_object().at("normal-bytes"));
        if (bytes < static_cast<double>(size_)) throw std::runtime_error("QEMU has left memory out");
        return ms / 1e3 * static_cast<double>(size_) / bytes;
    }

private:
    vmstate::tests::qemu_options options() const {
        vmstate::tests::qemu_options made;
        made.memory = std::to_string((size_ >> 20) + 64) + "M";
        made.rom = rom_;
        return made;
    }

    vmstate::tests::temporary_directory directory_;
    std::filesystem::path rom_ = write_idle_rom(directory_);
    std::size_t size_;
    bool has_migrated_ = false;
    std::optional<vmstate::tests::qemu> qemu_;
};

// ---- the comparison

void throughput(benchmark::State& state, way how) {
    const std::size_t size = memory_size();
    const mapping ram(size, how.pages);
    fill_with_noise(ram.span());
    const vmstate::tests::temporary_directory directory;
    std::vector<double> ours, qemus, by_writev, by_vmsplice, by_buffer;
    try {
        std::optional<qemu_source> qemu;
        if (how.pages == backing::huge_pages && !vmstate::tests::find_qemu().empty()) qemu.emplace(ram.span());
        for (auto _ : state) {
            const auto run = [&](std::vector<double>& times, auto&& trial) {
                warm_up_free_memory(size + (std::size_t{64} << 20));
                times.push_back(trial());
            };
            run(ours, [&] {
                const std::string socket = (directory / "migrate").string();
                std::filesystem::remove(socket);
                return time_of_ours(how, ram.span(), how.tcp ? "tcp:127.0.0.1:0" : "unix:" + socket);
            });
            run(by_writev, [&] { return time_of_loop(how, ram.span(), send_by_writev, receive_by_readv); });
            run(by_vmsplice, [&] { return time_of_loop(how, ram.span(), send_by_vmsplice, receive_by_readv); });
            run(by_buffer, [&] { return time_of_loop(how, ram.span(), send_by_buffer, receive_by_buffer); });
            if (qemu) run(qemus, [&] { return qemu->time(how.tcp); });
        }
    } catch (const std::exception& failure) {
        return state.SkipWithError(failure.what());
    }
    const auto speed = [&](const std::vector<double>& times) { return static_cast<double>(size) / median(times) / 1e9; };
    state.counters["ours"] = speed(ours);
    state.counters["writev"] = speed(by_writev);
    state.counters["vmsplice"] = speed(by_vmsplice);
    state.counters["buffer"] = speed(by_buffer);
    state.counters["vs_loops"] = std::min({median(by_writev), median(by_vmsplice), median(by_buffer)}) / median(ours);
    state.counters["fastest_vs_loops"] =
        std::min({smallest(by_writev), smallest(by_vmsplice), smallest(by_buffer)}) / smallest(ours);
    if (qemus.empty()) return;
    state.counters["qemu"] = speed(qemus);
    state.counters["vs_qemu"] = median(qemus) / median(ours);
    state.counters["fastest_vs_qemu"] = smallest(qemus) / smallest(ours);
}

const auto rounds = static_cast<benchmark::IterationCount>(environment_or("VMSTATE_BENCH_ROUNDS", 7));

BENCHMARK_CAPTURE(throughput, unix/huge_pages, way{false, backing::huge_pages})->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(throughput, tcp/huge_pages, way{true, backing::huge_pages})->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(throughput, unix/small_pages, way{false, backing::small_pages})->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(throughput, tcp/small_pages, way{true, backing::small_pages})->Iterations(rounds)->Unit(benchmark::kMillisecond);

} // namespace
