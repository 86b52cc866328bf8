// SPDX-License-Identifier: BSL-1.0
// Postcopy's mechanisms with real memory and real faults: threads play the guest and touch what isn't there, other threads
// play the source. Anonymous memory, a memfd, huge pages of both kinds.
#include <support/catch.hpp>
#include <support/huge_pages.hpp>

#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/ram_memory.hpp>
#include <vmstate/postcopy/discard_memory.hpp>
#include <vmstate/postcopy/fault_thread.hpp>
#include <vmstate/postcopy/page_assembler.hpp>
#include <vmstate/postcopy/request_queue.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/channel.hpp>

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

using namespace vmstate;
using namespace std::chrono_literals;
using vmstate::tests::contains;
using vmstate::tests::huge_pages;
using vmstate::tests::skip;

namespace {

/// mlock, which the sanitizers' runtimes make into nothing.
bool lock_memory(std::span<std::byte> memory) { return ::syscall(SYS_mlock, memory.data(), memory.size()) == 0; }

constexpr std::size_t page_size = 4096;
constexpr std::uint64_t huge = std::uint64_t{2} << 20;

enum class kind { anonymous, memfd, huge_anonymous, huge_memfd };

std::string name_of(kind what) {
    switch (what) {
    case kind::anonymous: return "anonymous";
    case kind::memfd: return "memfd";
    case kind::huge_anonymous: return "huge, anonymous";
    case kind::huge_memfd: return "huge, memfd";
    }
    return "?";
}
bool is_huge(kind what) { return what == kind::huge_anonymous || what == kind::huge_memfd; }

result<ram_memory> memory_of(kind what, std::uint64_t size) {
    switch (what) {
    case kind::anonymous: return ram_memory::anonymous(size);
    case kind::memfd: return ram_memory::memfd("guest", size);
    case kind::huge_anonymous: return ram_memory::anonymous(size, huge);
    case kind::huge_memfd: return ram_memory::memfd("guest", size, huge);
    }
    return error(errc::invalid_argument);
}

ram_block& add_block(ram_section& ram, const char* name, const ram_memory& memory) {
    ram_options options;
    options.host_page_size = memory.page_size();
    options.file = memory.file();
    ram.insert(std::make_unique<ram_block>(ram_block{name, memory.span(), memory.span().size(), options}));
    return *ram.find(name);
}

/// What the source has: some pages are zero, whole huge pages, too; of the others each word is another.
bool is_zero_at_source(std::size_t page) { return page % 5 == 0 || (page / 512) % 4 == 1; }
std::uint64_t word_at_source(std::size_t page, std::size_t word) {
    return is_zero_at_source(page) ? 0 : (page * 512 + word) * 0x9e3779b97f4a7c15U;
}
std::vector<std::byte> page_at_source(std::size_t page) {
    std::vector<std::byte> bytes(page_size);
    for (std::size_t i = 0; i < page_size / 8; ++i) {
        const std::uint64_t word = word_at_source(page, i);
        std::memcpy(bytes.data() + 8 * i, &word, 8);
    }
    return bytes;
}
bool is_right(std::span<const std::byte> memory, std::size_t page) {
    for (const std::size_t word : {std::size_t{0}, std::size_t{17}, std::size_t{300}, std::size_t{511}}) {
        std::uint64_t found = 0;
        std::memcpy(&found, memory.data() + page * page_size + 8 * word, 8);
        if (found != word_at_source(page, word)) return false;
    }
    return true;
}
/// Where guests count, so that a page placed over one that is in use is seen: no word that `is_right` looks at.
std::atomic_ref<std::uint64_t> counter_of(std::span<std::byte> memory, std::size_t page) {
    return std::atomic_ref<std::uint64_t>(*reinterpret_cast<std::uint64_t*>(memory.data() + page * page_size + 8 * 100));
}

/// The records of a host page, as a channel carries them.
void put_host_page(writer& out, const ram_block& block, std::uint64_t offset) {
    for (std::uint64_t at = offset; at < offset + block.options.host_page_size; at += page_size) {
        const auto page = static_cast<std::size_t>(at / page_size);
        out.put_be64(at | (is_zero_at_source(page) ? ram_flag::zero : ram_flag::page));
        out.put_counted_string(block.name);
        if (is_zero_at_source(page)) out.put_u8(0);
        else out.write(page_at_source(page));
    }
}
/// Reads records into an assembler until there are no more.
result<void> load_records(page_assembler& into, reader& in, const ram_section& ram) {
    ram_record_reader records(page_size);
    ram_record record;
    while (in.peek(1) != 0) {
        if (!records.next(in, record)) return in.failure();
        if (result<void> done = into.load(in, record, *ram.find(records.block())); !done) return done;
    }
    return into.flush();
}

/// A destination's part of postcopy, and the source's queue at the other end of its return path.
struct destination {
    explicit destination(const ram_section& blocks)
        : ram(blocks), received(page_size), placer(received), requests(received), decoder(blocks)
        , faults(placer, requests, statistics, [this](const error& why) {
              const std::lock_guard lock(failures_mutex);
              failures.push_back(why.message());
          }) {
        for (const auto& block : ram.blocks()) received.add(*block);
    }
    result<void> start() {
        if (result<void> started = placer.start(); !started) return started;
        if (result<void> connected = requests.connect(send()); !connected) return connected;
        return faults.start();
    }
    page_requests::send_function send() {
        return [this](const page_request_message& message) -> result<void> {
            const result<page_request> request = decoder.decode(message.type(), message.payload());
            if (!request) return request.error();
            queue.push(*request);
            return {};
        };
    }
    std::vector<std::string> failed() {
        const std::lock_guard lock(failures_mutex);
        return failures;
    }

