// SPDX-License-Identifier: BSL-1.0
// multifd between two machines of ours in one process: what arrives is what was there when the guest stopped, however many
// channels there are and whichever way their pages are compressed; and whichever channel breaks, wherever, the source's
// guest runs on, and no thread is left behind.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/ram/multifd_zlib.hpp>
#include <vmstate/ram/multifd_zstd.hpp>
#include <vmstate/ram/present_pages.hpp>

#include "live/footprint.hpp"
#include "live/small_machine.hpp"
#include "live/switchboard.hpp"
#include "support/outcome.hpp"

using namespace vmstate;
using namespace vmstate::tests;
using namespace std::chrono_literals;

namespace {

bool has(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

struct outcome {
    result<void> left = error(errc::io);
    result<void> arrived = error(errc::io);
    migration::status source;
    migration::status destination;
};
outcome migrate(small_machine& from, small_machine& to, switchboard& channels, const migration::parameters& here,
    const migration::parameters& there, bool give_up = false) {
    outcome seen;
    migration::destination destination(to.state, to.control, there);
    std::thread receiving([&] { seen.arrived = destination.run(channels.acceptor()); });
    migration::source source(from.state, from.control, here);
    const result<void> started = source.start(channels.connector());
    seen.left = started ? source.wait() : started;
    if (!started || (give_up && !seen.left)) {
        while (destination.status().state == migration::state::none) std::this_thread::yield(); // nothing to cancel yet
        destination.cancel();
    }
    receiving.join();
    seen.source = source.status();
    seen.destination = destination.status();
    return seen;
}

/// In a list of channels, behind the main one and two others: the main one's other direction.
constexpr std::size_t number_of_way_back = 3;

multifd_compression compression_by(const std::string& name) {
    return name == "zlib" ? multifd_zlib() : name == "zstd" ? multifd_zstd() : multifd_compression{};
}

} // namespace

TEST_CASE("a running guest arrives over several channels as it was when it stopped") {
    const unsigned channels = GENERATE(1u, 2u, 4u);
    const std::string compression = GENERATE("none", "zlib", "zstd");
    const bool each_section = GENERATE(false, true);
    CAPTURE(channels, compression, each_section);
    small_machine from(2048);
    small_machine to(2048);
    fill(from);
    from.start();
    switchboard lines;
    if (each_section) lines.reverse_after(channels + 1);
    const migration::parameters there{.multifd = true, .multifd_channels = channels, .multifd_compression = compression_by(compression)};
    migration::parameters here = there;
    here.downtime_limit = 100ms;
    here.multifd_flush_after_each_section = each_section;
    const outcome seen = migrate(from, to, lines, here, there);
    to.stop();
    REQUIRE(message_of(seen.left) == "");
    REQUIRE(message_of(seen.arrived) == "");
    CHECK_FALSE(from.runs());
    CHECK(to.starts == 1);

    CHECK(seen.source.ram.multifd_bytes > 0);
    CHECK(seen.source.ram.multifd_bytes == seen.destination.ram.multifd_bytes);
    CHECK(seen.source.ram.transferred == seen.destination.ram.transferred);
    CHECK(seen.source.ram.transferred == seen.source.ram.precopy_bytes + seen.source.ram.downtime_bytes);
    if (compression == "none") CHECK(seen.source.ram.multifd_bytes > seen.source.ram.normal_bytes);
    else CHECK(seen.source.ram.multifd_bytes < seen.source.ram.normal_bytes);
    // All of the pages went over them: the main channel has records of zero pages at most.
    CHECK(seen.source.ram.transferred - seen.source.ram.multifd_bytes < 64 * page + 16 * seen.source.ram.duplicate);
    std::size_t multifd = 0;
    for (unsigned number = 1; number <= channels; ++number) {
        CHECK(lines.written(number) > 64);
        multifd += lines.written(number) - 64;
    }
    CHECK(multifd == seen.source.ram.multifd_bytes);

    const std::size_t written = from.memory().size() / 8;
    CHECK(std::memcmp(from.memory().data() + written, to.memory().data() + written, from.memory().size() - written) == 0);
    for (std::size_t at = 0; at != written; at += page) {
        std::uint64_t before = 0, after = 0, end = 0;
        std::memcpy(&before, from.memory().data() + at, 8);
        std::memcpy(&after, to.memory().data() + at, 8);
        std::memcpy(&end, to.memory().data() + at + page - 8, 8);
        if (after < before || after != end) FAIL("page " << at / page << " is stale or torn: " << before << ", " << after << ", " << end);
    }
}

namespace {

/// As a vCPU does, of which a sanitizer sees nothing either.
[[gnu::no_sanitize_thread, gnu::noinline]] void write_word(std::byte* at, std::uint64_t value) {
    *reinterpret_cast<volatile std::uint64_t*>(at) = value;
}

} // namespace

TEST_CASE("a page that is zero only later, and one that is zero no longer, arrive as they are") {
    const bool each_section = GENERATE(false, true);
    // Each page changes between zero and not in every pass, so that it goes over the main and over another channel in turn.
    std::vector<std::byte> memory(64 * page), copy(64 * page, std::byte{0x55});
    marked_log log(memory.size());
    std::atomic<bool> runs = true;
    machine from{{.name = "small"}}, to{{.name = "small"}};
    from.add_ram("ram", std::span<std::byte>(memory));
    to.add_ram("ram", std::span<std::byte>(copy));
    std::thread vcpu([&] {
        for (unsigned round = 0; runs.load(); ++round) {
            for (std::size_t i = 0; i != 64 && runs.load(); ++i) {
                write_word(memory.data() + i * page, (round + i) % 2 * 0x1234567);
                log.mark(i * page, page);
            }
            std::this_thread::sleep_for(100us);
        }
    });
    migration::guest source_guest, destination_guest;
    source_guest.stop = [&]() -> result<void> {
        runs = false;
        vcpu.join();
        return {};
    };
    source_guest.dirty_logs.emplace("ram", log);
    switchboard lines;
    const migration::parameters settings{
        .downtime_limit = 0ms, .multifd = true, .multifd_channels = 2, .multifd_flush_after_each_section = each_section};
    migration::destination destination(to, destination_guest, settings);
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(lines.acceptor()); });
    migration::source source(from, source_guest, settings);
    REQUIRE(source.start(lines.connector()));
    // With no downtime allowed it goes round and round.
    while (source.status().ram.dirty_sync_count < 20 && !is_final(source.status().state)) std::this_thread::sleep_for(1ms);
    migration::parameters enough = settings;
    enough.downtime_limit = 10'000ms;
    source.set_parameters(enough);
    CHECK(message_of(source.wait()) == "");
    receiving.join();
    CHECK(message_of(arrived) == "");
    if (vcpu.joinable()) {
        runs = false;
        vcpu.join();
    }
    CHECK(memory == copy);
}

