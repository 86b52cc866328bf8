// SPDX-License-Identifier: BSL-1.0
// A real QEMU that goes on in postcopy, and us at the other end: with and without a preempt channel, over unix sockets and
// TCP, from the first moment and after some precopy; threads of ours play the guest and touch pages while they arrive. The
// machine goes on to another QEMU, in which the guest runs on. And the connection breaks, again and again.
#include "../live/breakable_channel.hpp"
#include "support/catch.hpp"
#include "support/outcome.hpp"
#include "support/counter.hpp"
#include "support/huge_pages.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"
#include "support/tls_channels.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/marked_log.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate::tests;
using namespace std::chrono_literals;
using vmstate::migration::state;

namespace {

constexpr std::size_t memory_size = 16 << 20;
constexpr std::size_t page = 4096;
/// Where the guest's memory is full of something that it never looks at.
constexpr std::size_t ballast_at = 0x200000;
constexpr std::size_t ballast_size = memory_size - ballast_at - 0x100000;


/// Whether this system lets us be a destination at all; says why not.
bool can_postcopy() {
    const auto memory = vmstate::ram_memory::anonymous(page);
    vmstate::machine small{{.name = "none"}};
    if (!memory || !small.add_ram("ram", *memory)) return false;
    const auto supported = vmstate::check_postcopy_support(*small.ram());
    if (!supported) skip(supported.error().message());
    return static_cast<bool>(supported);
}

void set_capabilities(qemu& who, std::initializer_list<std::pair<const char*, bool>> which) {
    boost::json::array all;
    for (const auto& [name, on] : which) all.push_back(boost::json::object{{"capability", name}, {"state", on}});
    who.execute("migrate-set-capabilities", {{"capabilities", all}});
}
std::string migration_status(qemu& who) {
    const boost::json::object info = who.execute("query-migrate").as_object();
    const auto* status = info.if_contains("status");
    return status != nullptr ? std::string(status->as_string()) : "none";
}
/// Waits for one of the states; fails the test after a minute.
std::string wait_status(qemu& who, std::initializer_list<std::string_view> states) {
    std::string now;
    for (const auto end = std::chrono::steady_clock::now() + 60s; std::chrono::steady_clock::now() < end;) {
        now = migration_status(who);
        if (std::find(states.begin(), states.end(), now) != states.end()) return now;
        std::this_thread::sleep_for(2ms);
    }
    throw std::runtime_error("QEMU's migration stays in " + now);
}

struct way {
    std::string machine = "pc";
    bool tcp = false;
    bool preempt = false;
    std::chrono::milliseconds precopy{0};
    std::uint64_t postcopy_bandwidth = 0;
    bool huge = false;
    bool tls = false;
};

/// What a QEMU's memory comes from: huge pages, or small ones in a block of the same name.
std::vector<std::string> backend(bool huge) {
    return {"-object", "memory-backend-memfd,id=memory,size=16M" + std::string(huge ? ",hugetlb=on,hugetlbsize=2M" : "")};
}

/// A QEMU that counts in a memory full of numbers.
struct counting_qemu {
    explicit counting_qemu(const std::string& machine, bool huge = false, bool tls = false)
        : options{.machine = machine + (huge ? ",memory-backend=memory" : ""), .rom = guest_rom("counter")} {
        std::vector<std::byte> ballast(ballast_size);
        std::mt19937_64 numbers(1);
        for (std::size_t i = 0; i < ballast.size(); i += 64) ballast[i] = static_cast<std::byte>(numbers());
        write_file(directory / "ballast", ballast);
        options.arguments = {"-device",
            "loader,force-raw=on,addr=" + std::to_string(ballast_at) + ",file=" + (directory / "ballast").string()};
        if (huge)
            for (const std::string& argument : backend(true)) options.arguments.push_back(argument);
        qemu_options more = options;
        if (tls) {
            write_certificates(directory.path());
            more.arguments.insert(more.arguments.end(),
                {"-object", "tls-creds-x509,id=tls0,verify-peer=on,endpoint=client,dir=" + directory.path().string()});
        }
        first = std::make_unique<qemu>(more);
        first->wait_serial(lines(3), "3 lines");
        schema = std::make_unique<recorded_stream>(record(*first));
        first->cont();
        first->wait_serial(lines(5), "5 lines");
    }

