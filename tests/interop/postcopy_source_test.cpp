// SPDX-License-Identifier: BSL-1.0
// A source of ours in postcopy with a real QEMU as the destination: its guest runs there before its memory is, and finds
// every page; with and without the preempt channel, at once and after some precopy; the connection is cut, and it goes on
// over a new one. The machine comes from a stream that a QEMU wrote, and a thread of ours writes its memory meanwhile.
#include "support/catch.hpp"
#include "support/outcome.hpp"
#include "support/counter.hpp"
#include "support/huge_pages.hpp"
#include "support/qemu.hpp"
#include "support/recorded_stream.hpp"
#include "support/tls_channels.hpp"

#include <vmstate/machine/carry.hpp>
#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/stream/connect.hpp>

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate::tests;
using namespace std::chrono_literals;
using vmstate::migration::state;

namespace {

constexpr std::size_t page_size = 4096;
constexpr std::size_t memory_size = 32 << 20;
/// The guest uses what is below.
constexpr std::size_t ours_at = 1 << 20;


qemu_options options_of_guest() {
    return {.machine = "microvm", .memory = std::to_string(memory_size >> 20) + "M", .rom = guest_rom("counter")};
}

/// The same on huge pages, in a block of the same name.
qemu_options options_of_huge_guest(const std::string& block) {
    qemu_options options = options_of_guest();
    options.arguments = {"-object", "memory-backend-memfd,id=" + block + ",size=" + options.memory +
        ",hugetlb=on,hugetlbsize=2M,x-use-canonical-path-for-ramblock-id=off"};
    options.machine += ",memory-backend=" + block;
    return options;
}

struct recorded_guest {
    recorded_stream stream;
    std::string printed;
};
/// A counter guest that has run a little; once for all tests.
const recorded_guest& guest_of_qemu() {
    static const recorded_guest recorded = [] {
        qemu first(options_of_guest());
        first.wait_serial(lines(3), "3 lines");
        recorded_stream stream = record(first);
        return recorded_guest{std::move(stream), first.serial()};
    }();
    return recorded;
}

/// That guest's machine here. It stands still, but a thread writes the memory that it doesn't use, until `stop`.
class busy_machine {
public:
    /// `mapped`: its memory, of that size, where it isn't to be a vector.
    explicit busy_machine(std::optional<vmstate::ram_memory> mapped = std::nullopt)
        : original_(guest_of_qemu()), copy_(original_.stream), mapped_(std::move(mapped)) {
        const auto loaded = copy_.load(original_.stream.bytes, &original_.stream.description);
        if (!loaded) throw std::runtime_error(loaded.error().message());
        if (mapped_) {
            std::ranges::copy(copy_.memory.at(block_name()), mapped_->span().begin());
            copy_.machine.remove_ram(block_name());
            if (const auto added = copy_.machine.add_ram(block_name(), *mapped_); !added) throw std::runtime_error(added.error().message());
        }
        // A quarter stays as it is, which is nothing; the rest is full of something.
        std::minstd_rand random(1);
        for (std::size_t at = ours_at; at != memory_size; at += page_size) {
            if (at / page_size % 4 == 0) continue;
            for (std::size_t i = 0; i != page_size; i += 4) {
                const std::uint32_t value = static_cast<std::uint32_t>(random());
                std::memcpy(memory().data() + at + i, &value, sizeof value);
            }
        }
        guest.stop = [this]() -> vmstate::result<void> {
            ++stops;
            halt();
            at_stop.assign(memory().begin(), memory().end());
            return {};
        };
        guest.start = [this]() -> vmstate::result<void> {
            ++starts;
            return {};
        };
        guest.dirty_logs.emplace(block_name(), log_);
        writer_ = std::thread([this] {
            std::minstd_rand where(2);
            while (!halted_.load()) {
                write(ours_at + where() % ((memory_size - ours_at) / page_size) * page_size);
                std::this_thread::sleep_for(50us);
            }
        });
    }
    ~busy_machine() { halt(); }

    const std::string& block_name() const { return original_.stream.blocks.front().name; }
    std::span<std::byte> memory() {
        return mapped_ ? mapped_->span() : std::span<std::byte>(copy_.memory.at(block_name()));
    }
    vmstate::machine& machine() { return copy_.machine; }
    /// What the guest printed before it was here.
    const std::string& printed() const { return original_.printed; }

