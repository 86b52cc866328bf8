// SPDX-License-Identifier: BSL-1.0
// Guest memory that a vhost-user backend maps, too, while postcopy brings it: the VMM's half, with backends as threads that
// have mappings and userfaultfds of their own, and as processes that can be killed. Every page is looked at; whatever a
// backend does, the others and the guest get their pages.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/postcopy/discard_memory.hpp>
#include <vmstate/postcopy/request_queue.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/vhost_user/backend_log.hpp>
#include <vmstate/vhost_user/client.hpp>
#include <vmstate/vhost_user/postcopy_clients.hpp>

#include "vhost_user_backend.hpp"

#include <support/catch.hpp>
#include <support/huge_pages.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;
using vhost_user::client_phase;
using vhost_user::postcopy_clients;
using vhost_user::request;

namespace {

constexpr std::size_t page = 4096;
constexpr std::uint64_t huge = std::uint64_t{2} << 20;

/// What the source has: the first word of each small page. Some are zero.
std::uint64_t word_at_source(std::size_t number) { return number % 5 == 0 ? 0 : number * 0x9e3779b97f4a7c15U; }
/// Where users of the memory count, so that a page placed over one that is in use is seen.
std::atomic_ref<std::uint64_t> counter_of(std::span<std::byte> memory, std::size_t number) {
    return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(memory.data() + number * page + 8 * 100));
}
std::uint64_t word_of(std::span<const std::byte> memory, std::size_t number) {
    return *reinterpret_cast<const volatile std::uint64_t*>(memory.data() + number * page);
}
/// Looks at every page in an order of its own, and counts in it; how many weren't what the source has.
std::size_t use_every_page(std::span<std::byte> memory, unsigned seed) {
    std::vector<std::size_t> order(memory.size() / page);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    std::size_t wrong = 0;
    for (const std::size_t number : order) {
        if (word_of(memory, number) != word_at_source(number)) ++wrong;
        counter_of(memory, number).fetch_add(1);
    }
    return wrong;
}

ram_block& add_block(ram_section& ram, const char* name, const ram_memory& memory) {
    ram_options options;
    options.host_page_size = memory.page_size();
    options.file = memory.file();
    options.guest_address = 0x100000;
    ram.insert(std::make_unique<ram_block>(ram_block{name, memory.span(), memory.span().size(), options}));
    return *ram.find(name);
}

bool may_run() {
    if (userfault::open(userfault_scope::user_and_kernel, 0)) return true;
    skip("no userfaultfd for faults of system calls here (vm.unprivileged_userfaultfd)");
    return false;
}

/// A socket's two ends: the front end with what was agreed upon, and what the backend has.
struct connection {
    std::shared_ptr<vhost_user::front_end> front;
    unique_fd back;
};
connection connect_backend(const std::string& name, std::chrono::milliseconds patience = 20s,
    std::uint64_t agreed = vhost_user::protocol_feature::pagefault | vhost_user::protocol_feature::reply_ack) {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    auto front = std::make_shared<vhost_user::front_end>(unique_fd(ends[0]), name, patience);
    front->set_protocol_features(agreed);
    return {front, unique_fd(ends[1])};
}

/// A destination's part of postcopy, and a source that sends what it is asked for.
class rig {
public:
    explicit rig(const ram_section& blocks, std::vector<vhost_user::shared_region> regions = {})
        : clients(std::move(regions),
              [this](const std::string& name, const error& why) {
                  const std::lock_guard lock(failures_mutex_);
                  failures_.push_back(name + ": " + why.message());
              })
        , ram(blocks), received(page), placer(received), requests(received), decoder(blocks)
        , faults(placer, requests, statistics, [this](const error& why) {
              const std::lock_guard lock(failures_mutex_);
              failures_.push_back("own: " + why.message());
          }) {
        for (const auto& block : ram.blocks()) received.add(*block);
        placer.on_placed([this](ram_block& block, std::uint64_t offset, std::uint64_t size) { clients.placed(block, offset, size); });
    }
    ~rig() { end(); }

    result<void> advise() { return clients.advise(ram); }
    result<void> listen() {
        if (result<void> started = placer.start(); !started) return started;
        if (result<void> started = faults.start(); !started) return started;
        if (result<void> connected = requests.connect([this](const page_request_message& message) -> result<void> {
                const result<page_request> wanted = decoder.decode(message.type(), message.payload());
                if (!wanted) return wanted.error();
                queue.push(*wanted);
                return {};
            });
            !connected)
            return connected;
        return clients.listen(faults);
    }
    /// Sends what is asked for from now on.
    void serve() {
        source_ = std::thread([this] {
            while (const auto wanted = queue.pop_until(std::chrono::steady_clock::now() + 24h)) static_cast<void>(place(wanted->offset));
        });
    }
    /// The host page of the first block.
    result<void> place(std::uint64_t offset) {
        ram_block& block = *ram.blocks().front();
        std::vector<std::byte> content(static_cast<std::size_t>(block.options.host_page_size));
        for (std::size_t at = 0; at < content.size(); at += page) {
            const std::uint64_t word = word_at_source((static_cast<std::size_t>(offset) + at) / page);
            std::memcpy(content.data() + at, &word, sizeof word);
        }
        return placer.place(block, offset, content.data());
    }
    /// Nobody touches anything any more.
    void end() {
        queue.close();
        if (source_.joinable()) source_.join();
        clients.end(true);
        faults.stop();
    }
    std::vector<std::string> failures() {
        const std::lock_guard lock(failures_mutex_);
        return failures_;
    }
    client_phase phase_of(std::size_t index) const { return clients.status()[index].phase; }

private:
    std::mutex failures_mutex_;
    std::vector<std::string> failures_;
    std::thread source_;

public:
    postcopy_clients clients;
    const ram_section& ram;
    received_pages received;
    page_placer placer;
    page_requests requests;
    postcopy_statistics statistics;
    page_request_decoder decoder;
    page_request_queue queue;
    fault_thread faults;
};

/// A machine of 64 pages of a memfd with one block, and a rig for it.
struct small_rig {
    explicit small_rig(std::vector<vhost_user::shared_region> regions = {}, std::size_t pages = 64)
        : memory(ram_memory::memfd("guest", pages * page).value()), block(add_block(ram, "pc.ram", memory)), at(ram, std::move(regions)) {}

    ram_memory memory;
    ram_section ram;
    ram_block& block;
    rig at;
};

