// SPDX-License-Identifier: BSL-1.0
// A destination in postcopy and a source whose stream is made by hand: one that behaves, one that answers what it is asked
// for, and many that do not. Whatever comes, it ends or pauses in bounded time and says what was wrong, a guest is started
// once or not at all, and nothing is left behind.
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/describe.hpp>
#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/postcopy/received_bitmap.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/connect.hpp>
#include <vmstate/stream/socket_channel.hpp>

#include "footprint.hpp"

#include <support/catch.hpp>
#include <support/outcome.hpp>

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;
using migration::state;

namespace {

using bytes = std::vector<std::byte>;
constexpr std::size_t page = 4096;
constexpr std::size_t page_count = 32;

/// What the source has at a page.
std::byte fill_of(std::size_t number) { return static_cast<std::byte>(number % 5 == 0 ? 0 : number + 1); }

// ---- the machine

struct looking_card;
result<void> look(looking_card& card);

/// A device that looks at guest memory when it is loaded.
struct looking_card {
    std::uint64_t offset = 0;
    std::byte found{};
    std::function<std::byte(std::uint64_t)> memory;
};
inline constexpr auto vmstate_looking_card = describe<looking_card>({.name = "looking-card"}, post_load<look>,
    field<&looking_card::offset>, transient<&looking_card::found, &looking_card::memory>);
result<void> look(looking_card& card) {
    if (card.offset != ~std::uint64_t{0}) card.found = card.memory(card.offset);
    return {};
}

enum class backing { anonymous, memfd, of_two_pages };

struct looking_machine {
    explicit looking_machine(backing how = backing::anonymous, const machine_options& of = {.name = "small", .suppress_vmdesc = true})
        : mapping(how == backing::memfd ? *ram_memory::memfd("guest", (page_count + 1) * page)
                                        : *ram_memory::anonymous((page_count + 1) * page))
        , state(of) {
        card.memory = [this](std::uint64_t offset) { return read(offset); };
        ram_options options;
        options.host_page_size = how == backing::of_two_pages ? 2 * page : page;
        options.file = mapping.file();
        // Of a size that the system hasn't: at its boundary.
        const std::size_t begin = reinterpret_cast<std::uintptr_t>(mapping.span().data()) % options.host_page_size;
        options.file.offset += begin;
        memory = mapping.span().subspan(begin, page_count * page);
        REQUIRE(state.add_ram("ram", memory, options));
        REQUIRE(state.add_device<vmstate_looking_card>(card));
        control.start = [this]() -> result<void> {
            ++starts;
            return {};
        };
    }
    std::byte read(std::uint64_t offset) const {
        return *const_cast<const volatile std::byte*>(memory.data() + offset);
    }
    /// The first page that isn't the source's.
    std::optional<std::size_t> first_difference() const {
        for (std::size_t number = 0; number != page_count; ++number)
            for (std::size_t i = 0; i != page; ++i)
                if (memory[number * page + i] != fill_of(number)) return number;
        return std::nullopt;
    }