    temporary_directory directory;
    qemu_options options;
    std::unique_ptr<qemu> first;
    std::unique_ptr<recorded_stream> schema;
};

/// A machine of ours to take it, in memory that postcopy works with, and threads that touch it in any order.
class machine_of_ours {
public:
    explicit machine_of_ours(const recorded_stream& schema, bool huge = false) : image(schema), main_block(schema.blocks.front().name) {
        image.memory.clear();
        for (const vmstate::stream_ram_block& block : schema.blocks) {
            image.machine.remove_ram(block.name);
            auto mapped = huge && block.name == main_block ? vmstate::ram_memory::memfd("guest", block.used_length, 2 << 20)
                                                           : vmstate::ram_memory::anonymous(block.used_length);
            REQUIRE(message_of(mapped) == "");
            memory.emplace(block.name, std::move(*mapped));
        }
        for (const auto& [name, mapped] : memory) REQUIRE(image.machine.add_ram(name, mapped));
        guest.start = [this]() -> vmstate::result<void> {
            ++starts;
            for (unsigned number = 0; number < 2; ++number) players.emplace_back([this, number] { touch_all(number); });
            return {};
        };
    }
    ~machine_of_ours() { join(); }
    void join() {
        for (std::thread& one : players) one.join();
        players.clear();
    }
    std::span<const std::byte> main_memory() const { return memory.at(main_block).span(); }

    // Before the machine, which has it registered.
    std::map<std::string, vmstate::ram_memory> memory;
    replica image;
    std::string main_block;
    vmstate::migration::guest guest;
    std::vector<std::thread> players;
    std::atomic<int> starts = 0;
    std::chrono::microseconds pause{0}; ///< between two touches

private:
    void touch_all(unsigned seed) const {
        const auto bytes = main_memory();
        std::vector<std::size_t> order(bytes.size() / page);
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::shuffle(order.begin(), order.end(), std::mt19937(seed));
        for (const std::size_t one : order) {
            static_cast<void>(*const_cast<const volatile std::byte*>(bytes.data() + one * page));
            if (pause != 0us) std::this_thread::sleep_for(pause);
        }
    }
};

/// The states that a destination went through.
class state_list {
public:
    explicit state_list(vmstate::migration::destination& of) {
        of.observe([this](const vmstate::migration::status& at) {
            const std::lock_guard lock(states_mutex_);
            if (states_.empty() || states_.back() != at.state) states_.push_back(at.state);
        });
    }
    std::vector<state> all() const {
        const std::lock_guard lock(states_mutex_);
        return states_;
    }
    bool has(state one) const {
        const std::lock_guard lock(states_mutex_);
        return std::find(states_.begin(), states_.end(), one) != states_.end();
    }

private:
    mutable std::mutex states_mutex_;
    std::vector<state> states_;
};

void configure(qemu& from, const way& how) {
    set_capabilities(from, {{"postcopy-ram", true}, {"return-path", true}, {"postcopy-preempt", how.preempt}});
    // Precopy doesn't come to an end by itself.
    from.execute("migrate-set-parameters", {{"downtime-limit", 1}, {"max-bandwidth", 2 << 20},
        {"max-postcopy-bandwidth", how.postcopy_bandwidth}});
    if (how.tls) from.execute("migrate-set-parameters", {{"tls-creds", "tls0"}, {"tls-hostname", "localhost"}});
}

void compare(qemu& with, const machine_of_ours& ours) {
    // QEMU has stopped its guest: ours has the same memory.
    const auto theirs = with.memory(0, memory_size);
    const auto here = ours.main_memory();
    CHECK(difference(std::span(theirs).first(0xa0000), here.first(0xa0000)) == "");
    CHECK(difference(std::span(theirs).subspan(0x100000), here.subspan(0x100000)) == "");
}

/// To another QEMU, by precopy, in which the guest goes on.
void send_on(counting_qemu& original, machine_of_ours& ours) {
    const std::string before = original.first->serial();
    qemu_options more{.machine = original.options.machine, .rom = guest_rom("counter")};
    if (more.machine.ends_with("=memory")) more.arguments = backend(false);
    more.incoming = "unix:" + (original.directory / "to-qemu").string();
    qemu second(more);
    vmstate::migration::guest standing{.stop = {}, .start = {}};
    vmstate::migration::source source(ours.image.machine, standing);
    REQUIRE(message_of(source.start(more.incoming)) == "");
    CHECK(message_of(source.wait()) == "");
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    const auto output = counter::output_of_two(before, second); // throws at "BAD"
    for (std::size_t i = 1; i < output.size(); ++i) REQUIRE(output[i].round == output[i - 1].round + 1);
    std::uint32_t round = 0;
    CHECK(counter::check_memory(second.memory(0, 0x60000), round) == "");
    CHECK(second.complaints() == "");
}

/// Runs `body` while a destination receives; ends the destination where that throws.
template <class Receive, class Body>
void beside(vmstate::migration::destination& destination, Receive receive, Body body) {
    std::thread receiving(receive);
    try {
        body();
    } catch (...) {
        destination.cancel();
        destination.give_up();
        receiving.join();
        throw;
    }
    receiving.join();
}

vmstate::migration::parameters settings_for(const way& how) {
    vmstate::migration::parameters settings;
    settings.postcopy_ram = true;
    settings.postcopy_preempt = how.preempt;
    return settings;
}

} // namespace