bool wait_for(auto done) {
    for (int i = 0; i != 20'000 && !done(); ++i) std::this_thread::sleep_for(1ms);
    return done();
}

// ---- backends as processes: this very program, run again with nothing but a hidden test case

/// Ends with the test, and the test's process.
class backend_process {
public:
    /// `dies_at`: the phase in which it kills itself, if any; "source" for one that uses memory until its connection ends,
    /// "slow" for one that takes its time between two pages.
    backend_process(int socket, unsigned seed, std::uint64_t guest_address, const std::string& dies_at = {}) {
        int pipe[2];
        if (::pipe2(pipe, O_CLOEXEC) != 0) throw std::runtime_error("pipe");
        report_.reset(pipe[0]);
        const unique_fd report_end(pipe[1]);
        const std::string program = std::filesystem::read_symlink("/proc/self/exe").string();
        const std::vector<std::string> told{"VMSTATE_BACKEND_SOCKET=" + std::to_string(socket), "VMSTATE_BACKEND_REPORT=" + std::to_string(pipe[1]),
            "VMSTATE_BACKEND_SEED=" + std::to_string(seed), "VMSTATE_BACKEND_ADDRESS=" + std::to_string(guest_address),
            "VMSTATE_BACKEND_DIES=" + dies_at};
        const char* const argv[] = {program.c_str(), "[.backend]", nullptr};
        std::vector<const char*> environment;
        for (char** one = environ; *one != nullptr; ++one) environment.push_back(*one);
        for (const std::string& one : told) environment.push_back(one.c_str());
        environment.push_back(nullptr);
        child_ = ::fork();
        if (child_ < 0) throw std::runtime_error("fork");
        if (child_ == 0) {
            ::prctl(PR_SET_PDEATHSIG, SIGKILL);
            ::fcntl(socket, F_SETFD, 0);
            ::fcntl(pipe[1], F_SETFD, 0);
            ::dup2(::open("/dev/null", O_WRONLY), STDOUT_FILENO);
            ::execve(program.c_str(), const_cast<char* const*>(argv), const_cast<char* const*>(environment.data()));
            ::_exit(127);
        }
    }
    ~backend_process() { kill(); }
    backend_process(const backend_process&) = delete;
    backend_process& operator=(const backend_process&) = delete;

    void kill() {
        if (child_ <= 0) return;
        ::kill(child_, SIGKILL);
        ::waitpid(std::exchange(child_, -1), nullptr, 0);
    }
    /// Returns when it has ended by itself.
    void join() {
        if (child_ > 0) ::waitpid(std::exchange(child_, -1), nullptr, 0);
    }
    /// How many pages of those that it has used weren't right; none where it ended before it had used them all.
    std::optional<std::uint64_t> wait() const {
        std::uint64_t wrong = 0;
        return ::read(report_.get(), &wrong, sizeof wrong) == sizeof wrong ? std::optional(wrong) : std::nullopt;
    }

private:
    pid_t child_ = -1;
    unique_fd report_;
};

constexpr unsigned threads_of_a_backend = 2;

/// A machine whose memory a backend can map.
struct shared_machine {
    explicit shared_machine(std::size_t pages)
        : memory(ram_memory::memfd("guest", pages * page).value()) {
        ram_options options;
        options.file = memory.file();
        options.guest_address = std::uint64_t{1} << 32;
        REQUIRE(state.add_ram("ram", memory.span(), options));
    }
    void fill() {
        for (std::size_t number = 0; number != memory.span().size() / page; ++number) {
            const std::uint64_t word = word_at_source(number);
            if (word != 0) std::memcpy(memory.span().data() + number * page, &word, sizeof word);
        }
    }

    ram_memory memory;
    machine state{{.name = "shared"}};
    migration::guest control{.stop = [] { return result<void>(); }, .start = [] { return result<void>(); }};
};

} // namespace

// The part of a backend, see backend_process: with the client of this library, and threads that use all of the memory.
TEST_CASE("a backend", "[.backend]") {
    const auto told = [](const char* name) {
        const char* const value = std::getenv(name);
        return std::string(value != nullptr ? value : "");
    };
    if (told("VMSTATE_BACKEND_SOCKET").empty()) return;
    const int socket = std::stoi(told("VMSTATE_BACKEND_SOCKET"));
    const std::uint64_t address = std::stoull(told("VMSTATE_BACKEND_ADDRESS"));
    const std::string dies = told("VMSTATE_BACKEND_DIES");
    vhost_user::client_options options;
    options.page_notices = true; // where the VMM wants them
    vhost_user::client backend(options);
    std::atomic<bool> over = false;
    std::atomic<std::uint64_t> wrong = 0;
    std::atomic<std::size_t> used = 0;
    std::vector<std::thread> users;
    for (unsigned i = 0; i != threads_of_a_backend; ++i)
        users.emplace_back([&, i] {
            while (!over && dies != "source" && backend.postcopy_phase() != vhost_user::phase::running) std::this_thread::sleep_for(1ms);
            std::vector<std::size_t> order;
            for (std::size_t done = 0; !over && (order.empty() || done != order.size());) {
                const std::optional<vhost_user::memory_access> access = backend.access();
                if (!access || access->table().empty()) {
                    std::this_thread::sleep_for(100us);
                    continue;
                }
                if (order.empty()) {
                    order.resize(access->table().entries().front().own.size() / page);
                    std::iota(order.begin(), order.end(), std::size_t{0});
                    std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(std::stoul(told("VMSTATE_BACKEND_SEED"))) + i));
                }
                if (dies == "running" && ++used == order.size() / 4) ::kill(::getpid(), SIGKILL);
                const std::span<std::byte> memory = access->table().at_guest(address + order[done] * page, page);
                if (word_of(memory, 0) != word_at_source(order[done])) ++wrong;
                counter_of(memory, 0).fetch_add(1);
                if (++done == order.size() && dies == "source") done = 0;
                if (dies == "slow") std::this_thread::sleep_for(500us);
            }
        });
    std::thread messages([&] {
        for (;;) {
            auto got = vhost_user::receive_message(socket);
            if (!got || !*got) break;
            if (to_string((*got)->request) == dies) ::kill(::getpid(), SIGKILL);
            const auto handled = backend.handle(socket, **got);
            if (handled && *handled != vhost_user::handling::answered) static_cast<void>(backend.acknowledge(socket, **got, true));
            if (!handled) break;
        }
        over = true;
        backend.disconnect();
    });
    for (std::thread& user : users) user.join();
    const std::uint64_t count = wrong;
    if (!over) static_cast<void>(!::write(std::stoi(told("VMSTATE_BACKEND_REPORT")), &count, sizeof count));
    messages.join();
}

