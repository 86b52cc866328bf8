// SPDX-License-Identifier: BSL-1.0
// Postcopy between a source and a destination of ours: the guest checks every page that it touches, before, during and
// after, and every one has what was written into it last; also when the connection breaks, wherever, again and again, and
// when the guest comes and goes a hundred times. And what the destination counts of it.
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/marked_log.hpp>

#include "footprint.hpp"
#include "peer_process.hpp"
#include "switchboard.hpp"

#include <support/catch.hpp>
#include <support/huge_pages.hpp>
#include <support/outcome.hpp>
#include <support/temporary_directory.hpp>

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;

namespace {

constexpr std::size_t pages = 8192; // 32 MiB

/// How often each page was written, wherever the guest was: what it has to find there.
using history = std::vector<std::uint64_t>;

struct card;
result<void> card_loaded(card& loaded);

struct card {
    std::uint64_t touched = 0;
    std::function<result<void>()> loaded; ///< where it isn't empty
};
constexpr auto vmstate_card = describe<card>({.name = "card"}, post_load<card_loaded>, field<&card::touched>, transient<&card::loaded>);
result<void> card_loaded(card& loaded) { return loaded.loaded ? loaded.loaded() : result<void>(); }

/// A machine whose guest touches pages in random order: each has to hold what the history says.
class checked_machine {
public:
    /// `vcpus`: each has the pages of which the number leaves the same remainder.
    checked_machine(history& all, bool shared, unsigned vcpus = 1) : checked_machine(all, memory_of(all, shared), vcpus) {}
    checked_machine(history& all, ram_memory memory, unsigned vcpus = 1)
        : memory_(std::move(memory)), log_(all.size() * page), history_(all), vcpus_(vcpus) {
        REQUIRE(state.add_device<vmstate_card>(device));
        REQUIRE(state.add_ram("ram", memory_));
        control.stop = [this]() -> result<void> {
            stop();
            if (stopped) stopped();
            return {};
        };
        control.start = [this]() -> result<void> {
            ++starts;
            start();
            return {};
        };
        control.vcpu_threads = [this] {
            make_threads();
            return ids_;
        };
        control.dirty_logs.emplace("ram", log_);
    }
    ~checked_machine() { stop(); }

    void fill() {
        for (std::size_t i = 0; i != history_.size(); ++i)
            if (i % 4 != 0) touch(i); // a quarter stays as nobody has touched it
    }
    void start() {
        if (runs_.exchange(true)) return;
        make_threads();
        go_.store(true);
        go_.notify_all();
    }
    void stop() {
        runs_.store(false);
        go_.store(true);
        go_.notify_all();
        for (std::thread& one : guest_) one.join();
        guest_.clear();
        go_.store(false);
    }
    bool runs() const { return runs_.load(); }
    /// What a device may look at while it is loaded.
    bool has_right(std::size_t index) {
        const std::size_t before = wrong;
        check(index);
        return wrong == before;
    }
    /// Pages that are not what they should be, all of them looked at.
    std::size_t count_wrong() {
        for (std::size_t i = 0; i != history_.size(); ++i) check(i);
        return wrong;
    }

    machine state{{.name = "checked"}};
    migration::guest control;
    std::function<void()> stopped; ///< where it isn't empty
    card device;
    std::atomic<std::size_t> wrong = 0;
    std::atomic<int> starts = 0;

private:
    static ram_memory memory_of(const history& all, bool shared) {
        return shared ? ram_memory::memfd("guest", all.size() * page).value() : ram_memory::anonymous(all.size() * page).value();
    }
    /// They wait until the guest is started.
    void make_threads() {
        if (!guest_.empty()) return;
        ids_.assign(vcpus_, 0);
        std::atomic<unsigned> made = 0;
        for (unsigned vcpu = 0; vcpu != vcpus_; ++vcpu)
            guest_.emplace_back([this, vcpu, &made] {
                ids_[vcpu] = static_cast<std::uint32_t>(::syscall(SYS_gettid));
                made.fetch_add(1);
                go_.wait(false);
                std::minstd_rand random(static_cast<unsigned>(device_touched().load() + vcpu + 1));
                while (runs_.load()) touch(random() % (history_.size() / vcpus_) * vcpus_ + vcpu);
            });
        while (made.load() != vcpus_) std::this_thread::yield();
    }
    std::atomic_ref<std::uint64_t> device_touched() { return std::atomic_ref<std::uint64_t>(device.touched); }
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
        device_touched().fetch_add(1);
    }

    ram_memory memory_;
    marked_log log_;
    history& history_;
    const unsigned vcpus_;
    std::atomic<bool> runs_ = false;
    std::atomic<bool> go_ = false; ///< the threads need not wait
    std::vector<std::uint32_t> ids_;
    std::vector<std::thread> guest_;
};

bool can_postcopy() {
    history nothing(1);
    checked_machine any(nothing, false);
    const result<void> can = check_postcopy_support(*any.state.ram());
    if (!can) skip(can.error().message());
    return static_cast<bool>(can);
}

