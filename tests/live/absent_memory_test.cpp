// SPDX-License-Identifier: BSL-1.0
// Memory that the guest has never touched: it isn't read, it isn't sent where the destination knows that it is zero, and
// it doesn't come into being at either end; but what the guest writes there while it migrates is never lost.
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/ram/pagemap_scan_log.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/stream/socket_channel.hpp>

#include <support/catch.hpp>
#include <support/zero_frame.hpp>

using namespace vmstate;
using namespace vmstate::tests;

namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t pages = 4096;
constexpr std::size_t first_pages = 1024; // that are there from the beginning

std::size_t present_pages(const ram_memory& memory) {
    page_bitmap present(pages);
    return static_cast<std::size_t>(find_present_pages(memory.span(), page, present, memory.file()).value());
}
void write_page(const ram_memory& memory, std::size_t index, int value) {
    std::memset(memory.span().data() + index * page, value, page);
}
int first_byte(const ram_memory& memory, std::size_t index) {
    return std::to_integer<int>(memory.span()[index * page]);
}

/// A migration in this process, over a socket, at the moment when `during` is called the guest still runs.
struct outcome {
    result<void> left = error(errc::io);
    result<void> arrived = error(errc::io);
    migration::status status;
};
template <class During>
outcome migrate(machine& from, migration::guest& guest, machine& to, bool return_path, During during) {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    outcome all;
    migration::guest nobody;
    migration::destination destination(to, nobody, {.advise_huge_pages = false}); // page for page
    std::thread receiving([&] {
        all.arrived = destination.run(std::unique_ptr<input_channel>(std::make_unique<socket_channel>(unique_fd(ends[1]))));
    });
    guest.stop = [&]() -> result<void> {
        during();
        return {};
    };
    migration::source source(from, guest, {.return_path = return_path});
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::make_unique<socket_channel>(unique_fd(ends[0])))));
    all.left = source.wait();
    receiving.join();
    all.status = source.status();
    return all;
}

result<ram_memory> make(const std::string& kind) {
    return kind == "memfd" ? ram_memory::memfd("ram", pages * page) : ram_memory::anonymous(pages * page);
}

} // namespace