TEST_CASE("whichever channel breaks, and wherever, the source's guest runs on and nothing is left") {
    const bool at_source = GENERATE(true, false);
    const std::string compression = GENERATE("none", "zstd");
    CAPTURE(at_source, compression);
    constexpr unsigned channels = 2;
    constexpr std::size_t pages = 192;
    small_machine from(pages);
    small_machine to(pages);
    fill(from);
    from.memory().back() = std::byte{1};
    const std::vector<std::byte> before = from.memory();
    const auto is_intact = [&](const small_machine& machine) {
        return std::memcmp(before.data() + before.size() / 8, machine.memory().data() + before.size() / 8, before.size() * 7 / 8) == 0;
    };
    migration::parameters settings{.downtime_limit = 1000ms, .multifd = true, .multifd_channels = channels,
        .multifd_compression = compression_by(compression), .peer_timeout = 30s};
    // How much each carries when nothing breaks. Of the pages a channel may get more one time and fewer another.
    std::vector<std::size_t> whole;
    for (int times = 0; times != 2; ++times) { // the first time there is more to say: of memory that is zero
        switchboard lines;
        from.start();
        REQUIRE(message_of(migrate(from, to, lines, settings, settings).left) == "");
        to.stop();
        whole.clear();
        for (std::size_t number = 0; number <= channels; ++number) whole.push_back(lines.written(number));
        for (std::size_t number = 1; number <= channels; ++number) whole[number] = 64 + (whole[1] + whole[2] - 128) / channels;
        if (number_of_way_back == whole.size()) whole.push_back(lines.read_back(0));
    }
    const leak_check leaks;
    const std::size_t places = 250; // with each compression, at either end
    std::size_t broken = 0;
    for (std::size_t place = 0; place != places; ++place) {
        // Main channel, way back, and the others: each at places from its first byte to its last.
        const std::size_t number = place % whole.size();
        const std::size_t bytes = whole[number] * (place / whole.size()) / (places / whole.size() + 1);
        CAPTURE(number, bytes, whole[number]);
        settings.multifd_flush_after_each_section = place % 3 == 0;
        switchboard lines;
        if (number == number_of_way_back) (at_source ? lines.at_source(0).read : lines.at_destination(0).written) = bytes;
        else (at_source ? lines.at_source(number).written : lines.at_destination(number).read) = bytes;
        from.start();
        const int there = to.starts;
        const outcome seen = migrate(from, to, lines, settings, settings, true); // or it waits for the channels that don't come
        to.stop();
        const bool ran = from.runs();
        from.stop();
        INFO(message_of(seen.left));
        INFO(message_of(seen.arrived));
        // Where it left, it has arrived. Where it arrived, the source may not have heard of it.
        if (seen.left) REQUIRE(seen.arrived);
        REQUIRE(to.starts - there == (seen.arrived ? 1 : 0));
        REQUIRE(ran == seen.left.has_error());
        REQUIRE(is_intact(from));
        if (seen.arrived) REQUIRE(is_intact(to));
        if (seen.left) {
            // It had less to carry this time.
            REQUIRE(number != number_of_way_back);
            continue;
        }
        ++broken;
        REQUIRE(seen.source.state == migration::state::failed);
        const std::string path(seen.left.error().path());
        const std::string stage = path.substr(0, path.find('/'));
        REQUIRE((stage == "setup" || stage == "active" || stage == "device" || path == "return path"));
    }
    CHECK(broken > places * 2 / 3);
    leaks.check(places);
}

