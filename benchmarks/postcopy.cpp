// SPDX-License-Identifier: BSL-1.0
//
// How long a guest stands still for a page in postcopy, while all the other pages come as fast as they can; how long it
// stands still before that, and how long the whole transfer takes. A guest thread reads every page of the destination's
// memory once, in an order that looks random, from the moment on that it runs there; a read in which the thread had a page
// fault counts as a wait for a page. The contenders take turns within each round; compare within one run.
//
//     limit    a thread that reads the userfaultfd, asks another process over a unix socket, and copies the page that comes;
//              no other pages come meanwhile, and 8192 are enough. `+1 cpu`: all threads on one processor, where to wake
//              another one costs less
//     ours     source and destination of migration/, two processes; `+preempt`: with postcopy_preempt
//     qemu     two QEMUs with `-accel tcg`; the guest's program (guests/touch.S) does as the guest thread does and measures
//              with rdtsc. It can't know of a page fault: what takes three times as long as the first read of a page that
//              is there, and 4 us at least, counts as a wait. (A virtual machine without nested paging makes that read slow.)
//              `+preempt`: with postcopy-preempt
//
// Before the switch there are 200 to 300 ms of precopy with 20 MB/s. A table has, for each contender, medians over the rounds:
//
//     waits, mean, median, p99   how many reads had to wait, and how long (us)
//     total                      from the guest's stop until the source is done (ms)
//     stop                       from start_postcopy() (QEMU: migrate-start-postcopy is sent) to the guest's stop (ms)
//     downtime                   from there until it runs at the destination (ms)
//     cpu                        `limited` alone: of the source's threads, while the rest goes over at 50 MB/s and the guest
//                                asks for nothing any more (QEMU: still asks): of all, and of the busiest, in percent
//
// full_speed: 512 MiB (VMSTATE_BENCH_MIB, a power of two), no limit of bandwidth. limited: 128 MiB, max_postcopy_bandwidth is
// 50 MB/s and the guest reads 4096 pages. Counters: means and totals of ours over the limit's (where the kernel places its
// threads, and on one processor) and QEMU's. Aimed at: at most 2 over the limit's mean, 1 of QEMU's total and downtime, 5 ms to
// the stop. Full speed is that of two processors that are busy with it: with fewer than four, who serves a page waits for one
// of them, too. VMSTATE_BENCH_ROUNDS sets how often (5).
#include "support/two_processes.hpp"

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>

#include <linux/userfaultfd.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <x86intrin.h>

#include <array>
#include <atomic>
#include <bit>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <thread>