    vmstate::migration::guest guest;
    std::atomic<int> stops = 0;
    std::atomic<int> starts = 0;
    std::vector<std::byte> at_stop; ///< its memory

private:
    void halt() {
        halted_.store(true);
        if (writer_.joinable()) writer_.join();
    }
    // Read by the migration meanwhile, and again when the log says so: a race by design, as with a vCPU.
    [[gnu::no_sanitize_thread, gnu::noinline]] void write(std::size_t at) {
        auto* const first = reinterpret_cast<volatile std::uint64_t*>(memory().data() + at);
        *first = *first + 1;
        log_.mark(at, page_size);
    }

    const recorded_guest& original_;
    replica copy_;
    std::optional<vmstate::ram_memory> mapped_;
    vmstate::marked_log log_{memory_size};
    std::atomic<bool> halted_ = false;
    std::thread writer_;
};

/// A QEMU that waits for it.
class waiting_qemu {
public:
    waiting_qemu(bool tcp, bool preempt, bool postcopy = true, qemu_options options = options_of_guest(), bool tls = false)
        : tcp_(tcp) {
        options.arguments.insert(options.arguments.end(), {"-incoming", "defer"});
        if (tls) {
            write_certificates(directory_.path());
            options.arguments.insert(options.arguments.end(),
                {"-object", "tls-creds-x509,id=tls0,verify-peer=on,endpoint=server,dir=" + directory_.path().string()});
        }
        there.emplace(std::move(options));
        if (tls) there->execute("migrate-set-parameters", {{"tls-creds", "tls0"}});
        const auto capability = [](const char* name, bool on) {
            return boost::json::object{{"capability", name}, {"state", on}};
        };
        there->execute("migrate-set-capabilities",
            {{"capabilities", boost::json::array{capability("postcopy-ram", postcopy), capability("events", true)}}});
        if (preempt)
            there->execute("migrate-set-capabilities", {{"capabilities", boost::json::array{capability("postcopy-preempt", true)}}});
        there->execute("migrate-incoming", {{"uri", next_address()}});
    }
    std::string next_address() {
        path_ = directory_ / ("channel" + std::to_string(number_++));
        return tcp_ ? std::string("tcp:127.0.0.1:0") : "unix:" + path_.string();
    }
    /// Where it listens.
    std::string address() {
        if (!tcp_) return "unix:" + path_.string();
        const auto socket = there->execute("query-migrate").as_object().at("socket-address").as_array();
        return "tcp:127.0.0.1:" + std::string(socket.at(socket.size() - 1).as_object().at("port").as_string());
    }
    std::string migration_status() {
        const auto answer = there->execute("query-migrate").as_object();
        const auto* named = answer.if_contains("status");
        return named != nullptr ? std::string(named->as_string()) : "";
    }
    /// The next state that it went to.
    std::string next_state() {
        return std::string(there->wait_event("MIGRATION").at("data").as_object().at("status").as_string());
    }
    /// Of those that its `tls` trusts.
    vmstate::tls_credentials credentials() const { return credentials_in(directory_.path(), vmstate::tls_endpoint::client); }
    /// Reads guest memory as somebody who needs it now.
    void touch(std::size_t at) { there->human("xp /1xg " + std::to_string(at)); }