TEST_CASE("memory that nobody touched is neither read nor sent, and what is written there late arrives") {
    const std::string kind = GENERATE(Catch::Generators::as<std::string>(), "anonymous", "memfd");
    const std::string log = GENERATE(Catch::Generators::as<std::string>(), "marked", "pagemap");
    CAPTURE(kind, log);
    if (log == "pagemap")
        if (const result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    const ram_memory here = make(kind).value();
    const ram_memory there = make(kind).value();
    for (std::size_t i = 0; i != first_pages; ++i) write_page(here, i, 1 + static_cast<int>(i % 100));
    REQUIRE(present_pages(here) == first_pages);

    machine from{{.name = "small"}};
    machine to{{.name = "small"}};
    REQUIRE(from.add_ram("ram", here));
    REQUIRE(to.add_ram("ram", there));
    marked_log marks(here.span().size());
    migration::guest guest;
    if (log == "marked") guest.dirty_logs.emplace("ram", marks);
    else guest.dirty_logs.emplace("ram", pagemap_scan_log(here.span()));
    const outcome all = migrate(from, guest, to, true, [&] {
        // Two pages that weren't there when the memory was looked through, and one that was.
        for (const std::size_t late : {std::size_t{2000}, pages - 1, std::size_t{7}}) {
            write_page(here, late, 200);
            marks.mark(late * page, page);
        }
    });
    REQUIRE(all.left);
    REQUIRE(all.arrived);
    CHECK(all.status.ram.normal == first_pages + 3);
    // The kernel's log has marks where nothing is in the page tables that are there: two may be in part.
    const std::size_t marked = log == "pagemap" ? 2 * 511 : 0;
    CHECK(all.status.ram.skipped <= pages - first_pages);
    CHECK(all.status.ram.skipped >= pages - first_pages - marked);
    CHECK(all.status.ram.duplicate <= marked);
    CHECK(present_pages(here) <= first_pages + 2 + (kind == "memfd" ? marked : 0));
    CHECK(present_pages(there) <= first_pages + 2 + (kind == "memfd" ? marked : 0));
    CHECK(std::memcmp(here.span().data(), there.span().data(), here.span().size()) == 0);
}

TEST_CASE("a destination with something in its memory is told of every zero page") {
    const ram_memory here = ram_memory::anonymous(pages * page).value();
    const ram_memory there = ram_memory::anonymous(pages * page).value();
    write_page(here, 5, 1);
    write_page(there, 9, 2); // the source has nothing there
    machine from{{.name = "small"}};
    machine to{{.name = "small"}};
    REQUIRE(from.add_ram("ram", here));
    REQUIRE(to.add_ram("ram", there));
    const bool return_path = GENERATE(true, false);
    migration::guest guest;
    marked_log marks(here.span().size());
    guest.dirty_logs.emplace("ram", marks);
    const outcome all = migrate(from, guest, to, return_path, [] {});
    REQUIRE(all.left);
    REQUIRE(all.arrived);
    CHECK(all.status.ram.skipped == 0);
    CHECK(all.status.ram.duplicate == pages - 1);
    CHECK(present_pages(here) == 1);
    CHECK(first_byte(there, 5) == 1);
    CHECK(first_byte(there, 9) == 0);
}

TEST_CASE("without a return path nobody can tell, and every zero page is said") {
    const std::string kind = GENERATE(Catch::Generators::as<std::string>(), "anonymous", "memfd");
    CAPTURE(kind);
    const ram_memory here = make(kind).value();
    const ram_memory there = make(kind).value();
    write_page(here, 5, 1);
    write_page(there, 9, 2);
    REQUIRE(present_pages(there) == 1);
    machine from{{.name = "small"}};
    machine to{{.name = "small"}};
    REQUIRE(from.add_ram("ram", here));
    REQUIRE(to.add_ram("ram", there));
    migration::guest guest;
    marked_log marks(here.span().size());
    guest.dirty_logs.emplace("ram", marks);
    const outcome all = migrate(from, guest, to, false, [] {});
    REQUIRE(all.left);
    REQUIRE(all.arrived);
    CHECK(all.status.ram.duplicate == pages - 1);
    CHECK(present_pages(here) == 1);
    // To know that a zero page needn't be written it is read.
    CHECK(present_pages(there) == (kind == "memfd" || has_zero_frame() ? 2 : pages));
    CHECK(first_byte(there, 5) == 1);
    CHECK(first_byte(there, 9) == 0);
}

TEST_CASE("a guest isn't stopped before the destination has said that it is ready") {
    const ram_memory here = ram_memory::anonymous(pages * page).value();
    const ram_memory there = ram_memory::anonymous(pages * page).value();
    machine from{{.name = "small"}};
    machine to{{.name = "small"}};
    REQUIRE(from.add_ram("ram", here));
    REQUIRE(to.add_ram("ram", there));
    const bool acks = GENERATE(true, false);
    const bool patient = GENERATE(true, false);
    CAPTURE(acks, patient);
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    migration::guest guest;
    marked_log marks(here.span().size());
    guest.dirty_logs.emplace("ram", marks);
    migration::guest nobody;
    result<void> arrived = error(errc::io);
    migration::destination destination(to, nobody, {.switchover_ack = acks});
    std::thread receiving([&] {
        arrived = destination.run(std::unique_ptr<input_channel>(std::make_unique<socket_channel>(unique_fd(ends[1]))));
    });
    migration::source source(from, guest, {.switchover_ack = true, .peer_timeout = std::chrono::milliseconds(patient ? 60'000 : 300)});
    REQUIRE(source.start(std::unique_ptr<output_channel>(std::make_unique<socket_channel>(unique_fd(ends[0])))));
    if (!acks && patient) {
        // It goes on asking the logs: the guest runs, and what it writes is sent.
        while (source.status().ram.dirty_sync_count < 4) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        CHECK(source.status().state == migration::state::active);
        source.cancel();
    }
    const result<void> left = source.wait();
    receiving.join();
    INFO((left ? "" : left.error().message()) + "; " + (arrived ? "" : arrived.error().message()));
    CHECK(left.has_value() == acks);
    if (!acks && !patient) {
        CHECK(source.status().state == migration::state::failed);
        CHECK_THAT(left.error().message(), contains("active/return path: input/output error: no SWITCHOVER_ACK from the destination"));
    }
    CHECK(arrived.has_value() == acks);
}