TEST_CASE("an error of a multifd channel names it") {
    const bool return_path = GENERATE(false, true);
    small_machine from(2048);
    small_machine to(2048);
    fill(from);
    switchboard lines;
    lines.at_source(2).written = 64 + 100 * 1024;
    const migration::parameters settings{.return_path = return_path, .multifd = true, .multifd_channels = 2};
    const outcome seen = migrate(from, to, lines, settings, settings);
    INFO(message_of(seen.left));
    // Active, or device on a machine that is busy enough; there the destination may have hung up on the other one before.
    const bool is_consequence = has(message_of(seen.left), "/multifd channel 0: ") && has(message_of(seen.left), "Broken pipe");
    CHECK((has(message_of(seen.left), "/multifd channel 1") || is_consequence));
    // The destination may say first that it can't load that.
    CHECK((has(message_of(seen.left), "broken") || is_consequence ||
           (return_path && has(message_of(seen.left), "could not load the stream"))));
    CHECK(seen.arrived.has_error());
}

TEST_CASE("channels that don't come, or come from a source that is configured otherwise, end the migration in time") {
    small_machine from(256);
    small_machine to(256);
    fill(from);
    const leak_check leaks;
    migration::parameters here{.multifd = true, .multifd_channels = 2, .peer_timeout = 300ms};
    migration::parameters there = here;
    switchboard lines;
    std::string expected_left, expected_arrived;
    SECTION("none at all") {
        here.multifd = false;
        expected_arrived = "setup/channel 2 of 3";
    }
    SECTION("the second is refused") {
        lines.limit(2);
        expected_left = "setup/multifd channel 1: input/output error: nobody there";
        expected_arrived = "setup/channel 3 of 3";
    }
    SECTION("more are expected") {
        there.multifd_channels = 3;
        expected_arrived = "setup/channel 4 of 4";
    }
    SECTION("another compression") {
        here.multifd_compression = multifd_zlib();
        expected_arrived = "ram: bad RAM record: expected pages compressed by none, found zlib";
    }
    SECTION("no compression where one is expected") {
        there.multifd_compression = multifd_zstd();
        expected_arrived = "ram: bad RAM record: expected pages compressed by zstd, found none";
    }
    const outcome seen = migrate(from, to, lines, here, there);
    INFO(message_of(seen.left));
    INFO(message_of(seen.arrived));
    CHECK(seen.left.has_error());
    CHECK(seen.arrived.has_error());
    CHECK(has(message_of(seen.left), expected_left));
    CHECK(has(message_of(seen.arrived), expected_arrived));
    CHECK(to.starts == 0);
    CHECK(from.stops == from.starts);
    from.stop();
    leaks.check(16);
}