    ram_memory mapping;
    std::span<std::byte> memory;
    machine state;
    looking_card card;
    migration::guest control;
    std::atomic<int> starts = 0;
};

bool can_postcopy() {
    looking_machine any;
    const result<void> supported = check_postcopy_support(*any.state.ram());
    if (!supported) skip(supported.error().message());
    return static_cast<bool>(supported);
}

// ---- the stream

bytes operator+(bytes left, const bytes& right) {
    left.insert(left.end(), right.begin(), right.end());
    return left;
}
template <class Integer>
bytes big(Integer value) {
    bytes made;
    for (int shift = static_cast<int>(8 * sizeof value) - 8; shift >= 0; shift -= 8)
        made.push_back(static_cast<std::byte>(value >> shift));
    return made;
}
bytes text(std::string_view name) {
    bytes made(1, static_cast<std::byte>(name.size()));
    for (const char c : name) made.push_back(static_cast<std::byte>(c));
    return made;
}
bytes command_of(command number, const bytes& payload = {}) {
    return big(std::uint8_t{8}) + big(static_cast<std::uint16_t>(number)) + big(static_cast<std::uint16_t>(payload.size())) + payload;
}
constexpr std::uint32_t ram_id = 5;
bytes footer(std::uint32_t id) { return big(std::uint8_t{0x7e}) + big(id); }
bytes eos() { return big(ram_flag::eos); }

bytes header() {
    bytes made = big(stream_magic) + big(stream_version) + big(std::uint8_t{7}) + big(std::uint32_t{5});
    for (const char c : std::string_view("small")) made.push_back(static_cast<std::byte>(c));
    return made;
}
bytes advise(std::uint64_t summary = page) {
    return command_of(command::postcopy_advise, big(summary) + big(std::uint64_t{page}));
}
bytes ram_start(std::optional<std::uint64_t> page_size = {}) {
    bytes list = big(std::uint64_t{page_count * page} | ram_flag::mem_size) + text("ram") + big(std::uint64_t{page_count * page});
    if (page_size) list = list + big(*page_size);
    return big(std::uint8_t{1}) + big(ram_id) + text("ram") + big(std::uint32_t{0}) + big(std::uint32_t{4}) + list + eos() + footer(ram_id);
}
bytes record_of(std::size_t number, std::string_view block = "ram", std::optional<std::byte> fill = {}) {
    const std::byte value = fill.value_or(fill_of(number));
    const bool zero = value == std::byte{0};
    const bytes word = big(std::uint64_t{number * page} | (zero ? ram_flag::zero : ram_flag::page) |
                           (block.empty() ? ram_flag::continued : std::uint64_t{0}));
    return word + (block.empty() ? bytes() : text(block)) + (zero ? bytes(1) : bytes(page, value));
}
bytes part(const bytes& records) { return big(std::uint8_t{2}) + big(ram_id) + records + eos() + footer(ram_id); }
bytes ram_end() { return big(std::uint8_t{3}) + big(ram_id) + eos() + footer(ram_id); }
bytes ending() { return ram_end() + big(std::uint8_t{0}); }
bytes discard(std::uint64_t first, std::uint64_t count, std::string_view block = "ram") {
    return command_of(command::postcopy_ram_discard,
        big(std::uint8_t{0}) + text(block) + big(std::uint8_t{0}) + big(first * page) + big(count * page));
}
bytes card(std::uint64_t looks_at = ~std::uint64_t{0}) {
    return big(std::uint8_t{4}) + big(std::uint32_t{9}) + text("looking-card") + big(std::uint32_t{0}) + big(std::uint32_t{0}) +
           big(looks_at) + footer(9);
}
bytes listen() { return command_of(command::postcopy_listen); }
bytes run() { return command_of(command::postcopy_run); }
bytes packaged(const bytes& content) {
    return command_of(command::packaged, big(static_cast<std::uint32_t>(content.size()))) + content;
}
bytes pages_from(std::size_t first, std::size_t end = page_count) {
    bytes records;
    for (std::size_t number = first; number != end; ++number)
        records = records + record_of(number, number == first ? "ram" : "");
    return part(records);
}
bytes opening() { return header() + command_of(command::open_return_path) + advise() + ram_start(); }
bytes switched(const bytes& content) { return opening() + pages_from(0) + discard(4, page_count - 4) + packaged(content); }
/// The first four pages are there, the guest runs.
bytes running() { return switched(listen() + card() + run()); }

// ---- both ends

migration::parameters with_postcopy() {
    migration::parameters settings;
    settings.postcopy_ram = true;
    settings.peer_timeout = 10s;
    return settings;
}

/// The source's end of a connection.
class source_end {
public:
    explicit source_end(unique_fd fd) : channel_(std::move(fd)), in_(channel_) { channel_.set_timeout(20s); }
    /// False where nobody takes it any more.
    bool send(const bytes& all) {
        const std::span<const std::byte> whole(all);
        return static_cast<bool>(channel_.writev({&whole, 1}));
    }
    /// The next message; none at the end.
    std::optional<migration::received_message> next() {
        migration::received_message message;
        if (!read_return_message(in_, message)) return std::nullopt;
        return message;
    }
    reader& in() { return in_; }
    void close() { channel_.shutdown(); }

private:
    socket_channel channel_;
    buffered_reader in_;
};

/// A destination that runs in a thread of its own.
class running_destination {
public:
    explicit running_destination(looking_machine& into, const migration::parameters& settings = with_postcopy())
        : destination(std::make_unique<migration::destination>(into.state, into.control, settings)) {
        auto [ours, theirs] = pair();
        end = std::make_unique<source_end>(std::move(theirs));
        thread_ = std::thread([this, channel = std::move(ours)]() mutable {
            outcome = destination->run(std::unique_ptr<input_channel>(std::make_unique<socket_channel>(std::move(channel))));
        });
    }
    ~running_destination() {
        destination->cancel();
        destination->give_up();
        join();
    }
    void join() {
        if (thread_.joinable()) thread_.join();
    }
    state wait_for(std::initializer_list<state> wanted) {
        const auto deadline = std::chrono::steady_clock::now() + 30s;
        for (;;) {
            const state now = destination->status().state;
            if (is_final(now) || std::find(wanted.begin(), wanted.end(), now) != wanted.end()) return now;
            if (std::chrono::steady_clock::now() > deadline) return now;
            std::this_thread::sleep_for(100us);
        }
    }
    /// The next connection: what `recover` accepts, and the source's end of it.
    void recover() {
        auto [ours, theirs] = pair();
        end = std::make_unique<source_end>(std::move(theirs));
        auto channel = std::make_shared<std::unique_ptr<input_channel>>(std::make_unique<socket_channel>(std::move(ours)));
        REQUIRE(destination->recover([channel](const opening_options&) -> result<std::unique_ptr<input_channel>> {
            if (!*channel) return error(errc::io, "one channel", "more");
            return std::move(*channel);
        }));
    }

    std::unique_ptr<migration::destination> destination;
    std::unique_ptr<source_end> end;
    result<void> outcome = error(errc::io, {}, "not over");

private:
    static std::pair<unique_fd, unique_fd> pair() {
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        return {unique_fd(ends[0]), unique_fd(ends[1])};
    }
    std::thread thread_;
};

std::uint64_t start_of(const migration::received_message& request) {
    return vmstate::detail::load_big<std::uint64_t>(request.payload.data());
}

} // namespace

TEST_CASE("a device that looks at memory that hasn't come while it is loaded gets its page") {
    if (!can_postcopy()) return;
    const backing how = GENERATE(backing::anonymous, backing::memfd);
    looking_machine ours(how);
    running_destination there(ours);
    REQUIRE(there.end->send(switched(listen() + card(17 * page + 5) + run())));
    const auto request = there.end->next();
    REQUIRE(request);
    CHECK(request->type == migration::return_message::req_pages_id);
    CHECK(start_of(*request) == 17 * page);
    CHECK(there.destination->status().state == state::active);
    CHECK(there.destination->status().postcopy.state == postcopy_state::listen);
    CHECK(ours.starts == 0);
    REQUIRE(there.end->send(part(record_of(17))));
    CHECK(there.wait_for({state::postcopy_active}) == state::postcopy_active);
    CHECK(ours.card.found == fill_of(17));
    // A thread of the guest waits; a page that came twice is no harm.
    std::byte seen{};
    std::thread vcpu([&] { seen = ours.read(9 * page); });
    const auto second = there.end->next();
    REQUIRE(second);
    CHECK(second->type == migration::return_message::req_pages);
    CHECK(start_of(*second) == 9 * page);
    REQUIRE(there.end->send(part(record_of(9)) + pages_from(4) + ending()));
    vcpu.join();
    CHECK(seen == fill_of(9));
    there.join();
    CHECK(message_of(there.outcome) == "");
    const auto shut = there.end->next();
    REQUIRE(shut);
    CHECK(shut->type == migration::return_message::shut);
    CHECK(shut->value() == 0);
    CHECK(ours.starts == 1);
    CHECK_FALSE(ours.first_difference());
    const auto status = there.destination->status();
    CHECK(status.state == state::completed);
    CHECK(status.postcopy.state == postcopy_state::end);
    CHECK(status.postcopy.requests == 2);
    CHECK(status.postcopy.faults.faults == 2);
}

