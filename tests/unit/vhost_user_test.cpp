// SPDX-License-Identifier: BSL-1.0
// The backend's half of vhost-user against a peer made by hand, over a socket pair: messages and tables that can't be meant,
// the phases of postcopy in and out of order, threads that wait for pages, and a peer that dies in each phase. Then the disk
// of examples/ in the same way, with a guest that can't be meant either.
#include <support/catch.hpp>
#include <support/huge_pages.hpp>
#include <support/outcome.hpp>

#include <vmstate/vhost_user/client.hpp>

#include <device.hpp> // of examples/vhost_user_disk

#include <fcntl.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <future>
#include <mutex>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate::vhost_user;
using namespace std::chrono_literals;
using vmstate::errc;
using vmstate::error;
using vmstate::result;
using vmstate::unique_fd;
using vmstate::tests::contains;
using vmstate::tests::message_of;

namespace {

constexpr std::size_t page_size = 4096;
constexpr auto patience = 10s; // of the peer: much longer than anything takes

unique_fd make_memory(std::size_t size) {
    unique_fd made(::memfd_create("guest", MFD_CLOEXEC));
    if (!made || ::ftruncate(made.get(), static_cast<off_t>(size)) != 0) throw std::runtime_error("memfd");
    return made;
}
unique_fd twin(const unique_fd& fd) { return unique_fd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0)); }

struct socket_pair {
    socket_pair() {
        int both[2];
        if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, both) != 0) throw std::runtime_error("socketpair");
        backend.reset(both[0]);
        vmm.reset(both[1]);
    }
    unique_fd backend, vmm;
};

/// The page's number in each of its words.
void fill_page(const unique_fd& memory, std::size_t page) {
    std::array<std::uint64_t, page_size / 8> words;
    words.fill(0x1000 + page);
    if (::pwrite(memory.get(), words.data(), page_size, static_cast<off_t>(page * page_size)) != page_size)
        throw std::runtime_error("pwrite");
}

/// The bytes of a message, to be damaged.
std::vector<std::byte> bytes_of(std::uint32_t number, std::uint32_t flags, std::uint32_t size, std::size_t payload) {
    std::vector<std::byte> bytes(header_size + payload);
    const std::array<std::uint32_t, 3> head{number, flags, size};
    std::memcpy(bytes.data(), head.data(), header_size);
    return bytes;
}

/// A VMM that does what a test tells it, and a client that runs in a thread of its own. It has `pages` pages of memory in one
/// file; guest-physical they begin at 1 MiB, and the VMM says that it has them at 2^40.
class bench {
public:
    static constexpr std::uint64_t guest = 1 << 20;
    static constexpr std::uint64_t user = std::uint64_t{1} << 40;

    explicit bench(std::size_t pages = 8, client_options options = {.features = 0xf0, .faults = vmstate::userfault_scope::user_only})
        : memory(make_memory(pages * page_size)), whole_{guest, pages * page_size, user, 0}, client_(std::move(options)) {
        runs_ = std::async(std::launch::async, [this] {
            return client_.run(sockets_.backend.get(), [this](message& m) -> result<handling> {
                others_.push_back(m.request);
                if (on_other) on_other();
                return m.request == request::set_owner ? handling::done : handling::not_mine;
            });
        });
        ask(make_message(request::set_protocol_features, protocol_feature::reply_ack | protocol_feature::pagefault));
    }
    ~bench() { sockets_.vmm.reset(); }

    void ask(const message& m) {
        if (result<void> sent = send_message(sockets_.vmm.get(), m, patience); !sent)
            throw std::runtime_error(sent.error().message());
    }
    message answer() {
        result<std::optional<message>> got = receive_message(sockets_.vmm.get(), patience);
        if (!got) throw std::runtime_error(got.error().message());
        if (!*got) throw std::runtime_error("the client closed the connection: " + message_of(end()));
        return std::move(**got);
    }
    message ask_and_wait(const message& m) {
        ask(m);
        return answer();
    }
    /// With `need_reply`: whether it went well.
    bool succeeds(message m) {
        m.flags |= message_flag::need_reply;
        return ask_and_wait(m).as<std::uint64_t>().value() == 0;
    }
    message table(std::span<const memory_region> regions) const {
        std::vector<unique_fd> files;
        for (std::size_t i = 0; i < regions.size(); ++i)
            files.push_back(twin(memory));
        return make_memory_table(regions, std::move(files));
    }
    message table() const { return table(std::span(&whole_, 1)); }
    memory_region region(std::size_t first, std::size_t count) const {
        return {guest + first * page_size, count * page_size, user + first * page_size, first * page_size};
    }

    /// ADVISE; its answer's descriptor.
    bool advise() {
        message got = ask_and_wait(make_request(request::postcopy_advise));
        if (got.descriptors.size() == 1) faults = std::move(got.descriptors.front());
        return static_cast<bool>(faults);
    }
    /// To where memory may be touched, with all of it in one region.
    bool reach_running() {
        if (!advise() || !succeeds(make_request(request::postcopy_listen))) return false;
        told = memory_regions_of(ask_and_wait(table())).value();
        acknowledge(request::set_mem_table);
        return true;
    }
    void acknowledge(request r) {
        ask(make_message(r, std::uint64_t{0}));
        // Nothing answers it. What is answered next has seen it.
        (void)ask_and_wait(make_request(request::get_features));
    }
    /// The page in which a thread of the client's waits, as the table that was told has it.
    std::optional<std::size_t> next_fault(std::chrono::milliseconds longest = patience) {
        pollfd ready{faults.get(), POLLIN, 0};
        uffd_msg event{};
        if (::poll(&ready, 1, static_cast<int>(longest.count())) <= 0
            || ::read(faults.get(), &event, sizeof event) != sizeof event || event.event != UFFD_EVENT_PAGEFAULT)
            return std::nullopt;
        const result<memory_table> known = memory_table::from(told, std::nullopt);
        if (!known) throw std::runtime_error(known.error().message());
        const auto at = known->find_user(event.arg.pagefault.address);
        if (!at) throw std::runtime_error("a fault outside what was told");
        return (told[at->index].mmap_offset + at->offset) / page_size;
    }
    /// Puts the page into the shared file, and wakes whoever waits.
    void serve(std::size_t page) {
        fill_page(memory, page);
        for (const memory_region& one : told) {
            if (page * page_size < one.mmap_offset || page * page_size >= one.mmap_offset + one.size) continue;
            uffdio_range range{one.user_address + page * page_size - one.mmap_offset, page_size};
            (void)::ioctl(faults.get(), UFFDIO_WAKE, &range);
        }
    }
    /// What a thread of the backend reads at the beginning of a page; nothing where it may not, or the VMM died meanwhile.
    std::optional<std::uint64_t> read(std::size_t page) {
        const auto access = client_.access();
        if (!access) return std::nullopt;
        const auto found = access->table().at_guest(guest + page * page_size, 8);
        if (found.size() != 8) return std::nullopt;
        std::uint64_t word = 0;
        std::memcpy(&word, found.data(), 8);
        if (!access->intact()) return std::nullopt;
        return word;
    }
    std::future<std::optional<std::uint64_t>> read_elsewhere(std::size_t page) {
        return std::async(std::launch::async, [this, page] { return read(page); });
    }