    const ram_section& ram;
    received_pages received;
    page_placer placer;
    page_requests requests;
    postcopy_statistics statistics;
    page_request_decoder decoder;
    page_request_queue queue;
    std::mutex failures_mutex;
    std::vector<std::string> failures;
    fault_thread faults;
};

const auto never = std::chrono::steady_clock::now() + 24h;

/// Serves requests on a channel of its own until the queue is closed.
void serve_requests(destination& at, result<void>& done) {
    page_assembler assembler(at.placer);
    while (const auto entry = at.queue.pop_until(never)) {
        vector_writer out;
        put_host_page(out, *entry->block, entry->offset);
        const std::vector<std::byte> bytes = out.take();
        memory_reader in(bytes);
        if (done = load_records(assembler, in, at.ram); !done) return;
    }
}
/// All pages in order, whatever was requested: some of those that follow each other are placed together, with pages among
/// them that are there already.
void send_all(destination& at, result<void>& done) {
    page_assembler assembler(at.placer, 3);
    for (const auto& block : at.ram.blocks())
        for (std::uint64_t offset = 0; offset < block->used_length;) {
            vector_writer out;
            for (int pages = 0; pages != 8 && offset < block->used_length; ++pages) {
                put_host_page(out, *block, offset);
                offset += block->options.host_page_size;
            }
            const std::vector<std::byte> bytes = out.take();
            memory_reader in(bytes);
            if (done = load_records(assembler, in, at.ram); !done) return;
        }
}

std::uint32_t thread_id() { return static_cast<std::uint32_t>(::syscall(SYS_gettid)); }

/// Whether this process may catch faults of system calls; says so where it may not.
bool may_run() {
    if (userfault::open(userfault_scope::user_and_kernel, 0)) return true;
    skip("no userfaultfd for faults of system calls here (vm.unprivileged_userfaultfd)");
    return false;
}

} // namespace

TEST_CASE("every thread finds every page, whichever channel brought it") {
    if (!may_run()) return;
    const kind what = GENERATE(kind::anonymous, kind::memfd, kind::huge_anonymous, kind::huge_memfd);
    const bool background = GENERATE(false, true);
    INFO(name_of(what) << (background ? ", with the background stream" : ", requests alone"));
    const std::uint64_t size = is_huge(what) ? 8 * huge : 4 * huge;
    std::optional<huge_pages> reserved;
    if (is_huge(what) && !reserved.emplace(8).enough()) return skip("no huge pages of 2 MiB to be had");
    const result<ram_memory> memory = memory_of(what, size);
    REQUIRE(memory.has_value());
    const std::span<std::byte> guest = memory->span();

    // What precopy left is thrown away.
    std::memset(guest.data(), 0x55, guest.size());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    REQUIRE(check_postcopy_support(ram));
    set_transparent_huge_pages(block, false);
    REQUIRE(discard_range(block, {0, size}));

    destination at(ram);
    REQUIRE(at.start());
    const std::size_t pages = guest.size() / page_size;
    constexpr std::size_t guests = 3;
    std::array<std::atomic<std::uint32_t>, guests> ids{};
    std::atomic<std::size_t> ready = 0;
    std::atomic<bool> go = false;
    std::array<std::size_t, guests> wrong{};
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < guests; ++i)
        threads.emplace_back([&, i] {
            ids[i] = thread_id();
            ++ready;
            while (!go) std::this_thread::yield();
            std::vector<std::size_t> order(pages);
            std::iota(order.begin(), order.end(), std::size_t{0});
            std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(i)));
            for (const std::size_t page : order) {
                if (!is_right(guest, page)) ++wrong[i];
                counter_of(guest, page).fetch_add(1);
            }
        });
    while (ready != guests) std::this_thread::yield();
    at.statistics.set_vcpu_threads({ids[0], ids[1], ids[2]});
    result<void> served;
    result<void> sent;
    std::thread urgent([&] { serve_requests(at, served); });
    std::thread stream;
    if (background) stream = std::thread([&] { send_all(at, sent); });
    go = true;
    for (std::thread& one : threads) one.join();
    if (background) stream.join();
    at.queue.close();
    urgent.join();
    at.faults.stop();

    CHECK(served);
    CHECK(sent);
    CHECK(at.failed().empty());
    CHECK(std::accumulate(wrong.begin(), wrong.end(), std::size_t{0}) == 0);
    std::size_t overwritten = 0;
    for (std::size_t page = 0; page < pages; ++page)
        if (counter_of(guest, page).load() != word_at_source(page, 100) + guests) ++overwritten;
    CHECK(overwritten == 0);
    CHECK(at.received.snapshot(block).count() == pages);
    CHECK(at.requests.waiting() == 0);

    // Nobody waits any more, and every wait was counted.
    const postcopy_fault_status status = at.statistics.snapshot();
    CHECK(status.faults >= status.already_received);
    CHECK(std::accumulate(status.latencies.begin(), status.latencies.end(), std::uint64_t{0}) ==
          status.faults - status.already_received);
    CHECK(at.requests.sent() <= size / block.options.host_page_size);
    if (!background) CHECK(at.requests.sent() == size / block.options.host_page_size);
    if (at.placer.has_thread_ids()) {
        REQUIRE(status.threads.size() == guests);
        std::uint64_t faults = 0;
        for (const postcopy_thread_status& one : status.threads) {
            CHECK(one.is_vcpu);
            CHECK(std::find(ids.begin(), ids.end(), one.thread_id) != ids.end());
            faults += one.faults;
            CHECK(one.blocked >= status.blocktime);
        }
        CHECK(faults == status.faults);
    }
}