TEST_CASE("a source with more channels than expected is refused before a page is lost") {
    small_machine from(256);
    small_machine to(256);
    fill(from);
    migration::destination destination(to.state, to.control, {.multifd = true, .multifd_channels = 1});
    REQUIRE(destination.listen("tcp:127.0.0.1:0"));
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, {.multifd = true, .multifd_channels = 2});
    REQUIRE(source.start(destination.uri()));
    CHECK(source.wait().has_error());
    receiving.join();
    INFO(message_of(arrived));
    // Whichever of the two came first.
    CHECK((has(message_of(arrived), "expected 1 multifd channels and the main one, found more") || has(message_of(arrived), "expected multifd channels 0 to 0, found 1")));
    CHECK(to.starts == 0);
}

TEST_CASE("a source with multifd is refused by a destination without, also where all pages fit into the sockets") {
    small_machine from(64);
    small_machine to(64);
    fill(from);
    migration::destination destination(to.state, to.control, {.peer_timeout = std::chrono::seconds(2)});
    REQUIRE(destination.listen("tcp:127.0.0.1:0"));
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, {.multifd = true, .multifd_channels = 2});
    REQUIRE(source.start(destination.uri()));
    CHECK(source.wait().has_error());
    receiving.join();
    INFO(message_of(arrived));
    CHECK(has(message_of(arrived), "a source without multifd, as here"));
    CHECK(to.starts == 0);
}

namespace {

/// What a source without a way back has written, the main channel first.
struct recording {
    struct sink {
        std::vector<std::byte>* into;
        result<std::size_t> write_some(std::span<const std::byte> from) {
            into->insert(into->end(), from.begin(), from.end());
            return from.size();
        }
    };
    std::deque<std::vector<std::byte>> channels;

    channel_connector connector() {
        return [this](const opening_options&) -> result<std::unique_ptr<output_channel>> {
            return make_output_channel(sink{&channels.emplace_back()});
        };
    }
    /// From the end of the main channel, where RAM's last section ends. As QEMU 9.1 and 9.2 leave it out.
    bool drop_last_flush() {
        std::array<std::byte, 16> record{};
        record[6] = std::byte{2}; // MULTIFD_FLUSH
        record[15] = std::byte{0x10}; // EOS
        const auto at = std::find_end(channels[0].begin(), channels[0].end(), record.begin(), record.end());
        if (at == channels[0].end()) return false;
        channels[0].erase(at, at + 8);
        return true;
    }
};

/// Gives a destination what was recorded. The main channel's last byte comes when the others have been read.
struct replay {
    struct source {
        std::span<const std::byte> rest;
        std::atomic<std::size_t>* unread; ///< of the other channels
        bool is_main;
        result<std::size_t> read_some(std::span<std::byte> into) {
            std::size_t count = std::min(into.size(), rest.size());
            if (is_main && rest.size() > 1) count = std::min(count, rest.size() - 1);
            else if (is_main && rest.size() == 1) {
                for (int i = 0; unread->load() != 0 && i != 5000; ++i) std::this_thread::sleep_for(1ms);
                std::this_thread::sleep_for(20ms); // and have been looked at
            }
            std::memcpy(into.data(), rest.data(), count);
            rest = rest.subspan(count);
            if (!is_main) unread->fetch_sub(count);
            return count;
        }
    };
    explicit replay(const recording& from) : what(from) {
        for (std::size_t i = 1; i < from.channels.size(); ++i) unread += from.channels[i].size();
    }
    channel_acceptor acceptor() {
        return [this](const opening_options&) -> result<std::unique_ptr<input_channel>> {
            const std::size_t number = next++;
            return make_input_channel(source{what.channels.at(number), &unread, number == 0});
        };
    }
    const recording& what;
    std::atomic<std::size_t> unread = 0;
    std::size_t next = 0;
};

} // namespace

TEST_CASE("a SYNC at the very end that the main channel doesn't name is no harm, and one behind pages is") {
    const bool has_pages = GENERATE(false, true);
    CAPTURE(has_pages);
    small_machine from(256);
    small_machine to(256);
    fill(from);
    // The guest writes when it is stopped, or not at all.
    from.control.stop = [&]() -> result<void> {
        if (has_pages) from.write_page(1);
        return {};
    };
    const migration::parameters settings{.multifd = true, .multifd_channels = 2};
    recording recorded;
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(recorded.connector()));
    REQUIRE(message_of(source.wait()) == "");
    REQUIRE(recorded.drop_last_flush());

    replay replayed(recorded);
    migration::destination destination(to.state, to.control, settings);
    const result<void> arrived = destination.run(replayed.acceptor());
    to.stop();
    if (has_pages) {
        CHECK(has(message_of(arrived), "expected a sync point in the main stream, found none"));
        CHECK(to.starts == 0);
    } else {
        CHECK(message_of(arrived) == "");
        CHECK(std::memcmp(from.memory().data() + from.memory().size() / 8, to.memory().data() + from.memory().size() / 8,
                  from.memory().size() * 7 / 8) == 0);
    }
}