TEST_CASE("a running QEMU goes on in postcopy to us, and the guest goes on in another QEMU") {
    VMSTATE_REQUIRE_QEMU();
    if (!can_postcopy()) return;
    const way how = GENERATE(way{"pc", false, false, 0ms}, way{"pc", true, true, 600ms}, way{"microvm", false, true, 0ms},
        way{"microvm", true, false, 600ms}, way{.machine = "microvm", .precopy = 300ms, .huge = true},
        way{.machine = "microvm", .tcp = true, .preempt = true, .huge = true}, way{.machine = "microvm", .tcp = true, .tls = true},
        way{.machine = "microvm", .preempt = true, .precopy = 300ms, .tls = true});
    CAPTURE(how.machine, how.tcp, how.preempt, how.precopy.count(), how.huge, how.tls);
    // Theirs and ours.
    std::optional<huge_pages> reserved;
    if (how.huge && !reserved.emplace(16).enough()) return skip("no 16 huge pages of 2 MiB to be had");
    counting_qemu original(how.machine, how.huge, how.tls);
    qemu& first = *original.first;
    configure(first, how);
    machine_of_ours ours(*original.schema, how.huge);
    vmstate::load_options loading = vmstate::carry_unknown();
    loading.description = &original.schema->description;
    vmstate::migration::destination destination(ours.image.machine, ours.guest, settings_for(how), loading);
    const state_list states(destination);
    const std::string here = how.tcp ? std::string("tcp:127.0.0.1:0") : "unix:" + (original.directory / "to-us").string();
    vmstate::result<vmstate::socket_listener> listener = vmstate::error(vmstate::errc::io);
    vmstate::channel_acceptor accept;
    if (how.tls) {
        listener = vmstate::socket_listener::listen(here);
        REQUIRE(message_of(listener) == "");
        accept = tls_acceptor(*listener, credentials_in(original.directory.path(), vmstate::tls_endpoint::server));
    } else {
        REQUIRE(message_of(destination.listen(here)) == "");
    }
    vmstate::result<void> arrived = vmstate::error(vmstate::errc::io);
    beside(destination, [&] { arrived = how.tls ? destination.run(accept) : destination.run(); }, [&] {
        first.execute("migrate", {{"uri", how.tls ? listener->uri() : destination.uri()}});
        wait_status(first, {"active", "failed"});
        std::this_thread::sleep_for(how.precopy);
        first.execute("migrate-start-postcopy");
        CHECK(wait_status(first, {"completed", "failed", "postcopy-paused"}) == "completed");
        if (migration_status(first) != "completed") destination.cancel(), destination.give_up();
    });
    REQUIRE(message_of(arrived) == "");
    ours.join();
    CHECK(ours.starts == 1);
    CHECK(states.all() == std::vector{state::setup, state::active, state::postcopy_active, state::completed});
    const auto status = destination.status();
    CHECK(status.postcopy.state == vmstate::postcopy_state::end);
    CHECK(status.postcopy.requests > 0);
    CHECK(status.postcopy.waiting == 0);
    CHECK(status.postcopy.faults.faults > 0);
    compare(first, ours);
    send_on(original, ours);
}