TEST_CASE("two backends in processes of their own use a machine's memory here, and there while postcopy brings it") {
    const bool preempt = GENERATE(false, true);
    const bool breaks = GENERATE(false, true); // the connection, while they wait for pages
    const bool notices = GENERATE(false, true); // they resolve their faults by themselves
    CAPTURE(preempt, breaks, notices);
    constexpr std::size_t pages = 2048;
    shared_machine from(pages), to(pages);
    if (const result<void> can = check_postcopy_support(*to.state.ram()); !can) return skip(can.error().message());
    from.fill();
    const std::uint64_t address = to.state.ram()->blocks().front()->options.guest_address;

    // At the source they use it until the guest stops.
    std::vector<std::unique_ptr<backend_process>> at_source;
    std::vector<connection> to_them;
    for (unsigned seed = 0; seed != 2; ++seed) {
        to_them.push_back(connect_backend("at the source"));
        at_source.push_back(std::make_unique<backend_process>(to_them.back().back.get(), 50 + seed, address, "source"));
        to_them.back().back.reset();
        REQUIRE(message_of(to_them.back().front->negotiate(0, vhost_user::protocol_feature::reply_ack)) == "");
        const vhost_user::memory_region all{address, pages * page, reinterpret_cast<std::uintptr_t>(from.memory.span().data()), 0};
        std::vector<unique_fd> files;
        files.emplace_back(::fcntl(from.memory.file().fd, F_DUPFD_CLOEXEC, 0));
        REQUIRE(message_of(to_them.back().front->tell(vhost_user::make_memory_table({&all, 1}, std::move(files)))) == "");
    }
    from.control.stop = [&]() -> result<void> {
        for (const connection& one : to_them) one.front->shutdown();
        for (const auto& one : at_source) one->join();
        return {};
    };
    const auto all_used = [&] {
        std::size_t used = 0;
        for (std::size_t number = 0; number != pages; ++number) used += counter_of(from.memory.span(), number).load() > 1;
        return used > pages / 2;
    };
    REQUIRE(wait_for(all_used));

    postcopy_clients clients;
    std::vector<std::unique_ptr<backend_process>> processes;
    bool no_minor_faults = false;
    const auto start = [&](const std::string& name, const std::string& dies_at) {
        connection one = connect_backend(name, 20s, 0);
        processes.push_back(std::make_unique<backend_process>(one.back.get(), static_cast<unsigned>(10 * processes.size()), address, dies_at));
        one.back.reset();
        CHECK(message_of(one.front->negotiate(0, vhost_user::protocol_feature::pagefault | vhost_user::protocol_feature::reply_ack |
                                                     (notices ? vhost_user::protocol_feature::page_notices : 0))) == "");
        if (notices && !one.front->has(vhost_user::protocol_feature::page_notices)) no_minor_faults = true;
        CHECK(message_of(clients.add(one.front)) == "");
    };
    start("disk", breaks ? "slow" : "");
    start("net", breaks ? "slow" : "");
    // One that dies on the way costs the others nothing.
    const std::string dies_at = preempt ? "running" : breaks ? "POSTCOPY_LISTEN" : "SET_MEM_TABLE";
    start("third", dies_at);
    if (no_minor_faults) return skip("a kernel without minor faults of shmem and hugetlbfs (Linux 5.14)");

    // So slow that it isn't over before it is told to go on in postcopy.
    migration::parameters settings{.max_bandwidth = 1u << 20, .postcopy_ram = true, .postcopy_preempt = preempt, .max_postcopy_bandwidth = breaks ? 1u << 20 : 16u << 20};
    std::thread guest;
    std::atomic<bool> guest_may_run = !breaks; // it would have all of its memory before the connection breaks
    std::atomic<std::size_t> wrong = 0;
    to.control.start = [&]() -> result<void> {
        guest = std::thread([&] {
            guest_may_run.wait(false);
            wrong += use_every_page(to.memory.span(), 99);
        });
        return {};
    };
    migration::destination destination(to.state, to.control, settings);
    destination.add_postcopy_observer(clients);
    const temporary_directory directory;
    REQUIRE(destination.listen("unix:" + (directory / "socket").string()));
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, settings);
    CHECK(message_of(source.start(destination.uri())) == "");
    CHECK(message_of(source.start_postcopy()) == "");
    if (breaks) {
        // Its backends may wait for pages before the machine runs.
        CHECK(wait_for([&] {
            const migration::status at = destination.status();
            return at.state == migration::state::postcopy_active && at.postcopy.faults.faults > 10;
        }));
        destination.pause();
        const auto is_paused = [](const auto& side) { return side.status().state == migration::state::postcopy_paused; };
        CHECK(wait_for([&] { return is_paused(source) && is_paused(destination); }));
        // Whoever touches a page that isn't there waits through it.
        CHECK(wait_for([&] { return destination.status().postcopy.waiting >= 2; }));
        guest_may_run = true;
        guest_may_run.notify_all();
        settings.max_postcopy_bandwidth = 0;
        source.set_parameters(settings);
        CHECK(message_of(destination.recover("unix:" + (directory / "again").string())) == "");
        CHECK(message_of(source.recover("unix:" + (directory / "again").string())) == "");
    }
    const result<void> left = source.wait();
    receiving.join();
    if (guest.joinable()) guest.join();
    CHECK(message_of(left) == "");
    CHECK(message_of(arrived) == "");
    CHECK(processes[0]->wait() == 0u);
    CHECK(processes[1]->wait() == 0u);
    CHECK_FALSE(processes[2]->wait());
    CHECK(wrong == 0);
    std::size_t overwritten = 0;
    for (std::size_t number = 0; number != pages; ++number) {
        // Where it stood at the source, and once for each of those here.
        const std::uint64_t counted = counter_of(to.memory.span(), number).load() - counter_of(from.memory.span(), number).load();
        const std::uint64_t expected = 2 * threads_of_a_backend + 1;
        if (counted < expected || counted > expected + (dies_at == "running" ? threads_of_a_backend : 0)) ++overwritten;
    }
    CHECK(overwritten == 0);

    const auto status = destination.status();
    REQUIRE(status.postcopy.faults.clients.size() == (dies_at == "running" ? 3 : 2));
    for (std::size_t i = 0; i != 2; ++i) {
        const postcopy_client_status& one = status.postcopy.faults.clients[i];
        CAPTURE(one.name, one.faults, one.blocked.count(), one.longest.count());
        CHECK(one.faults > 0);
        CHECK(one.blocked > 0ns);
        CHECK(one.longest <= one.blocked);
        CHECK(clients.status()[i].phase == client_phase::ended);
    }
    // All of the memory may have been there before it died.
    const client_phase last = clients.status()[2].phase;
    CHECK((last == client_phase::failed || (dies_at == "running" && last == client_phase::ended)));
    CHECK(status.postcopy.interruptions == (breaks ? 1u : 0u));
}

TEST_CASE("backends learn of a migration that fails by the end of their connection, and of one without postcopy by name") {
    constexpr std::size_t pages = 256;
    const std::string way = GENERATE("given up", "precopy", "ADVISE fails");
    CAPTURE(way);
    shared_machine from(pages), to(pages);
    if (const result<void> can = check_postcopy_support(*to.state.ram()); !can) return skip(can.error().message());
    from.fill();
    postcopy_clients clients;
    connection one = connect_backend("disk", 20s, way == "ADVISE fails" ? 0 : vhost_user::protocol_feature::pagefault);
    REQUIRE(clients.add(one.front));
    hand_made_backend disk(std::move(one.back));
    disk.start();
    // So slow that it isn't over before it is told to go on in postcopy.
    migration::parameters settings{.max_bandwidth = way == "given up" ? 64u << 10 : 0, .postcopy_ram = true, .max_postcopy_bandwidth = 64 << 10};
    migration::destination destination(to.state, to.control, settings);
    destination.add_postcopy_observer(clients);
    const temporary_directory directory;
    REQUIRE(destination.listen("unix:" + (directory / "socket").string()));
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, settings);
    CHECK(message_of(source.start(destination.uri())) == "");
    std::thread user;
    if (way == "given up") {
        CHECK(message_of(source.start_postcopy()) == "");
        CHECK(disk.wait_until_registered());
        user = std::thread([&] { static_cast<void>(word_of(disk.memory(), pages - 1)); });
        CHECK(wait_for([&] {
            const auto now = destination.status();
            return now.state == migration::state::postcopy_active && now.postcopy.faults.faults > 0;
        }));
        destination.give_up();
    }
    receiving.join();
    if (way == "given up") {
        CHECK(wait_for([&] { return source.status().state == migration::state::postcopy_paused; }));
        CHECK(message_of(source.give_up()) == "");
    }
    const result<void> left = source.wait();
    if (way == "given up") {
        CHECK(arrived.has_error());
        CHECK(clients.status()[0].phase == client_phase::failed);
        CHECK_FALSE(disk.has_ended());
        disk.stop(); // at the end of the connection a backend lets its threads go on
        user.join();
    } else if (way == "precopy") {
        CHECK(message_of(arrived) == "");
        CHECK(message_of(left) == "");
        CHECK(disk.has_ended());
        CHECK(clients.status()[0].phase == client_phase::ended);
    } else {
        CHECK_THAT(message_of(arrived), contains("postcopy"));
        CHECK_THAT(message_of(arrived), contains("PAGEFAULT"));
        CHECK(left.has_error());
        CHECK(clients.status()[0].phase == client_phase::failed);
    }
}

