// SPDX-License-Identifier: BSL-1.0
//
// How long a vhost-user backend waits for a page in postcopy, against the guest's own threads: a thread of this process and
// one of a backend in another process take turns in touching pages that aren't there, while the source sends next to
// nothing but what it is asked for. `userfaultfd`: by QEMU's protocol; `notices`: the backend resolves its own faults. Source and destination are in this process, with a unix socket between them, as are the
// channels for pages that somebody waits for.
//
// Counters, in microseconds: `own_us` and `backend_us` are medians, `own_p99_us` and `backend_p99_us` what one in a hundred
// exceeds; `ratio` is the backend's median over our own. Its limit is 1.5. VMSTATE_BENCH_TOUCHES sets how often each
// touches a page in each round (2000), VMSTATE_BENCH_ROUNDS how many rounds there are (5).
#include <benchmark/benchmark.h>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/vhost_user/client.hpp>
#include <vmstate/vhost_user/postcopy_clients.hpp>

#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace vmstate;
using namespace std::chrono_literals;

constexpr std::size_t page_size = 4096;
constexpr std::size_t memory_size = std::size_t{128} << 20;

std::size_t environment_or(const char* name, std::size_t otherwise) {
    const char* const text = std::getenv(name);
    return text != nullptr ? std::max<std::size_t>(1, std::strtoul(text, nullptr, 10)) : otherwise;
}
template <class T>
void check(const T& outcome) {
    if (!outcome) throw std::runtime_error(outcome.error().message());
}
std::array<unique_fd, 2> make_pair(int type) {
    int ends[2];
    if (::socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, ends) != 0) throw std::runtime_error("socketpair");
    return {unique_fd(ends[0]), unique_fd(ends[1])};
}

/// What the source has at the beginning of each page.
std::uint64_t word_at_source(std::size_t page) { return (page + 1) * 0x9e3779b97f4a7c15U; }

/// Microseconds.
double touch(const std::byte* at, std::uint64_t expected) {
    const auto begin = std::chrono::steady_clock::now();
    const std::uint64_t found = *reinterpret_cast<const volatile std::uint64_t*>(at);
    const auto end = std::chrono::steady_clock::now();
    if (found != expected) throw std::runtime_error("a page that the source hasn't");
    return std::chrono::duration<double, std::micro>(end - begin).count();
}

/// A backend that touches the page that it is told, and tells how long that took.
class backend_process {
public:
    backend_process() {
        auto [front, back] = make_pair(SOCK_STREAM);
        auto [ours, theirs] = make_pair(SOCK_SEQPACKET);
        connection = std::move(front);
        orders_ = std::move(ours);
        child_ = ::fork();
        if (child_ < 0) throw std::runtime_error("fork");
        if (child_ != 0) return;
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        connection.reset();
        orders_.reset();
        try {
            work(back.get(), theirs.get());
        } catch (const std::exception& failure) {
            std::fprintf(stderr, "backend: %s\n", failure.what());
        }
        ::_exit(0);
    }
    ~backend_process() {
        ::kill(child_, SIGKILL);
        ::waitpid(child_, nullptr, 0);
    }
    backend_process(const backend_process&) = delete;
    backend_process& operator=(const backend_process&) = delete;

    double touch_page(std::size_t page) {
        double took = 0;
        if (::send(orders_.get(), &page, sizeof page, 0) != sizeof page || ::recv(orders_.get(), &took, sizeof took, 0) != sizeof took)
            throw std::runtime_error("the backend has died");
        return took;
    }

    unique_fd connection;

private:
    [[noreturn]] static void work(int socket, int orders) {
        vhost_user::client_options options;
        options.page_notices = true; // where the VMM wants them
        vhost_user::client backend(options);
        std::thread messages([&] {
            check(backend.run(socket, [](const vhost_user::message&) -> result<vhost_user::handling> { return vhost_user::handling::done; }));
            ::_exit(0);
        });
        for (std::size_t page = 0; ::recv(orders, &page, sizeof page, 0) == sizeof page;) {
            while (backend.postcopy_phase() != vhost_user::phase::running) std::this_thread::sleep_for(1ms);
            const std::optional<vhost_user::memory_access> access = backend.access();
            if (!access) break;
            const double took = touch(access->table().at_guest(page * page_size, page_size).data(), word_at_source(page));
            if (::send(orders, &took, sizeof took, 0) != sizeof took) break;
        }
        ::_exit(0);
    }