bool is_soak() { return std::getenv("VMSTATE_SOAK") != nullptr; }

bool wait_for(auto done) {
    for (int i = 0; i != 30'000 && !done(); ++i) std::this_thread::sleep_for(1ms);
    return done();
}

} // namespace

TEST_CASE("a guest goes on at the destination while its memory comes, and finds every page as it left it") {
    if (!can_postcopy()) return;
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
    // In postcopy it isn't over before a guest that waits for a processor has missed a page.
    migration::parameters settings{.downtime_limit = 1ms, .max_bandwidth = 64u << 20, .postcopy_ram = true,
        .postcopy_preempt = preempt, .max_postcopy_bandwidth = 256u << 20};
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
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    const bool at_source = GENERATE(false, true);
    CAPTURE(preempt, at_source);
    const int breaks = is_soak() ? 50 : 4; // each
    const temporary_directory directory;
    const auto address = [&](int number) { return "unix:" + (directory / std::to_string(number)).string(); };
    history all(pages);
    checked_machine from(all, false);
    checked_machine to(all, false);
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
    const auto is_paused = [](const auto& side) { return side.status().state == migration::state::postcopy_paused; };
    const auto is_active = [](const auto& side) { return side.status().state == migration::state::postcopy_active; };
    CHECK(wait_for([&] { return is_active(source) && is_active(destination); }));
    int broken = 0;
    for (int i = 1; i <= breaks; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20 + 7 * i % 30));
        if (!at_source) destination.pause();
        else if (!source.pause()) break; // it is over
        if (!wait_for([&] { return (is_paused(source) && is_paused(destination)) || is_final(source.status().state); })) break;
        if (is_final(source.status().state)) break;
        ++broken;
        REQUIRE(destination.recover(address(i)));
        REQUIRE(source.recover(address(i)));
        CHECK(wait_for([&] { return (is_active(source) && is_active(destination)) || is_final(source.status().state); }));
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

namespace {

bool is_paused(const auto& side) { return side.status().state == migration::state::postcopy_paused; }

/// What happens to a connection, from when the source's guest has been stopped or from when it leaves; to a later one, from
/// its beginning.
using deed = std::function<void(switchboard&)>;
enum class moment { stop, run };

struct outcome {
    result<void> left = error(errc::io);
    result<void> arrived = error(errc::io);
    std::size_t pauses = 0;
    bool given_up = false;           ///< the source
    std::uint64_t bytes = 0;         ///< that left over the main channel since the guest's stop, of the last connection
    std::uint64_t bytes_back = 0;    ///< and came back
    std::uint64_t bytes_urgent = 0;  ///< over the preempt channel
    std::uint64_t bytes_asked = 0;   ///< and came back over it
    std::string last_pause;          ///< the reason
};
/// A postcopy that is recovered as often as it takes; each deed is done to a connection, as long as there are some.
outcome migrate(checked_machine& from, checked_machine& to, const migration::parameters& settings, const std::vector<deed>& here,
    const deed& there = {}, moment when = moment::stop) {
    outcome seen;
    std::deque<switchboard> boards(1);
    migration::destination destination(to.state, to.control, settings);
    std::atomic<bool> begun_there = false, begun_here = false;
    if (there) {
        destination.observe([&](const migration::status& at) {
            if (at.state == migration::state::postcopy_active && !begun_there.exchange(true)) there(boards.front());
        });
    }
    std::thread receiving([&, accept = boards.front().acceptor()] { seen.arrived = destination.run(accept); });
    migration::source source(from.state, from.control, settings);
    std::size_t before = 0, before_back = 0;
    const auto begin_here = [&] {
        if (!here.empty() && !begun_here.exchange(true)) here.front()(boards.front());
    };
    from.stopped = [&] {
        before = boards.front().written(0);
        before_back = boards.front().read_back(0);
        if (when == moment::stop) begin_here();
    };
    source.observe([&](const migration::status& at) {
        if (at.state == migration::state::postcopy_active) begin_here();
    });
    const result<void> started = source.start(boards.front().connector());
    if (started) (void)source.start_postcopy();
    for (;;) {
        const auto both_paused = [&] {
            return is_paused(source) && is_paused(destination) && destination.status().postcopy.interruptions == boards.size();
        };
        const bool settled = wait_for([&] { return is_final(source.status().state) || is_final(destination.status().state) || both_paused(); });
        if (!settled || !both_paused()) break;
        ++seen.pauses;
        seen.last_pause = source.status().error_desc.message();
        switchboard& next = boards.emplace_back();
        if (boards.size() <= here.size()) here[boards.size() - 1](next);
        if (!destination.recover(next.acceptor()) || !source.recover(next.connector())) break;
    }
    // A destination that has everything may not have been able to say so; one that hasn't waits for ever.
    if (!wait_for([&] { return is_final(source.status().state) || is_paused(source); }) || !is_final(source.status().state))
        seen.given_up = source.give_up().has_value();
    seen.left = source.wait();
    from.stopped = {};
    if (!seen.left) wait_for([&] { return is_final(destination.status().state) || is_paused(destination); });
    if (!is_final(destination.status().state)) {
        destination.cancel();
        destination.give_up();
    }
    receiving.join();
    if (here.empty() && boards.size() == 1) {
        seen.bytes = boards.front().written(0) - before;
        seen.bytes_back = boards.front().read_back(0) - before_back;
        seen.bytes_urgent = boards.front().written(1);
        seen.bytes_asked = boards.front().read_back(1);
    }
    return seen;
}

} // namespace