    /// How the client's loop ended; the VMM hangs up if it hasn't.
    result<void> end() {
        (void)::shutdown(sockets_.vmm.get(), SHUT_RDWR);
        return runs_.get();
    }
    /// The client's reason to end by itself.
    std::string why_it_ended() {
        if (runs_.wait_for(patience) != std::future_status::ready) return "it hasn't";
        return message_of(runs_.get());
    }

    /// Whether the guest's file has any page at all.
    bool has_pages() const { return ::lseek(memory.get(), 0, SEEK_DATA) >= 0; }

    unique_fd memory;
    unique_fd faults;
    std::vector<memory_region> told;
    std::function<void()> on_other; // what the device does with each of its messages
    client& backend() { return client_; }
    unique_fd& vmm() { return sockets_.vmm; }
    const std::vector<request>& others() const { return others_; }

private:
    socket_pair sockets_;
    memory_region whole_;
    client client_;
    std::vector<request> others_; // the loop's, until it has ended
    std::future<result<void>> runs_; // waited for before the client goes
};

/// False, and says so, where no userfaultfd can be had.
bool have_userfaultfd() {
    const auto opened = vmstate::userfault::open(vmstate::userfault_scope::user_only, 0);
    if (!opened) vmstate::tests::skip("no userfaultfd: " + opened.error().message());
    return opened.has_value();
}

} // namespace