    std::optional<qemu> there;

private:
    bool tcp_;
    temporary_directory directory_;
    std::filesystem::path path_;
    int number_ = 0;
};

/// The states that a source went through.
class history {
public:
    void watch(vmstate::migration::source& what) {
        what.observe([this](const vmstate::migration::status& at) {
            const std::lock_guard lock(states_mutex_);
            if (states_.empty() || states_.back() != at.state) states_.push_back(at.state);
        });
    }
    std::string text() const {
        const std::lock_guard lock(states_mutex_);
        std::string all;
        for (const state one : states_) all += (all.empty() ? "" : " ") + std::string(to_string(one));
        return all;
    }

private:
    mutable std::mutex states_mutex_; // states_
    std::vector<state> states_;
};

template <class Done>
bool wait_for(Done done, std::chrono::seconds patience = 60s) {
    const auto deadline = std::chrono::steady_clock::now() + patience;
    while (!done()) {
        if (std::chrono::steady_clock::now() > deadline) return false;
        std::this_thread::sleep_for(1ms);
    }
    return true;
}

/// Connections that can be cut.
class cables {
public:
    ~cables() { forget(); }
    vmstate::channel_connector to(std::string address) {
        return [this, address = std::move(address)](
                   const vmstate::opening_options& opening) -> vmstate::result<std::unique_ptr<vmstate::output_channel>> {
            auto connected = vmstate::connect(address, opening);
            if (!connected) return connected.error();
            const std::lock_guard lock(fds_mutex_);
            fds_.push_back(::dup(dynamic_cast<vmstate::socket_channel&>(**connected).native_handle()));
            return std::unique_ptr<vmstate::output_channel>(std::move(*connected));
        };
    }
    /// The main one is the first.
    void cut(std::size_t number) {
        const std::lock_guard lock(fds_mutex_);
        ::shutdown(fds_.at(number), SHUT_RDWR);
    }
    void forget() {
        const std::lock_guard lock(fds_mutex_);
        for (const int fd : fds_) ::close(fd);
        fds_.clear();
    }

private:
    std::mutex fds_mutex_; // fds_
    std::vector<int> fds_;
};

/// The guest goes on where it was, and the memory beside it is what it was when it stopped.
void check_guest(waiting_qemu& destination, busy_machine& from, bool recovered = false) {
    qemu& there = *destination.there;
    const std::string printed = there.serial();
    there.wait_serial(lines(std::count(printed.begin(), printed.end(), '\n') + 3), "3 more lines");
    there.stop();
    const auto output = counter::parse_output(from.printed() + there.serial()); // throws at "BAD"
    for (std::size_t i = 1; i < output.size(); ++i) REQUIRE(output[i].round == output[i - 1].round + 1);
    std::uint32_t round = 0;
    CHECK(counter::check_memory(there.memory(0, 0x60000), round) == "");
    const auto memory = there.memory(ours_at, memory_size - ours_at);
    CHECK(difference(std::span<const std::byte>(from.at_stop).subspan(ours_at), memory) == "");
    if (!recovered) CHECK(there.complaints() == "");
}

} // namespace

TEST_CASE("in postcopy our guest runs on in a QEMU, which asks us for the pages that it touches") {
    VMSTATE_REQUIRE_QEMU();
    struct way {
        bool tcp, preempt, at_once;
        std::uint64_t bandwidth;
        bool tls = false;
    };
    const way how = GENERATE(way{true, false, true, 10 << 20, true}, way{false, true, true, 10 << 20, true},
        way{false, false, true, 10 << 20}, way{false, true, false, 10 << 20}, way{true, true, true, 10 << 20},
        way{true, false, false, 10 << 20}, way{false, true, true, 0}, way{true, false, true, 0});
    CAPTURE(how.tcp, how.preempt, how.at_once, how.bandwidth, how.tls);
    busy_machine from;
    waiting_qemu destination(how.tcp, how.preempt, true, options_of_guest(), how.tls);
    vmstate::migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = how.at_once ? 1u << 20 : 20u << 20,
        .postcopy_ram = true, .postcopy_preempt = how.preempt, .max_postcopy_bandwidth = how.bandwidth};
    history states; // who watches outlives what it watches
    vmstate::migration::source source(from.machine(), from.guest, settings);
    states.watch(source);
    CHECK(source.start_postcopy().error() == vmstate::errc::invalid_argument); // nothing is under way
    REQUIRE(message_of(how.tls ? source.start(tls_connector(destination.address(), destination.credentials()))
                               : source.start(destination.address())) == "");
    if (!how.at_once) REQUIRE(wait_for([&] { return source.status().ram.dirty_sync_count >= 2 || is_final(source.status().state); }));
    CHECK(message_of(source.start_postcopy()) == "");
    CHECK(message_of(source.start_postcopy()) == "");
    REQUIRE(wait_for([&] { return source.status().state >= state::postcopy_active; }));
    // Not before it listens for faults: what is touched between a discard and that is there, and can't come any more.
    REQUIRE(wait_for([&] {
        const std::string now = destination.migration_status();
        return now == "postcopy-active" || now == "completed";
    }));
    // Which of them are there already nobody knows here.
    std::minstd_rand random(3);
    for (int i = 0; i != 200; ++i) destination.touch(ours_at + random() % (memory_size - ours_at - 8));
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    REQUIRE(message_of(source.wait()) == "");
    CHECK(message_of(source.start_postcopy()) == "");
    const auto incoming = destination.there->wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    CHECK(states.text() == "setup active postcopy-active completed");
    const std::string first = destination.next_state(); // of before it was asked to tell
    CHECK((first == "setup" || first == "active"));
    if (first == "setup") CHECK(destination.next_state() == "active");
    CHECK(destination.next_state() == "postcopy-active");
    CHECK(destination.next_state() == "completed");
    CHECK(from.stops == 1);
    CHECK(from.starts == 0);
    const vmstate::migration::status at_end = source.status();
    CHECK(at_end.ram.remaining == 0);
    CHECK(at_end.ram.postcopy_requests > 0);
    CHECK(at_end.ram.postcopy_bytes > 0);
    CHECK(at_end.ram.transferred >= at_end.ram.postcopy_bytes);
    check_guest(destination, from);
}