TEST_CASE("backends and the guest get every page, whoever asked for it, from any memory that processes can share") {
    if (!may_run()) return;
    const std::string kind = GENERATE("memfd", "/dev/shm", "huge pages");
    const bool unasked = GENERATE(false, true); // pages also come that nobody asked for
    CAPTURE(kind, unasked);
    const bool is_huge = kind == "huge pages";
    std::optional<huge_pages> reserved;
    if (is_huge && !reserved.emplace(6).enough()) return skip("no huge pages of 2 MiB to be had");
    const std::uint64_t size = is_huge ? 6 * huge : 2 * huge;
    const std::string path = "/dev/shm/vmstate-vhost-user-test-" + std::to_string(::getpid());
    result<ram_memory> memory = kind == "memfd"      ? ram_memory::memfd("guest", size)
                                : kind == "/dev/shm" ? ram_memory::file(path, size)
                                                     : ram_memory::memfd("guest", size, huge);
    ::unlink(path.c_str());
    REQUIRE(message_of(memory) == "");
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);

    // What precopy brought of it has become old.
    std::memset(memory->span().data(), 0x55, memory->span().size());
    REQUIRE(check_postcopy_support(ram));
    set_transparent_huge_pages(block, false);
    REQUIRE(discard_range(block, {0, size}));

    rig at(ram);
    connection one = connect_backend("disk"), other = connect_backend("net");
    REQUIRE(at.clients.add(one.front));
    REQUIRE(at.clients.add(other.front));
    hand_made_backend disk(std::move(one.back)), net(std::move(other.back));
    disk.start();
    net.start();
    REQUIRE(message_of(at.advise()) == "");
    REQUIRE(message_of(at.listen()) == "");
    at.serve();
    REQUIRE(disk.wait_until_registered());
    REQUIRE(net.wait_until_registered());
    CHECK(at.phase_of(0) == client_phase::listening);

    std::atomic<std::size_t> wrong = 0;
    std::vector<std::thread> users;
    for (unsigned i = 0; i != 2; ++i) {
        users.emplace_back([&, i] { wrong += use_every_page(disk.memory(), i); });
        users.emplace_back([&, i] { wrong += use_every_page(net.memory(), 10 + i); });
    }
    users.emplace_back([&] { wrong += use_every_page(memory->span(), 20); });
    std::thread background;
    if (unasked)
        background = std::thread([&] {
            for (std::uint64_t offset = 0; offset != size; offset += block.options.host_page_size) static_cast<void>(at.place(offset));
        });
    for (std::thread& user : users) user.join();
    if (unasked) background.join();
    at.end();

    CHECK(wrong == 0);
    CHECK(at.failures() == std::vector<std::string>{});
    std::size_t overwritten = 0;
    for (std::size_t number = 0; number != memory->span().size() / page; ++number)
        if (counter_of(memory->span(), number).load() != users.size()) ++overwritten;
    CHECK(overwritten == 0);
    CHECK(at.requests.waiting() == 0);
    CHECK(at.requests.sent() <= size / block.options.host_page_size);
    CHECK(disk.has_ended());
    CHECK(at.phase_of(1) == client_phase::ended);
    const postcopy_fault_status status = at.statistics.snapshot();
    REQUIRE(status.clients.size() == 2);
    CHECK(status.clients[0].name == "disk");
    CHECK(status.clients[1].name == "net");
    std::uint64_t all = 0;
    for (const postcopy_client_status& client : status.clients) {
        CHECK(client.has_left);
        all += client.faults;
        CHECK(client.longest <= client.blocked);
        CHECK((client.faults == 0) == (client.blocked == 0ns));
    }
    if (!unasked) CHECK(all > 0);
    CHECK(all <= status.faults);
}

TEST_CASE("who waits for a page goes on when it comes, whoever asked and whether or not it was asked for") {
    if (!may_run()) return;
    small_rig small;
    rig& at = small.at;
    connection one = connect_backend("disk"), other = connect_backend("net");
    const result<unsigned> first = at.clients.add(one.front);
    REQUIRE(at.clients.add(other.front));
    hand_made_backend disk(std::move(one.back)), net(std::move(other.back));
    disk.start();
    net.start();
    REQUIRE(message_of(at.advise()) == "");
    REQUIRE(message_of(at.listen()) == "");
    REQUIRE(disk.wait_until_registered());
    REQUIRE(net.wait_until_registered());

    // Two backends and the guest wait for one page: it is asked for once.
    std::atomic<int> right = 0;
    std::mutex lock_that_others_want;
    std::vector<std::thread> users;
    users.emplace_back([&] {
        const std::lock_guard lock(lock_that_others_want);
        right += word_of(disk.memory(), 7) == word_at_source(7);
    });
    users.emplace_back([&] { right += word_of(net.memory(), 7) == word_at_source(7); });
    users.emplace_back([&] { right += word_of(small.memory.span(), 7) == word_at_source(7); });
    // Another one waits for the lock, whose owner waits for the page.
    users.emplace_back([&] {
        while (lock_that_others_want.try_lock()) {
            lock_that_others_want.unlock();
            if (right != 0) break;
            std::this_thread::yield();
        }
        const std::lock_guard lock(lock_that_others_want);
        right += word_of(disk.memory(), 11) == word_at_source(11);
    });
    CHECK(wait_for([&] { return at.statistics.snapshot().faults >= 3; }));
    CHECK(at.requests.sent() == 1);
    CHECK(right == 0);
    CHECK(at.statistics.snapshot().clients[0].faults == 1);
    CHECK(at.statistics.snapshot().clients[0].blocked > 0ns); // it waits still
    // Nobody takes the request: the page comes of its own accord. A backend that comes and goes meanwhile disturbs nobody.
    connection third = connect_backend("third");
    hand_made_backend late(std::move(third.back));
    late.start();
    const result<unsigned> added = at.clients.add(third.front);
    CHECK(message_of(added) == "");
    CHECK(late.wait_until_registered());
    if (added) at.clients.remove(*added);
    REQUIRE(at.place(7 * page));
    CHECK(wait_for([&] { return right >= 3 && at.statistics.snapshot().faults >= 4; }));
    REQUIRE(at.place(11 * page));
    for (std::thread& user : users) user.join();
    CHECK(right == 4);

    // Precopy left it without memory, or the guest: zero it is, and nobody is asked.
    const std::uint64_t asked = at.requests.sent();
    at.received.mark(small.block, 20 * page, page);
    std::thread user([&] { right += word_of(net.memory(), 20) == 0; });
    user.join();
    CHECK(right == 5);
    CHECK(at.requests.sent() == asked);
    CHECK(wait_for([&] { return at.statistics.snapshot().clients[1].already_received == 1; })); // counted when it goes on
    CHECK(at.statistics.snapshot().clients[2].has_left);

    // One leaves, its threads go on; twice is harmless. What it waited for isn't in the guest's memory because of that.
    std::thread left([&] { static_cast<void>(word_of(disk.memory(), 31)); });
    CHECK(wait_for([&] { return at.requests.waiting() == 1; }));
    at.clients.remove(*first);
    at.clients.remove(*first);
    left.join();
    CHECK_FALSE(disk.has_ended());
    CHECK(at.failures() == std::vector<std::string>{});
    const off_t where = static_cast<off_t>(31 * page);
    CHECK(::lseek(small.memory.file().fd, where, SEEK_DATA) != where);
    CHECK(message_of(at.place(31 * page)) == "");
    CHECK(word_of(small.memory.span(), 31) == word_at_source(31));
}