TEST_CASE("a page that the guest waits for is asked for over the channel that it comes over, in a recovery, too") {
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    history all(pages);
    checked_machine from(all, false);
    checked_machine to(all, false);
    from.fill();
    from.start();
    migration::parameters settings{.postcopy_ram = true, .postcopy_preempt = preempt, .max_postcopy_bandwidth = 8u << 20};
    std::deque<switchboard> boards(2);
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(boards[0].acceptor()); });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(boards[0].connector()));
    REQUIRE(source.start_postcopy());
    const auto are = [&](migration::state wanted) { return source.status().state == wanted && destination.status().state == wanted; };
    const auto asked = [&](std::uint64_t more) {
        const std::uint64_t before = source.status().ram.postcopy_requests;
        CHECK(wait_for([&] { return source.status().ram.postcopy_requests >= before + more; }));
    };
    CHECK(wait_for([&] { return are(migration::state::postcopy_active); }));
    asked(200);
    CHECK(source.pause());
    CHECK(wait_for([&] { return are(migration::state::postcopy_paused); }));
    CHECK(destination.recover(boards[1].acceptor()));
    CHECK(source.recover(boards[1].connector()));
    CHECK(wait_for([&] { return are(migration::state::postcopy_active); }));
    asked(200);
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    CHECK(message_of(source.wait()) == "");
    receiving.join();
    to.stop();
    CHECK(message_of(arrived) == "");
    CHECK(to.count_wrong() == 0);
    for (switchboard& board : boards) {
        CAPTURE(board.read_back(0), board.read_back(1));
        // 16 bytes each, and a bitmap in the recovery; the first ones may be early.
        CHECK((board.read_back(1) > 150 * 16) == preempt);
        CHECK((board.read_back(0) > 150 * 16) == !preempt);
    }
}

TEST_CASE("wherever the connection breaks from the guest's stop on, it runs on at one side by itself and finds every page") {
    if (!can_postcopy()) return;
    struct place {
        const char* what;
        bool preempt;
        bool at_source;
        std::uint64_t outcome::* length;
        std::size_t channel;
        bool back;
    };
    const place what = GENERATE(place{"the main channel, at the source", false, true, &outcome::bytes, 0, false},
        place{"the main channel, at the source, beside a preempt channel", true, true, &outcome::bytes, 0, false},
        place{"the main channel, at the destination", false, false, &outcome::bytes, 0, false},
        place{"the way back", false, true, &outcome::bytes_back, 0, true},
        place{"the way back, beside a preempt channel", true, true, &outcome::bytes_back, 0, true},
        place{"the preempt channel, at the source", true, true, &outcome::bytes_urgent, 1, false},
        place{"the preempt channel, at the destination", true, false, &outcome::bytes_urgent, 1, false},
        place{"the preempt channel's other direction", true, true, &outcome::bytes_asked, 1, true});
    CAPTURE(what.what);
    const std::size_t places = is_soak() ? 200 : 30;
    const std::size_t least_breaks = is_soak() ? 29 : 5; // each; in all eight ways more than 200 and 30
    constexpr std::size_t small = 512; // pages
    // Or it would be over before it is told to go on in postcopy; and where requests are what is to break, before there is one.
    const bool needs_requests = what.preempt && what.channel == 1 && what.back;
    const migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true,
        .postcopy_preempt = what.preempt, .max_postcopy_bandwidth = needs_requests ? 16u << 20 : 0u, .peer_timeout = 20s};
    const auto run = [&](const std::vector<deed>& here, const deed& there = {}, bool way_back_breaks = false, moment when = moment::stop) {
        history all(small);
        checked_machine from(all, false);
        checked_machine to(all, false);
        from.fill();
        from.start();
        const outcome seen = migrate(from, to, settings, here, there, when);
        const bool from_runs = from.runs();
        to.stop();
        from.stop();
        INFO(message_of(seen.left) + "; " + message_of(seen.arrived) + "; paused for " + seen.last_pause);
        if (seen.arrived) {
            // It may be all there, and the source not have heard of it.
            if (!seen.left) REQUIRE(way_back_breaks);
            REQUIRE(seen.given_up == seen.left.has_error());
            REQUIRE(to.starts == 1);
            REQUIRE(from.starts == 0);
            REQUIRE_FALSE(from_runs);
            REQUIRE(to.count_wrong() == 0);
            REQUIRE(from.wrong == 0);
        } else {
            // Before the source has told the destination to run the guest. Nobody had to give up here.
            REQUIRE(seen.left.has_error());
            REQUIRE_FALSE(seen.given_up);
            REQUIRE(to.starts == 0);
            REQUIRE(from.starts == 1);
            REQUIRE(from_runs);
            REQUIRE(from.count_wrong() == 0);
        }
        return seen;
    };
    const outcome whole = run({});
    REQUIRE(whole.left);
    const std::uint64_t length = whole.*what.length;
    REQUIRE(length != 0);
    const leak_check leaks;
    std::size_t broken = 0, kept = 0, tried = 0;
    // How much goes over a channel differs from time to time: where too few of the places lie within what goes, they are
    // tried again.
    for (; tried < places || (broken < least_breaks && tried < 3 * places); ++tried) {
        const std::size_t i = tried % places;
        // What is asked for differs from time to time: half of the places are at the beginning of what follows the guest's
        // stop, or RUN.
        const moment when = i % 4 == 3 ? moment::run : moment::stop;
        // What there is between the two, of either direction.
        const std::size_t until_run = what.back ? 32 : 128;
        const std::size_t bytes = i % 2 == 0              ? static_cast<std::size_t>(length * i / places)
                                  : when == moment::stop ? until_run * i / places
                                                         : i * i / 4;
        CAPTURE(i, bytes, length);
        const deed spoil = [&](switchboard& board) {
            carried_bytes& end = what.at_source ? board.at_source(what.channel) : board.at_destination(what.channel);
            (what.at_source == what.back ? end.read : end.written) = bytes;
        };
        // The recovery breaks, too, somewhere in its handshake: its first try, or the first two.
        std::vector<deed> more;
        if (i % 3 != 0) more.emplace_back([&](switchboard& board) { board.at_source(0).written = i; });
        if (i % 3 == 2) more.emplace_back([&](switchboard& board) { board.at_source(0).read = 3 * i; });
        std::vector<deed> here{what.at_source ? spoil : deed([](switchboard&) {})};
        here.insert(here.end(), more.begin(), more.end());
        const outcome seen = run(here, what.at_source ? deed() : spoil, what.back || i % 3 == 2, when);
        if (seen.pauses != 0) ++broken;
        if (!seen.arrived) ++kept;
    }
    CHECK(broken >= least_breaks);
    if (what.at_source && what.channel == 0) CHECK(kept > places / 16);
    leaks.check(tried);
}