    unique_fd orders_;
    pid_t child_;
};

double quantile(std::vector<double> values, double part) {
    const auto at = values.begin() + static_cast<std::ptrdiff_t>(static_cast<double>(values.size() - 1) * part);
    std::nth_element(values.begin(), at, values.end());
    return *at;
}

struct waits {
    std::vector<double> own, backend;
};

void measure(std::size_t touches, bool notices, waits& into) {
    backend_process backend; // while there is one thread
    const ram_memory there = ram_memory::anonymous(memory_size).value();
    const ram_memory here = ram_memory::memfd("guest", memory_size).value();
    for (std::size_t page = 0; page != memory_size / page_size; ++page) {
        const std::uint64_t word = word_at_source(page);
        std::memcpy(there.span().data() + page * page_size, &word, sizeof word);
    }
    machine from({.name = "bench"}), to({.name = "bench"});
    check(from.add_ram("ram", there));
    check(to.add_ram("ram", here));
    const auto nothing = [] { return result<void>(); };
    migration::guest stopped{.stop = nothing, .start = nothing};
    migration::guest started{.stop = nothing, .start = nothing};

    auto front = std::make_shared<vhost_user::front_end>(std::move(backend.connection), "backend");
    const std::uint64_t way = notices ? vhost_user::protocol_feature::page_notices : 0;
    check(front->negotiate(0, vhost_user::protocol_feature::pagefault | vhost_user::protocol_feature::reply_ack | way));
    if (!front->has(way)) throw std::runtime_error("a kernel without minor faults");
    vhost_user::postcopy_clients clients;
    check(clients.add(front));
    // Of precopy nothing, of what nobody waits for a page or two each second.
    migration::parameters settings{.max_bandwidth = page_size, .postcopy_ram = true, .postcopy_preempt = true, .max_postcopy_bandwidth = page_size};
    migration::destination destination(to, started, settings);
    destination.add_postcopy_observer(clients);
    const std::string address = "unix:/tmp/vmstate-bench-vhost-user-" + std::to_string(::getpid());
    check(destination.listen(address));
    std::thread receiving([&] { static_cast<void>(destination.run()); });
    migration::source source(from, stopped, settings);
    check(source.start(address));
    check(source.start_postcopy());
    while (destination.status().state != migration::state::postcopy_active) std::this_thread::sleep_for(1ms);

    std::vector<std::size_t> order(memory_size / page_size);
    for (std::size_t page = 0; page != order.size(); ++page) order[page] = page;
    std::shuffle(order.begin(), order.end(), std::mt19937(1));
    touches = std::min(touches, order.size() / 2);
    for (std::size_t i = 0; i != touches; ++i) {
        into.own.push_back(touch(here.span().data() + order[2 * i] * page_size, word_at_source(order[2 * i])));
        into.backend.push_back(backend.touch_page(order[2 * i + 1]));
    }
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    check(source.wait());
    receiving.join();
    const auto status = destination.status();
    if (status.postcopy.faults.clients.size() != 1 || status.postcopy.faults.clients[0].faults < touches * 9 / 10)
        throw std::runtime_error("a backend that didn't have to wait");
}

void fault_latency(benchmark::State& state, bool notices) {
    const std::size_t touches = environment_or("VMSTATE_BENCH_TOUCHES", 2000);
    waits all;
    try {
        for (auto _ : state) measure(touches, notices, all);
    } catch (const std::exception& failure) {
        return state.SkipWithError(failure.what());
    }
    state.counters["own_us"] = quantile(all.own, 0.5);
    state.counters["backend_us"] = quantile(all.backend, 0.5);
    state.counters["own_p99_us"] = quantile(all.own, 0.99);
    state.counters["backend_p99_us"] = quantile(all.backend, 0.99);
    state.counters["ratio"] = quantile(all.backend, 0.5) / quantile(all.own, 0.5);
}

const auto rounds = static_cast<benchmark::IterationCount>(environment_or("VMSTATE_BENCH_ROUNDS", 5));

BENCHMARK_CAPTURE(fault_latency, userfaultfd, false)->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(fault_latency, notices, true)->Iterations(rounds)->Unit(benchmark::kMillisecond);

} // namespace