TEST_CASE("a backend has the time that a page takes, and is served until it has answered the end") {
    if (!may_run()) return;
    small_rig small;
    rig& at = small.at;
    connection one = connect_backend("disk", 100ms);
    REQUIRE(at.clients.add(one.front));
    // Its thread of the messages waits for a page at one message, and for one that is there and has no memory at another.
    std::atomic<bool> goes_on = false;
    std::atomic<std::uint64_t> word = 0;
    hand_made_backend* self = nullptr;
    hand_made_backend disk(std::move(one.back), {.device = [&](request which) {
        if (which == request::set_vring_enable) goes_on.wait(false);
        else if (which != request::get_vring_base) return;
        word = word_of(self->memory(), which == request::set_vring_enable ? 20 : 7);
    }});
    self = &disk;
    disk.start();
    REQUIRE(message_of(at.advise()) == "");
    REQUIRE(message_of(at.listen()) == "");
    REQUIRE(disk.wait_until_registered());
    std::thread source([&] {
        static_cast<void>(wait_for([&] { return at.requests.waiting() == 1; }));
        std::this_thread::sleep_for(300ms);
        static_cast<void>(at.place(7 * page));
    });
    CHECK(message_of(one.front->tell(make_request(request::get_vring_base))) == "");
    source.join();
    CHECK(word == word_at_source(7));

    at.received.mark(small.block, 20 * page, page);
    result<void> told;
    std::thread teller([&] { told = one.front->tell(make_request(request::set_vring_enable)); });
    std::this_thread::sleep_for(20ms);
    std::thread ending([&] { at.end(); });
    std::this_thread::sleep_for(20ms); // it waits for the other request's answer now
    goes_on = true;
    goes_on.notify_all();
    teller.join();
    ending.join();
    CHECK(message_of(told) == "");
    CHECK(word == 0);
    CHECK(disk.has_ended());
    CHECK(at.failures() == std::vector<std::string>{});
}

TEST_CASE("regions of a block are mapped where the guest has them, and faults in each find their page") {
    if (!may_run()) return;
    small_rig small({{"pc.ram", 0, 16 * page, 0}, {"pc.ram", 32 * page, 0, std::uint64_t{4} << 30}});
    rig& at = small.at;
    at.serve();
    connection one = connect_backend("disk");
    REQUIRE(at.clients.add(one.front));
    hand_made_backend disk(std::move(one.back));
    disk.start();
    REQUIRE(message_of(at.advise()) == "");
    REQUIRE(message_of(at.listen()) == "");
    REQUIRE(disk.wait_until_registered());
    REQUIRE(disk.memory(0).size() == 16 * page);
    REQUIRE(disk.memory(1).size() == 32 * page);
    CHECK(word_of(disk.memory(0), 9) == word_at_source(9));
    CHECK(word_of(disk.memory(1), 9) == word_at_source(32 + 9));
    at.end();
    CHECK(at.failures() == std::vector<std::string>{});
}

TEST_CASE("what no backend can share or do is refused at ADVISE by name, with the remedy") {
    if (!may_run()) return;
    {
        const ram_memory of_its_own = ram_memory::anonymous(8 * page).value();
        ram_section ram;
        add_block(ram, "pc.ram", of_its_own);
        rig at(ram);
        CHECK(message_of(at.advise()) == ""); // nobody maps it
        at.clients.end(true);
        connection one = connect_backend("disk");
        REQUIRE(at.clients.add(one.front));
        const result<void> refused = at.advise();
        REQUIRE(refused.has_error());
        CHECK(refused.error().code() == errc::unsupported);
        for (const char* const word : {"pc.ram", "private", "memfd", "/dev/shm"}) CHECK_THAT(refused.error().message(), contains(word));
        // Here a list would do.
    }
    struct {
        const char* what;
        std::vector<vhost_user::shared_region> regions;
        std::string said;
    } const lists[] = {
        {"another block", {{"vga", 0, page, 0}}, "vga"},
        {"too long", {{"pc.ram", 0, 65 * page, 0}}, "within"},
        {"part of a page", {{"pc.ram", 0, 100, 0}}, "whole host pages"},
        {"behind the end", {{"pc.ram", 64 * page, 0, 0}}, "within"},
        {"over each other", {{"pc.ram", 0, 2 * page, 0}, {"pc.ram", 4 * page, page, page}}, "overlap"},
        {"too many", std::vector<vhost_user::shared_region>(9, {"pc.ram", 0, page, 0}), "1 to 8"},
    };
    for (const auto& list : lists) {
        CAPTURE(list.what);
        small_rig small(list.regions);
        connection one = connect_backend("disk");
        REQUIRE(small.at.clients.add(one.front));
        CHECK_THAT(message_of(small.at.advise()), contains(list.said));
    }
    {
        small_rig small;
        small.block.options.file = {};
        connection one = connect_backend("disk");
        REQUIRE(small.at.clients.add(one.front));
        CHECK_THAT(message_of(small.at.advise()), contains("ram_options.file"));
    }
    {
        small_rig small;
        connection one = connect_backend("disk", 20s, vhost_user::protocol_feature::reply_ack);
        REQUIRE(small.at.clients.add(one.front));
        CHECK_THAT(message_of(small.at.advise()), contains("PAGEFAULT"));
    }
    struct {
        backend_act act;
        std::string said;
    } const acts[] = {
        {backend_act::die, "the end of the connection"},
        {backend_act::never_answer, "nothing for 30 ms"},
        {backend_act::refuse, "a payload of 0 bytes"},
        {backend_act::answer_something_else, "GET_CONFIG"},
        {backend_act::no_descriptor, "0 descriptors"},
        {backend_act::other_descriptor, "another descriptor"},
    };
    for (const auto& [act, said] : acts) {
        CAPTURE(said);
        small_rig small;
        connection one = connect_backend("net"), other = connect_backend("disk", 30ms);
        REQUIRE(small.at.clients.add(one.front));
        REQUIRE(small.at.clients.add(other.front));
        hand_made_backend good(std::move(one.back)), bad(std::move(other.back), {.at = request::postcopy_advise, .act = act});
        good.start();
        bad.start();
        const result<void> refused = small.at.advise();
        CHECK_THAT(message_of(refused), contains("vhost-user backend disk/POSTCOPY_ADVISE"));
        CHECK_THAT(message_of(refused), contains(said));
        CHECK(small.at.phase_of(1) == client_phase::failed);
        small.at.clients.end(true);
        CHECK(good.has_ended());
        CHECK(small.at.phase_of(0) == client_phase::ended);
    }
}