TEST_CASE("a message and its descriptors arrive as they were sent") {
    const socket_pair sockets;
    const memory_region region{0x1000, 0x2000, 0x3000, 0x4000};
    const unique_fd event(::eventfd(7, EFD_CLOEXEC));
    message sent = make_memory_region(request::add_mem_reg, region, twin(event), message_flag::need_reply);
    REQUIRE(message_of(send_message(sockets.vmm.get(), sent)) == "");
    const auto got = receive_message(sockets.backend.get(), patience);
    REQUIRE(message_of(got) == "");
    REQUIRE(got->has_value());
    CHECK((*got)->request == request::add_mem_reg);
    CHECK((*got)->needs_reply());
    CHECK_FALSE((*got)->is_reply());
    CHECK(memory_region_of(**got).value() == region);
    REQUIRE((*got)->descriptors.size() == 1);
    std::uint64_t count = 0;
    CHECK(::read((*got)->descriptors.front().get(), &count, 8) == 8);
    CHECK(count == 7);
    CHECK((::fcntl((*got)->descriptors.front().get(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("a peer that closes the connection between two messages is no error, and within one it is") {
    socket_pair sockets;
    SECTION("between") {
        sockets.vmm.reset();
        const auto got = receive_message(sockets.backend.get(), patience);
        REQUIRE(message_of(got) == "");
        CHECK_FALSE(got->has_value());
    }
    SECTION("in the header") {
        REQUIRE(::send(sockets.vmm.get(), bytes_of(1, 1, 0, 0).data(), 7, 0) == 7);
        sockets.vmm.reset();
        CHECK(message_of(receive_message(sockets.backend.get(), patience))
            == "stream ends too early: expected a header of 12 bytes, found 7");
    }
    SECTION("in the payload") {
        REQUIRE(::send(sockets.vmm.get(), bytes_of(2, 1, 8, 8).data(), 15, 0) == 15);
        sockets.vmm.reset();
        CHECK(message_of(receive_message(sockets.backend.get(), patience))
            == "stream ends too early: expected SET_FEATURES with a payload of 8 bytes, found 3");
    }
}

TEST_CASE("messages out of bounds are refused by name") {
    const socket_pair sockets;
    const auto received_of = [&](const std::vector<std::byte>& bytes) {
        REQUIRE(::send(sockets.vmm.get(), bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
        return message_of(receive_message(sockets.backend.get(), patience));
    };
    SECTION("another version") {
        CHECK(received_of(bytes_of(1, 2, 0, 0)) == "bad vhost-user message: expected GET_FEATURES of version 1, found 2");
    }
    SECTION("a huge payload") {
        CHECK(received_of(bytes_of(99, 1, 0xffffffff, 0))
            == "bad vhost-user message: expected request 99 with a payload of at most 4096 bytes, found 4294967295");
    }
    SECTION("too many descriptors") {
        const unique_fd event(::eventfd(0, EFD_CLOEXEC));
        auto bytes = bytes_of(5, 1, 0, 0);
        alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(9 * sizeof(int))> control{};
        iovec part{bytes.data(), bytes.size()};
        msghdr leaving{};
        leaving.msg_iov = &part;
        leaving.msg_iovlen = 1;
        leaving.msg_control = control.data();
        leaving.msg_controllen = control.size();
        cmsghdr* const head = CMSG_FIRSTHDR(&leaving);
        head->cmsg_level = SOL_SOCKET;
        head->cmsg_type = SCM_RIGHTS;
        head->cmsg_len = CMSG_LEN(9 * sizeof(int));
        for (std::size_t i = 0; i < 9; ++i) {
            const int fd = event.get();
            std::memcpy(CMSG_DATA(head) + i * sizeof fd, &fd, sizeof fd);
        }
        REQUIRE(::sendmsg(sockets.vmm.get(), &leaving, 0) == static_cast<ssize_t>(bytes.size()));
        const int before = ::dup(0);
        ::close(before);
        CHECK(message_of(receive_message(sockets.backend.get(), patience))
            == "bad vhost-user message: expected at most 8 descriptors in one message, found more");
        // None of them is left open.
        const int after = ::dup(0);
        ::close(after);
        CHECK(after == before);
    }
    SECTION("silence") {
        CHECK(message_of(receive_message(sockets.backend.get(), 20ms)) == "input/output error: expected a message, found nothing for 20 ms");
    }
    SECTION("a peer that reads nothing") {
        result<void> sent;
        for (int i = 0; i < 10'000 && sent; ++i)
            sent = send_message(sockets.vmm.get(), make_message(request::get_config, std::array<std::byte, 256>{}), 20ms);
        CHECK(message_of(sent) == "input/output error: expected a peer that reads, found nothing for 20 ms");
    }
}

TEST_CASE("a table of memory refuses what can't be meant") {
    const memory_region one{0x10000, 0x2000, 0x50000, 0}, two{0x12000, 0x1000, 0x60000, 0x2000};
    const auto refused = [](std::vector<memory_region> regions, std::optional<std::size_t> files = std::nullopt,
                             std::size_t most = memory_table::default_most) {
        const auto made = memory_table::from(regions, files, most);
        if (!made) CHECK(made.error() == errc::bad_message);
        return message_of(made);
    };
    CHECK(refused({one, two}) == "");
    CHECK(refused({one, two}, 2) == "");
    CHECK_THAT(refused({}), contains("at least one region, found an empty one"));
    CHECK_THAT(refused({one, two}, 1), contains("a descriptor for each of 2 memory regions, found 1"));
    CHECK_THAT(refused({one, two}, 3), contains("a descriptor for each of 2 memory regions, found 3"));
    CHECK_THAT(refused({one, two}, {}, 1), contains("at most 1 memory regions, found 2"));
    CHECK_THAT(refused({{0x1000, 0, 0x1000, 0}}), contains("a memory region that isn't empty, found 0x1000+0x0"));
    CHECK_THAT(refused({{~std::uint64_t{0} - 0xfff, 0x1000, 0, 0}}), contains("within 64 bits"));
    CHECK_THAT(refused({{0, 0x1000, ~std::uint64_t{0}, 0}}), contains("within 64 bits"));
    CHECK_THAT(refused({{0, 0x1000, 0, ~std::uint64_t{0}}}), contains("within 64 bits"));
    CHECK_THAT(refused({one, {0x11fff, 0x1000, 0x90000, 0}}), contains("don't overlap"));
    CHECK_THAT(refused({one, {0x20000, 0x1000, 0x4f001, 0}}), contains("don't overlap"));

    message m = make_memory_table({}, {});
    m.payload[0] = std::byte{9};
    CHECK_THAT(message_of(memory_regions_of(m)), contains("at most 8 regions, found 9"));
    m.payload[0] = std::byte{1};
    CHECK_THAT(message_of(memory_regions_of(m)), contains("SET_MEM_TABLE with a payload of 40 bytes, found 8"));
    m.payload.resize(3);
    CHECK_THAT(message_of(memory_regions_of(m)), contains("found 3"));
}

TEST_CASE("a table of memory finds its regions by each kind of address") {
    std::array<std::byte, 0x3000> own;
    memory_table table;
    REQUIRE(message_of(table.add({0x10000, 0x2000, 0x50000, 0}, std::span(own).first(0x2000))) == "");
    REQUIRE(message_of(table.add({0x12000, 0x1000, 0x40000, 0}, std::span(own).subspan(0x2000))) == "");
    CHECK(table.add({0x20000, 0x1000, 0x70000, 0}, std::span(own).first(1)).error() == errc::invalid_argument);
    CHECK(table.at_guest(0x10010, 16).data() == own.data() + 0x10);
    CHECK(table.at_guest(0x11ff0, 0x20).size() == 0x10); // it goes on in the next region
    CHECK(table.at_guest(0x12000, 0x20).data() == own.data() + 0x2000);
    CHECK(table.at_guest(0x12fff, ~std::uint64_t{0}).size() == 1);
    CHECK(table.at_guest(0x13000, 1).empty());
    CHECK(table.at_guest(0xffff, 1).empty());
    CHECK(table.at_user(0x40fff, 1).data() == own.data() + 0x2fff);
    CHECK(table.find_own(own.data() + 0x2001)->index == 1);
    CHECK_FALSE(table.find_own(own.data() + own.size()));
    CHECK(table.find({0x12000, 0x1000, 0x40000, 77}).value() == 1); // wherever it is in its file
    CHECK_FALSE(table.find({0x12000, 0x1000, 0x40001, 0}));
}

TEST_CASE("a client offers its features, and refuses others") {
    bench b;
    const auto offered = b.ask_and_wait(make_request(request::get_features)).as<std::uint64_t>().value();
    CHECK(offered == (0xf0 | feature::log_all | feature::protocol_features));
    const auto protocol = b.ask_and_wait(make_request(request::get_protocol_features)).as<std::uint64_t>().value();
    CHECK(protocol == 0x852a); // LOG_SHMFD, REPLY_ACK, BACKEND_REQ, PAGEFAULT, BACKEND_SEND_FD, CONFIGURE_MEM_SLOTS
    CHECK(b.ask_and_wait(make_request(request::get_max_mem_slots)).as<std::uint64_t>().value() == 32);
    CHECK(b.succeeds(make_message(request::set_features, std::uint64_t{0x30})));
    CHECK(b.backend().features() == 0x30);
    CHECK(b.succeeds(make_request(request::set_owner))); // the device's
    CHECK_FALSE(b.succeeds(make_message(request::set_features, std::uint64_t{0x100})));
    CHECK(b.why_it_ended() == "SET_FEATURES: bad vhost-user message: expected features among those offered, found 256");
    CHECK(b.others() == std::vector<request>{request::set_owner});
}

TEST_CASE("a backend's own loop gives the client each message, and does the others itself") {
    const socket_pair sockets;
    client mine({.postcopy = false});
    message theirs = make_request(request::set_vring_num);
    CHECK(mine.handle(sockets.backend.get(), theirs).value() == handling::not_mine);
    message ask = make_request(request::get_protocol_features);
    CHECK(mine.handle(sockets.backend.get(), ask).value() == handling::answered);
    const auto got = receive_message(sockets.vmm.get(), patience);
    CHECK(((*got)->as<std::uint64_t>().value() & protocol_feature::pagefault) == 0);
    message advise = make_request(request::postcopy_advise);
    CHECK(mine.handle(sockets.backend.get(), advise).error() == errc::unsupported);
    CHECK((*receive_message(sockets.vmm.get(), patience))->descriptors.empty()); // an answer all the same
    CHECK(mine.postcopy_phase() == phase::none);
}

TEST_CASE("guest memory is there when its table has come, and refused tables change nothing that was") {
    bench b;
    fill_page(b.memory, 3);
    CHECK_FALSE(b.read(3));
    REQUIRE(b.succeeds(b.table()));
    CHECK(b.read(3) == 0x1003u);
    CHECK_FALSE(b.read(8));
    // A table replaces the one before.
    const std::array<memory_region, 2> two{b.region(0, 2), b.region(2, 2)};
    REQUIRE(b.succeeds(b.table(two)));
    CHECK(b.read(3) == 0x1003u);
    CHECK_FALSE(b.read(4));
    // By single regions.
    CHECK(b.succeeds(make_memory_region(request::rem_mem_reg, two[1])));
    CHECK_FALSE(b.read(3));
    CHECK(b.succeeds(make_memory_region(request::add_mem_reg, b.region(2, 6), twin(b.memory))));
    CHECK(b.read(3) == 0x1003u);
    CHECK(message_of(b.end()) == "");
    CHECK_FALSE(b.read(3));
}

TEST_CASE("regions that a backend can't map are refused, and the VMM is told") {
    bench b;
    const auto refuse = [&](message m, const std::string& why) {
        CHECK_FALSE(b.succeeds(std::move(m)));
        CHECK_THAT(b.why_it_ended(), contains(why));
        CHECK_FALSE(b.read(0));
    };
    const std::array<memory_region, 2> overlapping{b.region(0, 2), b.region(1, 2)};
    SECTION("overlapping") { refuse(b.table(overlapping), "SET_MEM_TABLE: bad vhost-user message: expected memory regions that don't overlap"); }
    SECTION("empty") { refuse(make_memory_table({}, {}), "at least one region"); }
    SECTION("more regions than descriptors") {
        message m = b.table(std::array{b.region(0, 1), b.region(1, 1)});
        m.descriptors.pop_back();
        refuse(std::move(m), "a descriptor for each of 2 memory regions, found 1");
    }
    SECTION("outside its file") { refuse(b.table(std::array{b.region(4, 5)}), "within its file of 32768 bytes"); }
    SECTION("no file") {
        refuse(make_memory_region(request::add_mem_reg, b.region(0, 1), unique_fd(::eventfd(0, EFD_CLOEXEC))), "that is a file");
    }
    SECTION("added without a descriptor") {
        refuse(make_memory_region(request::add_mem_reg, b.region(0, 1)), "ADD_MEM_REG: bad vhost-user message: expected one descriptor, found 0");
    }
    SECTION("added twice") {
        REQUIRE(b.succeeds(b.table()));
        refuse(make_memory_region(request::add_mem_reg, b.region(7, 1), twin(b.memory)), "don't overlap");
    }
    SECTION("removed and never there") { refuse(make_memory_region(request::rem_mem_reg, b.region(0, 1)), "a memory region of the table"); }
    SECTION("a region of another size than a region's") { refuse(make_message(request::add_mem_reg, std::uint32_t{0}), "a payload of 40 bytes, found 4"); }
}

TEST_CASE("a backend's writes are logged when the VMM asks for it") {
    bench b;
    REQUIRE(b.succeeds(b.table()));
    const auto write = [&](std::uint64_t address, std::uint64_t size) { b.backend().access()->mark_dirty(address, size); };
    struct log_description {
        std::uint64_t size, offset;
    };
    const std::size_t size = (bench::guest + 8 * page_size) / page_size / 8; // of the bits up to the end of memory
    const unique_fd file = make_memory(2 * page_size);
    const auto set_log = [&](std::uint64_t bytes, std::uint64_t offset) {
        message m = make_message(request::set_log_base, log_description{bytes, offset});
        m.descriptors.push_back(twin(file));
        return m;
    };
    SECTION("into the log") {
        CHECK(b.ask_and_wait(set_log(size, 64)).as<std::uint64_t>().value() == 0);
        write(bench::guest, 1); // not yet asked for
        REQUIRE(b.succeeds(make_message(request::set_features, feature::log_all)));
        write(bench::guest + page_size - 1, 2);
        write(bench::guest + 7 * page_size, page_size);
        write(bench::guest + 8 * page_size, ~std::uint64_t{0}); // beyond it
        REQUIRE(b.succeeds(make_message(request::set_features, std::uint64_t{0})));
        write(bench::guest + 4 * page_size, 1);
        std::vector<unsigned char> log(2 * page_size);
        REQUIRE(::pread(file.get(), log.data(), log.size(), 0) == static_cast<ssize_t>(log.size()));
        std::vector<unsigned char> expected(2 * page_size);
        expected[64 + bench::guest / page_size / 8] = 0x83;
        CHECK(log == expected);
    }
    SECTION("too small a log is refused") {
        b.ask(set_log(size - 1, 0));
        CHECK_THAT(b.why_it_ended(), contains("SET_LOG_BASE: bad vhost-user message: expected a log that has a bit for all memory"));
    }
    SECTION("a log outside its file is refused") {
        b.ask(set_log(page_size, 2 * page_size));
        CHECK_THAT(b.why_it_ended(), contains("a log within its file of 8192 bytes, found 4096 bytes at 8192"));
    }
}

TEST_CASE("postcopy takes its phases in order") {
    if (!have_userfaultfd()) return;
    bench b;
    SECTION("LISTEN first") {
        CHECK_FALSE(b.succeeds(make_request(request::postcopy_listen)));
        CHECK(b.why_it_ended() == "POSTCOPY_LISTEN: bad vhost-user message: expected phase advise, found none");
    }
    SECTION("END first") {
        CHECK_FALSE(b.succeeds(make_request(request::postcopy_end)));
        CHECK(b.why_it_ended() == "POSTCOPY_END: bad vhost-user message: expected phase advise, listen or running, found none");
    }
    SECTION("a table that the VMM wasn't told of, at LISTEN") {
        REQUIRE(b.succeeds(b.table()));
        REQUIRE(b.advise());
        CHECK_FALSE(b.succeeds(make_request(request::postcopy_listen)));
        CHECK_THAT(b.why_it_ended(), contains("expected the memory table after POSTCOPY_LISTEN, found one from before"));
    }
    SECTION("ADVISE twice, and then no postcopy at all") {
        REQUIRE(b.advise());
        REQUIRE(b.advise());
        CHECK(b.backend().postcopy_phase() == phase::advise);
        REQUIRE(b.succeeds(b.table())); // not told: an acknowledgement alone
        fill_page(b.memory, 1);
        CHECK(b.read(1) == 0x1001u);
        CHECK(b.read(2) == 0u);
        CHECK(b.ask_and_wait(make_request(request::postcopy_end)).as<std::uint64_t>().value() == 0);
        CHECK(b.backend().postcopy_phase() == phase::none);
    }
    SECTION("an acknowledgement of a table in which nothing changed: QEMU's has no request then") {
        REQUIRE(b.reach_running());
        b.acknowledge(request{});
        CHECK(b.backend().postcopy_phase() == phase::running);
        auto waits = b.read_elsewhere(1);
        CHECK(b.next_fault() == 1u);
        b.acknowledge(request{}); // nor does anybody wait for the page because of it
        b.serve(1);
        CHECK(waits.get() == 0x1001u);
    }
    SECTION("a message without a request that is none") {
        REQUIRE(b.reach_running());
        b.ask(make_request(request{}));
        CHECK_THAT(b.why_it_ended(), contains("a request that this device knows"));
    }
    SECTION("ADVISE while it runs: no descriptor, and all goes on") {
        REQUIRE(b.reach_running());
        CHECK(b.ask_and_wait(make_request(request::postcopy_advise)).descriptors.empty());
        b.serve(1);
        CHECK(b.read(1) == 0x1001u);
    }
    SECTION("END before the table is acknowledged") {
        REQUIRE(b.advise());
        REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
        (void)b.ask_and_wait(b.table());
        CHECK_FALSE(b.succeeds(make_request(request::postcopy_end)));
        CHECK_THAT(b.why_it_ended(), contains("an acknowledgement of the table before POSTCOPY_END"));
    }
    SECTION("a VMM that doesn't take the table") {
        REQUIRE(b.advise());
        REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
        (void)b.ask_and_wait(b.table());
        b.ask(make_message(request::set_mem_table, std::uint64_t{1}));
        CHECK_THAT(b.why_it_ended(), contains("an acknowledgement of the table, found 1"));
        CHECK_FALSE(b.read(0));
    }
    SECTION("another message where the acknowledgement should be") {
        REQUIRE(b.advise());
        REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
        (void)b.ask_and_wait(b.table());
        b.ask(b.table());
        CHECK_THAT(b.why_it_ended(), contains("SET_MEM_TABLE with a payload of 8 bytes, found 40"));
    }
    SECTION("a region in which a fault couldn't be told from one beside it") {
        REQUIRE(b.advise());
        REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
        memory_region odd = b.region(0, 2);
        odd.size -= 512;
        b.ask(b.table(std::span(&odd, 1)));
        CHECK_THAT(b.why_it_ended(), contains("for postcopy, memory regions of whole pages of 4096 bytes"));
    }
}

TEST_CASE("in postcopy a thread of the backend waits for the page that it touches, from the first access on") {
    if (!have_userfaultfd()) return;
    bench b;
    fill_page(b.memory, 0); // came in precopy
    REQUIRE(b.advise());
    CHECK(b.backend().postcopy_phase() == phase::advise);
    REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
    CHECK(b.backend().postcopy_phase() == phase::listen);
    CHECK_FALSE(b.backend().access());

    SECTION("a table as a whole") {
        const std::array<memory_region, 2> two{b.region(0, 4), b.region(4, 4)};
        b.told = memory_regions_of(b.ask_and_wait(b.table(two))).value();
        REQUIRE(b.told.size() == 2);
        CHECK(b.told[1].guest_address == two[1].guest_address);
        CHECK(b.told[1].user_address != two[1].user_address);
        CHECK(b.backend().postcopy_phase() == phase::listen);
        CHECK_FALSE(b.backend().access());
        b.acknowledge(request::set_mem_table);
    }
    SECTION("region by region, with one acknowledgement for them all") {
        for (const std::size_t first : {0U, 4U})
            b.told.push_back(memory_region_of(
                b.ask_and_wait(make_memory_region(request::add_mem_reg, b.region(first, 4), twin(b.memory)))).value());
        CHECK_FALSE(b.backend().access());
        b.acknowledge(request::add_mem_reg);
    }
    CHECK(b.backend().postcopy_phase() == phase::running);
    CHECK(b.read(0) == 0x1000u);
    CHECK_FALSE(b.next_fault(0ms));
    for (const std::size_t page : {5U, 1U}) {
        auto waits = b.read_elsewhere(page);
        CHECK(b.next_fault() == page);
        CHECK(waits.wait_for(0ms) == std::future_status::timeout);
        b.serve(page);
        CHECK(waits.get() == 0x1000u + page);
    }
    b.serve(6); // unasked
    CHECK(b.read(6) == 0x1006u);
    CHECK_FALSE(b.next_fault(0ms));

    // A page that nobody brought is one of zeros, when all has come.
    CHECK(b.ask_and_wait(make_request(request::postcopy_end)).as<std::uint64_t>().value() == 0);
    CHECK(b.backend().postcopy_phase() == phase::none);
    CHECK(b.read(2) == 0u);
    CHECK(b.read(5) == 0x1005u);
    CHECK(message_of(b.end()) == "");
}

TEST_CASE("a thread that waits for a page with a lock that others want gets it all the same") {
    if (!have_userfaultfd()) return;
    bench b;
    REQUIRE(b.reach_running());
    std::mutex queue_mutex;
    std::vector<std::future<std::optional<std::uint64_t>>> threads;
    for (int i = 0; i < 3; ++i)
        threads.push_back(std::async(std::launch::async, [&] {
            const std::lock_guard lock(queue_mutex);
            return b.read(2);
        }));
    CHECK(b.next_fault() == 2u);
    // Nor does the thread of the messages wait for it, as long as nothing changes in memory.
    CHECK(b.succeeds(make_request(request::set_owner)));
    b.serve(2);
    for (auto& each : threads)
        CHECK(each.get() == 0x1002u);
}

TEST_CASE("memory that comes and goes in postcopy is told, acknowledged and watched like the first") {
    if (!have_userfaultfd()) return;
    bench b;
    REQUIRE(b.advise());
    REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
    const memory_region low = b.region(0, 4), high = b.region(4, 4);
    b.told = memory_regions_of(b.ask_and_wait(b.table(std::span(&low, 1)))).value();
    b.acknowledge(request::set_mem_table);
    CHECK_FALSE(b.read(4));

    SECTION("a region more; the others can be touched all the while") {
        b.told.push_back(memory_region_of(
            b.ask_and_wait(make_memory_region(request::add_mem_reg, high, twin(b.memory)))).value());
        CHECK(b.backend().postcopy_phase() == phase::running);
        b.serve(0);
        CHECK(b.read(0) == 0x1000u);
        CHECK_FALSE(b.read(4));
        b.acknowledge(request::add_mem_reg);
        auto waits = b.read_elsewhere(4);
        CHECK(b.next_fault() == 4u);
        b.serve(4);
        CHECK(waits.get() == 0x1004u);
        CHECK(b.succeeds(make_memory_region(request::rem_mem_reg, low)));
        CHECK_FALSE(b.read(0));
        CHECK(b.read(4) == 0x1004u);
    }
    SECTION("another table, for which a thread that waits is waited for") {
        auto waits = b.read_elsewhere(1);
        REQUIRE(b.next_fault() == 1u);
        b.ask(b.table(std::span(&high, 1)));
        CHECK(waits.wait_for(20ms) == std::future_status::timeout);
        b.serve(1);
        CHECK(waits.get() == 0x1001u);
        b.told = memory_regions_of(b.answer()).value();
        CHECK(b.backend().postcopy_phase() == phase::listen);
        CHECK_FALSE(b.backend().access());
        b.acknowledge(request::set_mem_table);
        auto again = b.read_elsewhere(7);
        CHECK(b.next_fault() == 7u);
        b.serve(7);
        CHECK(again.get() == 0x1007u);
    }
}

TEST_CASE("a VMM that dies leaves no thread behind, in whichever phase") {
    if (!have_userfaultfd()) return;
    bench b;
    std::optional<std::future<std::optional<std::uint64_t>>> waits;
    SECTION("none") { REQUIRE(b.succeeds(b.table())); }
    SECTION("advise") { REQUIRE(b.advise()); }
    SECTION("listen") {
        REQUIRE(b.advise());
        REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
    }
    SECTION("listen, with a table that it didn't acknowledge") {
        REQUIRE(b.advise());
        REQUIRE(b.succeeds(make_request(request::postcopy_listen)));
        (void)b.ask_and_wait(b.table());
    }
    SECTION("running, with a thread that waits: what it reads then isn't the guest's") {
        REQUIRE(b.reach_running());
        waits = b.read_elsewhere(3);
        REQUIRE(b.next_fault() == 3u);
    }
    SECTION("ended") {
        REQUIRE(b.reach_running());
        (void)b.ask_and_wait(make_request(request::postcopy_end));
    }
    b.faults.reset();
    b.vmm().reset();
    CHECK(b.why_it_ended() == "");
    if (waits) CHECK_FALSE(waits->get());
    CHECK(b.backend().postcopy_phase() == phase::none);
    CHECK_FALSE(b.backend().access());
}

TEST_CASE("a connection that ends in postcopy leaves no page in the memory of a guest that lives on") {
    if (!have_userfaultfd()) return;
    bench b;
    REQUIRE(b.reach_running());
    auto reads = b.read_elsewhere(3);
    CHECK(b.next_fault() == 3u);
    auto writes = std::async(std::launch::async, [&] {
        const auto access = b.backend().access();
        std::memset(access->table().at_guest(bench::guest + 5 * page_size, page_size).data(), 1, page_size);
        return access->intact();
    });
    CHECK(b.next_fault() == 5u);
    SECTION("by the VMM") { CHECK(message_of(b.end()) == ""); }
    SECTION("by a message that can't be meant") {
        b.ask(make_message(request::set_features, std::uint8_t{0}));
        CHECK_THAT(b.why_it_ended(), contains("SET_FEATURES"));
    }
    SECTION("by the device") {
        b.ask(make_request(request::get_vring_base));
        CHECK_THAT(b.why_it_ended(), contains("GET_VRING_BASE"));
    }
    CHECK_FALSE(reads.get());
    CHECK_FALSE(writes.get());
    CHECK_FALSE(b.has_pages());
}

TEST_CASE("a region that is abandoned is private from then on, and its file as it was") {
    if (!have_userfaultfd()) return;
    const bool is_huge = GENERATE(false, true);
    const std::size_t size = is_huge ? std::size_t{2} << 20 : 4 * page_size;
    std::optional<vmstate::tests::huge_pages> reserved;
    if (is_huge && !reserved.emplace(1).enough()) return vmstate::tests::skip("no huge pages of 2 MiB to be had");
    const unique_fd file(::memfd_create("guest", MFD_CLOEXEC | (is_huge ? MFD_HUGETLB : 0)));
    REQUIRE(::ftruncate(file.get(), static_cast<off_t>(size)) == 0);
    const auto faults = vmstate::userfault::open(vmstate::userfault_scope::user_only, vmstate::userfault_feature::missing_shmem
        | vmstate::userfault_feature::missing_hugetlbfs);
    REQUIRE(message_of(faults) == "");
    auto region = mapped_region::map({0, size, 0, 0}, file);
    REQUIRE(message_of(region) == "");
    REQUIRE(message_of(region->watch(*faults)) == "");
    std::thread waits([&] { region->memory()[0] = std::byte{1}; });
    pollfd ready{faults->get(), POLLIN, 0};
    CHECK(::poll(&ready, 1, -1) == 1);
    region->abandon(*faults);
    waits.join();
    CHECK(region->memory()[0] == std::byte{1});
    region->abandon(*faults); // harmless twice
    struct stat status {};
    CHECK(::fstat(file.get(), &status) == 0);
    CHECK(status.st_blocks == 0);
}

TEST_CASE("a VMM that dies while the thread of the messages waits for one that waits for a page lets both go") {
    if (!have_userfaultfd()) return;
    bench b;
    REQUIRE(b.reach_running());
    auto waits = b.read_elsewhere(3);
    CHECK(b.next_fault() == 3u);
    b.on_other = [&] { waits.wait(); };
    const request which = GENERATE(request::set_features, request::rem_mem_reg, request::set_mem_table, request::get_vring_base);
    CAPTURE(name_of(which));
    switch (which) {
    case request::set_features: b.ask(make_message(which, std::uint64_t{0x30})); break;
    case request::rem_mem_reg: b.ask(make_memory_region(which, b.region(0, 8))); break;
    case request::set_mem_table: b.ask(b.table()); break;
    default: b.ask(make_request(which)); // the device's
    }
    CHECK(waits.wait_for(20ms) == std::future_status::timeout);
    const bool dies = GENERATE(false, true);
    CAPTURE(dies);
    if (dies) b.vmm().reset();
    else REQUIRE(::shutdown(b.vmm().get(), SHUT_WR) == 0);
    CHECK(b.why_it_ended() != "it hasn't");
    CHECK_FALSE(b.has_pages());
    b.serve(3); // where it hangs all the same
    CHECK_FALSE(waits.get());
}

TEST_CASE("a device is told of memory that came, and not of memory that went") {
    std::atomic<int> came = 0;
    bench b(8, {.faults = vmstate::userfault_scope::user_only, .on_memory = [&] { ++came; }});
    REQUIRE(b.succeeds(b.table()));
    CHECK(came == 1);
    REQUIRE(b.succeeds(make_memory_region(request::rem_mem_reg, b.region(0, 8))));
    CHECK(came == 1);
    REQUIRE(b.succeeds(make_memory_region(request::add_mem_reg, b.region(0, 8), twin(b.memory))));
    CHECK(came == 2);
}

TEST_CASE("a VMM that dies within a message, or stops within one, ends the connection by name") {
    bench b(8, {.features = 0, .patience = 50ms});
    const std::vector<std::byte> bytes = bytes_of(2, 1, 8, 8);
    REQUIRE(::send(b.vmm().get(), bytes.data(), 15, 0) == 15);
    SECTION("dies") {
        b.vmm().reset();
        CHECK_THAT(b.why_it_ended(), contains("SET_FEATURES with a payload of 8 bytes, found 3"));
    }
    SECTION("stops") { CHECK_THAT(b.why_it_ended(), contains("expected a message, found nothing for 50 ms")); }
}

// ---- the disk of examples/

namespace {

/// A VMM with one queue of 8, whose rings are the first three pages of its guest's memory, and a disk of 8 sectors that have
/// their number in every byte.
class disk_bench {
public:
    static constexpr std::size_t pages = 16;
    static constexpr std::uint64_t guest = 1 << 20;
    static constexpr std::uint64_t user = std::uint64_t{1} << 40;
    static constexpr std::uint32_t queue_size = 8;

    explicit disk_bench(bool in_postcopy = false) : memory(make_memory(pages * page_size)), file(make_memory(8 * 512)) {
        void* const at = ::mmap(nullptr, pages * page_size, PROT_READ | PROT_WRITE, MAP_SHARED, memory.get(), 0);
        if (at == MAP_FAILED) throw std::runtime_error("mmap");
        bytes_ = static_cast<std::byte*>(at);
        std::memset(bytes_, 0, 3 * page_size);
        for (int sector = 0; sector != 8; ++sector) {
            const std::vector<char> content(512, static_cast<char>(sector));
            if (::pwrite(file.get(), content.data(), 512, 512 * sector) != 512) throw std::runtime_error("pwrite");
        }
        device_.emplace(disk::file_disk::open("/proc/self/fd/" + std::to_string(file.get()), false, 1).value(), std::uint16_t{1}, true);
        runs_ = std::async(std::launch::async, [this] { return device_->serve(sockets_.backend.get()); });
        send(make_message(request::set_protocol_features, protocol_feature::reply_ack | protocol_feature::pagefault | protocol_feature::config
                | protocol_feature::configure_mem_slots));
        features = ask(make_request(request::get_features)).as<std::uint64_t>().value();
        if (in_postcopy) {
            faults = std::move(ask(make_request(request::postcopy_advise)).descriptors.at(0));
            tell(make_request(request::postcopy_listen));
            at_backend = memory_region_of(ask(make_memory_region(request::add_mem_reg, region(), twin(memory)))).value().user_address;
            send(make_message(request::add_mem_reg, std::uint64_t{0}));
        } else {
            tell(make_memory_region(request::add_mem_reg, region(), twin(memory)));
        }
        tell(make_message(request::set_features, features & ~feature::log_all));
    }
    ~disk_bench() {
        static_cast<void>(end());
        ::munmap(bytes_, pages * page_size);
    }
    disk_bench(const disk_bench&) = delete;
    disk_bench& operator=(const disk_bench&) = delete;

    memory_region region() const { return {guest, pages * page_size, user, 0}; }
    void start_queue(std::uint32_t flags = 0) {
        struct state {
            std::uint32_t index, number;
        };
        tell(make_message(request::set_vring_num, state{0, queue_size}));
        tell(make_message(request::set_vring_base, state{0, 0}));
        tell(make_message(request::set_vring_addr, disk::vring_addresses{0, flags, user, user + 2 * page_size, user + page_size, guest + 2 * page_size}));
        const auto give = [&](request which, const unique_fd& event) {
            message m = make_message(which, std::uint64_t{0});
            m.descriptors.push_back(twin(event));
            tell(std::move(m));
        };
        give(request::set_vring_call, call);
        give(request::set_vring_err, err);
        give(request::set_vring_kick, kick);
        tell(make_message(request::set_vring_enable, state{0, 1}));
    }

    void send(const message& m) {
        if (result<void> sent = send_message(sockets_.vmm.get(), m, patience); !sent) throw std::runtime_error(sent.error().message());
    }
    message ask(const message& m) {
        send(m);
        result<std::optional<message>> got = receive_message(sockets_.vmm.get(), patience);
        if (!got || !*got) throw std::runtime_error("no answer to " + name_of(m.request));
        return std::move(**got);
    }
    std::uint64_t acknowledgement_of(message m) {
        m.flags |= message_flag::need_reply;
        return ask(m).as<std::uint64_t>().value();
    }
    void tell(message m) {
        if (const std::string name = name_of(m.request); acknowledgement_of(std::move(m)) != 0) throw std::runtime_error(name);
    }

    std::byte* at(std::uint64_t offset) const { return bytes_ + offset; }
    void describe(std::size_t index, const disk::descriptor& one) const { std::memcpy(at(index * sizeof one), &one, sizeof one); }
    /// A request's header in guest memory.
    void put_header(std::uint64_t offset, std::uint32_t type, std::uint64_t sector) const {
        const virtio_blk_outhdr header{type, 0, sector};
        std::memcpy(at(offset), &header, sizeof header);
    }
    /// Makes the chains that begin with these descriptors available.
    void submit(std::initializer_list<std::uint16_t> heads) {
        for (const std::uint16_t head : heads) std::memcpy(at(page_size + 4 + 2 * (submitted_++ % queue_size)), &head, sizeof head);
        std::memcpy(at(page_size + 2), &submitted_, sizeof submitted_);
        raise(kick);
    }
    std::uint16_t used() const { return std::atomic_ref(reinterpret_cast<std::uint16_t&>(*at(2 * page_size + 2))).load(); }
    static void raise(const unique_fd& event) { static_cast<void>(::eventfd_write(event.get(), 1)); }
    /// Whether it is raised, now or before long.
    static bool wait(const unique_fd& event, std::chrono::milliseconds longest = patience) {
        pollfd ready{event.get(), POLLIN, 0};
        eventfd_t count = 0;
        return ::poll(&ready, 1, static_cast<int>(longest.count())) == 1 && ::eventfd_read(event.get(), &count) == 0;
    }
    /// Reads: the header in page 3, `size` bytes to `into`, the status in page 7.
    void read_sectors(std::uint64_t into, std::uint32_t size, std::uint64_t sector = 1) {
        put_header(3 * page_size, VIRTIO_BLK_T_IN, sector);
        *at(7 * page_size) = std::byte{0xff};
        describe(0, {guest + 3 * page_size, 16, disk::descriptor_next, 1});
        describe(1, {into, size, disk::descriptor_next | disk::descriptor_write, 2});
        describe(2, {guest + 7 * page_size, 1, disk::descriptor_write, 0});
        submit({0});
    }
    int status() const { return std::to_integer<int>(*at(7 * page_size)); }
    /// The page in which the queue waits.
    std::optional<std::size_t> next_fault() const {
        pollfd ready{faults.get(), POLLIN, 0};
        uffd_msg event{};
        if (::poll(&ready, 1, static_cast<int>(patience / 1ms)) != 1 || ::read(faults.get(), &event, sizeof event) != sizeof event) return std::nullopt;
        return (event.arg.pagefault.address - at_backend) / page_size;
    }
    void wake(std::size_t page) const {
        uffdio_range range{at_backend + page * page_size, page_size};
        (void)::ioctl(faults.get(), UFFDIO_WAKE, &range);
    }
    bool has_page(std::size_t page) const {
        const auto where = static_cast<off_t>(page * page_size);
        return ::lseek(memory.get(), where, SEEK_DATA) == where;
    }
    /// The VMM hangs up, where it hasn't. False where the disk goes on all the same.
    bool end() {
        (void)::shutdown(sockets_.vmm.get(), SHUT_RDWR);
        return runs_.wait_for(patience) == std::future_status::ready;
    }

    unique_fd memory, file;
    unique_fd kick{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)}, call{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)},
        err{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    unique_fd faults;
    std::uint64_t at_backend = 0; // where the disk has the memory
    std::uint64_t features = 0;

private:
    socket_pair sockets_;
    std::byte* bytes_ = nullptr;
    std::uint16_t submitted_ = 0;
    std::optional<disk::device> device_;
    std::future<result<void>> runs_; // waited for before the device goes
};

} // namespace

TEST_CASE("a disk logs the pages of buffer, status and used ring, and no others") {
    disk_bench b;
    const unique_fd log = make_memory(page_size);
    struct description {
        std::uint64_t size, offset;
    };
    message m = make_message(request::set_log_base, description{page_size, 0});
    m.descriptors.push_back(twin(log));
    CHECK(b.ask(m).as<std::uint64_t>().value() == 0);
    b.tell(make_message(request::set_features, b.features));
    b.start_queue(1); // VHOST_VRING_F_LOG
    b.read_sectors(disk_bench::guest + 5 * page_size - 512, 1024, 2);
    REQUIRE(disk_bench::wait(b.call));
    CHECK(b.used() == 1);
    CHECK(b.status() == VIRTIO_BLK_S_OK);
    CHECK(*b.at(5 * page_size - 1) == std::byte{2});
    CHECK(*b.at(5 * page_size) == std::byte{3});
    std::array<unsigned char, page_size> bits{};
    REQUIRE(::pread(log.get(), bits.data(), bits.size(), 0) == page_size);
    std::vector<std::size_t> dirty;
    for (std::size_t i = 0; i != bits.size() * 8; ++i)
        if ((bits[i / 8] >> i % 8 & 1) != 0) dirty.push_back(i - disk_bench::guest / page_size);
    CHECK(dirty == std::vector<std::size_t>{2, 4, 5, 7});
}

TEST_CASE("a disk's queue stands while its memory is away, and goes on when it is back") {
    disk_bench b;
    b.start_queue();
    b.tell(make_memory_region(request::rem_mem_reg, b.region()));
    b.read_sectors(disk_bench::guest + 4 * page_size, 512);
    CHECK_FALSE(disk_bench::wait(b.err, 20ms));
    CHECK(b.used() == 0);
    b.tell(make_memory_region(request::add_mem_reg, b.region(), twin(b.memory)));
    CHECK(disk_bench::wait(b.call));
    CHECK(b.used() == 1);
    CHECK(b.status() == VIRTIO_BLK_S_OK);
}

TEST_CASE("a disk refuses what it can't do, and goes on") {
    disk_bench b;
    b.start_queue();
    CHECK(b.acknowledgement_of(make_message(request::set_config, std::array<std::uint32_t, 4>{32, 4, 0, 1})) != 0);
    CHECK(b.acknowledgement_of(make_request(request{99})) != 0);
    b.read_sectors(disk_bench::guest + 4 * page_size, 512);
    CHECK(disk_bench::wait(b.call));
    CHECK(b.status() == VIRTIO_BLK_S_OK);
    b.send(make_message(request::set_config, std::array<std::uint32_t, 4>{32, 4, 0, 1}));
    b.tell(make_request(request::set_owner));
    // What a guest may ask for, and has to hear that it can't be done.
    b.read_sectors(disk_bench::guest + 4 * page_size, 512, 8); // behind its end
    CHECK(disk_bench::wait(b.call));
    CHECK(b.status() == VIRTIO_BLK_S_IOERR);
    b.read_sectors(disk_bench::guest + 4 * page_size, 511);
    CHECK(disk_bench::wait(b.call));
    CHECK(b.status() == VIRTIO_BLK_S_IOERR);
    b.read_sectors(disk_bench::guest + disk_bench::pages * page_size, 512); // outside guest memory
    CHECK(disk_bench::wait(b.call));
    CHECK(b.status() == VIRTIO_BLK_S_IOERR);
    CHECK(b.used() == 4);
}

TEST_CASE("a guest whose descriptors can't be meant stops its queue, and hurts nobody") {
    using disk::descriptor;
    using disk::descriptor_indirect;
    using disk::descriptor_next;
    using disk::descriptor_write;
    constexpr std::uint64_t guest = disk_bench::guest, end = guest + disk_bench::pages * page_size;
    constexpr std::uint64_t header = guest + 3 * page_size, table = guest + 5 * page_size, status = guest + 7 * page_size;
    struct hostile {
        const char* what;
        std::vector<descriptor> ring;      // its first descriptors
        std::vector<descriptor> table = {}; // the indirect one's
        std::uint16_t head = 0;
    };
    const hostile cases[] = {
        {"a head outside the table", {}, {}, disk_bench::queue_size},
        {"a next outside the table", {{header, 16, descriptor_next, 0xffff}}},
        {"a loop", {{header, 16, descriptor_next, 1}, {header, 16, descriptor_next, 0}}},
        {"a loop of one that is writable", {{status, 1, descriptor_next | descriptor_write, 0}}},
        {"beyond 64 bits", {{~std::uint64_t{0} - 8, 16, descriptor_next, 1}, {status, 1, descriptor_write, 0}}},
        {"readable behind writable", {{status, 1, descriptor_next | descriptor_write, 1}, {header, 16, 0, 0}}},
        {"no status", {{header, 16, 0, 0}}},
        {"no byte for a status", {{header, 16, descriptor_next, 1}, {status, 0, descriptor_write, 0}}},
        {"half a header", {{header, 15, descriptor_next, 1}, {status, 1, descriptor_write, 0}}},
        {"a header outside memory", {{end - 8, 16, descriptor_next, 1}, {status, 1, descriptor_write, 0}}},
        {"a status outside memory", {{header, 16, descriptor_next, 1}, {end, 1, descriptor_write, 0}}},
        {"a status before memory", {{header, 16, descriptor_next, 1}, {guest - 1, 1, descriptor_write, 0}}},
        {"an indirect table of no length", {{table, 0, descriptor_indirect, 0}}},
        {"one of half a descriptor", {{table, 24, descriptor_indirect, 0}}},
        {"a huge one", {{table, 0xfffffff0, descriptor_indirect, 0}}},
        {"one outside memory", {{end - 16, 32, descriptor_indirect, 0}}},
        {"one with something behind it", {{table, 32, descriptor_indirect | descriptor_next, 1}, {status, 1, descriptor_write, 0}}},
        {"one in one", {{table, 32, descriptor_indirect, 0}}, {{table, 32, descriptor_indirect, 0}}},
        {"a loop in one", {{table, 32, descriptor_indirect, 0}}, {{header, 16, descriptor_next, 1}, {header, 16, descriptor_next, 0}}},
        {"a next outside of it", {{table, 32, descriptor_indirect, 0}}, {{header, 16, descriptor_next, 2}}},
    };
    for (const hostile& one : cases) {
        CAPTURE(one.what);
        disk_bench b;
        b.start_queue();
        b.put_header(3 * page_size, VIRTIO_BLK_T_IN, 0);
        for (std::size_t i = 0; i != one.ring.size(); ++i) b.describe(i, one.ring[i]);
        if (!one.table.empty()) std::memcpy(b.at(5 * page_size), one.table.data(), one.table.size() * sizeof(descriptor));
        b.submit({one.head});
        CHECK(disk_bench::wait(b.err));
        CHECK(b.used() == 0);
        // It stands until it is begun anew.
        b.read_sectors(guest + 4 * page_size, 512);
        CHECK(b.acknowledgement_of(make_request(request::set_owner)) == 0);
        CHECK(b.used() == 0);
    }
    {
        disk_bench b;
        b.start_queue();
        const std::uint16_t many = disk_bench::queue_size + 1;
        std::memcpy(b.at(page_size + 2), &many, sizeof many);
        disk_bench::raise(b.kick);
        CHECK(disk_bench::wait(b.err));
        CHECK(b.used() == 0);
    }
    // The same request by an indirect table that can be meant.
    disk_bench b;
    b.start_queue();
    b.put_header(3 * page_size, VIRTIO_BLK_T_IN, 5);
    const descriptor good[] = {{header, 16, descriptor_next, 1}, {guest + 4 * page_size, 512, descriptor_next | descriptor_write, 2}, {status, 1, descriptor_write, 0}};
    std::memcpy(b.at(5 * page_size), good, sizeof good);
    b.describe(0, {table, sizeof good, descriptor_indirect, 0});
    b.submit({0});
    CHECK(disk_bench::wait(b.call));
    CHECK(*b.at(4 * page_size + 511) == std::byte{5});
}

TEST_CASE("a disk's request that waits for a page holds up neither those before it nor the VMM's messages") {
    if (!have_userfaultfd()) return;
    using namespace disk;
    disk_bench b(true);
    b.start_queue();
    constexpr std::uint64_t guest = disk_bench::guest;
    // Two of them: the second one writes what is in a page that hasn't come.
    *b.at(7 * page_size) = std::byte{0xff};
    b.put_header(3 * page_size, VIRTIO_BLK_T_IN, 1);
    b.describe(0, {guest + 3 * page_size, 16, descriptor_next, 1});
    b.describe(1, {guest + 7 * page_size + 512, 512, descriptor_next | descriptor_write, 2});
    b.describe(2, {guest + 7 * page_size, 1, descriptor_write, 0});
    b.put_header(3 * page_size + 64, VIRTIO_BLK_T_OUT, 6);
    b.describe(3, {guest + 3 * page_size + 64, 16, descriptor_next, 4});
    b.describe(4, {guest + 9 * page_size, 512, descriptor_next, 5});
    b.describe(5, {guest + 7 * page_size + 1, 1, descriptor_write, 0});
    b.submit({0, 3});
    REQUIRE(b.next_fault() == 9u);
    CHECK(disk_bench::wait(b.call));
    CHECK(b.used() == 1);
    struct state {
        std::uint32_t index, number;
    };
    CHECK(b.acknowledgement_of(make_message(request::set_vring_enable, state{0, 1})) == 0);
    std::array<char, 512> sector{};
    SECTION("the page comes") {
        std::memset(b.at(9 * page_size), 0x77, page_size);
        b.wake(9);
        CHECK(disk_bench::wait(b.call));
        CHECK(b.used() == 2);
        CHECK(::pread(b.file.get(), sector.data(), sector.size(), 6 * 512) == 512);
        CHECK(sector[511] == 0x77);
    }
    SECTION("the VMM goes, while it waits for the queue to stop") {
        b.send(make_message(request::get_vring_base, state{0, 0}));
        std::this_thread::sleep_for(20ms); // it had better have read it
        const bool ended = b.end();
        if (!ended) b.wake(9);
        CHECK(ended);
        CHECK_FALSE(b.has_page(9));
        CHECK(b.used() == 1);
        CHECK(::pread(b.file.get(), sector.data(), sector.size(), 6 * 512) == 512);
        CHECK(sector[511] == 6);
    }
}