TEST_CASE("a large page that is paid for slowly doesn't look like a source that has gone") {
    if (!can_postcopy()) return;
    constexpr std::size_t large = 128 << 10;
    std::vector<std::byte> at_source(2 * large, std::byte{0x17});
    const auto at_destination = ram_memory::anonymous(3 * large);
    REQUIRE(at_destination.has_value());
    const std::size_t before = large - reinterpret_cast<std::uintptr_t>(at_destination->span().data()) % large;
    const std::span<std::byte> there = at_destination->span().subspan(before % large, 2 * large);
    machine from{{.name = "checked"}};
    machine to{{.name = "checked"}};
    REQUIRE(from.add_ram("ram", at_source, {.host_page_size = large}));
    REQUIRE(to.add_ram("ram", there, {.host_page_size = large}));
    // A page is paid for in more than twice the time that the destination waits.
    const migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 4096, .postcopy_ram = true,
        .max_postcopy_bandwidth = 48 << 10, .peer_timeout = 1s};
    migration::guest standing;
    switchboard lines;
    migration::destination destination(to, standing, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(lines.acceptor()); });
    migration::source source(from, standing, settings);
    const result<void> started = source.start(lines.connector());
    if (started) CHECK(source.start_postcopy());
    CHECK(wait_for([&] { return is_final(source.status().state) || is_paused(source) || is_paused(destination); }));
    const std::string why = destination.status().error_desc.message();
    if (is_paused(source)) CHECK(source.give_up());
    const result<void> left = source.wait();
    if (!left) {
        destination.cancel();
        destination.give_up();
    }
    receiving.join();
    INFO(why);
    REQUIRE(message_of(left) == "");
    REQUIRE(message_of(arrived) == "");
    CHECK(destination.status().postcopy.interruptions == 0);
    CHECK(std::equal(there.begin(), there.end(), at_source.begin()));
}

TEST_CASE("a guest that goes back and forth in postcopy finds every page each time") {
    if (!can_postcopy()) return;
    const int times = is_soak() ? 100 : 8;
    history all(2048);
    checked_machine here(all, false);
    checked_machine there(all, true);
    here.fill();
    here.start();
    std::optional<leak_check> leaks;
    for (int i = 0; i != times; ++i) {
        CAPTURE(i);
        if (i == 2) leaks.emplace();
        checked_machine& from = i % 2 == 0 ? here : there;
        checked_machine& to = i % 2 == 0 ? there : here;
        const outcome seen = migrate(from, to, {.downtime_limit = 0ms, .max_bandwidth = 8 << 20, .postcopy_ram = true,
            .postcopy_preempt = i % 4 < 2, .release_ram = i % 3 == 1}, {});
        REQUIRE(message_of(seen.left) == "");
        REQUIRE(message_of(seen.arrived) == "");
        REQUIRE(seen.bytes != 0);
        REQUIRE(to.starts == i / 2 + 1);
        REQUIRE_FALSE(from.runs());
        to.stop();
        REQUIRE(to.count_wrong() == 0);
        REQUIRE(from.wrong == 0);
        to.start();
    }
    leaks->check(static_cast<std::size_t>(times));
}