TEST_CASE("what a channel still sends when the guest runs is taken, until the source closes it, and no page of it") {
    const bool has_page = GENERATE(false, true);
    CAPTURE(has_page);
    small_machine from(64);
    small_machine to(64);
    fill(from);
    const migration::parameters settings{.multifd = true, .multifd_channels = 2};
    recording recorded;
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(recorded.connector()));
    REQUIRE(message_of(source.wait()) == "");

    // As QEMU 7.2's threads may do it: an empty packet when all else has been sent. The page is nobody's.
    std::vector<std::byte> late(multifd_packet_header::wire_size(page));
    std::vector<std::uint64_t> offsets;
    multifd_packet_header header;
    if (has_page) {
        offsets.push_back(63 * page);
        header.block = from.state.ram()->blocks().front()->name;
        header.normal = offsets;
        header.next_packet_size = page;
    }
    header.encode(late, page);
    if (has_page) late.resize(late.size() + page, std::byte{0xee});

    switchboard channels;
    std::deque<std::unique_ptr<output_channel>> here;
    const auto write = [&](std::size_t number, std::span<const std::byte> bytes) { return here[number]->writev({&bytes, 1}); };
    for (std::size_t i = 0; i != recorded.channels.size(); ++i) here.push_back(channels.connector()({}).value());
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(channels.acceptor()); });
    for (const std::size_t i : {1u, 2u, 0u}) CHECK(message_of(write(i, recorded.channels[i])) == "");
    while (destination.status().state != migration::state::completed && destination.status().state != migration::state::failed)
        std::this_thread::sleep_for(1ms);
    CHECK(to.starts == 1);
    CHECK(message_of(write(1, late)) == "");
    if (!has_page) CHECK(message_of(write(2, late)) == "");
    here.clear();
    receiving.join();
    to.stop();
    CHECK(message_of(arrived) == "");
    CHECK(std::memcmp(from.memory().data() + 63 * page, to.memory().data() + 63 * page, page) == 0);
}

TEST_CASE("a page that a channel's packet calls zero doesn't come into being in a file") {
    constexpr std::size_t pages = 64;
    const ram_memory there = ram_memory::memfd("ram", pages * page).value();
    std::vector<std::byte> here(pages * page, std::byte{1}); // what it says of these pages is overruled
    machine from{{.name = "small"}}, to{{.name = "small"}};
    REQUIRE(from.add_ram("ram", std::span<std::byte>(here)));
    REQUIRE(to.add_ram("ram", there));
    migration::guest guest, nobody;
    marked_log log(here.size());
    guest.dirty_logs.emplace("ram", log);
    const migration::parameters settings{
        .downtime_limit = 0ms, .multifd = true, .multifd_channels = 1, .advise_huge_pages = false};
    recording recorded;
    migration::source source(from, guest, settings);
    REQUIRE(source.start(recorded.connector()));
    REQUIRE(message_of(source.wait()) == "");
    // In place of the pages: all but one of them are zero, and so is that one, which is there.
    std::memset(there.span().data() + 3 * page, 7, page);
    std::vector<std::uint64_t> offsets;
    for (std::size_t i = 0; i != pages; ++i) offsets.push_back(i * page);
    multifd_packet_header zeros;
    zeros.block = "ram";
    zeros.zero = offsets;
    const std::size_t header = multifd_packet_header::wire_size(page);
    std::vector<std::byte>& channel = recorded.channels[1];
    REQUIRE(channel.size() == 64 + 4 * header + here.size()); // a SYNC, the pages, two SYNCs
    zeros.encode(std::span(channel).subspan(64 + header, header), page);
    channel.erase(channel.begin() + static_cast<std::ptrdiff_t>(64 + 2 * header),
        channel.begin() + static_cast<std::ptrdiff_t>(64 + 2 * header + here.size()));
    replay replayed(recorded);
    migration::destination destination(to, nobody, settings);
    REQUIRE(message_of(destination.run(replayed.acceptor())) == "");
    page_bitmap present(pages);
    CHECK(find_present_pages(there.span(), page, present, there.file()).value() == 1);
    CHECK(present.test(3));
    CHECK(is_zero_page(there.span().subspan(3 * page, page)));
}