TEST_CASE("a connection to a QEMU that breaks in postcopy is recovered, wherever it breaks, and no page is lost") {
    VMSTATE_REQUIRE_QEMU();
    const bool tcp = GENERATE(false, true);
    const bool preempt = GENERATE(false, true);
    CAPTURE(tcp, preempt);
    const std::size_t cuts = std::getenv("VMSTATE_SOAK") != nullptr ? 200 : 6;
    busy_machine from;
    waiting_qemu destination(tcp, preempt);
    vmstate::migration::parameters settings{.max_bandwidth = 20 << 20, .postcopy_ram = true, .postcopy_preempt = preempt,
        .max_postcopy_bandwidth = 1 << 20};
    history states;
    cables wires;
    vmstate::migration::source source(from.machine(), from.guest, settings);
    states.watch(source);
    REQUIRE(message_of(source.start(wires.to(destination.address()))) == "");
    CHECK(source.pause().error() == vmstate::errc::invalid_argument);
    CHECK(source.recover("unix:/nowhere").error() == vmstate::errc::invalid_argument);
    CHECK(source.give_up().error() == vmstate::errc::invalid_argument);
    REQUIRE(message_of(source.start_postcopy()) == "");
    REQUIRE(wait_for([&] { return source.status().state == state::postcopy_active; }));
    // A QEMU that stands still waiting for a page with its big lock held can't accept a connection: let the guest get what
    // it touches all the time.
    destination.there->wait_serial(lines(2), "2 lines");

    std::string expected = "setup active postcopy-active";
    std::size_t done = 0;
    const std::uint64_t all = source.status().ram.remaining;
    std::minstd_rand random(4);
    for (std::size_t i = 0; i != cuts; ++i) {
        CAPTURE(i);
        for (int touched = 0; touched != 10; ++touched) destination.touch(ours_at + random() % (memory_size - ours_at - 8));
        settings.max_postcopy_bandwidth = 30 << 20;
        source.set_parameters(settings);
        REQUIRE(wait_for([&] { return source.status().ram.remaining <= all / (cuts + 1) * (cuts - i) || source.status().state == state::completed; }));
        settings.max_postcopy_bandwidth = 1 << 20;
        source.set_parameters(settings);
        std::this_thread::sleep_for(150ms); // until the limit holds, and the status tells
        if (source.status().ram.remaining < (2 << 20)) break; // it was quicker than this test, and is about to end
        const bool on_purpose = i % 3 == 2;
        if (on_purpose) CHECK(message_of(source.pause()) == "");
        else wires.cut(preempt && i % 3 == 1 ? 1 : 0);
        // Nobody knows of a broken preempt channel before it is used: at the end at the latest.
        if (preempt && i % 3 == 1) {
            settings.max_postcopy_bandwidth = 0;
            source.set_parameters(settings);
        }
        REQUIRE(wait_for([&] { return source.status().state == state::postcopy_paused; }));
        const std::string why = source.status().error_desc.message();
        INFO(why);
        CHECK_THAT(why, contains(on_purpose ? "postcopy-active: input/output error: paused" : "postcopy-active"));
        settings.max_postcopy_bandwidth = 1 << 20;
        source.set_parameters(settings);
        source.cancel(); // does nothing
        const bool paused_too = wait_for([&] { return destination.migration_status() == "postcopy-paused"; });
        INFO("the destination is in " << destination.migration_status() << ": " << destination.there->complaints());
        REQUIRE(paused_too);
        wires.forget();
        ++done;
        if (i == 0) {
            // Nobody is there: paused as before, and it says why.
            REQUIRE(message_of(source.recover("unix:/nowhere/at/all")) == "");
            REQUIRE(wait_for([&] { return source.status().state == state::postcopy_paused; }));
            CHECK_THAT(source.status().error_desc.message(), contains("postcopy-recover: input/output error: unix:/nowhere/at/all"));
            expected += " postcopy-paused postcopy-recover";
        }
        destination.there->execute("migrate-recover", {{"uri", destination.next_address()}});
        const std::string address = destination.address();
        REQUIRE(message_of(source.recover(wires.to(address))) == "");
        expected += " postcopy-paused postcopy-recover postcopy-active";
        REQUIRE(wait_for([&] { return source.status().state != state::postcopy_recover; }));
        REQUIRE(message_of(source.status().error_desc ? vmstate::result<void>(source.status().error_desc) : vmstate::result<void>()) == "");
    }
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    REQUIRE(wait_for([&] { return is_final(source.status().state) || source.status().state == state::postcopy_paused; }));
    INFO(source.status().error_desc.message());
    INFO(destination.there->complaints());
    REQUIRE(source.status().state == state::completed);
    REQUIRE(message_of(source.wait()) == "");
    const auto incoming = destination.there->wait_incoming();
    REQUIRE(incoming.error == "");
    REQUIRE(incoming.completed);
    CHECK(states.text() == expected + " completed");
    CHECK(from.stops == 1);
    CHECK(from.starts == 0);
    CHECK(done >= (cuts == 200 ? 50 : 3)); // in each of the four ways
    check_guest(destination, from, true); // QEMU tells of each pause
}