TEST_CASE("a QEMU with postcopy-preempt learns that a destination of ours without doesn't read what it sends there") {
    VMSTATE_REQUIRE_QEMU();
    if (!can_postcopy()) return;
    way how{.machine = "microvm", .preempt = true};
    counting_qemu original(how.machine);
    qemu& first = *original.first;
    configure(first, how);
    how.preempt = false;
    machine_of_ours ours(*original.schema, false);
    vmstate::load_options loading = vmstate::carry_unknown();
    loading.description = &original.schema->description;
    vmstate::migration::destination destination(ours.image.machine, ours.guest, settings_for(how), loading);
    REQUIRE(message_of(destination.listen("unix:" + (original.directory / "to-us").string())) == "");
    vmstate::result<void> arrived = vmstate::error(vmstate::errc::io);
    beside(destination, [&] { arrived = destination.run(); }, [&] {
        first.execute("migrate", {{"uri", destination.uri()}});
        wait_status(first, {"active", "failed"});
        first.execute("migrate-start-postcopy");
        const std::string status = wait_status(first, {"completed", "failed", "postcopy-paused"});
        CHECK((status == "postcopy-paused" || status == "failed"));
        destination.cancel();
        destination.give_up();
    });
    ours.join();
    CHECK(arrived.has_error());
}

namespace {

/// Gives a destination's channels away one after the other; each breaks after so many bytes, in both directions.
class breaking_acceptor {
public:
    static std::shared_ptr<breaking_acceptor> listen(const std::string& uri) {
        auto listener = vmstate::socket_listener::listen(uri);
        REQUIRE(message_of(listener) == "");
        return std::make_shared<breaking_acceptor>(std::move(*listener));
    }
    explicit breaking_acceptor(vmstate::socket_listener listener) : listener_(std::move(listener)) {}

    std::string uri() const { return listener_.uri(); }
    /// From now on, so many bytes more come through the main channel.
    void break_after(std::size_t bytes) { main_->read = bytes; }
    static vmstate::channel_acceptor of(const std::shared_ptr<breaking_acceptor>& self) {
        return [self](const vmstate::opening_options& opening) -> vmstate::result<std::unique_ptr<vmstate::input_channel>> {
            self->listener_.set_timeout(opening.timeout);
            const std::stop_callback end(opening.stop, [&] { self->listener_.cancel(); });
            auto accepted = self->listener_.accept();
            if (!accepted) return accepted.error();
            if (self->accepted_++ != 0) return std::unique_ptr<vmstate::input_channel>(std::move(*accepted));
            return std::unique_ptr<vmstate::input_channel>(
                std::make_unique<breakable_channel>(std::move(*accepted), self->main_));
        };
    }

private:
    vmstate::socket_listener listener_;
    std::shared_ptr<carried_bytes> main_ = std::make_shared<carried_bytes>();
    int accepted_ = 0;
};

} // namespace