TEST_CASE("a bandwidth that is less than a packet of pages in each window is kept") {
    constexpr std::size_t pages = 200;
    small_machine from(pages);
    small_machine to(pages);
    for (std::size_t at = 0; at < from.memory().size(); at += page) from.memory()[at] = std::byte{1};
    switchboard lines;
    const migration::parameters there{.multifd = true, .multifd_channels = 2};
    migration::parameters here = there;
    here.downtime_limit = 1ms;
    here.max_bandwidth = 1'000'000;
    here.multifd_flush_after_each_section = true;
    const outcome seen = migrate(from, to, lines, here, there);
    to.stop();
    REQUIRE(message_of(seen.left) == "");
    REQUIRE(message_of(seen.arrived) == "");
    // However fast this machine is, what comes behind the first packet of 128 pages can't have left sooner.
    CHECK(seen.source.total_time >= 450ms);
}

TEST_CASE("what doesn't go together with multifd is refused at once") {
    small_machine one(16);
    channel_pair channels = make_pair();
    migration::source source(one.state, one.control, {.multifd = true});
    CHECK(source.start(std::unique_ptr<output_channel>(std::move(channels.one))).error() == errc::invalid_argument);
    CHECK(source.start("exec:cat >/dev/null").error() == errc::invalid_argument);
    source.set_parameters({.xbzrle = true, .multifd = true});
    CHECK(source.start("tcp:127.0.0.1:1").error() == errc::invalid_argument);
    source.set_parameters({.multifd = true, .multifd_channels = 0});
    CHECK(source.start("tcp:127.0.0.1:1").error() == errc::invalid_argument);
    migration::destination destination(one.state, one.control, {.multifd = true});
    CHECK(destination.run(std::unique_ptr<input_channel>(std::move(channels.other))).error() == errc::invalid_argument);
}

TEST_CASE("a migration over several channels is cancelled at either side at any moment") {
    const bool at_source = GENERATE(true, false);
    CAPTURE(at_source);
    small_machine from(2048);
    small_machine to(2048);
    fill(from);
    from.start();
    const leak_check leaks;
    migration::parameters settings{.max_bandwidth = 1 << 20, .multifd = true, .multifd_channels = 2, .peer_timeout = {}};
    for (int moment = 0; moment != 5; ++moment) {
        switchboard lines;
        migration::destination destination(to.state, to.control, settings);
        migration::source source(from.state, from.control, settings);
        result<void> arrived;
        std::thread receiving([&] { arrived = destination.run(lines.acceptor()); });
        if (moment != 0) REQUIRE(source.start(lines.connector()));
        while (moment > 1 && source.status().ram.transferred == 0) std::this_thread::sleep_for(1ms);
        if (moment > 2) std::this_thread::sleep_for(moment * 10ms);
        while (destination.status().state == migration::state::none) std::this_thread::yield();
        if (at_source) source.cancel();
        // Of a source that was cancelled at once the destination may wait for the first channel.
        if (!at_source || moment <= 1) destination.cancel();
        receiving.join();
        lines.hang_up();
        CHECK(arrived.has_error());
        if (moment != 0) CHECK(source.wait().has_error());
        CHECK(from.runs());
    }
    leaks.check(16);
}

TEST_CASE("multifd over sockets, by URI") {
    const std::string uri = GENERATE("tcp:127.0.0.1:0", "tcp:[::1]:0");
    small_machine from(512);
    small_machine to(512);
    fill(from);
    const migration::parameters settings{.multifd = true, .multifd_channels = 3};
    migration::destination destination(to.state, to.control, settings);
    if (result<void> listening = destination.listen(uri); !listening) {
        skip("can't listen at " + uri);
        return;
    }
    result<void> arrived;
    std::thread receiving([&] { arrived = destination.run(); });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start(destination.uri()));
    CHECK(message_of(source.wait()) == "");
    receiving.join();
    CHECK(message_of(arrived) == "");
    to.stop();
}