TEST_CASE("every wrong step before the guest runs is refused by name, and nothing is left") {
    if (!can_postcopy()) return;
    const bytes rest = pages_from(4) + ending();
    const bytes begin = header() + command_of(command::open_return_path);
    const bytes package = packaged(listen() + card() + run());
    struct {
        const char* what;
        bytes stream;
        std::string said;
    } const cases[] = {
        {"no ADVISE", begin + ram_start() + package + rest, "listen"},
        {"DISCARD without ADVISE", begin + ram_start() + discard(0, 1), "discard"},
        {"ADVISE twice", begin + advise() + advise(), "second"},
        {"ADVISE behind the list", begin + ram_start() + advise(), "list of RAM blocks"},
        {"ADVISE without memory", begin + command_of(command::postcopy_advise), "postcopy-ram"},
        {"another page size", begin + advise(2 << 20), "page sizes"},
        {"LISTEN outside", opening() + listen(), "package"},
        {"RUN outside", opening() + run(), "package"},
        {"RUN before LISTEN", opening() + packaged(card() + run()), "running"},
        {"LISTEN twice", opening() + packaged(listen() + listen() + run()), "listen"},
        {"RUN twice", opening() + packaged(listen() + card() + run() + run()), "behind POSTCOPY_RUN"},
        {"no RUN", opening() + packaged(listen() + card()), "POSTCOPY_RUN"},
        {"an empty package", opening() + packaged({}), "POSTCOPY_RUN"},
        {"a package in a package", opening() + packaged(packaged(listen() + card() + run())), "PACKAGED"},
        {"DISCARD in a package", opening() + packaged(discard(0, 1) + listen() + run()), "POSTCOPY_RAM_DISCARD"},
        {"ADVISE in a package", opening() + packaged(advise()), "POSTCOPY_ADVISE"},
        {"memory in a package", opening() + packaged(listen() + part(record_of(1)) + run()), "package"},
        {"memory's list in a package", opening() + packaged(listen() + big(std::uint8_t{4}) + big(std::uint32_t{77}) + text("ram") + big(std::uint32_t{0}) + big(std::uint32_t{4})), "no memory in a package"},
        {"an end in a package", opening() + packaged(listen() + card() + big(std::uint8_t{0})), "package"},
        {"an unknown device", opening() + packaged(listen() + big(std::uint8_t{4}) + big(std::uint32_t{3}) + text("nobody") + big(std::uint64_t{0}) + run()), "nobody"},
        {"a package that is huge", opening() + command_of(command::packaged, big(std::uint32_t{0xffffffff})), "package"},
        {"RESUME at the start", opening() + command_of(command::postcopy_resume), "POSTCOPY_RESUME"},
        {"RECV_BITMAP at the start", opening() + command_of(command::recv_bitmap, text("ram")), "RECV_BITMAP"},
        {"DISCARD of another block", opening() + discard(0, 1, "vga"), "vga"},
        {"DISCARD outside", opening() + discard(page_count, 1), "within"},
        {"DISCARD and an end", opening() + discard(0, 1) + ram_end() + card() + big(std::uint8_t{0}), "POSTCOPY_LISTEN"},
        {"no return path", header() + advise() + ram_start() + package + rest, "OPEN_RETURN_PATH"},
        {"memory that is at its end", opening() + ram_end() + package, "begun and not ended"},
    };
    const auto receive = [](const bytes& stream) {
        looking_machine ours;
        running_destination there(ours);
        static_cast<void>(there.end->send(stream));
        there.join();
        CHECK(ours.starts == 0);
        CHECK(there.destination->status().state == state::failed);
        REQUIRE(there.outcome.has_error());
        return there.outcome.error().message();
    };
    for (const auto& one : cases) static_cast<void>(receive(one.stream)); // the allocator has what it needs then
    const leak_check leaks;
    for (const auto& one : cases) {
        CAPTURE(one.what);
        CHECK_THAT(receive(one.stream), contains(one.said));
    }
    leaks.check(std::size(cases));
}

TEST_CASE("a connection that breaks before the guest runs leaves it to the source") {
    if (!can_postcopy()) return;
    const bytes stream = running();
    const leak_check leaks;
    std::size_t migrations = 0;
    std::vector<std::size_t> places;
    for (std::size_t at = 0; at < stream.size(); at += at + 400 < stream.size() ? 4000 : 7) places.push_back(at);
    for (const std::size_t at : places) {
        CAPTURE(at, stream.size());
        looking_machine ours;
        running_destination there(ours);
        static_cast<void>(there.end->send(bytes(stream.begin(), stream.begin() + static_cast<std::ptrdiff_t>(at))));
        there.end->close();
        there.join();
        ++migrations;
        CHECK(there.outcome.has_error());
        CHECK(ours.starts == 0);
    }
    leaks.check(migrations);
    // A device waits for its page just then.
    looking_machine ours;
    running_destination there(ours);
    REQUIRE(there.end->send(switched(listen() + card(17 * page) + run())));
    REQUIRE(there.end->next());
    there.end->close();
    there.join();
    CHECK(there.outcome.has_error());
    CHECK(ours.starts == 0);
    CHECK(there.destination->status().state == state::failed);
}