TEST_CASE("memory that has arrived is given back, when asked to, and a recovery lacks nothing of it") {
    VMSTATE_REQUIRE_QEMU();
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    auto mapped = vmstate::ram_memory::anonymous(memory_size);
    REQUIRE(message_of(mapped) == "");
    busy_machine from(std::move(*mapped));
    waiting_qemu destination(false, preempt);
    vmstate::migration::parameters settings{.max_bandwidth = 1 << 20, .postcopy_ram = true, .postcopy_preempt = preempt,
        .max_postcopy_bandwidth = 20 << 20, .release_ram = true};
    cables wires;
    vmstate::migration::source source(from.machine(), from.guest, settings);
    REQUIRE(message_of(source.start(wires.to(destination.address()))) == "");
    REQUIRE(message_of(source.start_postcopy()) == "");
    REQUIRE(wait_for([&] { return source.status().state == state::postcopy_active; }));
    destination.there->wait_serial(lines(2), "2 lines");
    const std::uint64_t all = source.status().ram.remaining;
    REQUIRE(wait_for([&] { return source.status().ram.remaining < all / 2; }));
    wires.cut(0);
    REQUIRE(wait_for([&] { return source.status().state == state::postcopy_paused; }));
    const auto gone = [&] {
        std::size_t pages = 0;
        for (std::size_t at = ours_at; at != memory_size; at += page_size)
            if (vmstate::is_zero_page(from.memory().subspan(at, page_size)) &&
                !vmstate::is_zero_page(std::span<const std::byte>(from.at_stop).subspan(at, page_size)))
                ++pages;
        return pages;
    };
    CHECK(gone() > 0);
    REQUIRE(wait_for([&] { return destination.migration_status() == "postcopy-paused"; }));
    destination.there->execute("migrate-recover", {{"uri", destination.next_address()}});
    REQUIRE(message_of(source.recover(destination.address())) == "");
    REQUIRE(wait_for([&] { return is_final(source.status().state); }));
    CHECK(source.status().error_desc.message() == vmstate::error().message());
    REQUIRE(source.status().state == state::completed);
    REQUIRE(destination.there->wait_incoming().completed);
    check_guest(destination, from, true);
}

TEST_CASE("memory of huge pages goes in postcopy by whole huge pages") {
    VMSTATE_REQUIRE_QEMU();
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    constexpr std::uint64_t huge = 2 << 20;
    huge_pages reserved(2 * static_cast<long>(memory_size / huge));
    auto mapped = vmstate::ram_memory::memfd("guest", memory_size, huge);
    if (!reserved.enough() || !mapped) return skip("no huge pages of 2 MiB to be had");
    busy_machine from(std::move(*mapped));
    waiting_qemu destination(false, preempt, true, options_of_huge_guest(from.block_name()));
    vmstate::migration::parameters settings{.max_bandwidth = 20 << 20, .postcopy_ram = true, .postcopy_preempt = preempt,
        .max_postcopy_bandwidth = 20 << 20, .release_ram = true};
    cables wires;
    vmstate::migration::source source(from.machine(), from.guest, settings);
    REQUIRE(message_of(source.start(wires.to(destination.address()))) == "");
    REQUIRE(wait_for([&] { return source.status().ram.remaining < memory_size / 2; }));
    REQUIRE(message_of(source.start_postcopy()) == "");
    REQUIRE(wait_for([&] { return source.status().state == state::postcopy_active; }));
    destination.there->wait_serial(lines(2), "2 lines");
    std::minstd_rand random(5);
    for (int i = 0; i != 5; ++i) destination.touch(ours_at + random() % (memory_size - ours_at - 8));
    wires.cut(0);
    if (wait_for([&] { return source.status().state == state::postcopy_paused || is_final(source.status().state); }) &&
        source.status().state == state::postcopy_paused) {
        REQUIRE(wait_for([&] { return destination.migration_status() == "postcopy-paused"; }));
        destination.there->execute("migrate-recover", {{"uri", destination.next_address()}});
        REQUIRE(message_of(source.recover(destination.address())) == "");
    }
    REQUIRE(wait_for([&] { return is_final(source.status().state); }));
    REQUIRE(source.status().state == state::completed);
    REQUIRE(destination.there->wait_incoming().completed);
    check_guest(destination, from, true);
}

