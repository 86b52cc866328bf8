// SPDX-License-Identifier: BSL-1.0
// Postcopy between a source and a destination of ours: the guest checks every page that it touches, before, during and
// after, and every one has what was written into it last; also when the connection breaks again and again.
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/marked_log.hpp>

#include <support/catch.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 8192; // 32 MiB

/// How often each page was written, wherever the guest was: what it has to find there.
using history = std::vector<std::uint64_t>;

struct card {
    std::uint64_t touched = 0;
};
constexpr auto vmstate_card = describe<card>({.name = "card"}, field<&card::touched>);

/// A machine whose guest touches pages in random order: each has to hold what the history says.
class checked_machine {
public:
    checked_machine(history& all, bool shared)
        : memory_(shared ? ram_memory::memfd("guest", pages * page).value() : ram_memory::anonymous(pages * page).value())
        , log_(pages * page)
        , history_(all) {
        REQUIRE(state.add_device<vmstate_card>(device));
        REQUIRE(state.add_ram("ram", memory_));
        control.stop = [this]() -> result<void> {
            stop();
            return {};
        };
        control.start = [this]() -> result<void> {
            ++starts;
            start();
            return {};
        };
        control.dirty_logs.emplace("ram", log_);
    }
    ~checked_machine() { stop(); }

    void fill() {
        for (std::size_t i = 0; i != pages; ++i)
            if (i % 4 != 0) touch(i); // a quarter stays as nobody has touched it
    }
    void start() {
        if (runs_.exchange(true)) return;
        guest_ = std::thread([this] {
            std::minstd_rand random(static_cast<unsigned>(device.touched + 1));
            while (runs_.load()) touch(random() % pages);
        });
    }
    void stop() {
        runs_.store(false);
        if (guest_.joinable()) guest_.join();
    }
    /// Pages that are not what they should be, all of them looked at.
    std::size_t count_wrong() {
        for (std::size_t i = 0; i != pages; ++i) check(i);
        return wrong;
    }

    machine state{{.name = "checked"}};
    migration::guest control;
    card device;
    std::atomic<std::size_t> wrong = 0;
    std::atomic<int> starts = 0;

private:
    // Read by the migration while it is written, and sent again: a race by design.
    [[gnu::no_sanitize_thread, gnu::noinline]] void check(std::size_t index) {
        const auto* const first = reinterpret_cast<const volatile std::uint64_t*>(memory_.span().data() + index * page);
        const auto* const last = first + page / 8 - 1;
        if (*first != history_[index] || *last != history_[index]) ++wrong;
    }
    [[gnu::no_sanitize_thread, gnu::noinline]] void write(std::size_t index) {
        auto* const first = reinterpret_cast<volatile std::uint64_t*>(memory_.span().data() + index * page);
        *first = history_[index];
        first[page / 8 - 1] = history_[index];
    }
    void touch(std::size_t index) {
        check(index);
        ++history_[index];
        write(index);
        log_.mark(index * page, page);
        ++device.touched;
    }

    ram_memory memory_;
    marked_log log_;
    history& history_;
    std::atomic<bool> runs_ = false;
    std::thread guest_;
};

bool wait_for(auto done) {
    for (int i = 0; i != 30'000 && !done(); ++i) std::this_thread::sleep_for(1ms);
    return done();
}

} // namespace

TEST_CASE("a guest goes on at the destination while its memory comes, and finds every page as it left it") {
    {
        history nothing(pages);
        checked_machine any(nothing, false);
        if (const result<void> can = check_postcopy_support(*any.state.ram()); !can) return skip(can.error().message());
    }
    const bool shared = GENERATE(false, true);
    const bool preempt = GENERATE(false, true);
    const bool tcp = GENERATE(false, true);
    const bool at_once = GENERATE(false, true);
    CAPTURE(shared, preempt, tcp, at_once);
    const temporary_directory directory;
    history all(pages);
    checked_machine from(all, shared);
    checked_machine to(all, shared);
    from.fill();
    from.start();
    // It never converges: the guest writes all of its memory as fast as it can.
    migration::parameters settings{.downtime_limit = 1ms, .max_bandwidth = 64u << 20, .postcopy_ram = true, .postcopy_preempt = preempt};
    migration::destination destination(to.state, to.control, settings);
    REQUIRE(destination.listen(tcp ? "tcp:127.0.0.1:0" : "unix:" + (directory / "socket").string()));
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, settings);
    std::vector<std::string> states;
    std::mutex states_mutex;
    source.observe([&](const migration::status& at) {
        const std::lock_guard lock(states_mutex);
        if (states.empty() || states.back() != to_string(at.state)) states.emplace_back(to_string(at.state));
    });
    REQUIRE(source.start(destination.uri()));
    if (!at_once) CHECK(wait_for([&] { return source.status().ram.transferred > 4u << 20; }));
    REQUIRE(source.start_postcopy());
    const result<void> left = source.wait();
    receiving.join();
    INFO(message_of(left) + "; " + message_of(arrived));
    REQUIRE(left);
    REQUIRE(arrived);
    CHECK(states == std::vector<std::string>{"setup", "active", "postcopy-active", "completed"});
    CHECK(to.starts == 1);
    CHECK(from.starts == 0);
    CHECK(source.status().ram.postcopy_requests > 0);
    CHECK(destination.status().postcopy.faults.faults > 0);
    REQUIRE(source.start_postcopy()); // late, and harmless
    to.stop();
    CHECK(from.wrong == 0);
    CHECK(to.count_wrong() == 0);
}

TEST_CASE("a connection that breaks in postcopy costs the guest no page, however often") {
    const bool preempt = GENERATE(false, true);
    const bool at_source = GENERATE(false, true);
    CAPTURE(preempt, at_source);
    const int breaks = std::getenv("VMSTATE_SOAK") != nullptr ? 50 : 4; // each
    const temporary_directory directory;
    const auto address = [&](int number) { return "unix:" + (directory / std::to_string(number)).string(); };
    history all(pages);
    checked_machine from(all, false);
    checked_machine to(all, false);
    if (const result<void> can = check_postcopy_support(*to.state.ram()); !can) return skip(can.error().message());
    from.fill();
    from.start();
    migration::parameters settings{.postcopy_ram = true, .postcopy_preempt = preempt, .max_postcopy_bandwidth = 8u << 20};
    migration::destination destination(to.state, to.control, settings);
    REQUIRE(destination.listen(address(0)));
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(destination.uri()));
    REQUIRE(source.start_postcopy());
    CHECK(wait_for([&] { return source.status().state == migration::state::postcopy_active; }));
    int broken = 0;
    const auto is_paused = [](const auto& side) { return side.status().state == migration::state::postcopy_paused; };
    for (int i = 1; i <= breaks; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20 + 7 * i % 30));
        if (!at_source) destination.pause();
        else if (!source.pause()) break; // it is over
        if (!wait_for([&] { return (is_paused(source) && is_paused(destination)) || is_final(source.status().state); })) break;
        if (is_final(source.status().state)) break;
        ++broken;
        REQUIRE(destination.recover(address(i)));
        REQUIRE(source.recover(address(i)));
        CHECK(wait_for([&] {
            const auto at = source.status().state;
            return at == migration::state::postcopy_active || is_final(at);
        }));
    }
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    const result<void> left = source.wait();
    receiving.join();
    INFO(message_of(left) + "; " + message_of(arrived));
    REQUIRE(left);
    REQUIRE(arrived);
    CHECK(broken > 0);
    to.stop();
    CHECK(to.starts == 1);
    CHECK(from.wrong == 0);
    CHECK(to.count_wrong() == 0);
}
