// SPDX-License-Identifier: BSL-1.0
//
// How long an idle guest stands still, with a downtime limit of 1 ms and 256 MiB of memory that was written once, and how
// long the whole migration takes. Ours: from the call of `stop` at the source to the call of `start` at the destination,
// another process. QEMU's: from its source's STOP to its destination's RESUME, by the times that the events carry. The
// contenders take turns within each round.
//
// Counters: `ours_ms` and `qemu_ms` of downtime, `ours_total_ms` and `qemu_total_ms` (query-migrate's total-time, less
// setup-time; ours counts all from start() on), each a median; `ratio` and `total_ratio` are ours over QEMU's. The limit
// of both is 1; `shortest_...` are the same of the shortest times, which other load disturbs less. VMSTATE_BENCH_ROUNDS sets how often (11).
#include "support/two_processes.hpp"

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>

#include <optional>

namespace {

using namespace bench;

constexpr std::size_t memory_size = std::size_t{240} << 20;
constexpr const char* qemu_memory = "256M";

struct times {
    std::vector<double> downtime;
    std::vector<double> total;
};

// ---- ours

/// About as much state as a PC's devices have: 64 KiB.
struct some_card {
    std::uint32_t control = 1;
    std::uint8_t memory[64 * 1024] = {};
};
constexpr auto vmstate_some_card =
    vmstate::describe<some_card>({.name = "some-card"}, vmstate::field<&some_card::control>, vmstate::field<&some_card::memory>);

void migrate_ours(std::span<std::byte> memory, const std::string& uri, times& into) {
    child destination([&](bench::pipe& parent) {
        const mapping ram(memory.size(), backing::huge_pages);
        vmstate::machine machine({.name = "bench"});
        machine.add_ram("ram", ram.span());
        const auto card = std::make_unique<some_card>();
        machine.add_device<vmstate_some_card>(*card);
        double started_at = 0;
        vmstate::migration::guest guest{.stop = {}, .start = [&]() -> vmstate::result<void> {
            started_at = now();
            return {};
        }};
        vmstate::migration::destination receiver(machine, guest);
        check(receiver.listen(uri));
        parent.put(make_address(receiver.uri()));
        check(receiver.run());
        parent.put(started_at);
        if (std::memcmp(ram.begin(), memory.data(), memory.size()) != 0) throw std::runtime_error("other memory");
    });
    const auto where = destination.from.take<address>();
    vmstate::machine machine({.name = "bench"});
    machine.add_ram("ram", memory);
    const auto card = std::make_unique<some_card>();
    machine.add_device<vmstate_some_card>(*card);
    vmstate::marked_log log(memory.size());
    double stopped_at = 0;
    vmstate::migration::guest guest{.stop = [&]() -> vmstate::result<void> {
                                        stopped_at = now();
                                        return {};
                                    },
        .start = {}};
    guest.dirty_logs.emplace("ram", log);
    vmstate::migration::source sender(machine, guest, {.downtime_limit = std::chrono::milliseconds(1)});
    const double begin = now();
    check(sender.start(where.uri));
    check(sender.wait());
    into.total.push_back(now() - begin);
    into.downtime.push_back(destination.from.take<double>() - stopped_at);
    destination.join();
}

// ---- QEMU

void migrate_qemu(const std::filesystem::path& memory, const std::string& uri, times& into) {
    vmstate::tests::temporary_directory directory;
    vmstate::tests::qemu_options options;
    options.memory = qemu_memory;
    options.rom = write_idle_rom(directory);
    vmstate::tests::qemu_options incoming = options;
    options.arguments = {"-device", "loader,force-raw=on,addr=0x1000000,file=" + memory.string()};
    vmstate::tests::qemu source(options);
    incoming.incoming = uri;
    vmstate::tests::qemu destination(incoming);
    set_parameters(source, 1);
    warm_up_free_memory(memory_size);
    const std::string where = incoming_uri(destination, uri);
    const vmstate::tests::migration_outcome outcome = source.migrate(where);
    if (!outcome.completed) throw std::runtime_error("QEMU: " + outcome.error);
    const double stopped_at = time_of(source.wait_event("STOP"));
    const double resumed_at = time_of(destination.wait_event("RESUME"));
    const boost::json::object state = source.execute("query-migrate").as_object();
    if (number(state.at("ram").as_object().at("normal-bytes")) < static_cast<double>(memory_size))
        throw std::runtime_error("QEMU has left memory out");
    into.downtime.push_back(resumed_at - stopped_at);
    into.total.push_back((number(state.at("total-time")) - number(state.at("setup-time"))) / 1e3);
}

// ---- the comparison

void idle_guest(benchmark::State& state, bool tcp) {
    const mapping ram(memory_size, backing::huge_pages);
    fill_with_noise(ram.span());
    const vmstate::tests::temporary_directory directory;
    const std::filesystem::path file = directory / "memory";
    vmstate::tests::write_file(file, ram.span());
    const bool has_qemu = !vmstate::tests::find_qemu().empty();
    times ours, qemu;
    try {
        for (auto _ : state) {
            const std::string socket = (directory / "migrate").string();
            const std::string uri = tcp ? "tcp:127.0.0.1:0" : "unix:" + socket;
            std::filesystem::remove(socket);
            warm_up_free_memory(memory_size);
            migrate_ours(ram.span(), uri, ours);
            std::filesystem::remove(socket);
            if (has_qemu) migrate_qemu(file, uri, qemu);
        }
    } catch (const std::exception& failure) {
        return state.SkipWithError(failure.what());
    }
    state.counters["ours_ms"] = median(ours.downtime) * 1e3;
    state.counters["ours_total_ms"] = median(ours.total) * 1e3;
    if (!has_qemu) return;
    state.counters["qemu_ms"] = median(qemu.downtime) * 1e3;
    state.counters["qemu_total_ms"] = median(qemu.total) * 1e3;
    state.counters["ratio"] = median(ours.downtime) / median(qemu.downtime);
    state.counters["total_ratio"] = median(ours.total) / median(qemu.total);
    state.counters["shortest_ratio"] = smallest(ours.downtime) / smallest(qemu.downtime);
    state.counters["shortest_total_ratio"] = smallest(ours.total) / smallest(qemu.total);
}

const auto rounds = static_cast<benchmark::IterationCount>(environment_or("VMSTATE_BENCH_ROUNDS", 11));

BENCHMARK_CAPTURE(idle_guest, unix, false)->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(idle_guest, tcp, true)->Iterations(rounds)->Unit(benchmark::kMillisecond);

} // namespace