namespace {

/// Passes on what it is asked to, so many times, and then throws.
class throwing_channel final : public duplex_channel {
public:
    throwing_channel(std::unique_ptr<duplex_channel> inner, int writes, int reads)
        : inner_(std::move(inner)), writes_(writes), reads_(reads) {}

    result<void> writev(std::span<const std::span<const std::byte>> parts) override {
        if (writes_-- == 0) throw std::bad_alloc();
        return inner_->writev(parts);
    }
    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        if (reads_-- == 0) throw std::bad_alloc();
        return inner_->read_some(parts);
    }
    void shutdown() noexcept override { inner_->shutdown(); }
    void end_output() noexcept override { inner_->end_output(); }
    bool is_ended() noexcept override { return inner_->is_ended(); }
    bool set_timeout(std::chrono::milliseconds timeout) noexcept override { return inner_->set_timeout(timeout); }
    result<std::unique_ptr<duplex_channel>> get_return_path() override { return inner_->get_return_path(); }
    result<void> close() override { throw std::bad_alloc(); }

private:
    std::unique_ptr<duplex_channel> inner_;
    int writes_;
    int reads_;
};
/// The channel as one with both directions, which those of a switchboard are.
template <class Channel>
std::unique_ptr<Channel> throwing(std::unique_ptr<Channel> channel, int writes, int reads) {
    std::unique_ptr<duplex_channel> both(dynamic_cast<duplex_channel*>(channel.release()));
    return std::make_unique<throwing_channel>(std::move(both), writes, reads);
}

} // namespace

TEST_CASE("what a multifd channel throws in its thread ends the migration, not the process") {
    const bool at_source = GENERATE(true, false);
    CAPTURE(at_source);
    small_machine from(1024);
    small_machine to(1024);
    fill(from);
    from.start();
    switchboard lines;
    const migration::parameters settings{.multifd = true, .multifd_channels = 2, .peer_timeout = 30s};
    // The main channel is the first; that it throws when it is closed has no say in anything.
    int connected = 0, accepted = 0;
    const channel_connector connect = lines.connector();
    const channel_acceptor accept = lines.acceptor();
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived;
    std::thread receiving([&] {
        arrived = destination.run([&](const opening_options& how) -> result<std::unique_ptr<input_channel>> {
            result<std::unique_ptr<input_channel>> next = accept(how);
            if (!next) return next;
            return throwing(std::move(*next), -1, at_source || accepted++ == 0 ? -1 : 3);
        });
    });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start([&](const opening_options& how) -> result<std::unique_ptr<output_channel>> {
        result<std::unique_ptr<output_channel>> next = connect(how);
        if (!next) return next;
        return throwing(std::move(*next), !at_source || connected++ == 0 ? -1 : 2, -1);
    }));
    const result<void> left = source.wait();
    receiving.join();
    INFO(message_of(left));
    INFO(message_of(arrived));
    REQUIRE(left.has_error());
    REQUIRE(arrived.has_error());
    CHECK(has(message_of(at_source ? left : arrived), "multifd channel"));
    CHECK(has(message_of(at_source ? left : arrived), "bad_alloc"));
    CHECK(from.runs());
    CHECK(to.starts == 0);
}

TEST_CASE("channels that throw when they are closed don't call back a guest that has moved") {
    small_machine from(64);
    small_machine to(64);
    fill(from);
    from.start();
    switchboard lines;
    const migration::parameters settings{.multifd = true, .multifd_channels = 2};
    const channel_connector connect = lines.connector();
    const channel_acceptor accept = lines.acceptor();
    migration::destination destination(to.state, to.control, settings);
    result<void> arrived;
    std::thread receiving([&] {
        arrived = destination.run([&](const opening_options& how) -> result<std::unique_ptr<input_channel>> {
            result<std::unique_ptr<input_channel>> next = accept(how);
            if (!next) return next;
            return throwing(std::move(*next), -1, -1);
        });
    });
    migration::source source(from.state, from.control, settings);
    REQUIRE(source.start([&](const opening_options& how) -> result<std::unique_ptr<output_channel>> {
        result<std::unique_ptr<output_channel>> next = connect(how);
        if (!next) return next;
        return throwing(std::move(*next), -1, -1);
    }));
    CHECK(message_of(source.wait()) == "");
    receiving.join();
    CHECK(message_of(arrived) == "");
    CHECK_FALSE(from.runs());
    CHECK(to.starts == 1);
    to.stop();
}