TEST_CASE("a backend that fails at LISTEN or later is served no more, and costs nobody else a page") {
    if (!may_run()) return;
    using table = std::vector<vhost_user::memory_region>;
    struct {
        const char* what;
        backend_script script;
        std::string said;
    } const cases[] = {
        {"dies", {.at = request::postcopy_listen, .act = backend_act::die}, "POSTCOPY_LISTEN"},
        {"never answers", {.at = request::postcopy_listen, .act = backend_act::never_answer}, "nothing for 30 ms"},
        {"refuses", {.at = request::postcopy_listen, .act = backend_act::refuse}, "failure 7"},
        {"dies", {.at = request::set_mem_table, .act = backend_act::die}, "SET_MEM_TABLE"},
        {"never answers", {.at = request::set_mem_table, .act = backend_act::never_answer}, "nothing for 30 ms"},
        {"another answer", {.at = request::set_mem_table, .act = backend_act::answer_something_else}, "GET_CONFIG"},
        {"an empty table", {.answer = [](table& t) { t.clear(); }}, "at least one region"},
        {"one that overlaps", {.answer = [](table& t) { t.push_back(t.front()); }}, "overlap"},
        {"more regions than descriptors",
            {.answer =
                    [](table& t) {
                        t.push_back(t.front());
                        t.back().guest_address += t.back().size;
                        t.back().user_address += t.back().size;
                    }},
            "1 regions"},
        {"outside of memory", {.answer = [](table& t) { t.front().guest_address += std::uint64_t{1} << 40; }}, "the region"},
        {"larger than memory", {.answer = [](table& t) { t.front().size *= 2; }}, "the region"},
        {"an address of no page", {.answer = [](table& t) { t.front().user_address += 8; }}, "whole pages"},
        {"no address", {.answer = [](table& t) { t.front().user_address = 0; }}, "whole pages"},
        {"around the end", {.answer = [](table& t) { t.front().user_address = ~std::uint64_t{0} - page; }}, "64 bits"},
        {"too many", {.answer = [](table& t) { t.resize(9, t.front()); }}, "8 regions"},
    };
    for (const auto& one : cases) {
        CAPTURE(one.what, one.said);
        small_rig small;
        rig& at = small.at;
        connection to_bad = connect_backend("bad", 30ms), to_good = connect_backend("good");
        REQUIRE(at.clients.add(to_bad.front));
        REQUIRE(at.clients.add(to_good.front));
        hand_made_backend bad(std::move(to_bad.back), one.script), good(std::move(to_good.back));
        bad.start();
        good.start();
        CHECK(message_of(at.advise()) == "");
        CHECK(message_of(at.listen()) == "");
        at.serve();
        CHECK(at.phase_of(0) == client_phase::failed);
        CHECK(at.phase_of(1) == client_phase::listening);
        REQUIRE(good.wait_until_registered());
        CHECK(use_every_page(good.memory(), 1) == 0);
        at.end();
        REQUIRE(at.failures().size() == 1);
        CHECK_THAT(at.failures()[0], contains("bad: "));
        CHECK_THAT(at.failures()[0], contains(one.said));
        CHECK(at.statistics.snapshot().clients.size() == 1);
    }

    // At the end: it takes no longer than its patience.
    for (const backend_act act : {backend_act::die, backend_act::never_answer, backend_act::refuse, backend_act::answer_something_else}) {
        small_rig small;
        connection to_bad = connect_backend("bad", 30ms), to_good = connect_backend("good");
        REQUIRE(small.at.clients.add(to_bad.front));
        REQUIRE(small.at.clients.add(to_good.front));
        hand_made_backend bad(std::move(to_bad.back), {.at = request::postcopy_end, .act = act}), good(std::move(to_good.back));
        bad.start();
        good.start();
        CHECK(message_of(small.at.advise()) == "");
        CHECK(message_of(small.at.listen()) == "");
        small.at.end();
        CHECK(good.has_ended());
        CHECK(small.at.phase_of(0) == client_phase::failed);
        REQUIRE(small.at.failures().size() == 1);
        CHECK_THAT(small.at.failures()[0], contains("POSTCOPY_END"));
    }
}

TEST_CASE("a backend that touches what its table hasn't is reported and still served") {
    if (!may_run()) return;
    small_rig small;
    rig& at = small.at;
    connection one = connect_backend("disk");
    REQUIRE(at.clients.add(one.front));
    // It says that it has its memory a mapping's length further on than it has.
    hand_made_backend disk(std::move(one.back),
        {.answer = [](std::vector<vhost_user::memory_region>& t) { t.front().user_address += 32 * page; }});
    disk.start();
    REQUIRE(message_of(at.advise()) == "");
    REQUIRE(message_of(at.listen()) == "");
    at.serve();
    REQUIRE(disk.wait_until_registered());
    std::thread lost([&] { static_cast<void>(word_of(disk.memory(), 3)); });
    CHECK(wait_for([&] { return !at.failures().empty(); }));
    CHECK_THAT(at.failures()[0], contains("disk: "));
    CHECK_THAT(at.failures()[0], contains("a client's fault in guest memory"));
    CHECK(at.phase_of(0) == client_phase::listening);
    // For the page of another number, but it is served: that one is there then, and the end lets the first go on.
    std::thread served([&] { static_cast<void>(word_of(disk.memory(), 40)); });
    CHECK(wait_for([&] { return at.received.has(small.block, 8 * page, page); }));
    at.end();
    lost.join();
    served.join();
    CHECK(disk.has_ended());
}