TEST_CASE("a system call that touches missing memory gets its page") {
    if (!may_run()) return;
    const kind what = GENERATE(kind::anonymous, kind::memfd);
    const result<ram_memory> memory = memory_of(what, 16 * page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    add_block(ram, "pc.ram", *memory);
    destination at(ram);
    REQUIRE(at.start());
    std::array<int, 2> pipe{};
    REQUIRE(::pipe2(pipe.data(), O_CLOEXEC) == 0);
    const unique_fd from(pipe[0]);
    const unique_fd to(pipe[1]);
    REQUIRE(::write(to.get(), "0123456789abcdef", 16) == 16);
    ssize_t got = 0;
    ssize_t put = 0;
    std::thread guest([&] {
        // Into the middle of two pages that aren't there, and out of a third.
        got = ::read(from.get(), memory->span().data() + 2 * page_size - 8, 16);
        put = ::write(to.get(), memory->span().data() + 7 * page_size, page_size);
    });
    result<void> served;
    std::thread urgent([&] { serve_requests(at, served); });
    guest.join();
    at.queue.close();
    urgent.join();
    CHECK(served);
    CHECK(got == 16);
    CHECK(put == static_cast<ssize_t>(page_size));
    CHECK(std::memcmp(memory->span().data() + 2 * page_size - 8, "0123456789abcdef", 16) == 0);
    std::vector<std::byte> bytes(page_size);
    REQUIRE(::read(from.get(), bytes.data(), page_size) == static_cast<ssize_t>(page_size));
    CHECK(bytes == page_at_source(7));
    CHECK(at.failed().empty());
}

TEST_CASE("a page that was received and has no memory becomes a page of zeros without a request") {
    if (!may_run()) return;
    const kind what = GENERATE(kind::anonymous, kind::memfd, kind::huge_anonymous, kind::huge_memfd);
    INFO(name_of(what));
    std::optional<huge_pages> reserved;
    if (is_huge(what) && !reserved.emplace(2).enough()) return skip("no huge pages of 2 MiB to be had");
    const result<ram_memory> memory = memory_of(what, 2 * huge);
    REQUIRE(memory.has_value());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    destination at(ram);
    // In precopy: zero pages that nobody touched.
    at.received.mark(block, 0, 2 * huge);
    REQUIRE(at.start());
    std::atomic<std::uint64_t> sum = 1;
    std::vector<std::thread> guests;
    for (int i = 0; i < 2; ++i)
        guests.emplace_back([&] {
            for (std::size_t page = 0; page < 1024; page += 37)
                sum += counter_of(memory->span(), page).load() + std::to_integer<unsigned>(memory->span()[page * page_size]);
        });
    for (std::thread& one : guests) one.join();
    at.faults.stop();
    CHECK(sum == 1);
    CHECK(at.requests.sent() == 0);
    CHECK(at.requests.waiting() == 0);
    CHECK(at.failed().empty());
    const postcopy_fault_status status = at.statistics.snapshot();
    CHECK(status.faults == status.already_received);
    CHECK(status.faults >= (is_huge(what) ? 2U : 28U));
}

TEST_CASE("what is wanted while there is no connection comes after the recovery") {
    if (!may_run()) return;
    const result<ram_memory> memory = memory_of(kind::anonymous, 8 * page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    destination at(ram);
    REQUIRE(at.start());
    // The first request finds a broken return path, the second none.
    REQUIRE(at.requests.connect([](const page_request_message&) -> result<void> { return error(errc::io, {}, "broken"); }));
    std::vector<std::thread> guests;
    std::array<bool, 2> right{};
    for (std::size_t i = 0; i < 2; ++i)
        guests.emplace_back([&, i] { right[i] = is_right(memory->span(), 2 + i); });
    while (at.requests.waiting() != 2) std::this_thread::yield();
    CHECK(at.queue.empty());
    CHECK(at.statistics.snapshot().threads.size() == (at.placer.has_thread_ids() ? 2U : 0U));

    at.decoder.forget_block();
    REQUIRE(at.requests.connect(at.send()));
    result<void> served;
    std::thread urgent([&] { serve_requests(at, served); });
    for (std::thread& one : guests) one.join();
    at.queue.close();
    urgent.join();
    at.faults.stop();
    CHECK(served);
    CHECK((right[0] && right[1]));
    CHECK(at.requests.sent() == 2);
    REQUIRE(at.failed().size() == 1);
    CHECK_THAT(at.failed()[0], contains("broken"));
    CHECK(at.received.snapshot(block).count() == 2);
}

TEST_CASE("another process's faults are heard of and its threads woken, from when it is added until it is removed") {
    if (!may_run()) return;
    const kind what = GENERATE(kind::memfd, kind::huge_memfd);
    INFO(name_of(what));
    std::optional<huge_pages> reserved;
    if (is_huge(what) && !reserved.emplace(4).enough()) return skip("no huge pages of 2 MiB to be had");
    const std::uint64_t size = 4 * huge;
    const result<ram_memory> memory = memory_of(what, size);
    REQUIRE(memory.has_value());
    // What another process has of it: a mapping of its own, with a userfaultfd of its own.
    const result<ram_memory> theirs = ram_memory::file(memory->file().fd, 0, size);
    REQUIRE(theirs.has_value());
    result<userfault> their_fault = userfault::open(userfault_scope::user_and_kernel,
        is_huge(what) ? userfault_feature::missing_hugetlbfs : userfault_feature::missing_shmem);
    REQUIRE(their_fault.has_value());
    REQUIRE(their_fault->add(theirs->span(), UFFDIO_REGISTER_MODE_MISSING));

    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    destination at(ram);
    const auto their_page = [&](std::uint64_t offset) {
        return theirs->span().subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(block.options.host_page_size));
    };
    at.placer.on_placed([&](ram_block&, std::uint64_t offset, std::uint64_t) { (void)their_fault->wake(their_page(offset)); });
    REQUIRE(at.start());

    const std::size_t pages = theirs->span().size() / page_size;
    std::atomic<std::size_t> wrong = 0;
    std::vector<std::thread> guests;
    for (unsigned i = 0; i < 2; ++i)
        guests.emplace_back([&, i] {
            std::vector<std::size_t> order(pages);
            std::iota(order.begin(), order.end(), std::size_t{0});
            std::shuffle(order.begin(), order.end(), std::mt19937(i));
            // One of each kind: a thread of that process, a thread of ours.
            for (const std::size_t page : order)
                if (!is_right(i == 0 ? theirs->span() : memory->span(), page)) ++wrong;
        });
    const auto translate = [&](std::uint64_t address) -> std::optional<ram_address> {
        const std::uint64_t offset = address - reinterpret_cast<std::uintptr_t>(theirs->span().data());
        if (offset >= size) return std::nullopt;
        return ram_address{&block, offset};
    };
    const auto wake = [&](const ram_address& where) { return their_fault->wake(their_page(where.offset)); };
    const result<unsigned> number = at.faults.add({their_fault->get(), translate, wake});
    REQUIRE(number.has_value());
    // Others come and go meanwhile.
    std::thread other([&] {
        for (int i = 0; i < 20; ++i) {
            const unique_fd event(::eventfd(0, EFD_CLOEXEC));
            if (const result<unsigned> added = at.faults.add({event.get(), translate, wake})) at.faults.remove(*added);
        }
    });
    result<void> served;
    std::thread urgent([&] { serve_requests(at, served); });
    for (std::thread& one : guests) one.join();
    other.join();
    at.queue.close();
    urgent.join();
    at.faults.remove(*number);
    at.faults.remove(*number);
    at.faults.stop();
    CHECK(served);
    CHECK(wrong == 0);
    CHECK(at.failed().empty());
    CHECK_FALSE(at.faults.add({-1, translate, wake}).has_value());
}

TEST_CASE("a client that is broken is reported once and no longer asked") {
    if (!may_run()) return;
    const result<ram_memory> memory = memory_of(kind::anonymous, page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    add_block(ram, "pc.ram", *memory);
    destination at(ram);
    REQUIRE(at.start());
    std::array<int, 2> pipe{};
    REQUIRE(::pipe2(pipe.data(), O_CLOEXEC) == 0);
    const unique_fd from(pipe[0]);
    { const unique_fd to(pipe[1]); } // hung up
    REQUIRE(at.faults.add({from.get(), [](std::uint64_t) { return std::nullopt; }, [](const ram_address&) { return result<void>(); }})
                .has_value());
    while (at.failed().empty()) std::this_thread::yield();
    std::this_thread::sleep_for(20ms);
    at.faults.stop();
    REQUIRE(at.failed().size() == 1);
    CHECK_THAT(at.failed()[0], contains("a client's userfaultfd"));
}

TEST_CASE("what a client's functions throw is reported once, and the others' faults are heard of all the same") {
    if (!may_run()) return;
    const result<ram_memory> memory = memory_of(kind::anonymous, page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    add_block(ram, "pc.ram", *memory);
    destination at(ram);
    REQUIRE(at.start());
    const auto nowhere = [](std::uint64_t) { return std::nullopt; };
    const auto wake = [](const ram_address&) { return result<void>(); };
    const unique_fd first(::eventfd(1, EFD_CLOEXEC));
    const unique_fd second(::eventfd(1, EFD_CLOEXEC));
    for (const unique_fd* const one : {&first, &second}) {
        const std::size_t before = at.failed().size();
        fault_thread::client thrower{one->get(), nowhere, wake};
        thrower.read = [](const fault_thread::found_function&) -> result<void> { throw std::runtime_error("out of luck"); };
        REQUIRE(at.faults.add(std::move(thrower)).has_value());
        while (at.failed().size() == before) std::this_thread::yield();
    }
    std::this_thread::sleep_for(20ms);
    at.faults.stop();
    REQUIRE(at.failed().size() == 2);
    CHECK_THAT(at.failed()[0], contains("out of luck"));
    CHECK_THAT(at.failed()[1], contains("out of luck"));
}

TEST_CASE("who touches memory at the moment when it is unregistered goes on") {
    if (!may_run()) return;
    const int rounds = std::getenv("VMSTATE_SOAK") != nullptr ? 10'000 : 2000;
    int asleep = 0;
    for (int i = 0; i != rounds && asleep == 0; ++i) {
        const result<ram_memory> memory = memory_of(kind::anonymous, page_size);
        REQUIRE(memory.has_value());
        const result<userfault> fault = userfault::open(userfault_scope::user_and_kernel, 0);
        REQUIRE(fault.has_value());
        REQUIRE(fault->register_memory(memory->span(), UFFDIO_REGISTER_MODE_MISSING).has_value());
        std::atomic<bool> begun = false, done = false;
        std::thread guest([&] {
            begun.store(true);
            static_cast<void>(*const_cast<const volatile std::byte*>(memory->span().data()));
            done.store(true);
        });
        while (!begun.load()) std::this_thread::yield();
        for (std::atomic<int> wait = i * 37 % 20'000; wait > 0; --wait) {
        }
        const result<void> removed = fault->remove(memory->span());
        for (int waits = 0; waits != 5000 && !done.load(); ++waits) std::this_thread::sleep_for(waits < 100 ? 10us : 1000us);
        if (!done.load()) ++asleep;
        static_cast<void>(fault->wake(memory->span()));
        guest.join();
        REQUIRE(removed);
    }
    CHECK(asleep == 0);
}

TEST_CASE("the fault thread starts again after it was stopped, and ends however often it is told") {
    if (!may_run()) return;
    const result<ram_memory> memory = memory_of(kind::anonymous, 4 * page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    add_block(ram, "pc.ram", *memory);
    destination at(ram);
    at.faults.stop();
    REQUIRE(at.start());
    CHECK_FALSE(at.faults.start());
    at.faults.stop();
    at.faults.stop();
    bool right = false;
    std::thread guest([&] { right = is_right(memory->span(), 1); });
    REQUIRE(at.faults.start());
    result<void> served;
    std::thread urgent([&] { serve_requests(at, served); });
    guest.join();
    at.queue.close();
    urgent.join();
    CHECK(right);
}

// ---- assembling

namespace {

/// Gives a few bytes at a time, so that no payload is in a reader's window in full.
class dribble final : public input_channel {
public:
    explicit dribble(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {}
    result<std::size_t> read_some(std::span<const std::span<std::byte>> parts) override {
        const std::size_t count = std::min({std::size_t{1000}, bytes_.size() - done_, parts[0].size()});
        if (count != 0) std::memcpy(parts[0].data(), bytes_.data() + done_, count);
        done_ += count;
        return count;
    }

private:
    std::vector<std::byte> bytes_;
    std::size_t done_ = 0;
};

void put_record(writer& out, const std::string& name, std::uint64_t offset, std::uint64_t flag) {
    out.put_be64(offset | flag);
    out.put_counted_string(name);
    if (flag == ram_flag::zero) out.put_u8(0);
    else if (flag == ram_flag::page) out.fill(std::byte{0x11}, page_size);
}

} // namespace

TEST_CASE("records out of place are refused by name, and a page that isn't complete is never seen") {
    if (!may_run()) return;
    const huge_pages reserved(2);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    const result<ram_memory> small = memory_of(kind::anonymous, 8 * page_size);
    const result<ram_memory> big = memory_of(kind::huge_anonymous, 2 * huge);
    REQUIRE((small.has_value() && big.has_value()));
    ram_section ram;
    add_block(ram, "pc.ram", *small);
    ram_block& block = add_block(ram, "huge", *big);
    received_pages received(page_size);
    for (const auto& one : ram.blocks()) received.add(*one);
    page_placer placer(received);
    REQUIRE(placer.start());
    page_assembler assembler(placer);
    const auto load = [&](const std::function<void(writer&)>& fill) {
        vector_writer out;
        fill(out);
        const std::vector<std::byte> bytes = out.take();
        memory_reader in(bytes);
        const result<void> done = load_records(assembler, in, ram);
        return done ? std::string("no error") : done.error().message();
    };
    const auto one = [&](const std::string& name, std::uint64_t offset, std::uint64_t flag = ram_flag::page) {
        return load([&](writer& out) { put_record(out, name, offset, flag); });
    };
    CHECK_THAT(one("huge", page_size),
        contains("huge: bad RAM record: expected the first page of a host page of 2097152 bytes, found the one at 4096"));
    CHECK_FALSE(assembler.has_part());
    CHECK(assembler.check_complete());
    CHECK(one("huge", 0) == "no error");
    CHECK(assembler.has_part());
    CHECK_THAT(one("huge", 2 * page_size),
        contains("the page at 4096 of huge, whose host page isn't complete, found the one at 8192"));
    CHECK_THAT(one("pc.ram", page_size), contains("the page at 4096 of huge"));
    CHECK_THAT(one("huge", 0), contains("the page at 4096 of huge"));
    CHECK(one("huge", page_size) == "no error");
    const result<void> incomplete = assembler.check_complete();
    REQUIRE_FALSE(incomplete);
    CHECK_THAT(incomplete.error().message(), contains("huge: bad RAM record: expected the rest of the host page at 0"));
    assembler.drop();
    CHECK(assembler.check_complete());
    CHECK(received.snapshot(block).none());

    CHECK_THAT(one("huge", 2 * huge), contains("a page within 4194304 bytes, found offset 4194304"));
    CHECK_THAT(one("pc.ram", ~std::uint64_t{0xfff}), contains("a page within 32768 bytes"));
    CHECK_THAT(load([](writer& out) {
        out.put_be64(ram_flag::xbzrle);
        out.put_counted_string("pc.ram");
        out.put_u8(1);
        out.put_be16(0);
    }),
        contains("expected PAGE or ZERO in postcopy, found XBZRLE"));
    // Cut short inside a payload: nothing is left behind.
    CHECK_THAT(load([](writer& out) {
        out.put_be64(ram_flag::page);
        out.put_counted_string("huge");
        out.fill(std::byte{1}, 100);
    }),
        contains("stream ends too early"));
    CHECK_FALSE(assembler.has_part());
    CHECK(received.snapshot(block).none());
}

TEST_CASE("after a recovery the rest of a huge page may come before its beginning, and others between") {
    if (!may_run()) return;
    const huge_pages reserved(4);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    const result<ram_memory> memory = memory_of(kind::huge_anonymous, 4 * huge);
    REQUIRE(memory.has_value());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    received_pages received(page_size);
    received.add(block);
    page_placer placer(received);
    REQUIRE(placer.start());
    page_assembler assembler(placer);
    const auto load = [&](std::size_t first, std::size_t end) {
        vector_writer out;
        for (std::size_t page = first; page < end; ++page) {
            const bool zero = is_zero_at_source(page);
            out.put_be64(page * page_size | (zero ? ram_flag::zero : ram_flag::page));
            out.put_counted_string("pc.ram");
            if (zero) out.put_u8(0);
            else out.write(page_at_source(page));
        }
        const std::vector<std::byte> bytes = out.take();
        memory_reader in(bytes);
        const result<void> done = load_records(assembler, in, ram);
        return done ? std::string("no error") : done.error().message();
    };
    CHECK(load(0, 100) == "no error");
    CHECK_THAT(load(511, 512), contains("the page at 409600 of pc.ram, whose host page isn't complete, found the one at"));
    assembler.drop();
    // As seen from QEMU 7.2: pages 1 to 511 were left of a request; then another one; then what is missing.
    CHECK(load(1, 512) == "no error");
    CHECK(received.snapshot(block).none());
    CHECK(load(1024, 1536) == "no error");
    CHECK(received.snapshot(block).count() == 512);
    CHECK(assembler.has_part());
    CHECK(load(512, 700) == "no error");
    // No second one: the source had one request in hand.
    CHECK_THAT(load(1536, 1537), contains("the page at 2867200 of pc.ram"));
    // In the middle of another one, too.
    CHECK(load(0, 1) == "no error");
    CHECK(load(700, 1024) == "no error");
    CHECK(load(1536, 2048) == "no error");
    CHECK_FALSE(assembler.has_part());
    CHECK(received.snapshot(block).count() == 2048);
    bool right = true;
    for (std::size_t page = 0; page < 2048; ++page)
        right = right && std::memcmp(memory->span().data() + page * page_size, page_at_source(page).data(), page_size) == 0;
    CHECK(right);
}

TEST_CASE("payloads that arrive in pieces and pages that come twice are placed right") {
    if (!may_run()) return;
    const kind what = GENERATE(kind::anonymous, kind::huge_memfd);
    INFO(name_of(what));
    const huge_pages reserved(is_huge(what) ? 2 : 0);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    const result<ram_memory> memory = memory_of(what, 2 * huge);
    REQUIRE(memory.has_value());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    received_pages received(page_size);
    received.add(block);
    page_placer placer(received);
    std::vector<std::uint64_t> placed;
    placer.on_placed([&](ram_block&, std::uint64_t offset, std::uint64_t size) {
        CHECK(size == block.options.host_page_size);
        CHECK(received.has(block, offset, size));
        placed.push_back(offset);
    });
    REQUIRE(placer.start());
    vector_writer out;
    for (int twice = 0; twice < 2; ++twice)
        for (std::uint64_t offset = 0; offset < 2 * huge; offset += block.options.host_page_size)
            put_host_page(out, block, offset);
    dribble channel(out.take());
    buffered_reader in(channel);
    page_assembler assembler(placer);
    REQUIRE(load_records(assembler, in, ram));
    CHECK(placed.size() == 2 * 2 * huge / block.options.host_page_size);
    bool right = true;
    for (std::size_t page = 0; page < 1024; ++page)
        right = right && std::memcmp(memory->span().data() + page * page_size, page_at_source(page).data(), page_size) == 0;
    CHECK(right);
    if (what == kind::anonymous) {
        // Pages of zeros have no memory behind them.
        page_bitmap present(1024);
        REQUIRE(find_present_pages(memory->span(), page_size, present).has_value());
        std::size_t zeros = 0;
        for (std::size_t page = 0; page < 1024; ++page)
            if (is_zero_at_source(page) && !present.test(page)) ++zeros;
        CHECK(zeros > 512);
    }
}

TEST_CASE("a block whose source has larger pages than its memory gets them piece by piece") {
    if (!may_run()) return;
    const result<ram_memory> memory = memory_of(kind::anonymous, 2 * huge);
    REQUIRE(memory.has_value());
    // One that came with a stream: the source's pages are huge. The block begins where a huge page may.
    std::span<std::byte> span = memory->span();
    const auto address = reinterpret_cast<std::uintptr_t>(span.data());
    span = span.subspan((huge - address % huge) % huge, huge);
    ram_options options;
    options.host_page_size = huge;
    ram_section ram;
    ram.insert(std::make_unique<ram_block>(ram_block{"adopted", span, span.size(), options}));
    REQUIRE(check_postcopy_support(ram));
    ram_block& block = *ram.find("adopted");
    received_pages received(page_size);
    received.add(block);
    page_placer placer(received);
    REQUIRE(placer.start());
    std::vector<std::byte> host_page(huge, std::byte{0x11});
    REQUIRE(placer.place(block, 0, host_page.data()));
    REQUIRE(placer.place_zero(block, 0));
    CHECK(std::equal(host_page.begin(), host_page.end(), span.begin()));
    CHECK(received.snapshot(block).count() == 512);
}

TEST_CASE("a page that came into being behind our back is an error by name, and one that was received is none") {
    if (!may_run()) return;
    const kind what = GENERATE(kind::anonymous, kind::memfd);
    INFO(name_of(what));
    constexpr std::size_t pages = 16;
    const result<ram_memory> memory = memory_of(what, pages * page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    // Between the discard and the registration somebody reads: a page of zeros is there.
    REQUIRE(discard_range(block, {0, block.used_length}));
    CHECK(*const_cast<volatile std::byte*>(memory->span().data() + 5 * page_size) == std::byte{0});
    received_pages received(page_size);
    received.add(block);
    page_placer placer(received);
    std::size_t told = 0;
    placer.on_placed([&](ram_block&, std::uint64_t, std::uint64_t) { ++told; });
    REQUIRE(placer.start());
    const std::vector<std::byte> content(pages * page_size, std::byte{0x31});
    const auto why = [](const result<void>& done) { return done ? std::string("no error") : done.error().message(); };
    const std::string refused =
        "pc.ram: bad RAM record: expected memory that is missing until its page comes, found a page at 20480 that came";
    for (int twice = 0; twice != 2; ++twice) {
        CHECK_THAT(why(placer.place(block, 5 * page_size, content.data())), contains(refused));
        CHECK_THAT(why(placer.place_zero(block, 5 * page_size)), contains(refused));
        CHECK_FALSE(received.has(block, 5 * page_size, page_size));
    }
    CHECK(told == 0);
    CHECK(why(placer.place(block, 2 * page_size, content.data())) == "no error");
    // In a run, the one that was received is left alone, and those before the bad one are ours when they come again.
    CHECK_THAT(why(placer.place_run(block, 0, std::span(content).first(8 * page_size))), contains(refused));
    CHECK(why(placer.place_run(block, 0, std::span(content).first(5 * page_size))) == "no error");
    CHECK(why(placer.place_run(block, 6 * page_size, std::span(content).first(10 * page_size))) == "no error");
    CHECK(why(placer.place(block, 15 * page_size, content.data())) == "no error");
    CHECK(received.snapshot(block).count() == pages - 1);

    // The same pages from two threads at once: a race that harms nobody.
    const result<ram_memory> other = memory_of(what, 4096 * page_size);
    REQUIRE(other.has_value());
    ram_section more;
    ram_block& raced = add_block(more, "raced", *other);
    received_pages both(page_size);
    both.add(raced);
    page_placer placing(both);
    REQUIRE(placing.start());
    std::array<std::string, 2> failed;
    std::array<std::thread, 2> channels;
    std::atomic<std::size_t> together = 0;
    for (std::size_t number = 0; number != channels.size(); ++number)
        channels[number] = std::thread([&, number] {
            for (std::uint64_t offset = 0; offset != raced.used_length; offset += 4 * page_size) {
                ++together;
                while (together.load() < 2 * (offset / (4 * page_size) + 1)) std::this_thread::yield();
                const result<void> done = number == 0
                    ? placing.place_run(raced, offset, std::span(content).first(4 * page_size))
                    : placing.place(raced, offset + page_size, content.data());
                if (!done && failed[number].empty()) failed[number] = done.error().message();
            }
        });
    for (std::thread& one : channels) one.join();
    CHECK(failed == std::array<std::string, 2>{});
    CHECK(both.snapshot(raced).count() == 4096);
}

// ---- discarding

TEST_CASE("what is discarded is gone, for whoever maps it, and nothing else is") {
    const kind what = GENERATE(kind::anonymous, kind::memfd, kind::huge_anonymous, kind::huge_memfd);
    const bool file_told = GENERATE(true, false);
    INFO(name_of(what) << (file_told ? "" : ", its file not told"));
    std::optional<huge_pages> reserved;
    if (is_huge(what) && !reserved.emplace(4).enough()) return skip("no huge pages of 2 MiB to be had");
    const result<ram_memory> memory = memory_of(what, 4 * huge);
    REQUIRE(memory.has_value());
    std::memset(memory->span().data(), 0x55, memory->span().size());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    if (!file_told) block.options.file = {};
    REQUIRE(discard_range(block, {huge, 2 * huge}));
    const auto are_all = [&](std::span<const std::byte> bytes, std::byte value) {
        return std::all_of(bytes.begin(), bytes.end(), [&](std::byte b) { return b == value; });
    };
    CHECK(are_all(memory->span().first(huge), std::byte{0x55}));
    CHECK(are_all(memory->span().last(huge), std::byte{0x55}));
    if (memory->file().fd >= 0) {
        const result<ram_memory> other = ram_memory::file(memory->file().fd, 0, 4 * huge);
        REQUIRE(other.has_value());
        CHECK(are_all(other->span().subspan(huge, 2 * huge), std::byte{0}));
    }
    CHECK(are_all(memory->span().subspan(huge, 2 * huge), std::byte{0}));
}

TEST_CASE("a part of a file is discarded where the block lies in it, and locked memory, too") {
    const result<ram_memory> whole = ram_memory::memfd("guest", 8 * page_size);
    REQUIRE(whole.has_value());
    std::memset(whole->span().data(), 0x55, whole->span().size());
    const result<ram_memory> part = ram_memory::file(whole->file().fd, 4 * page_size, 4 * page_size);
    REQUIRE(part.has_value());
    ram_section ram;
    const ram_block& block = add_block(ram, "part", *part);
    REQUIRE(discard_range(block, {page_size, page_size}));
    for (std::size_t page = 0; page < 8; ++page)
        CHECK(whole->span()[page * page_size] == std::byte{page == 5 ? std::uint8_t{0} : std::uint8_t{0x55}});

    const result<ram_memory> locked = memory_of(kind::anonymous, 4 * page_size);
    REQUIRE(locked.has_value());
    if (!lock_memory(locked->span())) return skip("no memory may be locked here");
    std::memset(locked->span().data(), 0x55, locked->span().size());
    REQUIRE(discard_range(add_block(ram, "locked", *locked), {page_size, page_size}));
    CHECK(locked->span()[page_size] == std::byte{0});
    CHECK(locked->span()[0] == std::byte{0x55});
}

TEST_CASE("shared memory that is locked, and whose file nobody told, isn't taken to be discarded") {
    const result<ram_memory> memory = memory_of(kind::memfd, 4 * page_size);
    REQUIRE(memory.has_value());
    std::memset(memory->span().data(), 0x55, memory->span().size());
    if (!lock_memory(memory->span())) return skip("no memory may be locked here");
    ram_section ram;
    ram_block& block = add_block(ram, "locked", *memory);
    block.options.file = {};
    const result<void> refused = discard_range(block, {page_size, page_size});
    REQUIRE_FALSE(refused);
    CHECK_THAT(refused.error().message(), contains("locked: bad RAM record: expected memory that can be discarded, found MADV_REMOVE of 4096+4096"));
    CHECK(memory->span()[page_size] == std::byte{0x55});
    // By its file it can be.
    block.options.file = memory->file();
    REQUIRE(discard_range(block, {page_size, page_size}));
    CHECK(memory->span()[page_size] == std::byte{0});
}

TEST_CASE("memory that can't be discarded is an error that names the block and the call") {
    ram_section ram;
    const result<ram_memory> memory = memory_of(kind::anonymous, 4 * page_size);
    REQUIRE(memory.has_value());
    ram_block& block = add_block(ram, "pc.ram", *memory);
    const unique_fd read_only(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
    block.options.file = {read_only.get(), 0};
    const result<void> failed = discard_range(block, {0, page_size});
    REQUIRE_FALSE(failed);
    CHECK_THAT(failed.error().message(), contains("pc.ram: bad RAM record: expected memory that can be discarded"));
    CHECK_THAT(failed.error().message(), contains("fallocate(PUNCH_HOLE) of 0+4096"));
}

TEST_CASE("transparent huge pages are advised against, and for again") {
    const result<ram_memory> memory = memory_of(kind::anonymous, 2 * huge);
    REQUIRE(memory.has_value());
    ram_section ram;
    const ram_block& block = add_block(ram, "pc.ram", *memory);
    // VmFlags of the mapping, by /proc/self/smaps.
    const auto has_flag = [&](const std::string& flag) {
        std::ostringstream begin;
        begin << std::hex << reinterpret_cast<std::uintptr_t>(memory->span().data()) << '-';
        std::ifstream smaps("/proc/self/smaps");
        bool here = false;
        for (std::string line; std::getline(smaps, line);) {
            if (line.starts_with(begin.str())) here = true;
            if (here && line.starts_with("VmFlags:")) return line.find(' ' + flag) != std::string::npos;
        }
        return false;
    };
    set_transparent_huge_pages(block, false);
    if (!has_flag("nh")) return skip("a kernel without transparent huge pages");
    set_transparent_huge_pages(block, true);
    CHECK_FALSE(has_flag("nh"));
    CHECK(has_flag("hg"));
}

// ---- support

TEST_CASE("memory that postcopy can't work with is refused with the reason, before anything happens") {
    if (!may_run()) return;
    const auto refused = [](const ram_section& ram) {
        const result<void> checked = check_postcopy_support(ram);
        if (!checked) CHECK(checked.error() == errc::unsupported);
        return checked ? std::string("no error") : checked.error().message();
    };
    const result<ram_memory> memory = memory_of(kind::anonymous, 4 * page_size);
    REQUIRE(memory.has_value());
    {
        ram_section ram;
        add_block(ram, "pc.ram", *memory);
        CHECK(refused(ram) == "no error");
        CHECK(refused(ram) == "no error"); // nothing stays registered
        ram.find("pc.ram")->memory = memory->span().subspan(1);
        ram.find("pc.ram")->used_length = page_size;
        CHECK_THAT(refused(ram), contains("pc.ram/postcopy: unsupported: expected memory that begins at whole pages of 4096"));
    }
    {
        ram_section ram;
        add_block(ram, "pc.ram", *memory).used_length = page_size + 512;
        CHECK_THAT(refused(ram), contains("a length of whole pages of 4096 bytes, found 4608 bytes"));
    }
    {
        ram_section ram;
        add_block(ram, "pc.ram", *memory).options.host_page_size = 1000;
        CHECK_THAT(refused(ram), contains("a host_page_size that is a multiple of 4096, found 1000"));
    }
    {
        // What a private mapping of a file loses comes back from the file.
        const unique_fd file(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
        void* const address = ::mmap(nullptr, page_size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.get(), 0);
        REQUIRE(address != MAP_FAILED);
        ram_section ram;
        ram.insert(std::make_unique<ram_block>(
            ram_block{"rom", {static_cast<std::byte*>(address), page_size}, page_size, {}}));
        CHECK_THAT(refused(ram), contains("a private mapping of a file"));
        ::munmap(address, page_size);
    }
    {
        // Where another userfaultfd has it already.
        ram_section ram;
        add_block(ram, "pc.ram", *memory);
        const result<userfault> other = userfault::open(userfault_scope::user_and_kernel, 0);
        REQUIRE(other.has_value());
        REQUIRE(other->add(memory->span(), UFFDIO_REGISTER_MODE_MISSING));
        CHECK_THAT(refused(ram), contains("registered with no other userfaultfd"));
    }
    {
        // The file that is told isn't what is mapped.
        const result<ram_memory> file = memory_of(kind::memfd, 4 * page_size);
        REQUIRE(file.has_value());
        ram_section ram;
        add_block(ram, "pc.ram", *memory).options.file = file->file();
        CHECK_THAT(refused(ram), contains("ram_options.file of a shared mapping alone"));
    }
    const huge_pages reserved(2);
    if (!reserved.enough()) return skip("no huge pages of 2 MiB to be had");
    for (const kind what : {kind::huge_anonymous, kind::huge_memfd}) {
        const result<ram_memory> big = memory_of(what, huge);
        REQUIRE(big.has_value());
        ram_section ram;
        add_block(ram, "huge", *big);
        CHECK(refused(ram) == "no error");
        ram.find("huge")->options.host_page_size = page_size;
        CHECK_THAT(refused(ram), contains("ram_options.host_page_size of the huge pages"));
    }
}

TEST_CASE("whether memory can be discarded is tried, and the refusal says what to change") {
    constexpr std::uint64_t size = 4 * page_size;
    const auto tried = [](const ram_block& block) {
        const result<void> done = try_discard(block);
        if (!done) CHECK(done.error() == errc::unsupported);
        return done ? std::string("no error") : done.error().message();
    };
    for (const kind what : {kind::anonymous, kind::memfd}) {
        INFO(name_of(what));
        const result<ram_memory> memory = memory_of(what, size);
        REQUIRE(memory.has_value());
        ram_section ram;
        ram_block& block = add_block(ram, "pc.ram", *memory);
        CHECK(tried(block) == "no error");
        page_bitmap all(4);
        all.set_range(0, 4);
        CHECK(check_absent(block, all, page_size)); // nothing is left there
        memory->span()[2 * page_size] = std::byte{1};
        const result<void> there = check_absent(block, all, page_size);
        REQUIRE_FALSE(there);
        CHECK_THAT(there.error().message(), contains("pc.ram: bad RAM record: expected memory that is missing until its pages come, found a page at 8192"));
        all.clear_range(2, 1);
        CHECK(check_absent(block, all, page_size));
    }
    const result<ram_memory> memory = memory_of(kind::memfd, size);
    REQUIRE(memory.has_value());
    ram_section ram;
    ram_block& block = add_block(ram, "pc.ram", *memory);
    const unique_fd read_only(::open(("/proc/self/fd/" + std::to_string(memory->file().fd)).c_str(), O_RDONLY | O_CLOEXEC));
    REQUIRE(read_only);
    block.options.file = {read_only.get(), 0};
    CHECK_THAT(tried(block), contains("pc.ram/postcopy: unsupported: expected ram_options.file open for writing"));
    const result<ram_memory> another = memory_of(kind::memfd, size);
    REQUIRE(another.has_value());
    block.options.file = another->file();
    CHECK_THAT(tried(block), contains("ram_options.file that is the one mapped"));
    block.options.file = {};
    CHECK(tried(block) == "no error");
    if (lock_memory(memory->span())) {
        CHECK_THAT(tried(block), contains("ram_options.file of the shared mapping, or memory that isn't locked"));
        ::munlock(memory->span().data(), memory->span().size());
    }
    constexpr int future_write = 0x0010; // F_SEAL_FUTURE_WRITE, Linux 5.1
    const unique_fd sealed(::memfd_create("sealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    REQUIRE(sealed);
    REQUIRE(::ftruncate(sealed.get(), size) == 0);
    const result<ram_memory> mapped = ram_memory::file(sealed.get(), 0, size);
    REQUIRE(mapped.has_value());
    if (::fcntl(sealed.get(), F_ADD_SEALS, future_write) != 0) return skip("a kernel without F_SEAL_FUTURE_WRITE");
    CHECK_THAT(tried(add_block(ram, "sealed", *mapped)), contains("ram_options.file without F_SEAL_WRITE and F_SEAL_FUTURE_WRITE"));
}

TEST_CASE("a file system that knows no userfaultfd is refused by name") {
    if (!may_run()) return;
    std::string path = std::string(VMSTATE_GUESTS_DIR) + "/postcopy-XXXXXX";
    const unique_fd fd(::mkstemp(path.data()));
    REQUIRE(fd);
    ::unlink(path.c_str());
    struct statfs system {};
    REQUIRE(::fstatfs(fd.get(), &system) == 0);
    constexpr long tmpfs_magic = 0x01021994;
    if (static_cast<long>(system.f_type) == tmpfs_magic) return skip("the build directory is in a tmpfs");
    REQUIRE(::ftruncate(fd.get(), 4 * page_size) == 0);
    const result<ram_memory> memory = ram_memory::file(fd.get(), 0, 4 * page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    add_block(ram, "disk", *memory);
    const result<void> checked = check_postcopy_support(ram);
    REQUIRE_FALSE(checked);
    CHECK_THAT(checked.error().message(),
        contains("disk/postcopy: unsupported: expected memory that is anonymous, a memfd, or in tmpfs or hugetlbfs"));
}

namespace {

/// What `check_postcopy_support` says in a process that was restricted by `restrict`, which returns false if it can't.
std::string support_in_a_child(const ram_section& ram, bool (*restrict_it)()) {
    std::array<int, 2> pipe{};
    if (::pipe2(pipe.data(), O_CLOEXEC) != 0) return "no pipe";
    const unique_fd from(pipe[0]);
    unique_fd to(pipe[1]);
    const pid_t child = ::fork();
    if (child == 0) {
        std::string text = "not restricted";
        if (restrict_it()) {
            const result<void> checked = check_postcopy_support(ram);
            text = checked ? "no error" : checked.error().message();
        }
        (void)!::write(to.get(), text.data(), text.size());
        ::_exit(0);
    }
    to.reset();
    std::string text;
    std::array<char, 512> part{};
    for (ssize_t got = 0; (got = ::read(from.get(), part.data(), part.size())) > 0;) text.append(part.data(), static_cast<std::size_t>(got));
    ::waitpid(child, nullptr, 0);
    return text;
}
bool become_nobody() { return ::getuid() != 0 || ::setresuid(65534, 65534, 65534) == 0; }
bool filter_userfaultfd() {
    if (!become_nobody() || ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return false;
    std::array<sock_filter, 4> program{{BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)}};
    sock_fprog filter{static_cast<unsigned short>(program.size()), program.data()};
    return ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}

} // namespace

TEST_CASE("a process that may not use userfaultfd is told what to change") {
    const result<ram_memory> memory = memory_of(kind::anonymous, 4 * page_size);
    REQUIRE(memory.has_value());
    ram_section ram;
    add_block(ram, "pc.ram", *memory);
    if (::access("/proc/sys/vm/unprivileged_userfaultfd", R_OK) != 0) return skip("a kernel without userfaultfd");
    const std::string filtered = support_in_a_child(ram, filter_userfaultfd);
    if (filtered == "no error") return skip("/dev/userfaultfd is open to everybody");
    CHECK_THAT(filtered, contains("expected a seccomp filter that permits userfaultfd"));
    const std::string unprivileged = support_in_a_child(ram, become_nobody);
    if (detail::number_in("/proc/sys/vm/unprivileged_userfaultfd") != 0)
        return skip("vm.unprivileged_userfaultfd permits it to everybody");
    CHECK_THAT(unprivileged, contains("expected vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd"));
}