TEST_CASE("what the guest waited for is counted, by how long it was and by whom") {
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    constexpr unsigned vcpus = 2;
    history all(4096);
    checked_machine from(all, false, vcpus);
    checked_machine to(all, false, vcpus);
    from.fill();
    from.start();
    // So that they touch more than comes by itself.
    const migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true,
        .postcopy_preempt = preempt, .max_postcopy_bandwidth = 64 << 20};
    switchboard lines;
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(lines.acceptor()); });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(lines.connector()));
    REQUIRE(source.start_postcopy());
    CHECK(message_of(source.wait()) == "");
    receiving.join();
    REQUIRE(message_of(arrived) == "");
    to.stop();
    CHECK(to.count_wrong() == 0);
    const migration::postcopy_status status = destination.status().postcopy;
    CHECK(status.state == postcopy_state::end);
    CHECK(status.requests > 0);
    CHECK(status.requests == source.status().ram.postcopy_requests);
    CHECK(status.waiting == 0);
    CHECK(status.interruptions == 0);
    const postcopy_fault_status& faults = status.faults;
    CHECK(faults.faults >= status.requests); // two may wait for one page
    CHECK(std::accumulate(faults.latencies.begin(), faults.latencies.end(), std::uint64_t{0}) == faults.faults - faults.already_received);
    CHECK(faults.latency_max > 0ns);
    CHECK(faults.latency_total >= faults.latency_max);
    if (faults.threads.empty()) return skip("this kernel doesn't tell which thread waits for a page");
    REQUIRE(faults.threads.size() == vcpus);
    std::uint64_t of_threads = 0;
    std::chrono::nanoseconds blocked{0};
    for (const postcopy_thread_status& one : faults.threads) {
        CHECK(one.is_vcpu);
        CHECK(one.faults > 0);
        CHECK(one.blocked > 0ns);
        CHECK(one.blocked >= faults.blocktime);
        of_threads += one.faults;
        blocked += one.blocked;
    }
    CHECK(of_threads == faults.faults);
    CHECK(blocked >= faults.latency_total);
    CHECK(faults.blocktime > 0ns); // with so many faults both of them stood still at some time
}

namespace {

/// A guest here, on its way to a destination in a process of its own that is killed, or stopped, when it says so.
struct killed {
    migration::state before{}; ///< of the source, when the destination was dead and nobody had done anything
    error why;
    bool runs = false; ///< the guest, here
    int starts = 0;
    std::size_t wrong = 0;
};
killed kill_destination(const std::string& when, bool stop = false) {
    const temporary_directory directory;
    history all(512);
    checked_machine from(all, false);
    from.fill();
    from.start();
    peer_process there("peer destination in postcopy", {.uri = "unix:" + (directory / "socket").string(), .pages = all.size(), .hold = when});
    const std::string uri = there.wait_for("uri");
    migration::source source(from.state, from.control,
        {.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .max_postcopy_bandwidth = 1 << 20, .release_ram = true,
            .peer_timeout = stop ? 1s : 20s});
    REQUIRE(source.start(uri));
    if (when != "active") REQUIRE(source.start_postcopy());
    there.wait_for("state " + when);
    // It may have been sooner there than here.
    REQUIRE(wait_for([&] { return source.status().state != migration::state::setup; }));
    if (stop) there.stop();
    else there.kill();
    CHECK(wait_for([&] { return is_final(source.status().state) || is_paused(source); }));
    killed seen;
    seen.before = source.status().state;
    if (is_paused(source)) CHECK(source.give_up());
    const result<void> left = source.wait();
    CHECK(left.has_error());
    CHECK(source.status().state == migration::state::failed);
    CHECK(source.start_postcopy());
    if (!left) seen.why = left.error();
    seen.runs = from.runs();
    seen.starts = from.starts;
    from.stop();
    seen.wrong = from.count_wrong();
    return seen;
}

} // namespace

TEST_CASE("peer destination in postcopy", "[.]") {
    if (peer::told("VMSTATE_PEER_URI").empty()) return;
    history all(std::stoul(peer::told("VMSTATE_PEER_PAGES")));
    checked_machine to(all, false);
    const auto hold = [](const std::string& where) -> result<void> {
        if (peer::told("VMSTATE_PEER_HOLD") != where) return {};
        peer::say("state " + where);
        for (;;) ::pause();
    };
    to.device.loaded = [&] { return hold("package"); };
    to.control.start = [&] { return hold("start"); };
    migration::parameters settings;
    settings.postcopy_ram = true;
    migration::destination destination(to.state, to.control, settings);
    destination.observe(peer::reporter());
    REQUIRE(destination.listen(peer::told("VMSTATE_PEER_URI")));
    peer::say("uri " + destination.uri());
    static_cast<void>(destination.run());
}