namespace {

using namespace bench;
using namespace std::chrono_literals;

constexpr std::size_t most_pages = std::size_t{1} << 20;
constexpr std::size_t limit_reads = 8192;
constexpr std::uint64_t precopy_bandwidth = 20'000'000;

struct load {
    bool tcp;
    std::size_t memory;             ///< bytes, a power of two
    std::size_t reads;              ///< that the guest does
    std::uint64_t bandwidth;        ///< in postcopy, 0 for no limit
    std::chrono::microseconds precopy{};
};

/// What one migration has shown; seconds.
struct trial {
    std::vector<double> waits;
    double total = 0;
    double to_stop = 0;
    double downtime = 0;
    double cpu = 0; ///< shares of one processor
    double busiest = 0;
};

// ---- a guest of ours

/// What a guest thread has seen; in memory that its process shares with us.
struct account {
    std::atomic<std::uint32_t> waits; ///< in `wait`
    std::atomic<bool> done;
    double resumed_at;
    std::array<float, most_pages> wait;
};
class shared_account {
public:
    shared_account()
        : address_(::mmap(nullptr, sizeof(account), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
        expect(address_ != MAP_FAILED, "mmap");
    }
    shared_account(const shared_account&) = delete;
    shared_account& operator=(const shared_account&) = delete;
    ~shared_account() { ::munmap(address_, sizeof(account)); }
    account& operator*() const { return *static_cast<account*>(address_); }
    account* operator->() const { return static_cast<account*>(address_); }
    std::vector<double> waits() const { return {(*this)->wait.begin(), (*this)->wait.begin() + (*this)->waits.load()}; }

private:
    void* address_;
};

/// That this thread has had.
long page_faults() {
    rusage used;
    expect(::getrusage(RUSAGE_THREAD, &used) == 0, "getrusage");
    return used.ru_minflt + used.ru_majflt;
}
/// As guests/touch.S does it.
void read_pages(std::span<std::byte> memory, std::size_t reads, account& into) {
    const auto last_page = static_cast<std::uint32_t>(memory.size() / page_size - 1);
    std::uint32_t number = 0;
    long faults = page_faults();
    for (std::size_t i = 0; i != reads; ++i) {
        number = (number * 1664525 + 1013904223) & last_page;
        const volatile std::byte* const at = memory.data() + std::size_t{number ^ number >> 9} * page_size;
        const double begin = now();
        static_cast<void>(*at);
        const double time = now() - begin;
        if (const long before = std::exchange(faults, page_faults()); faults == before) continue;
        const std::uint32_t wait = into.waits.load(std::memory_order_relaxed);
        into.wait[wait] = static_cast<float>(time);
        into.waits.store(wait + 1, std::memory_order_relaxed);
    }
    into.done.store(true);
}

// ---- the limit

void read_all(int fd, void* into, std::size_t size) {
    for (std::size_t done = 0; done != size;) {
        const ssize_t got = ::read(fd, static_cast<std::byte*>(into) + done, size - done);
        expect(got > 0, "read");
        done += static_cast<std::size_t>(got);
    }
}
/// A userfaultfd for what is missing in `memory`.
int watch_faults(std::span<std::byte> memory) {
    const int fault = static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC));
    expect(fault >= 0, "userfaultfd");
    uffdio_api api{UFFD_API, 0, 0};
    uffdio_register area{{reinterpret_cast<std::uintptr_t>(memory.data()), memory.size()}, UFFDIO_REGISTER_MODE_MISSING, 0};
    expect(::ioctl(fault, UFFDIO_API, &api) == 0 && ::ioctl(fault, UFFDIO_REGISTER, &area) == 0, "UFFDIO_REGISTER");
    return fault;
}
/// Asks for what is missing in `memory`, for as long as the process lives.
void serve_faults(int fault, int source, std::span<std::byte> memory) {
    alignas(page_size) static std::array<std::byte, page_size> page;
    for (;;) {
        uffd_msg message;
        read_all(fault, &message, sizeof message);
        const std::uint64_t address = message.arg.pagefault.address & ~std::uint64_t{page_size - 1};
        const std::uint64_t offset = address - reinterpret_cast<std::uintptr_t>(memory.data());
        expect(::write(source, &offset, sizeof offset) == sizeof offset, "write");
        read_all(source, page.data(), page_size);
        uffdio_copy copy{address, reinterpret_cast<std::uintptr_t>(page.data()), page_size, 0, 0};
        expect(::ioctl(fault, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
    }
}
/// All that this process starts meanwhile runs on the processor that it is on now.
class one_processor {
public:
    explicit one_processor(bool really) {
        expect(::sched_getaffinity(0, sizeof before_, &before_) == 0, "sched_getaffinity");
        if (!really) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(static_cast<std::size_t>(::sched_getcpu()), &one);
        expect(::sched_setaffinity(0, sizeof one, &one) == 0, "sched_setaffinity");
    }
    one_processor(const one_processor&) = delete;
    one_processor& operator=(const one_processor&) = delete;
    ~one_processor() { ::sched_setaffinity(0, sizeof before_, &before_); }

private:
    cpu_set_t before_;
};
trial run_limit(const load& what, std::span<std::byte> memory, bool on_one_processor) {
    const one_processor pinned(on_one_processor);
    int ends[2];
    expect(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
    shared_account guest;
    child destination([&](bench::pipe&) {
        ::close(ends[0]);
        const mapping into(memory.size(), backing::small_pages);
        const int fault = watch_faults(into.span());
        std::thread(serve_faults, fault, ends[1], into.span()).detach();
        read_pages(into.span(), std::min(what.reads, limit_reads), *guest);
        std::fflush(nullptr);
        ::_exit(0); // with the thread
    });
    ::close(ends[1]);
    std::uint64_t offset = 0;
    while (::read(ends[0], &offset, sizeof offset) == sizeof offset)
        expect(::write(ends[0], memory.data() + offset, page_size) == static_cast<ssize_t>(page_size), "write");
    ::close(ends[0]);
    destination.join();
    trial seen;
    seen.waits = guest.waits();
    return seen;
}

// ---- processor time

/// Seconds that each thread of a process has run, by its id.
std::map<std::string, double> thread_times(const std::string& process) {
    std::map<std::string, double> times;
    for (const auto& thread : std::filesystem::directory_iterator("/proc/" + process + "/task")) {
        std::ifstream file(thread.path() / "schedstat");
        double nanoseconds = 0;
        if (file >> nanoseconds) times[thread.path().filename()] = nanoseconds / 1e9;
    }
    return times;
}
/// What they use for half a second: into `seen`.
void measure_threads(const std::string& process, trial& seen) {
    const auto before = thread_times(process);
    const double begin = now();
    std::this_thread::sleep_for(500ms);
    const auto after = thread_times(process);
    const double time = now() - begin;
    for (const auto& [thread, used] : after) {
        const auto was = before.find(thread);
        const double share = (used - (was != before.end() ? was->second : 0)) / time;
        seen.cpu += share;
        seen.busiest = std::max(seen.busiest, share);
    }
}

// ---- ours

/// About as much state as a PC's devices have: 64 KiB.
struct some_card {
    std::uint32_t control = 1;
    std::uint8_t memory[64 * 1024] = {};
};
constexpr auto vmstate_some_card =
    vmstate::describe<some_card>({.name = "some-card"}, vmstate::field<&some_card::control>, vmstate::field<&some_card::memory>);

trial run_ours(const load& what, std::span<std::byte> memory, const std::string& uri, bool preempt) {
    shared_account seen_by_guest;
    child destination([&](bench::pipe& parent) {
        const mapping ram(memory.size(), backing::huge_pages);
        vmstate::machine machine({.name = "bench"});
        check(machine.add_ram("ram", ram.span()));
        const auto card = std::make_unique<some_card>();
        machine.add_device<vmstate_some_card>(*card);
        std::thread player;
        vmstate::migration::guest guest{.stop = {}, .start = [&]() -> vmstate::result<void> {
            seen_by_guest->resumed_at = now();
            player = std::thread([&] { read_pages(ram.span(), what.reads, *seen_by_guest); });
            return {};
        }};
        vmstate::migration::destination receiver(machine, guest, {.postcopy_ram = true, .postcopy_preempt = preempt});
        check(receiver.listen(uri));
        parent.put(make_address(receiver.uri()));
        const vmstate::result<void> received = receiver.run();
        if (player.joinable()) player.join();
        check(received);
        if (std::memcmp(ram.begin(), memory.data(), memory.size()) != 0) throw std::runtime_error("other memory");
    });
    const auto where = destination.from.take<address>();
    vmstate::machine machine({.name = "bench"});
    check(machine.add_ram("ram", memory));
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
    trial seen;
    {
        vmstate::migration::source sender(machine, guest,
            {.max_bandwidth = precopy_bandwidth, .postcopy_ram = true, .postcopy_preempt = preempt,
                .max_postcopy_bandwidth = what.bandwidth});
        check(sender.start(where.uri));
        std::this_thread::sleep_for(what.precopy);
        const double asked_at = now();
        check(sender.start_postcopy());
        if (what.bandwidth != 0) {
            while (!seen_by_guest->done.load() && !is_final(sender.status().state)) std::this_thread::sleep_for(1ms);
            measure_threads("self", seen);
            if (is_final(sender.status().state)) throw std::runtime_error("it was over too early");
        }
        check(sender.wait());
        seen.total = now() - stopped_at;
        seen.to_stop = stopped_at - asked_at;
    }
    destination.join();
    seen.downtime = seen_by_guest->resumed_at - stopped_at;
    seen.waits = seen_by_guest.waits();
    return seen;
}

// ---- QEMU

/// Of guests/touch.S.
constexpr std::uint64_t variables_at = 0x10000;
constexpr std::uint64_t notes_at = 0x100000;
constexpr std::uint64_t memory_at = 0x1000000;
struct guest_variables {
    std::uint32_t last_page, long_read, touched, noted;
};
struct guest_note {
    std::uint32_t touched, ticks;
};
template <class T>
T read_guest(vmstate::tests::qemu& who, std::uint64_t address) {
    const std::vector<std::byte> bytes = who.memory(address, sizeof(T));
    T value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
}
/// Of rdtsc.
double ticks_per_second() {
    static const double rate = [] {
        const double begin = now();
        const std::uint64_t first = __rdtsc();
        std::this_thread::sleep_for(50ms);
        return static_cast<double>(__rdtsc() - first) / (now() - begin);
    }();
    return rate;
}
/// Seconds that a read took at least which waited for a page.
double long_read() {
    static const double time = [] {
        constexpr std::size_t pages = 2048;
        const mapping ram(pages * page_size, backing::small_pages);
        const int fault = watch_faults(ram.span());
        const std::vector<std::byte> noise(ram.size, std::byte{1});
        uffdio_copy copy{reinterpret_cast<std::uintptr_t>(ram.begin()), reinterpret_cast<std::uintptr_t>(noise.data()),
            ram.size, 0, 0};
        expect(::ioctl(fault, UFFDIO_COPY, &copy) == 0, "UFFDIO_COPY");
        std::vector<double> reads;
        for (std::size_t page = 0; page != pages; ++page) {
            const volatile std::byte* const at = ram.begin() + page * page_size;
            const double begin = now();
            static_cast<void>(*at);
            reads.push_back(now() - begin);
        }
        ::close(fault);
        return std::max(4e-6, 3 * median(reads));
    }();
    return time;
}
double system_time() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }
void enable(vmstate::tests::qemu& who, bool preempt) {
    boost::json::array all;
    for (const char* name : {"return-path", "postcopy-ram", "events", "postcopy-preempt"})
        if (preempt || name != std::string_view("postcopy-preempt"))
            all.push_back(boost::json::object{{"capability", name}, {"state", true}});
    who.execute("migrate-set-capabilities", {{"capabilities", all}});
}
/// When it went to that state.
double wait_state(vmstate::tests::qemu& who, std::string_view state) {
    for (;;) {
        const boost::json::object event = who.wait_event("MIGRATION");
        const boost::json::string& now = event.at("data").as_object().at("status").as_string();
        if (now == state) return time_of(event);
        if (now == "failed" || now == "postcopy-paused") throw std::runtime_error("QEMU's migration: " + std::string(now));
    }
}
std::string process_of(vmstate::tests::qemu& who) {
    const double thread = number(who.execute("query-cpus-fast").as_array().at(0).as_object().at("thread-id"));
    std::ifstream file("/proc/" + std::to_string(static_cast<int>(thread)) + "/status");
    for (std::string word; file >> word;)
        if (word == "Tgid:" && file >> word) return word;
    throw std::runtime_error("no process of QEMU's thread");
}

trial run_qemu(const load& what, const std::filesystem::path& memory, const std::string& uri, bool preempt) {
    vmstate::tests::qemu_options options;
    options.memory = std::to_string((what.memory >> 20) + 64) + "M";
    options.rom = vmstate::tests::guest_rom("touch");
    vmstate::tests::qemu_options incoming = options;
    const auto set = [](std::uint64_t address, std::uint64_t value) {
        return "loader,addr=" + std::to_string(address) + ",data=" + std::to_string(value) + ",data-len=4";
    };
    const auto last_page = static_cast<std::uint32_t>(what.memory / page_size - 1);
    options.arguments = {"-device", "loader,force-raw=on,addr=" + std::to_string(memory_at) + ",file=" + memory.string(),
        "-device", set(variables_at, last_page), "-device",
        set(variables_at + 4, static_cast<std::uint64_t>(long_read() * ticks_per_second()))};
    incoming.arguments = {"-incoming", "defer"};
    vmstate::tests::qemu source(options);
    vmstate::tests::qemu destination(incoming);
    enable(source, preempt);
    enable(destination, preempt);
    source.execute("migrate-set-parameters", {{"downtime-limit", 1}, {"max-bandwidth", precopy_bandwidth},
        {"max-postcopy-bandwidth", what.bandwidth}});
    destination.execute("migrate-incoming", {{"uri", uri}});
    warm_up_free_memory(what.memory);
    source.execute("migrate", {{"uri", incoming_uri(destination, uri)}});
    wait_state(source, "active");
    std::this_thread::sleep_for(what.precopy);
    const double asked_at = system_time();
    source.execute("migrate-start-postcopy");
    const double stopped_at = time_of(source.wait_event("STOP"));
    const double resumed_at = time_of(destination.wait_event("RESUME"));
    trial seen;
    if (what.bandwidth != 0) {
        std::this_thread::sleep_for(500ms);
        measure_threads(process_of(source), seen);
    }
    seen.total = wait_state(source, "completed") - stopped_at;
    seen.to_stop = stopped_at - asked_at;
    seen.downtime = resumed_at - stopped_at;
    if (!destination.wait_incoming().completed) throw std::runtime_error("QEMU: " + destination.complaints());
    destination.stop();
    // The memory of one is as it was at the stop, that of the other goes on from there.
    const auto before = read_guest<guest_variables>(source, variables_at);
    const auto after = read_guest<guest_variables>(destination, variables_at);
    if (before.touched == 0) throw std::runtime_error("QEMU's guest had not begun");
    const std::vector<std::byte> noted = destination.memory(notes_at, (after.noted + 1) * sizeof(guest_note));
    for (std::size_t i = before.noted; i < after.noted; ++i) {
        guest_note note;
        std::memcpy(&note, noted.data() + i * sizeof note, sizeof note);
        if (note.touched - before.touched <= what.reads) seen.waits.push_back(note.ticks / ticks_per_second());
    }
    return seen;
}

// ---- the comparison

struct contender {
    std::string name;
    std::function<trial()> run;
    std::vector<trial> trials{};

    double median_of(double (*which)(const trial&)) const {
        std::vector<double> values;
        for (const trial& one : trials) values.push_back(which(one));
        return median(values);
    }
};
double mean_wait(const trial& of) {
    double sum = 0;
    for (const double wait : of.waits) sum += wait;
    return sum / static_cast<double>(std::max<std::size_t>(1, of.waits.size()));
}
double quantile(std::vector<double> values, double part) {
    if (values.empty()) return 0;
    const auto at = static_cast<std::ptrdiff_t>(part * static_cast<double>(values.size() - 1));
    std::nth_element(values.begin(), values.begin() + at, values.end());
    return values[static_cast<std::size_t>(at)];
}
double total(const trial& of) { return of.total; }
double downtime(const trial& of) { return of.downtime; }

void print(const std::string& title, const std::vector<contender>& all) {
    std::printf("\n%-22s%8s%9s%9s%9s%9s%8s%10s%7s%9s\n", title.c_str(), "waits", "mean us", "median", "p99", "total ms", "stop",
        "downtime", "cpu %", "busiest");
    for (const contender& one : all) {
        std::printf("%-22s%8.0f%9.1f%9.1f%9.1f", one.name.c_str(),
            one.median_of([](const trial& of) { return static_cast<double>(of.waits.size()); }), one.median_of(mean_wait) * 1e6,
            one.median_of([](const trial& of) { return quantile(of.waits, 0.5); }) * 1e6,
            one.median_of([](const trial& of) { return quantile(of.waits, 0.99); }) * 1e6);
        if (one.median_of(total) != 0)
            std::printf("%9.0f%8.2f%10.2f%7.1f%9.1f", one.median_of(total) * 1e3,
                one.median_of([](const trial& of) { return of.to_stop; }) * 1e3, one.median_of(downtime) * 1e3,
                one.median_of([](const trial& of) { return of.cpu; }) * 1e2,
                one.median_of([](const trial& of) { return of.busiest; }) * 1e2);
        std::printf("\n");
    }
    std::fflush(stdout);
}

void postcopy(benchmark::State& state, load what) {
    const mapping ram(what.memory, backing::huge_pages);
    fill_with_noise(ram.span());
    const vmstate::tests::temporary_directory directory;
    const std::filesystem::path file = directory / "memory";
    const std::string socket = (directory / "migrate").string();
    const std::string uri = what.tcp ? "tcp:127.0.0.1:0" : "unix:" + socket;
    std::vector<contender> all;
    for (const bool one : {false, true})
        all.push_back({one ? "limit+1 cpu" : "limit", [&, one] { return run_limit(what, ram.span(), one); }});
    for (const bool preempt : {false, true})
        all.push_back({preempt ? "ours+preempt" : "ours", [&, preempt] { return run_ours(what, ram.span(), uri, preempt); }});
    if (!vmstate::tests::find_qemu().empty() && std::getenv("VMSTATE_BENCH_NO_QEMU") == nullptr) {
        vmstate::tests::write_file(file, ram.span());
        for (const bool preempt : {false, true})
            all.push_back({preempt ? "qemu+preempt" : "qemu", [&, preempt] { return run_qemu(what, file, uri, preempt); }});
    }
    try {
        std::minstd_rand random(1);
        for (auto _ : state) {
            what.precopy = std::chrono::microseconds(200'000 + random() % 100'000);
            for (contender& one : all) {
                std::filesystem::remove(socket);
                warm_up_free_memory(what.memory);
                one.trials.push_back(one.run());
            }
        }
    } catch (const std::exception& failure) {
        return state.SkipWithError(failure.what());
    }
    print(std::string(what.tcp ? "tcp" : "unix") + (what.bandwidth != 0 ? ", limited" : ", full speed"), all);
    const double limit = all[0].median_of(mean_wait);
    const double limit_on_one = all[1].median_of(mean_wait);
    for (const std::size_t preempt : {0, 1}) {
        const contender& ours = all[2 + preempt];
        const std::string prefix = preempt != 0 ? "preempt_" : "";
        state.counters[prefix + "vs_limit"] = ours.median_of(mean_wait) / limit;
        state.counters[prefix + "vs_limit_1cpu"] = ours.median_of(mean_wait) / limit_on_one;
        if (all.size() == 4) continue;
        const contender& qemu = all[4 + preempt];
        state.counters[prefix + "vs_qemu"] = ours.median_of(mean_wait) / qemu.median_of(mean_wait);
        state.counters[prefix + "total_vs_qemu"] = ours.median_of(total) / qemu.median_of(total);
        state.counters[prefix + "downtime_vs_qemu"] = ours.median_of(downtime) / qemu.median_of(downtime);
    }
}

const auto rounds = static_cast<benchmark::IterationCount>(environment_or("VMSTATE_BENCH_ROUNDS", 5));
const std::size_t full_size = std::bit_floor(environment_or("VMSTATE_BENCH_MIB", 512)) << 20;
constexpr std::size_t limited_size = std::size_t{128} << 20;

BENCHMARK_CAPTURE(postcopy, unix/full_speed, load{false, full_size, full_size / page_size, 0})->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(postcopy, tcp/full_speed, load{true, full_size, full_size / page_size, 0})->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(postcopy, unix/limited, load{false, limited_size, 4096, 50'000'000})->Iterations(rounds)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(postcopy, tcp/limited, load{true, limited_size, 4096, 50'000'000})->Iterations(rounds)->Unit(benchmark::kMillisecond);

} // namespace