TEST_CASE("the connection of a postcopy breaks, anywhere and again and again, and nothing is lost") {
    VMSTATE_REQUIRE_QEMU();
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    // Of huge pages what was left of a request comes before its page's beginning.
    const bool huge = GENERATE(false, true);
    const bool soak = std::getenv("VMSTATE_SOAK") != nullptr;
    if (huge && !preempt && !soak) return; // seconds
    std::optional<huge_pages> reserved;
    if (huge && !reserved.emplace(16).enough()) return skip("no 16 huge pages of 2 MiB to be had");
    const std::size_t least = soak ? 50 : 3; // 200 in all four ways
    std::size_t all_broken = 0;
    for (unsigned seed = 1; all_broken < least && seed <= (soak ? 25 : 3); ++seed) {
        const way how{"microvm", false, preempt, 0ms, std::uint64_t{soak ? 6u : 24u} << 20, huge};
        CAPTURE(preempt, huge, seed);
        counting_qemu original(how.machine, huge);
        qemu& first = *original.first;
        configure(first, how);
        machine_of_ours ours(*original.schema, huge);
        ours.pause = soak ? 2000us : 200us;
        vmstate::load_options loading = vmstate::carry_unknown();
        loading.description = &original.schema->description;
        vmstate::migration::destination destination(ours.image.machine, ours.guest, settings_for(how), loading);
        const state_list states(destination);
        const auto address = [&](std::size_t number) { return "unix:" + (original.directory / ("to-us-" + std::to_string(number))).string(); };
        std::shared_ptr<breaking_acceptor> acceptor = breaking_acceptor::listen(address(0));
        const vmstate::channel_acceptor first_acceptor = breaking_acceptor::of(acceptor);
        vmstate::result<void> arrived = vmstate::error(vmstate::errc::io);
        const std::size_t breaks = soak ? 100 : 5;
        std::size_t broken = 0;
        beside(destination, [&] { arrived = destination.run(first_acceptor); }, [&] {
            first.execute("migrate", {{"uri", acceptor->uri()}});
            wait_status(first, {"active", "failed"});
            first.execute("migrate-start-postcopy");
            const auto wait_here = [&](std::initializer_list<state> wanted) {
                const auto end = std::chrono::steady_clock::now() + 60s;
                for (;;) {
                    const state now = destination.status().state;
                    if (std::find(wanted.begin(), wanted.end(), now) != wanted.end()) return now;
                    if (std::chrono::steady_clock::now() > end) throw std::runtime_error("we stay in " + std::string(to_string(now)));
                    std::this_thread::sleep_for(200us);
                }
            };
            REQUIRE(wait_here({state::postcopy_active, state::failed}) == state::postcopy_active);
            std::minstd_rand numbers(2 * seed + (preempt ? 1 : 0));
            for (std::size_t number = 1; number <= breaks && all_broken < least + 2; ++number) {
                // Not at the very end: QEMU 7.2 waits for ever where it has sent everything and we break the connection before
                // we have it.
                const boost::json::value info = first.execute("query-migrate");
                if (info.at("ram").at("remaining").to_number<std::uint64_t>() < (2 << 20)) break;
                const std::size_t bytes = number % 4 == 0 ? 0 : numbers() % (number % 4 == 1 ? 20'000 : (7 << 20) / breaks);
                if (number % 5 == 4) destination.pause();
                else acceptor->break_after(bytes);
                const state now = wait_here({state::postcopy_paused, state::completed, state::failed});
                if (now != state::postcopy_paused) break;
                ++broken;
                ++all_broken;
                CHECK(destination.status().postcopy.state == vmstate::postcopy_state::paused);
                destination.cancel(); // does nothing
                wait_status(first, {"postcopy-paused"});
                // Not before the recovery is at its end: there QEMU 7.2 waits for ever, and so does whoever waits for it.
                acceptor = breaking_acceptor::listen(address(number));
                REQUIRE(message_of(destination.recover(breaking_acceptor::of(acceptor))) == "");
                CHECK(destination.recover(breaking_acceptor::of(acceptor)).has_error());
                first.execute("migrate", {{"uri", acceptor->uri()}, {"resume", true}});
                const std::uint64_t before = destination.status().postcopy.interruptions;
                const auto end = std::chrono::steady_clock::now() + 60s;
                for (state after = state::none; after != state::postcopy_active && after != state::completed;) {
                    if (std::chrono::steady_clock::now() > end) throw std::runtime_error("no recovery");
                    std::this_thread::sleep_for(200us);
                    const auto status = destination.status();
                    after = status.state;
                    CAPTURE(number, status.error_desc.message());
                    REQUIRE(status.postcopy.interruptions == before);
                }
            }
            acceptor->break_after(carried_bytes::all);
            CHECK(wait_status(first, {"completed", "failed", "postcopy-paused"}) == "completed");
            if (migration_status(first) != "completed") destination.give_up();
        });
        REQUIRE(message_of(arrived) == "");
        ours.join();
        CHECK(destination.status().postcopy.interruptions >= broken);
        CHECK(states.has(state::postcopy_recover) == (broken != 0));
        CHECK(ours.starts == 1);
        compare(first, ours);
        send_on(original, ours);
    }
    CHECK(all_broken >= least);
}

// ---- a guest that never lets precopy end

namespace {

/// Where tests/guests/writer.S begins to write: the first word of each page.
constexpr std::size_t writer_at = 0x200000;

/// A machine of ours between two QEMUs: its guest stands still, but a thread writes what the guest doesn't look at, as fast
/// as it can, until it is stopped.
class writing_guest {
public:
    explicit writing_guest(machine_of_ours& on)
        : memory_(on.memory.at(on.main_block).span()), log_(memory_.size()) {
        control.stop = [this]() -> vmstate::result<void> {
            stop();
            return {};
        };
        control.dirty_logs.emplace(on.main_block, log_);
        writer_ = std::thread([this] {
            for (std::uint64_t round = 1; !halted_.load(); ++round)
                for (std::size_t at = writer_at; at < memory_.size() && !halted_.load(); at += page) write(at, round);
        });
    }
    ~writing_guest() { stop(); }

    vmstate::migration::guest control;

private:
    void stop() {
        halted_.store(true);
        if (writer_.joinable()) writer_.join();
    }
    // Read by the migration meanwhile, and again when the log says so: a race by design, as with a vCPU.
    [[gnu::no_sanitize_thread, gnu::noinline]] void write(std::size_t at, std::uint64_t round) {
        *reinterpret_cast<volatile std::uint64_t*>(memory_.data() + at + page / 2) = round * 0x9e3779b97f4a7c15;
        log_.mark(at, page);
    }

    std::span<std::byte> memory_;
    vmstate::marked_log log_;
    std::atomic<bool> halted_ = false;
    std::thread writer_;
};

std::vector<std::string> migration_events(qemu& of, std::string_view last) {
    std::vector<std::string> all;
    do {
        const std::string next(of.wait_event("MIGRATION").at("data").as_object().at("status").as_string());
        if (all.empty() || all.back() != next) all.push_back(next);
    } while (all.back() != last && all.back() != "failed");
    return all;
}
std::uint64_t passes(qemu& of) {
    const auto info = of.execute("query-migrate").as_object();
    const auto* const ram = info.if_contains("ram");
    return ram != nullptr ? ram->at("dirty-sync-count").to_number<std::uint64_t>() : 0;
}
template <class Done>
void wait_until(Done done, const char* what) {
    for (const auto end = std::chrono::steady_clock::now() + 120s; !done(); std::this_thread::sleep_for(2ms))
        if (std::chrono::steady_clock::now() > end) throw std::runtime_error(std::string("no ") + what);
}
std::ptrdiff_t line_count(const qemu& of) {
    const std::string printed = of.serial();
    return std::count(printed.begin(), printed.end(), '\n');
}

} // namespace

TEST_CASE("a guest that writes its memory as fast as it can goes on in postcopy, from a QEMU to us and from us to another") {
    VMSTATE_REQUIRE_QEMU();
    if (!can_postcopy()) return;
    const bool soak = std::getenv("VMSTATE_SOAK") != nullptr;
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    const temporary_directory directory;
    qemu_options options{.machine = "microvm", .memory = soak ? "512M" : "128M", .rom = guest_rom("writer")};
    std::optional<recorded_stream> schema;
    {
        qemu_options still = options;
        still.stopped = true; // and its memory empty
        qemu same(still);
        schema.emplace(record(same));
    }
    const auto prepare = [&](qemu& one) {
        set_capabilities(one, {{"events", true}, {"postcopy-ram", true}, {"return-path", true}, {"postcopy-preempt", preempt}});
    };
    const std::uint64_t bandwidth = 200 << 20;

    // From a QEMU to us.
    qemu first(options);
    first.wait_serial(lines(3), "3 lines");
    prepare(first);
    first.execute("migrate-set-parameters", {{"downtime-limit", 1}, {"max-bandwidth", bandwidth}});
    machine_of_ours ours(*schema);
    vmstate::load_options loading = vmstate::carry_unknown();
    loading.description = &schema->description;
    {
        vmstate::migration::parameters settings = settings_for({.preempt = preempt});
        vmstate::migration::destination destination(ours.image.machine, ours.guest, settings, loading);
        const state_list states(destination);
        REQUIRE(message_of(destination.listen("unix:" + (directory / "to-us").string())) == "");
        vmstate::result<void> arrived = vmstate::error(vmstate::errc::io);
        beside(destination, [&] { arrived = destination.run(); }, [&] {
            first.execute("migrate", {{"uri", destination.uri()}});
            wait_until([&] { return passes(first) >= 3; }, "third pass");
            CHECK(migration_status(first) == "active");
            first.execute("migrate-start-postcopy");
            CHECK(wait_status(first, {"completed", "failed", "postcopy-paused"}) == "completed");
            if (migration_status(first) != "completed") destination.give_up();
        });
        REQUIRE(message_of(arrived) == "");
        ours.join();
        CHECK(states.all() == std::vector{state::setup, state::active, state::postcopy_active, state::completed});
        std::vector<std::string> events = migration_events(first, "completed");
        if (first.version() >= 1000) CHECK(std::erase(events, "device") == 1); // a QEMU before 10.0 doesn't speak of it
        CHECK(events == std::vector<std::string>{"setup", "active", "postcopy-active", "completed"});
        CHECK(destination.status().postcopy.requests > 0);
        CHECK(ours.starts == 1);
    }
    const std::string printed = first.serial();
    const auto count_differences = [&](qemu& with, std::size_t from_byte) {
        const auto here = ours.main_memory();
        const auto there = with.memory(0, here.size());
        std::size_t wrong = 0;
        for (std::size_t at = writer_at; at != here.size(); at += page)
            if (std::memcmp(here.data() + at + from_byte, there.data() + at + from_byte, page - from_byte) != 0)
                ++wrong;
        return wrong;
    };
    CHECK(count_differences(first, 0) == 0);

    // And from us to another.
    qemu_options more = options;
    more.arguments = {"-incoming", "defer"};
    qemu second(more);
    prepare(second);
    const std::string to_qemu = "unix:" + (directory / "to-qemu").string();
    second.execute("migrate-incoming", {{"uri", to_qemu}});
    writing_guest guest(ours);
    const vmstate::migration::parameters settings{
        .downtime_limit = 0ms, .max_bandwidth = bandwidth, .postcopy_ram = true, .postcopy_preempt = preempt};
    std::mutex states_mutex; // states
    std::vector<state> states;
    vmstate::migration::source source(ours.image.machine, guest.control, settings);
    source.observe([&](const vmstate::migration::status& at) {
        const std::lock_guard lock(states_mutex);
        if (states.empty() || states.back() != at.state) states.push_back(at.state);
    });
    REQUIRE(message_of(source.start(to_qemu)) == "");
    wait_until([&] { return source.status().ram.dirty_sync_count >= 3 || is_final(source.status().state); }, "third pass");
    CHECK(source.status().state == state::active);
    REQUIRE(message_of(source.start_postcopy()) == "");
    CHECK(message_of(source.wait()) == "");
    const auto incoming = second.wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    CHECK(states == std::vector{state::setup, state::active, state::postcopy_active, state::completed});
    std::vector<std::string> theirs = migration_events(second, "completed");
    if (theirs.front() == "setup") theirs.erase(theirs.begin());
    CHECK(theirs == std::vector<std::string>{"active", "postcopy-active", "completed"});
    CHECK(source.status().ram.postcopy_requests > 0);

    // It goes over all of its memory, and finds it as it left it.
    second.wait_serial(lines(line_count(second) + 3), "3 more lines");
    second.stop();
    const auto output = counter::parse_output(printed + second.serial()); // throws at "BAD"
    CHECK(counter::check_order(output) == "");
    CHECK(count_differences(second, 4) == 0); // the first word is the guest's
    CHECK(second.complaints() == "");
}