TEST_CASE("the destination's process is killed before the guest runs there: it goes on here, with every page") {
    if (!can_postcopy()) return;
    static_cast<void>(kill_destination("active"));
    const leak_check leaks;
    for (int times = 0; times != 3; ++times) {
        const killed early = kill_destination("active");
        CHECK(early.before == migration::state::failed);
        CAPTURE(early.why.message());
        const std::string_view stage = early.why.path();
        // The source may be a step behind.
        CHECK((stage.starts_with("active") || stage.starts_with("setup") || stage.starts_with("return path")));
        CHECK(early.runs);
        CHECK(early.wrong == 0);
        // While it loads the devices, and when it is about to say that it has.
        for (const char* const when : {"package", "postcopy-active"}) {
            CAPTURE(when);
            const killed loading = kill_destination(when);
            CHECK(loading.before == migration::state::failed);
            CHECK(loading.why.path().starts_with("active"));
            CHECK(loading.runs);
            CHECK(loading.starts == 1);
            CHECK(loading.wrong == 0);
        }
        // When it has been told to run it there, what it has done there is lost; it isn't started here.
        const killed late = kill_destination("start");
        CHECK(late.before == migration::state::postcopy_paused);
        CHECK_FALSE(late.runs);
        CHECK(late.starts == 0);
    }
    leaks.check(12);
    // It stands still, and says nothing any more.
    const killed silent = kill_destination("package", true);
    CHECK(silent.before == migration::state::failed);
    CHECK_THAT(silent.why.message(), contains("no PONG behind the devices"));
    CHECK(silent.runs);
    CHECK(silent.wrong == 0);
}

TEST_CASE("until the destination has said that the devices are loaded a migration can be cancelled, and the guest goes on here") {
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    history all(512);
    checked_machine from(all, false);
    checked_machine to(all, false);
    from.fill();
    from.start();
    const migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true,
        .postcopy_preempt = preempt, .release_ram = true};
    // A page that hasn't come is looked at, and comes.
    std::atomic<bool> looked = false, looked_right = false, let_go = false;
    to.device.loaded = [&]() -> result<void> {
        looked_right = to.has_right(all.size() - 1);
        looked = true;
        let_go.wait(false);
        return {};
    };
    switchboard lines;
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(lines.acceptor()); });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(lines.connector()));
    REQUIRE(source.start_postcopy());
    CHECK(wait_for([&] { return looked.load(); }));
    CHECK(source.status().state == migration::state::active);
    CHECK(destination.status().state == migration::state::active);
    CHECK_FALSE(source.pause());
    CHECK_FALSE(source.give_up());
    source.cancel();
    CHECK(message_of(source.wait()) == "input/output error: cancelled");
    CHECK(source.status().state == migration::state::cancelled);
    CHECK(from.runs());
    let_go = true;
    let_go.notify_all();
    receiving.join();
    CHECK(looked_right);
    CHECK(arrived.has_error());
    CHECK(to.starts == 0);
    from.stop();
    CHECK(from.starts == 1);
    CHECK(from.count_wrong() == 0);
}

TEST_CASE("devices may take longer to be loaded than a silent peer has, and the pages that they look at come meanwhile") {
    if (!can_postcopy()) return;
    history all(512);
    checked_machine from(all, false);
    checked_machine to(all, false);
    from.fill();
    from.start();
    std::atomic<bool> looked_right = true;
    to.device.loaded = [&]() -> result<void> {
        for (std::size_t i = 1; i <= 5; ++i) {
            std::this_thread::sleep_for(50ms);
            if (!to.has_right(all.size() - i)) looked_right = false;
        }
        std::this_thread::sleep_for(1200ms);
        return {};
    };
    const outcome seen = migrate(
        from, to, {.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .peer_timeout = 1s}, {});
    to.stop();
    CHECK(message_of(seen.left) == "");
    CHECK(message_of(seen.arrived) == "");
    CHECK(seen.pauses == 0);
    CHECK(looked_right);
    CHECK(to.count_wrong() == 0);
    CHECK(to.starts == 1);
    CHECK(from.starts == 0);
}

TEST_CASE("a destination that can't load the devices says so, and the guest goes on here") {
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    history all(512);
    checked_machine from(all, false);
    checked_machine to(all, false);
    to.device.loaded = []() -> result<void> { return error(errc::hook_failed, "a card", "another"); };
    from.fill();
    const leak_check leaks;
    for (int times = 0; times != 4; ++times) {
        from.start();
        const int starts = from.starts;
        const outcome seen = migrate(from, to,
            {.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .postcopy_preempt = preempt, .release_ram = true}, {});
        const bool runs = from.runs();
        from.stop();
        CHECK(seen.pauses == 0);
        CHECK(message_of(seen.left) == "active/return path: input/output error: the destination could not load the stream");
        CHECK_THAT(message_of(seen.arrived), contains("card"));
        CHECK(runs);
        CHECK(from.starts == starts + 1);
        CHECK(to.starts == 0);
        CHECK(from.count_wrong() == 0);
    }
    leaks.check(4);
}