TEST_CASE("while a huge page is paid for a QEMU hears that we are there, and goes on") {
    VMSTATE_REQUIRE_QEMU();
    constexpr std::uint64_t huge = 2 << 20;
    huge_pages reserved(2 * static_cast<long>(memory_size / huge));
    auto mapped = vmstate::ram_memory::memfd("guest", memory_size, huge);
    if (!reserved.enough() || !mapped) return skip("no huge pages of 2 MiB to be had");
    busy_machine from(std::move(*mapped));
    qemu_options options = options_of_huge_guest(from.block_name());
    options.arguments.insert(options.arguments.end(), {"-trace", "loadvm_process_command_ping"});
    waiting_qemu destination(false, false, true, options);
    // A page is paid for in two seconds, and within half of one something is to be heard.
    vmstate::migration::parameters settings{
        .max_bandwidth = 1 << 20, .postcopy_ram = true, .max_postcopy_bandwidth = 1 << 20, .peer_timeout = 2s};
    vmstate::migration::source source(from.machine(), from.guest, settings);
    REQUIRE(message_of(source.start(destination.address())) == "");
    REQUIRE(message_of(source.start_postcopy()) == "");
    // By QEMU's own trace.
    const auto pings = [&] {
        const std::string said = destination.there->complaints();
        std::size_t count = 0;
        for (std::size_t at = said.find("loadvm_process_command_ping"); at != std::string::npos;
             at = said.find("loadvm_process_command_ping", at + 1))
            ++count;
        return count;
    };
    REQUIRE(wait_for([&] { return source.status().state == state::postcopy_active; }));
    // The one behind RUN is among them.
    const std::size_t before = pings();
    CHECK(wait_for([&] { return pings() >= before + 5 || source.status().state != state::postcopy_active; }));
    CHECK(source.status().state == state::postcopy_active);
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    REQUIRE(message_of(source.wait()) == "");
    REQUIRE(destination.there->wait_incoming().completed);
    check_guest(destination, from, true); // but for the trace without a complaint
}

TEST_CASE("what fails before the guest is run there leaves it here") {
    VMSTATE_REQUIRE_QEMU();
    busy_machine from;
    waiting_qemu destination(false, false, false); // without postcopy-ram there
    vmstate::migration::source source(from.machine(), from.guest, {.max_bandwidth = 1 << 20, .postcopy_ram = true});
    REQUIRE(message_of(source.start(destination.address())) == "");
    CHECK(message_of(source.start_postcopy()) == "");
    const auto outcome = source.wait();
    CHECK_FALSE(outcome);
    INFO(message_of(outcome));
    CHECK(source.status().state == state::failed);
    CHECK(from.stops == from.starts);
    CHECK(message_of(source.start_postcopy()) == "");
}

TEST_CASE("a QEMU without postcopy-preempt is refused by a source of ours with it, before the guest is stopped") {
    VMSTATE_REQUIRE_QEMU();
    const bool tcp = GENERATE(false, true);
    CAPTURE(tcp);
    busy_machine from;
    waiting_qemu destination(tcp, false, true);
    vmstate::migration::source source(
        from.machine(), from.guest, {.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .postcopy_preempt = true});
    REQUIRE(message_of(source.start(destination.address())) == "");
    CHECK(message_of(source.start_postcopy()) == "");
    const bool over = wait_for([&] { return is_final(source.status().state); });
    if (!over) {
        static_cast<void>(source.pause());
        wait_for([&] { return source.give_up().has_value(); });
    }
    const auto left = source.wait();
    CHECK(over);
    CHECK_THAT(message_of(left), contains("preempt channel"));
    CHECK(from.stops == 0);
}