TEST_CASE("backends that resolve their own faults get every page by notices of region and offset") {
    if (!may_run()) return;
    const bool is_huge = GENERATE(false, true);
    CAPTURE(is_huge);
    std::optional<huge_pages> reserved;
    if (is_huge && !reserved.emplace(6).enough()) return skip("no huge pages of 2 MiB to be had");
    const std::uint64_t size = is_huge ? 6 * huge : 2 * huge;
    const result<ram_memory> memory = ram_memory::memfd("guest", size, is_huge ? huge : page);
    REQUIRE(message_of(memory) == "");
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    // Two regions, the second of which begins elsewhere.
    const std::uint64_t half = size / 2;
    const std::uint64_t second = std::uint64_t{4} << 30;
    rig at(ram, {{"pc.ram", 0, half, 0}, {"pc.ram", half, 0, second}});
    at.serve();
    struct backend {
        explicit backend(unique_fd to) : socket(std::move(to)), client([] {
            vhost_user::client_options options;
            options.page_notices = true;
            return options;
        }()) {
            messages = std::thread([this] {
                static_cast<void>(client.run(socket.get(), [](const vhost_user::message&) -> result<vhost_user::handling> { return vhost_user::handling::done; }));
            });
        }
        ~backend() {
            ::shutdown(socket.get(), SHUT_RDWR);
            messages.join();
        }
        unique_fd socket;
        vhost_user::client client;
        std::thread messages;
    };
    connection one = connect_backend("disk", 20s, 0), other = connect_backend("net", 20s, 0);
    backend disk(std::move(one.back)), net(std::move(other.back));
    for (const connection* to : {&one, &other}) {
        REQUIRE(message_of(to->front->negotiate(0, ~std::uint64_t{0})) == "");
        if (!to->front->has(vhost_user::protocol_feature::page_notices))
            return skip("a kernel without minor faults of shmem and hugetlbfs (Linux 5.14)");
        REQUIRE(at.clients.add(to->front));
    }
    // Some of it is in the file already, or was received and is nowhere.
    at.received.mark(block, 0, block.options.host_page_size);
    REQUIRE(message_of(at.advise()) == "");
    REQUIRE(message_of(at.listen()) == "");
    for (std::uint64_t offset = half; offset < size; offset += 2 * block.options.host_page_size) CHECK(at.place(offset));

    std::atomic<std::size_t> wrong = 0;
    std::vector<std::thread> users;
    const std::size_t zeros = static_cast<std::size_t>(block.options.host_page_size) / page;
    for (backend* const who : {&disk, &net})
        for (unsigned i = 0; i != 2; ++i)
            users.emplace_back([&, who, i] {
                while (who->client.postcopy_phase() != vhost_user::phase::running) std::this_thread::yield();
                std::vector<std::size_t> order(static_cast<std::size_t>(size) / page);
                std::iota(order.begin(), order.end(), std::size_t{0});
                std::shuffle(order.begin(), order.end(), std::mt19937(i));
                std::optional<vhost_user::memory_access> access = who->client.access();
                for (const std::size_t number : order) {
                    const std::uint64_t offset = number * page;
                    const std::span<std::byte> found = access->table().at_guest(offset < half ? offset : second + offset - half, page);
                    if (word_of(found, 0) != (number < zeros ? 0 : word_at_source(number))) ++wrong;
                    counter_of(found, 0).fetch_add(1);
                }
            });
    for (std::thread& user : users) user.join();
    at.end();
    CHECK(wrong == 0);
    CHECK(at.failures() == std::vector<std::string>{});
    std::size_t overwritten = 0;
    for (std::size_t number = 0; number != memory->span().size() / page; ++number)
        if (counter_of(memory->span(), number).load() != users.size()) ++overwritten;
    CHECK(overwritten == 0);
    CHECK(disk.client.postcopy_phase() == vhost_user::phase::none);
    const postcopy_fault_status status = at.statistics.snapshot();
    REQUIRE(status.clients.size() == 2);
    CHECK(status.clients[0].faults + status.clients[1].faults > 0);
    CHECK(at.requests.waiting() == 0);
    CHECK(at.requests.sent() < size / block.options.host_page_size);
}

TEST_CASE("notices of what isn't there, too many of them, and others at all end that backend's service alone") {
    if (!may_run()) return;
    struct {
        std::vector<vhost_user::page_notice> sent;
        std::string said;
    } cases[] = {
        {{{1, 0}}, "region 1"},
        {{{0, 64 * page}}, "of its table"},
        {{{0, ~std::uint64_t{0} - page + 1}}, "of its table"},
        {{{0, 8}}, "offset 8"},
        {{}, "at most 128"},
        {{{7, 7}}, "region 7"},
        {{{0, page}, {0, page}}, "isn't missed already"},
    };
    for (std::uint64_t i = 0; i != 129; ++i) cases[4].sent.push_back({0, i * page});
    for (const auto& one : cases) {
        CAPTURE(one.said);
        small_rig small({}, one.sent.size() > 1 ? 256 : 64);
        connection to = connect_backend("disk", 20s, vhost_user::protocol_feature::pagefault | vhost_user::protocol_feature::page_notices);
        REQUIRE(small.at.clients.add(to.front));
        // A backend that says what the case says.
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
        const unique_fd ours(ends[0]);
        unique_fd theirs(ends[1]);
        std::atomic<bool> saw_the_end = false;
        std::thread backend([&] {
            for (;;) {
                auto got = vhost_user::receive_message(to.back.get());
                if (!got || !*got) {
                    saw_the_end = true;
                    return;
                }
                vhost_user::message& m = **got;
                if (m.request == request::set_mem_table && m.descriptors.empty()) continue; // the acknowledgement
                vhost_user::message reply = make_request(m.request, vhost_user::message_flag::reply);
                if (m.request == request::postcopy_advise) reply.descriptors.push_back(std::move(theirs));
                else if (m.request == request::set_mem_table) reply.payload = m.payload;
                else reply.put(std::uint64_t{0});
                static_cast<void>(send_message(to.back.get(), reply));
            }
        });
        const result<void> advised = small.at.advise();
        const result<void> listening = advised ? small.at.listen() : advised;
        bool sent = true;
        for (const vhost_user::page_notice& notice : one.sent) sent = sent && send_notice(ours.get(), notice);
        const bool failed = wait_for([&] { return !small.at.failures().empty(); });
        const client_phase phase = small.at.phase_of(0);
        const bool told = wait_for([&] { return saw_the_end.load(); });
        small.at.end();
        to.front->shutdown();
        backend.join();
        CHECK(message_of(listening) == "");
        CHECK(sent);
        CHECK(failed);
        CHECK(phase == client_phase::failed);
        CHECK(told);
        CHECK(small.at.failures().size() == 1);
        if (failed) CHECK_THAT(small.at.failures()[0], contains(one.said));
    }
}

namespace {

/// A backend in this process, with the client of this library.
class client_thread {
public:
    explicit client_thread(unique_fd socket) : socket_(std::move(socket)) {
        messages_ = std::thread([this] {
            static_cast<void>(backend.run(socket_.get(), [](const vhost_user::message& m) -> result<vhost_user::handling> {
                return m.request == request::set_owner ? vhost_user::handling::done : vhost_user::handling::not_mine;
            }));
        });
    }
    ~client_thread() {
        ::shutdown(socket_.get(), SHUT_RDWR);
        messages_.join();
    }

    vhost_user::client backend;

private:
    unique_fd socket_;
    std::thread messages_;
};

} // namespace