// Where such a page has to be made first, which takes a while: see CMakeLists.txt.
TEST_CASE("memory of pages of 1 GiB goes in postcopy, by whole pages", "[.giant]") {
    if (!can_postcopy()) return;
    constexpr std::uint64_t giant = std::uint64_t{1} << 30;
    const huge_pages reserved(1, giant);
    auto memory = ram_memory::memfd("guest", giant, giant);
    if (!reserved.enough() || !memory) return skip("no huge page of 1 GiB to be had");
    history all(giant / page);
    auto at_source = ram_memory::anonymous(giant);
    REQUIRE(message_of(at_source) == "");
    // Of a source the memory is what it is; its page size is what it says.
    machine from{{.name = "checked"}};
    card device;
    REQUIRE(from.add_device<vmstate_card>(device));
    REQUIRE(from.add_ram("ram", at_source->span(), {.host_page_size = giant}));
    checked_machine to(all, std::move(*memory));
    // Few pages have something in them, the last one, too.
    for (std::size_t i = 511; i < all.size(); i += 512) {
        all[i] = i + 1;
        auto* const first = reinterpret_cast<std::uint64_t*>(at_source->span().data() + i * page);
        first[0] = first[page / 8 - 1] = all[i];
    }
    const migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .postcopy_preempt = true};
    migration::guest standing;
    switchboard lines;
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(lines.acceptor()); });
    migration::source source(from, standing, settings);
    REQUIRE(source.start(lines.connector()));
    REQUIRE(source.start_postcopy());
    CHECK(message_of(source.wait()) == "");
    receiving.join();
    REQUIRE(message_of(arrived) == "");
    to.stop();
    CHECK(to.count_wrong() == 0);
}

TEST_CASE("a migration that may go on in postcopy, and needn't, ends as any other") {
    const bool preempt = GENERATE(false, true);
    const bool tcp = GENERATE(false, true);
    const bool takes_time = GENERATE(false, true);
    CAPTURE(preempt, tcp, takes_time);
    const temporary_directory directory;
    history all(pages);
    checked_machine from(all, false);
    checked_machine to(all, false);
    if (const result<void> can = check_postcopy_support(*to.state.ram()); !can) return skip(can.error().message());
    from.fill(); // and stands still: the first pass is all there is
    migration::parameters settings{.postcopy_ram = true, .postcopy_preempt = preempt};
    // The destination's channel for urgent pages is closed by then, and says nothing; its word is still to come.
    if (takes_time) {
        settings.max_bandwidth = 64u << 20; // all that there is to be agreed upon has been
        to.control.accept = []() -> result<void> {
            std::this_thread::sleep_for(500ms);
            return {};
        };
    }
    migration::destination destination(to.state, to.control, settings);
    REQUIRE(destination.listen(tcp ? "tcp:127.0.0.1:0" : "unix:" + (directory / "socket").string()));
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, settings);
    const result<void> started = source.start(destination.uri());
    const result<void> left = started ? source.wait() : started;
    if (!started) destination.cancel();
    receiving.join();
    CHECK(message_of(left) == "");
    CHECK(message_of(arrived) == "");
    CHECK(source.status().state == migration::state::completed);
    CHECK(destination.status().state == migration::state::completed);
    CHECK(to.starts == 1);
    CHECK(from.starts == 0);
    to.stop();
    CHECK(to.count_wrong() == 0);
}

TEST_CASE("a source with postcopy-preempt doesn't stop its guest for a destination without") {
    if (!can_postcopy()) return;
    const bool tcp = GENERATE(false, true);
    CAPTURE(tcp);
    const temporary_directory directory;
    history all(512);
    checked_machine from(all, false);
    checked_machine to(all, false);
    from.fill();
    from.start();
    migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .peer_timeout = 20s};
    migration::destination destination(to.state, to.control, settings);
    REQUIRE(destination.listen(tcp ? "tcp:127.0.0.1:0" : "unix:" + (directory / "socket").string()));
    const std::string uri = destination.uri();
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(); });
    settings.postcopy_preempt = true;
    migration::source source(from.state, from.control, settings);
    const result<void> started = source.start(uri);
    if (started) static_cast<void>(source.start_postcopy());
    const bool over = wait_for([&] { return is_final(source.status().state); });
    if (!over) {
        static_cast<void>(source.pause());
        wait_for([&] { return is_paused(source); });
        static_cast<void>(source.give_up());
        wait_for([&] { return is_paused(destination); });
        destination.give_up();
    }
    const result<void> left = source.wait();
    destination.cancel();
    receiving.join();
    CHECK(over);
    CHECK_THAT(message_of(left), contains("active/preempt channel") && contains("a destination with postcopy-preempt, as here"));
    CHECK(arrived.has_error());
    CHECK(from.runs());
    CHECK(from.starts == 0); // it was never stopped
    CHECK(to.starts == 0);
}