TEST_CASE("what is wrong once the guest runs is said by name, and is a pause") {
    if (!can_postcopy()) return;
    const bytes wrong_end = part(record_of(4)) + ending();
    struct {
        const char* what;
        bytes stream;
        std::string said;
    } const cases[] = {
        {"another block", part(record_of(4, "vga")), "vga"},
        {"outside", part(record_of(page_count)), "within"},
        {"far outside", part(record_of(~std::size_t{0} / page)), "within"},
        {"XBZRLE", part(big(std::uint64_t{4 * page} | ram_flag::xbzrle) + text("ram") + big(std::uint8_t{1}) + big(std::uint16_t{0})), "XBZRLE"},
        {"a list of blocks", part(big(std::uint64_t{page} | ram_flag::mem_size)), "MEM_SIZE"},
        {"another section", big(std::uint8_t{2}) + big(std::uint32_t{9}), "section 5"},
        {"a device", card(), "type 4"},
        {"no footer", big(std::uint8_t{2}) + big(ram_id) + eos() + big(std::uint8_t{0}) + big(std::uint32_t{0}), "footer"},
        {"an end too early", big(std::uint8_t{0}), "END"},
        {"pages that are missing at the end", wrong_end, "every page"},
        {"pages behind the end", ram_end() + part(record_of(4)), "END"},
        {"DISCARD", discard(0, 1), "discard"},
        {"ADVISE", advise(), "advise"},
        {"LISTEN", listen(), "listen"},
        {"RUN", run(), "running"},
        {"a package", packaged(listen() + run()), "PACKAGED"},
        {"RESUME", command_of(command::postcopy_resume), "recovery"},
        {"RECV_BITMAP", command_of(command::recv_bitmap, text("ram")), "recovery"},
        {"the connection", {}, "too early"},
    };
    const auto receive = [](const bytes& stream) {
        looking_machine ours;
        running_destination there(ours);
        std::byte seen{1};
        REQUIRE(there.end->send(running()));
        CHECK(there.wait_for({state::postcopy_active}) == state::postcopy_active);
        for (int i = 0; i != 30'000 && ours.starts == 0; ++i) std::this_thread::sleep_for(1ms);
        // Waits for a page, and for longer than there is a connection.
        std::thread vcpu([&] { seen = ours.read(21 * page); });
        const bool asked = there.end->next().has_value();
        static_cast<void>(there.end->send(stream));
        if (stream.empty()) there.end->close();
        const state now = there.wait_for({state::postcopy_paused, state::failed, state::completed});
        const std::string said = there.destination->status().error_desc.message();
        const auto postcopy = there.destination->status().postcopy;
        there.destination->cancel(); // does nothing
        const state then = there.destination->status().state;
        there.destination->give_up();
        vcpu.join();
        there.join();
        CHECK(asked);
        CHECK(now == state::postcopy_paused);
        CHECK(then == state::postcopy_paused);
        CHECK(postcopy.state == postcopy_state::paused);
        CHECK(postcopy.waiting == 1);
        CHECK(seen == std::byte{0});
        CHECK(there.outcome.has_error());
        CHECK(there.destination->status().state == state::failed);
        CHECK(ours.starts == 1);
        return said;
    };
    for (const auto& one : cases) static_cast<void>(receive(one.stream)); // the allocator has what it needs then
    const leak_check leaks;
    for (const auto& one : cases) {
        CAPTURE(one.what);
        CHECK_THAT(receive(one.stream), contains(one.said));
    }
    leaks.check(std::size(cases));
}

TEST_CASE("the pages of a larger host page come together or not at all") {
    if (!can_postcopy()) return;
    const bytes start = header() + command_of(command::open_return_path) + advise(2 * page) + ram_start(2 * page) +
                        discard(0, page_count) + packaged(listen() + card() + run());
    const auto receive = [&](const bytes& stream) {
        looking_machine ours(backing::of_two_pages);
        running_destination there(ours);
        REQUIRE(there.end->send(start));
        CHECK(there.wait_for({state::postcopy_active}) == state::postcopy_active);
        static_cast<void>(there.end->send(stream));
        const state now = there.wait_for({state::postcopy_paused, state::failed, state::completed});
        const std::string said = there.destination->status().error_desc.message();
        there.destination->give_up();
        there.join();
        if (now == state::completed) CHECK_FALSE(ours.first_difference());
        return std::string(to_string(now)) + ": " + said;
    };
    CHECK_THAT(receive(pages_from(0) + ending()), contains("completed"));
    CHECK_THAT(receive(part(record_of(2)) + part(record_of(2, ""))), contains("host page isn't complete"));
    CHECK_THAT(receive(part(record_of(2) + record_of(5))), contains("host page isn't complete"));
    CHECK_THAT(receive(part(record_of(3))), contains("first page of a host page"));
    CHECK_THAT(receive(pages_from(0, page_count - 1) + ending()), contains("the rest of the host page"));
}

TEST_CASE("a paused postcopy goes on with what is missing, however often it takes") {
    if (!can_postcopy()) return;
    looking_machine ours;
    running_destination there(ours);
    std::mutex states_mutex;
    std::vector<state> states;
    there.destination->observe([&](const migration::status& at) {
        const std::lock_guard lock(states_mutex);
        if (states.empty() || states.back() != at.state) states.push_back(at.state);
    });
    CHECK(there.destination->recover("unix:/nowhere").has_error());
    REQUIRE(there.end->send(running()));
    REQUIRE(there.wait_for({state::postcopy_active}) == state::postcopy_active);
    std::byte seen{};
    std::thread vcpu([&] { seen = ours.read(21 * page); });
    const bool asked = there.end->next().has_value();
    static_cast<void>(there.end->send(part(record_of(10) + record_of(12, ""))));
    // Of the last page half comes.
    bytes half = part(record_of(13));
    half.resize(half.size() / 2);
    static_cast<void>(there.end->send(half));
    const bool took = there.end->send(command_of(command::ping, big(std::uint32_t{1})));
    std::this_thread::sleep_for(5ms); // so that it is likely to wait for the rest
    there.destination->pause();
    CHECK(asked);
    CHECK(took);
    CHECK(there.wait_for({state::postcopy_paused}) == state::postcopy_paused);

    const auto paused_again = [&](std::uint64_t before) {
        const auto deadline = std::chrono::steady_clock::now() + 30s;
        while (there.destination->status().postcopy.interruptions == before && std::chrono::steady_clock::now() < deadline)
            std::this_thread::sleep_for(100us);
        return there.wait_for({state::postcopy_paused}) == state::postcopy_paused;
    };
    // Recoveries that fail: each with its reason, and then it can be tried again.
    const struct {
        bytes stream;
        std::string said;
    } bad[] = {{pages_from(4), "POSTCOPY_RESUME before pages"}, {opening(), "next section"},
        {command_of(command::recv_bitmap, text("vga")), "vga"}, {command_of(command::recv_bitmap, text("ram") + bytes(1)), "bytes"},
        {discard(0, 1), "discard"}, {{}, "too early"}};
    for (const auto& one : bad) {
        const std::uint64_t before = there.destination->status().postcopy.interruptions;
        there.recover();
        static_cast<void>(there.end->send(one.stream));
        if (one.stream.empty()) there.end->close();
        CHECK(paused_again(before));
        CHECK_THAT(there.destination->status().error_desc.message(), contains(one.said));
    }

    there.recover();
    static_cast<void>(there.end->send(command_of(command::open_return_path) + command_of(command::recv_bitmap, text("ram"))));
    const auto bitmap = there.end->next();
    const bool told = bitmap && bitmap->type == migration::return_message::recv_bitmap;
    CHECK(told);
    const auto received = decode_received_bitmap(there.end->in(), page_count);
    CHECK(message_of(received) == "");
    if (received)
        for (std::size_t number = 0; number != page_count; ++number) {
            CAPTURE(number);
            CHECK(received->test(number) == (number < 4 || number == 10 || number == 12));
        }
    static_cast<void>(there.end->send(command_of(command::postcopy_resume)));
    const auto ack = there.end->next();
    CHECK((ack && ack->type == migration::return_message::resume_ack && ack->value() == 1));
    const auto again = there.end->next();
    CHECK((again && again->type == migration::return_message::req_pages_id && start_of(*again) == 21 * page));
    CHECK(there.wait_for({state::postcopy_active}) == state::postcopy_active);
    static_cast<void>(there.end->send(pages_from(4) + ending()));
    vcpu.join();
    there.join();
    CHECK(seen == fill_of(21));
    CHECK(message_of(there.outcome) == "");
    CHECK_FALSE(ours.first_difference());
    CHECK(ours.starts == 1);
    CHECK(there.destination->status().postcopy.interruptions == 1 + std::size(bad));
    const std::lock_guard lock(states_mutex);
    CHECK(std::vector(states.end() - 4, states.end()) ==
          std::vector{state::postcopy_paused, state::postcopy_recover, state::postcopy_active, state::completed});
}

namespace {

bytes ping(std::uint32_t value) { return command_of(command::ping, big(value)); }
constexpr std::uint32_t loaded = 3;
/// Of a source of ours: RUN comes behind the package.
bytes announced() { return opening() + ping(migration::ping_setup); }
bytes loaded_without_run(const bytes& content = listen() + card() + ping(loaded)) {
    return announced() + pages_from(0) + discard(4, page_count - 4) + packaged(content);
}
/// Whether it says that it waits for RUN, and then gives a source of ours its PING back.
bool says_that_it_waits(source_end& end) {
    const auto own = end.next();
    const auto given_back = end.next();
    return own && own->type == migration::return_message::pong && own->value() == migration::pong_waits_for_run && given_back &&
           given_back->type == migration::return_message::pong && given_back->value() == migration::ping_setup;
}
bool says_that_it_has_loaded(source_end& end) {
    const auto pong = end.next();
    return pong && pong->type == migration::return_message::pong && pong->value() == loaded;
}

} // namespace

TEST_CASE("RUN that comes behind the package is waited for, through as many connections as it takes, and runs the guest once") {
    if (!can_postcopy()) return;
    looking_machine ours;
    running_destination there(ours);
    REQUIRE(there.end->send(loaded_without_run()));
    CHECK(says_that_it_waits(*there.end));
    CHECK(says_that_it_has_loaded(*there.end));
    CHECK(there.destination->status().state == state::postcopy_active);
    const auto step = [&] { return there.destination->status().postcopy.state; };
    CHECK(step() == postcopy_state::listen);
    there.destination->cancel(); // too late: RUN may be on its way
    there.end->close();
    CHECK(there.wait_for({state::postcopy_paused}) == state::postcopy_paused);
    CHECK(step() == postcopy_state::paused);
    CHECK(ours.starts == 0);
    const auto resume = [&](const bytes& behind) {
        there.recover();
        static_cast<void>(there.end->send(command_of(command::open_return_path) + command_of(command::postcopy_resume) + behind));
        const auto ack = there.end->next();
        CHECK((ack && ack->type == migration::return_message::resume_ack));
    };
    const auto pauses_again = [&] {
        const auto deadline = std::chrono::steady_clock::now() + 30s;
        while (there.destination->status().state != state::postcopy_paused && std::chrono::steady_clock::now() < deadline)
            std::this_thread::sleep_for(100us);
        return there.destination->status().error_desc.message();
    };
    // The recovery breaks before RUN.
    resume(ping(1));
    CHECK(there.end->next());
    CHECK(step() == postcopy_state::listen);
    there.end->close();
    CHECK_THAT(pauses_again(), contains("too early"));
    CHECK(ours.starts == 0);
    // It brings RUN; a second one is one too many.
    resume(run() + ping(1));
    CHECK(there.end->next());
    CHECK(step() == postcopy_state::running);
    static_cast<void>(there.end->send(run()));
    CHECK_THAT(pauses_again(), contains("no step to running"));
    CHECK(ours.starts == 1);
    // The source can't know that it had come.
    resume(run() + pages_from(4) + ending());
    there.join();
    CHECK(message_of(there.outcome) == "");
    CHECK(ours.starts == 1);
    CHECK_FALSE(ours.first_difference());
    CHECK(there.destination->status().postcopy.interruptions == 3);
}

TEST_CASE("RUN behind the package that comes wrong or not at all runs no guest") {
    if (!can_postcopy()) return;
    const bytes rest = pages_from(4) + ending();
    struct {
        const char* what;
        bytes stream;
        state end; ///< where nobody gives up
        std::string said;
    } const cases[] = {
        {"nobody was told", switched(listen() + card() + ping(loaded)), state::failed, "POSTCOPY_RUN at the package's end"},
        {"no PING", loaded_without_run(listen() + card()), state::failed, "POSTCOPY_RUN at the package's end"},
        {"the PING isn't the last", loaded_without_run(listen() + ping(loaded) + card()), state::failed, "POSTCOPY_RUN at the package's end"},
        {"no LISTEN", loaded_without_run(card() + ping(loaded)), state::failed, "no step to running"},
        {"while a device waits for its page", loaded_without_run(listen() + card(17 * page) + ping(loaded)) + run(), state::failed,
            "it when the devices are loaded"},
        {"all but RUN", loaded_without_run() + rest, state::postcopy_paused, "POSTCOPY_RUN before the end"},
        {"the connection breaks", loaded_without_run(), state::postcopy_paused, "too early"},
    };
    const auto receive = [](const bytes& stream, state end, bool breaks) {
        looking_machine ours;
        running_destination there(ours);
        static_cast<void>(there.end->send(stream));
        if (breaks) {
            CHECK(says_that_it_waits(*there.end));
            CHECK(says_that_it_has_loaded(*there.end));
            there.end->close();
        }
        CHECK(there.wait_for({state::postcopy_paused}) == end);
        std::string said = there.destination->status().error_desc.message();
        there.destination->give_up();
        there.join();
        CHECK(ours.starts == 0);
        CHECK(there.destination->status().state == state::failed);
        CHECK(there.outcome.has_error());
        return said;
    };
    for (const auto& one : cases) {
        CAPTURE(one.what);
        CHECK_THAT(receive(one.stream, one.end, &one == std::end(cases) - 1), contains(one.said));
    }
    // A source of ours that has it in the package, as older ones do, and sends it once more.
    looking_machine ours;
    running_destination there(ours);
    static_cast<void>(there.end->send(loaded_without_run(listen() + card() + ping(loaded) + run())));
    // Before, it would be one that comes while the devices are loaded.
    for (int i = 0; i != 30'000 && ours.starts == 0; ++i) std::this_thread::sleep_for(1ms);
    static_cast<void>(there.end->send(run()));
    CHECK(there.wait_for({state::postcopy_paused}) == state::postcopy_paused);
    CHECK_THAT(there.destination->status().error_desc.message(), contains("POSTCOPY_RUN"));
    there.destination->give_up();
    there.join();
    CHECK(ours.starts == 1);
}

TEST_CASE("after a break the rest of a larger host page may come before its beginning, over either channel") {
    if (!can_postcopy()) return;
    const bool preempt = GENERATE(false, true);
    CAPTURE(preempt);
    looking_machine ours(backing::of_two_pages);
    migration::parameters settings = with_postcopy();
    settings.postcopy_preempt = preempt;
    migration::destination destination(ours.state, ours.control, settings);
    REQUIRE(message_of(destination.listen("tcp:127.0.0.1:0")) == "");
    result<void> outcome = error(errc::io);
    std::thread receiving([&] { outcome = destination.run(); });
    const auto wait_for = [&](auto done) {
        for (int i = 0; i != 30'000 && !done() && !is_final(destination.status().state); ++i) std::this_thread::sleep_for(1ms);
        return done();
    };
    const auto is = [&](state wanted) { return [&destination, wanted] { return destination.status().state == wanted; }; };
    struct channels {
        std::unique_ptr<duplex_channel> main, urgent;
    };
    const auto connect_all = [&] {
        channels made;
        if (auto main = vmstate::connect(destination.uri())) made.main = std::move(*main);
        if (!preempt) return made;
        if (auto urgent = vmstate::connect(destination.uri())) made.urgent = std::move(*urgent);
        return made;
    };
    const auto send = [](const std::unique_ptr<duplex_channel>& to, const bytes& all) {
        const std::span<const std::byte> whole(all);
        return to != nullptr && to->writev({&whole, 1});
    };
    {
        const channels first = connect_all();
        CHECK(send(first.main, header() + command_of(command::open_return_path) + advise(2 * page) + ram_start(2 * page) +
                                   discard(0, page_count) + packaged(listen() + card() + run())));
        CHECK(wait_for(is(state::postcopy_active)));
        // Of the host page that was asked for half has come.
        CHECK(send(preempt ? first.urgent : first.main, preempt ? record_of(2) : part(record_of(2))));
        if (first.main) first.main->shutdown();
    }
    CHECK(wait_for(is(state::postcopy_paused)));
    CHECK(message_of(destination.recover("tcp:127.0.0.1:0")) == "");
    CHECK(wait_for([&] { return !destination.uri().empty(); }));
    const channels second = connect_all();
    CHECK(send(second.main, command_of(command::open_return_path) + command_of(command::recv_bitmap, text("ram")) +
                                command_of(command::postcopy_resume)));
    CHECK(wait_for(is(state::postcopy_active)));
    // The other half, another page that somebody waits for, the first half.
    const bytes urgent = record_of(3) + record_of(8, "") + record_of(9, "") + record_of(2, "");
    if (preempt) CHECK(send(second.urgent, urgent));
    CHECK(send(second.main, (preempt ? bytes() : part(urgent)) + pages_from(0, 2) + pages_from(4, 8) + pages_from(10) + ending()));
    CHECK(wait_for(is(state::completed)));
    INFO(destination.status().error_desc.message());
    destination.cancel();
    destination.give_up();
    receiving.join();
    REQUIRE(message_of(outcome) == "");
    CHECK(destination.status().postcopy.interruptions == 1);
    CHECK_FALSE(ours.first_difference());
}

TEST_CASE("a page that came into being before the guest runs leaves the guest to the source") {
    if (!can_postcopy()) return;
    const backing how = GENERATE(backing::anonymous, backing::memfd);
    looking_machine ours(how);
    running_destination there(ours);
    REQUIRE(there.end->send(opening() + pages_from(0) + discard(4, page_count - 4) + command_of(command::ping, big(std::uint32_t{7}))));
    const auto pong = there.end->next();
    REQUIRE(pong);
    REQUIRE(pong->type == migration::return_message::pong);
    CHECK(ours.read(10 * page) == std::byte{0}); // a monitor's thread
    static_cast<void>(there.end->send(packaged(listen() + card() + run())));
    const auto shut = there.end->next();
    there.join();
    CHECK((shut && shut->type == migration::return_message::shut && shut->value() == 1));
    CHECK_THAT(message_of(there.outcome),
        contains("ram") && contains("expected memory that is missing until its pages come, found a page at 40960"));
    CHECK(ours.starts == 0);
}

TEST_CASE("memory that can't be discarded is refused as soon as the source has named it") {
    if (!can_postcopy()) return;
    looking_machine ours(backing::memfd);
    const ram_memory another = *ram_memory::memfd("another", (page_count + 1) * page);
    ours.state.remove_ram("ram");
    REQUIRE(ours.state.add_ram("ram", ours.memory, {.file = another.file()}));
    running_destination there(ours);
    static_cast<void>(there.end->send(opening()));
    there.join();
    CHECK_THAT(message_of(there.outcome), contains("unsupported: expected ram_options.file that is the one mapped"));
    CHECK(ours.starts == 0);
}

TEST_CASE("a destination that is destroyed while it is paused ends what it has") {
    if (!can_postcopy()) return;
    const leak_check leaks;
    for (const bool waits_for_the_source : {false, true}) {
        looking_machine ours;
        std::thread vcpu;
        {
            running_destination there(ours);
            REQUIRE(there.end->send(running()));
            REQUIRE(there.wait_for({state::postcopy_active}) == state::postcopy_active);
            vcpu = std::thread([&] { static_cast<void>(ours.read(21 * page)); });
            there.end->close();
            CHECK(there.wait_for({state::postcopy_paused}) == state::postcopy_paused);
            if (waits_for_the_source) CHECK(message_of(there.destination->recover("tcp:127.0.0.1:0")) == "");
            there.destination.reset(); // waits for its run to end
            there.destination = std::make_unique<migration::destination>(ours.state, ours.control);
            there.join();
            CHECK(there.outcome.has_error());
        }
        vcpu.join();
    }
    leaks.check(2);
}

TEST_CASE("a channel for the pages that somebody waits for comes whenever it comes, and what it brings is judged") {
    if (!can_postcopy()) return;
    bytes half = record_of(4);
    half.resize(100);
    struct {
        const char* what;
        bool early; ///< connected before the stream begins
        bool connects;
        bytes sent;
        bytes main; ///< behind it
        state end;
        std::string said;
        bool stays_open = false; ///< and what it brings comes behind the main channel's end
    } const cases[] = {
        {"older sources end it with EOS", true, true, record_of(21) + record_of(22, "") + eos(), pages_from(4) + ending(), state::completed, ""},
        {"it closes without EOS", false, true, record_of(21) + record_of(22, ""), pages_from(4) + ending(), state::completed, ""},
        {"newer sources leave it open", false, true, record_of(4) + record_of(5), pages_from(6) + ending(), state::completed, "", true},
        {"a page of which it has the only copy", false, true, record_of(4) + eos(), pages_from(5) + ending(), state::completed, ""},
        {"it never comes", false, false, {}, pages_from(4) + ending(), state::completed, ""},
        {"another block", true, true, record_of(4, "vga"), {}, state::postcopy_paused, "preempt channel: "},
        {"outside", false, true, record_of(page_count), {}, state::postcopy_paused, "within"},
        {"a list of blocks", false, true, big(std::uint64_t{page} | ram_flag::mem_size), {}, state::postcopy_paused, "MEM_SIZE"},
        {"no name at first", true, true, record_of(4, ""), {}, state::postcopy_paused, "name"},
        {"half a page", true, true, half, {}, state::postcopy_paused, "preempt channel"},
    };
    for (const auto& one : cases) {
        CAPTURE(one.what);
        looking_machine ours;
        migration::parameters settings = with_postcopy();
        settings.postcopy_preempt = true;
        if (one.stays_open) settings.peer_timeout = 0s; // or it would be over all the same, later
        migration::destination destination(ours.state, ours.control, settings);
        REQUIRE(message_of(destination.listen("tcp:127.0.0.1:0")) == "");
        result<void> outcome = error(errc::io);
        std::thread receiving([&] { outcome = destination.run(); });
        const auto connect_to = [&] {
            auto connected = vmstate::connect(destination.uri());
            return connected ? std::move(*connected) : nullptr;
        };
        const auto send = [](output_channel& to, const bytes& all) {
            const std::span<const std::byte> whole(all);
            return static_cast<bool>(to.writev({&whole, 1}));
        };
        const auto main = connect_to();
        std::unique_ptr<duplex_channel> preempt = one.early ? connect_to() : nullptr;
        bool sent = main != nullptr && send(*main, running());
        const auto wait_for = [&](std::initializer_list<state> wanted) {
            const auto deadline = std::chrono::steady_clock::now() + 30s;
            for (state now;; std::this_thread::sleep_for(100us))
                if (now = destination.status().state; is_final(now) || std::find(wanted.begin(), wanted.end(), now) != wanted.end() ||
                                                      std::chrono::steady_clock::now() > deadline)
                    return now;
        };
        const state ran = wait_for({state::postcopy_active});
        if (!one.early && one.connects) preempt = connect_to();
        if (one.stays_open) {
            sent = sent && preempt && send(*main, one.main);
            std::this_thread::sleep_for(50ms); // so that it is likely to wait for the other channel
        }
        if (preempt) {
            sent = sent && send(*preempt, one.sent);
            if (!one.stays_open) static_cast<void>(preempt->close());
        }
        if (!one.stays_open && !one.main.empty()) sent = sent && send(*main, one.main);
        const state end = wait_for({state::postcopy_paused});
        const std::string said = destination.status().error_desc.message();
        destination.cancel();
        destination.give_up();
        receiving.join();
        CHECK(sent);
        CHECK(ran == state::postcopy_active);
        CHECK(end == one.end);
        CHECK_THAT(said, contains(one.said));
        if (end == state::completed) CHECK_FALSE(ours.first_difference());
        CHECK(static_cast<bool>(outcome) == (one.end == state::completed));
    }
}

TEST_CASE("parameters that don't go together are refused before anything is awaited") {
    looking_machine ours;
    struct {
        migration::parameters settings;
        std::string said;
    } cases[3];
    cases[0].settings.postcopy_preempt = true;
    cases[0].said = "postcopy_ram";
    cases[1].settings.postcopy_ram = cases[1].settings.postcopy_preempt = true;
    cases[1].said = "another channel";
    cases[2].settings.postcopy_ram = cases[2].settings.multifd = true;
    cases[2].said = "multifd";
    for (const auto& one : cases) {
        migration::destination destination(ours.state, ours.control, one.settings);
        int ends[2];
        REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
        const unique_fd other(ends[1]);
        const result<void> outcome =
            destination.run(std::unique_ptr<input_channel>(std::make_unique<socket_channel>(unique_fd(ends[0]))));
        REQUIRE(outcome.has_error());
        CHECK_THAT(outcome.error().message(), contains(one.said));
    }
    looking_machine ignoring(backing::anonymous, {.name = "small", .capabilities = {"x-ignore-shared"}});
    migration::destination destination(ignoring.state, ignoring.control, with_postcopy());
    const result<void> outcome = destination.run("tcp:127.0.0.1:0");
    REQUIRE(outcome.has_error());
    CHECK_THAT(outcome.error().message(), contains("expected postcopy_ram or x-ignore-shared, found both"));
}

TEST_CASE("who starts the guest may wait for a page that only the next connection brings, or that never comes") {
    if (!can_postcopy()) return;
    const std::string then = GENERATE("recover", "give up", "destroy");
    CAPTURE(then);
    looking_machine ours;
    std::byte seen{1};
    ours.control.start = [&]() -> result<void> {
        ++ours.starts;
        seen = ours.read(21 * page);
        return {};
    };
    running_destination there(ours);
    REQUIRE(there.end->send(running()));
    const auto asked = there.end->next();
    there.end->close();
    CHECK((asked && start_of(*asked) == 21 * page));
    CHECK(there.wait_for({state::postcopy_paused}) == state::postcopy_paused);
    if (then == "recover") {
        there.recover();
        static_cast<void>(there.end->send(command_of(command::postcopy_resume)));
        const auto ack = there.end->next();
        CHECK((ack && ack->type == migration::return_message::resume_ack));
        const auto again = there.end->next();
        CHECK((again && start_of(*again) == 21 * page));
        static_cast<void>(there.end->send(pages_from(4) + ending()));
    } else if (then == "give up") {
        there.destination->give_up();
    } else {
        there.destination.reset();
        there.destination = std::make_unique<migration::destination>(ours.state, ours.control);
    }
    there.join();
    CHECK(ours.starts == 1);
    CHECK(seen == (then == "recover" ? fill_of(21) : std::byte{0}));
    CHECK(static_cast<bool>(there.outcome) == (then == "recover"));
    if (then == "recover") CHECK_FALSE(ours.first_difference());
}

TEST_CASE("what is thrown while the guest is started or its devices are loaded is told to the source, and ends it") {
    if (!can_postcopy()) return;
    const std::string where = GENERATE("start", "vcpu_threads", "post_load");
    CAPTURE(where);
    looking_machine ours;
    const auto fail = [] { throw std::runtime_error("out of luck"); };
    if (where == "start")
        ours.control.start = [&]() -> result<void> {
            fail();
            return {};
        };
    if (where == "vcpu_threads")
        ours.control.vcpu_threads = [&] {
            fail();
            return std::vector<std::uint32_t>();
        };
    if (where == "post_load")
        ours.card.memory = [&](std::uint64_t) {
            fail();
            return std::byte{};
        };
    running_destination there(ours);
    REQUIRE(there.end->send(switched(listen() + card(17 * page) + run())));
    if (where != "post_load") {
        // Which looks at a page first.
        CHECK(there.end->next());
        CHECK(there.end->send(part(record_of(17))));
    }
    const auto shut = there.end->next();
    CHECK((shut && shut->type == migration::return_message::shut && shut->value() == 1));
    there.join();
    CHECK_THAT(message_of(there.outcome), contains("out of luck"));
    CHECK(there.destination->status().state == state::failed);
    CHECK(ours.starts == 0);
}

TEST_CASE("an acceptor that throws while the channel for urgent pages is awaited ends the connection, not the process") {
    if (!can_postcopy()) return;
    const bool at_once = GENERATE(false, true);
    CAPTURE(at_once);
    looking_machine ours;
    migration::parameters settings = with_postcopy();
    settings.postcopy_preempt = true;
    migration::destination destination(ours.state, ours.control, settings);
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    source_end end{unique_fd(ends[1])};
    std::unique_ptr<input_channel> main = std::make_unique<socket_channel>(unique_fd(ends[0]));
    std::atomic<bool> runs = false;
    ours.control.start = [&]() -> result<void> {
        runs.store(true);
        runs.notify_all();
        return {};
    };
    result<void> outcome = error(errc::io);
    std::thread receiving([&] {
        outcome = destination.run([&](const opening_options&) -> result<std::unique_ptr<input_channel>> {
            if (main) return std::move(main);
            if (!at_once) runs.wait(false);
            throw std::runtime_error("out of luck");
        });
    });
    static_cast<void>(end.send(running()));
    const auto deadline = std::chrono::steady_clock::now() + 30s;
    state now = state::none;
    while (now = destination.status().state, !is_final(now) && now != state::postcopy_paused && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(100us);
    const std::string why = destination.status().error_desc.message();
    destination.give_up();
    receiving.join();
    // What breaks before POSTCOPY_LISTEN is no postcopy yet; the stream may be read as far as that by then.
    CHECK((now == state::postcopy_paused || (at_once && now == state::failed)));
    if (!at_once) CHECK_THAT(why, contains("preempt channel") && contains("out of luck"));
    CHECK(outcome.has_error());
}

TEST_CASE("a destination without a channel for urgent pages lets nobody in behind the main channel, in a recovery, too") {
    if (!can_postcopy()) return;
    looking_machine ours;
    migration::destination destination(ours.state, ours.control, with_postcopy());
    REQUIRE(message_of(destination.listen("tcp:127.0.0.1:0")) == "");
    std::string address = destination.uri();
    result<void> outcome = error(errc::io);
    std::thread receiving([&] { outcome = destination.run(); });
    const auto wait_for = [](auto done) {
        for (int i = 0; i != 30'000 && !done(); ++i) std::this_thread::sleep_for(1ms);
        return done();
    };
    const auto send = [](output_channel& to, const bytes& all) {
        const std::span<const std::byte> whole(all);
        return static_cast<bool>(to.writev({&whole, 1}));
    };
    bool sent = true, connected = true, hung_up = true, paused = true;
    for (int i = 0; i != 2; ++i) {
        auto main = connect(address);
        auto extra = connect(address);
        connected = connected && main;
        if (!connected) break;
        sent = sent && send(**main, i == 0 ? running() : command_of(command::open_return_path));
        // It may be too late even to connect.
        hung_up = hung_up && (!extra || wait_for([&] { return (*extra)->is_ended(); }));
        if (i == 1) break;
        paused = wait_for([&] { return destination.status().state == state::postcopy_active; });
        destination.pause();
        paused = paused && wait_for([&] { return destination.status().state == state::postcopy_paused; });
        if (!paused || !destination.recover("tcp:127.0.0.1:0")) break;
        address = destination.uri();
    }
    destination.cancel();
    destination.give_up();
    receiving.join();
    CHECK(connected);
    CHECK(sent);
    CHECK(hung_up);
    CHECK(paused);
    CHECK(outcome.has_error());
}