TEST_CASE("what backends write while a log is started is in it, whichever of them and wherever, and nothing else is") {
    // Two regions of one block, of which one begins in the midst of a byte of the log, and another block.
    constexpr std::size_t pages = 64;
    const ram_memory memory = ram_memory::memfd("guest", pages * page).value(), other_memory = ram_memory::memfd("other", 8 * page).value();
    ram_section ram;
    add_block(ram, "pc.ram", memory);
    add_block(ram, "other", other_memory);
    constexpr std::uint64_t high = (std::uint64_t{4} << 30) + 3 * page;
    const std::vector<vhost_user::shared_region> regions{{"pc.ram", 0, 32 * page, 0}, {"pc.ram", 32 * page, 0, high}, {"other", 0, 0, high + 32 * page}};
    vhost_user::backend_log all(ram, regions);
    auto log = all.of("pc.ram"), of_other = all.of("other");
    const bool reply_ack = GENERATE(true, false);
    CAPTURE(reply_ack);

    const auto connect = [&](const char* name, std::optional<client_thread>& backend) {
        connection made = connect_backend(name, 20s, 0);
        backend.emplace(std::move(made.back));
        REQUIRE(message_of(made.front->negotiate(0, vhost_user::protocol_feature::log_shmfd |
                                                        (reply_ack ? vhost_user::protocol_feature::reply_ack : 0))) == "");
        const auto shared = vhost_user::shared_memory::find(ram, regions);
        REQUIRE(message_of(shared) == "");
        auto table = shared->make_table();
        REQUIRE(message_of(table) == "");
        REQUIRE(message_of(made.front->tell(std::move(*table))) == "");
        return made.front;
    };
    std::optional<client_thread> disk, net;
    const auto to_disk = connect("disk", disk);
    REQUIRE(message_of(all.add(to_disk)) == "");
    const auto write = [&](client_thread& who, std::uint64_t address, std::uint64_t size = 1) {
        const std::optional<vhost_user::memory_access> access = who.backend.access();
        REQUIRE(access);
        REQUIRE_FALSE(access->table().at_guest(address, size).empty());
        access->table().at_guest(address, size)[0] = std::byte{1};
        access->mark_dirty(address, size);
    };
    page_bitmap dirty(pages), dirty_other(8);
    CHECK(log.collect(dirty).has_error());
    REQUIRE(message_of(log.start()) == "");
    REQUIRE(message_of(of_other.start()) == "");
    CHECK(log.start().has_error());
    CHECK((to_disk->features() & vhost_user::feature::log_all) != 0);

    // One that comes when logs are started logs, too.
    const auto to_net = connect("net", net);
    REQUIRE(message_of(all.add(to_net)) == "");
    write(*disk, 0);
    write(*net, 31 * page, page);
    write(*net, high);
    write(*disk, high + page);
    write(*disk, high + 31 * page + 8);
    write(*net, high + 32 * page); // the other block's first page, in the same byte of the log
    CHECK(log.collect(dirty).value() == 5);
    for (const std::size_t number : {0u, 31u, 32u, 33u, 63u}) CHECK(dirty.test(number));
    CHECK(of_other.collect(dirty_other).value() == 1);
    CHECK(dirty_other.test(0));
    CHECK(log.collect(dirty).value() == 0);
    CHECK(of_other.collect(dirty_other).value() == 0);
    page_bitmap wrong(pages + 1);
    CHECK(log.collect(wrong).has_error());

    // The last one that stops ends it; another time it begins without a mark.
    REQUIRE(message_of(log.stop()) == "");
    CHECK(log.collect(dirty).has_error());
    write(*net, high + 33 * page);
    CHECK(of_other.collect(dirty_other).value() == 1);
    REQUIRE(message_of(of_other.stop()) == "");
    REQUIRE(message_of(of_other.stop()) == "");
    CHECK((to_disk->features() & vhost_user::feature::log_all) == 0);
    write(*disk, 5 * page);
    REQUIRE(message_of(log.start()) == "");
    dirty.clear_all();
    CHECK(log.collect(dirty).value() == 0);

    // One that is gone is an error where it would have to log, and takes nothing of what it has marked with it.
    write(*net, 7 * page);
    net.reset();
    CHECK(log.collect(dirty).value() == 1);
    CHECK(log.stop().has_error());
    CHECK_THAT(message_of(log.start()), contains("vhost-user backend net/SET_LOG_BASE"));
    CHECK((to_disk->features() & vhost_user::feature::log_all) == 0);
    all.remove(*to_net);
    CHECK(message_of(log.start()) == "");
    CHECK(message_of(log.stop()) == "");

    // One that can't log is told so, by its name.
    const auto to_third = connect("third", net);
    to_third->set_protocol_features(0);
    REQUIRE(message_of(all.add(to_third)) == "");
    CHECK_THAT(message_of(log.start()), contains("vhost-user backend third/SET_LOG_BASE"));
    CHECK_THAT(message_of(log.start()), contains("LOG_SHMFD"));
}

TEST_CASE("no write of a backend is missed by a log that is asked while backends write") {
    constexpr std::size_t pages = 512;
    const ram_memory memory = ram_memory::memfd("guest", pages * page).value();
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", memory);
    vhost_user::backend_log all(ram);
    auto log = all.of("pc.ram");
    connection to = connect_backend("disk", 20s, 0);
    client_thread disk(std::move(to.back));
    REQUIRE(message_of(to.front->negotiate(0, vhost_user::protocol_feature::log_shmfd | vhost_user::protocol_feature::reply_ack)) == "");
    REQUIRE(message_of(to.front->tell(*vhost_user::shared_memory::find(ram, {})->make_table())) == "");
    REQUIRE(message_of(all.add(to.front)) == "");

    std::vector<std::uint64_t> copy(pages); // what a migration would have sent last
    page_bitmap dirty(pages);
    const auto send = [&] {
        CHECK(message_of(log.collect(dirty)) == "");
        for (std::size_t number = 0; number != pages; ++number)
            if (dirty.test(number)) copy[number] = counter_of(memory.span(), number).load(std::memory_order_relaxed);
        dirty.clear_all();
    };
    constexpr std::size_t writes = 200'000;
    std::atomic<unsigned> left = 2;
    std::vector<std::thread> writers;
    for (unsigned seed = 0; seed != 2; ++seed)
        writers.emplace_back([&, seed] {
            std::mt19937 random(seed);
            for (std::size_t i = 0; i != writes; ++i) {
                const std::size_t number = random() % (i % 2 == 0 ? 8 : pages); // some again and again
                const std::optional<vhost_user::memory_access> access = disk.backend.access();
                const std::uint64_t address = block.options.guest_address + number * page;
                counter_of(access->table().at_guest(address, page), 0).fetch_add(1, std::memory_order_relaxed);
                access->mark_dirty(address, page);
            }
            --left;
        });
    REQUIRE(message_of(log.start()) == "");
    dirty.set_range(0, pages);
    while (left != 0) send();
    for (std::thread& one : writers) one.join();
    send();
    CHECK(message_of(log.stop()) == "");
    std::size_t stale = 0;
    std::uint64_t counted = 0;
    for (std::size_t number = 0; number != pages; ++number) {
        const std::uint64_t now = counter_of(memory.span(), number).load();
        stale += copy[number] != now;
        counted += now;
    }
    CHECK(stale == 0);
    CHECK(counted == 2 * writes);
}

TEST_CASE("one backend's notices are read a round at a time, however many there are") {
    small_rig small;
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0);
    const unique_fd theirs(ends[1]);
    vhost_user::detail::noticed_memory memory{unique_fd(ends[0]), {{&small.block, 0, 64 * page, 0}}};
    constexpr std::size_t sent = vhost_user::max_missed_pages + 10;
    for (std::size_t i = 0; i != sent; ++i) REQUIRE(vhost_user::send_notice(theirs.get(), {0, 0}));
    std::size_t read = 0;
    const auto answer = [&](const ram_address& where) {
        ++read;
        static_cast<void>(memory.wake(*where.block, where.offset, page));
    };
    CHECK(message_of(memory.read(answer)) == "");
    CHECK(read == vhost_user::max_missed_pages);
    CHECK(message_of(memory.read(answer)) == "");
    CHECK(read == sent);
}