TEST_CASE("a destination with postcopy-preempt gets every page from a source without") {
    if (!can_postcopy()) return;
    history all(512);
    checked_machine from(all, false);
    checked_machine to(all, false);
    from.fill();
    from.start();
    migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true, .postcopy_preempt = true,
        .max_postcopy_bandwidth = 8 << 20, .peer_timeout = 20s};
    migration::destination destination(to.state, to.control, settings);
    REQUIRE(destination.listen("tcp:127.0.0.1:0"));
    const std::string uri = destination.uri();
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(); });
    settings.postcopy_preempt = false;
    migration::source source(from.state, from.control, settings);
    const result<void> started = source.start(uri);
    if (started) static_cast<void>(source.start_postcopy());
    const result<void> left = source.wait();
    if (!left) destination.cancel(), destination.give_up();
    receiving.join();
    CHECK(message_of(left) == "");
    CHECK(message_of(arrived) == "");
    CHECK(to.starts == 1);
    to.stop();
    CHECK(to.count_wrong() == 0);
}

TEST_CASE("what is thrown in a recovery, and a pause at its first moment, leave a postcopy paused: the next one brings every page") {
    if (!can_postcopy()) return;
    history all(2048);
    checked_machine from(all, false);
    checked_machine to(all, false);
    from.fill();
    from.start();
    migration::parameters settings{.downtime_limit = 0ms, .max_bandwidth = 1 << 20, .postcopy_ram = true,
        .max_postcopy_bandwidth = 2 << 20, .peer_timeout = 20s};
    std::deque<switchboard> boards(3);
    std::atomic<bool> pauses = false;
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived = error(errc::io);
    std::thread receiving([&] { arrived = destination.run(boards[0].acceptor()); });
    migration::source source(from.state, from.control, settings);
    result<void> paused_early = error(errc::io);
    source.observe([&](const migration::status& at) {
        if (at.state == migration::state::postcopy_recover && pauses.exchange(false)) paused_early = source.pause();
    });
    bool fine = static_cast<bool>(source.start(boards[0].connector()));
    fine = fine && source.start_postcopy();
    const auto both = [&](migration::state wanted) {
        return wait_for([&] {
            return (source.status().state == wanted && destination.status().state == wanted) || is_final(source.status().state) ||
                   is_final(destination.status().state);
        }) && source.status().state == wanted && destination.status().state == wanted;
    };
    const auto paused_for = [&](const auto& side, std::string_view why) {
        return wait_for([&] {
            const migration::status at = side.status();
            return is_final(at.state) || (at.state == migration::state::postcopy_paused && at.error_desc.message().find(why) != std::string::npos);
        }) && is_paused(side);
    };
    fine = fine && both(migration::state::postcopy_active);
    destination.pause();
    fine = fine && both(migration::state::postcopy_paused);
    // A connector and an acceptor that throw.
    const bool recovers_there = static_cast<bool>(destination.recover(
        [](const opening_options&) -> result<std::unique_ptr<input_channel>> { throw std::runtime_error("out of luck there"); }));
    const bool recovers_here = static_cast<bool>(source.recover(
        [](const opening_options&) -> result<std::unique_ptr<output_channel>> { throw std::runtime_error("out of luck here"); }));
    const bool thrown_there = paused_for(destination, "out of luck there");
    const bool thrown_here = paused_for(source, "out of luck here");
    // The migration thread hasn't seen yet that there is a recovery.
    pauses.store(true);
    const bool recovers_again = static_cast<bool>(source.recover(boards[1].connector()));
    const bool interrupted = wait_for([&] {
        const migration::status at = source.status();
        return is_final(at.state) || at.error_desc.message() == "postcopy-recover: input/output error: paused" || boards[1].written(0) != 0;
    }) && is_paused(source);
    const std::string why = source.status().error_desc.message();
    settings.max_postcopy_bandwidth = 0;
    source.set_parameters(settings);
    fine = fine && destination.recover(boards[2].acceptor()) && source.recover(boards[2].connector());
    if (!fine) static_cast<void>(source.give_up()), destination.cancel(), destination.give_up();
    const result<void> left = source.wait();
    if (!left) destination.cancel(), destination.give_up();
    receiving.join();
    CHECK(recovers_there);
    CHECK(recovers_here);
    CHECK(thrown_there);
    CHECK(thrown_here);
    CHECK(recovers_again);
    CHECK(message_of(paused_early) == "");
    CHECK(interrupted);
    CHECK(why == "postcopy-recover: input/output error: paused");
    CHECK(fine);
    CHECK(message_of(left) == "");
    CHECK(message_of(arrived) == "");
    CHECK(to.starts == 1);
    to.stop();
    CHECK(from.starts == 0);
    CHECK(to.count_wrong() == 0);
}
