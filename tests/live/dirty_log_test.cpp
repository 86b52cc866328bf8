// SPDX-License-Identifier: BSL-1.0
// Dirty logs of every kind, against memory that threads (or a guest) write while collects run: what was written before a
// collect began has been collected when it returns, and at the end nothing is missing.
#include <support/catch.hpp>
#include <support/zero_frame.hpp>

#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/ram/kvm_log.hpp>
#include <vmstate/ram/kvm_ring_log.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/ram/merged_log.hpp>
#include <vmstate/ram/pagemap_scan_log.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/ram/userfault_log.hpp>
#include <vmstate/support/unique_fd.hpp>

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

using namespace vmstate;
using vmstate::tests::skip;

namespace {

constexpr std::size_t page_size = 4096;

static_assert(dirty_log<marked_log> && dirty_log<merged_log> && dirty_log<pagemap_scan_log> && dirty_log<userfault_log>);
static_assert(dirty_log<kvm_bitmap_log> && dirty_log<kvm_ring_log> && dirty_log<any_dirty_log>);

/// Guest memory of one kind or another, gone at the end.
class memory {
public:
    enum class kind { anonymous, transparent_huge, memfd, hugetlb };

    static std::optional<memory> map(kind what, std::size_t size) {
        memory mapped(size);
        int flags = MAP_PRIVATE | MAP_ANONYMOUS;
        int fd = -1;
        if (what == kind::memfd) {
            mapped.fd_ = unique_fd(::memfd_create("guest", MFD_CLOEXEC));
            fd = mapped.fd_.get();
            flags = MAP_SHARED;
            if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(size)) != 0) return std::nullopt;
        }
        if (what == kind::hugetlb) flags |= MAP_HUGETLB;
        if (what == kind::transparent_huge) mapped.mapped_size_ = size + huge_page;
        void* const address = ::mmap(nullptr, mapped.mapped_size_, PROT_READ | PROT_WRITE, flags, fd, 0);
        if (address == MAP_FAILED) return std::nullopt;
        mapped.mapped_ = static_cast<std::byte*>(address);
        mapped.begin_ = mapped.mapped_;
        if (what == kind::transparent_huge) {
            const auto place = reinterpret_cast<std::uintptr_t>(address);
            mapped.begin_ += (huge_page - place % huge_page) % huge_page;
            if (::madvise(mapped.begin_, size, MADV_HUGEPAGE) != 0) return std::nullopt;
        }
        return mapped;
    }
    memory(memory&& other) noexcept
        : size_(other.size_)
        , mapped_size_(other.mapped_size_)
        , mapped_(std::exchange(other.mapped_, nullptr))
        , begin_(other.begin_)
        , fd_(std::move(other.fd_)) {}
    memory& operator=(memory&&) = delete;
    ~memory() {
        if (mapped_ != nullptr) ::munmap(mapped_, mapped_size_);
    }

    static constexpr std::size_t huge_page = std::size_t{2} << 20;

    std::span<std::byte> span() const { return {begin_, size_}; }
    std::size_t pages() const { return size_ / page_size; }
    int fd() const { return fd_.get(); }
    /// A counter at the start of each page stands for what the page holds.
    std::atomic_ref<std::uint32_t> counter(std::size_t page) const {
        return std::atomic_ref<std::uint32_t>(*reinterpret_cast<std::uint32_t*>(begin_ + page * page_size));
    }

private:
    explicit memory(std::size_t size) : size_(size), mapped_size_(size) {}

    std::size_t size_;
    std::size_t mapped_size_;
    std::byte* mapped_ = nullptr;
    std::byte* begin_ = nullptr;
    unique_fd fd_;
};

/// The other side of a migration: has of each page what it held when it was last collected.
class follower {
public:
    /// `from` on, pages are marked after they were written: `marked` counts those writes, and only they have to be here.
    explicit follower(const memory& ram, std::size_t from = ~std::size_t{0})
        : marked(ram.pages()), ram_(ram), marked_from_(from), seen_(ram.pages()), dirty_(ram.pages()) {}

    std::vector<std::atomic<std::uint32_t>> marked;

    /// One collect. Everything that was in memory before it has to be here after it.
    void follow(any_dirty_log& log) {
        std::vector<std::uint32_t> before(ram_.pages());
        for (std::size_t i = 0; i < before.size(); ++i)
            before[i] = i < marked_from_ ? ram_.counter(i).load() : marked[i].load();
        const result<std::uint64_t> added = log.collect(dirty_);
        if (!added) {
            failure = added.error().message();
            return;
        }
        if (*added != dirty_.count()) ++miscounted;
        for (page_run run = dirty_.find_next_run(0); run.count != 0;
             run = dirty_.find_next_run(run.first + run.count)) {
            collected += run.count;
            for (std::size_t i = run.first; i < run.first + run.count; ++i) seen_[i] = ram_.counter(i).load();
        }
        dirty_.clear_all();
        for (std::size_t i = 0; i < before.size(); ++i)
            // Counters go up only; one that is behind what was there before is a write that nobody told of.
            if (static_cast<std::int32_t>(seen_[i] - before[i]) < 0) ++missed;
        ++rounds;
    }
    bool has_all() const {
        for (std::size_t i = 0; i < seen_.size(); ++i)
            if (seen_[i] != ram_.counter(i).load()) return false;
        return true;
    }

    std::uint64_t missed = 0;
    std::uint64_t miscounted = 0;
    std::uint64_t collected = 0;
    std::uint64_t rounds = 0;
    std::string failure;

private:
    const memory& ram_;
    std::size_t marked_from_;
    std::vector<std::uint32_t> seen_;
    page_bitmap dirty_;
};

/// What a writer does after each write: nothing, or it marks the page.
using after_write = std::function<void(std::size_t page)>;
const after_write nothing;

/// Threads write pages at random, a few of them again and again, while collects run.
void nothing_is_missed(const memory& ram, any_dirty_log log, const after_write& mark = nothing,
    int writes = 4000) {
    follower destination(ram, mark ? 0 : ram.pages());
    REQUIRE(log.start());
    constexpr unsigned writers = 3;
    std::atomic<unsigned> running{writers};
    std::vector<std::thread> threads;
    for (unsigned t = 0; t < writers; ++t)
        threads.emplace_back([&, t] {
            std::mt19937 random(t);
            for (int i = 0; i < writes; ++i) {
                const std::size_t page = random() % 3 == 0 ? random() % 8 : random() % ram.pages();
                ram.counter(page).fetch_add(1);
                if (mark) {
                    mark(page);
                    ++destination.marked[page];
                }
                if (i % 64 == 0) std::this_thread::yield();
            }
            --running;
        });
    while (running != 0 && destination.failure.empty()) destination.follow(log);
    for (std::thread& thread : threads) thread.join();
    destination.follow(log);
    CHECK(destination.failure.empty());
    CHECK(destination.missed == 0);
    CHECK(destination.miscounted == 0);
    CHECK(destination.has_all());
    CHECK(destination.rounds > 1);
    REQUIRE(log.stop());
    // Writing goes on as if nothing had been.
    for (std::size_t i = 0; i < ram.pages(); ++i) ram.counter(i).fetch_add(1);
}

/// With nobody else about: exactly what is written is told, once; the log can be stopped and started again.
void only_what_is_written_is_told(const memory& ram, any_dirty_log log,
    const after_write& mark = nothing, std::size_t pages_together = 1) {
    for (std::size_t i = 0; i < ram.pages(); ++i) ram.counter(i).fetch_add(1);
    page_bitmap dirty(ram.pages());
    CHECK(log.collect(dirty).error() == errc::invalid_argument);
    for (int time = 0; time < 2; ++time) {
        REQUIRE(log.start());
        CHECK(log.start().error() == errc::invalid_argument);
        page_bitmap small(ram.pages() - 1);
        CHECK(log.collect(small).error() == errc::invalid_argument);
        dirty.clear_all();
        CHECK(log.collect(dirty).value() == 0);
        for (const std::size_t page : {std::size_t{0}, std::size_t{5}, std::size_t{6}, ram.pages() - 1}) {
            ram.counter(page).fetch_add(1);
            if (mark) mark(page);
        }
        page_bitmap expected(ram.pages());
        for (const std::size_t page : {std::size_t{0}, std::size_t{5}, std::size_t{6}, ram.pages() - 1})
            expected.set_range(page / pages_together * pages_together, pages_together);
        dirty.set(5); // known already: not new
        const std::size_t known = 1;
        CHECK(log.collect(dirty).value() == expected.count() - known);
        CHECK(dirty == expected);
        dirty.clear_all();
        CHECK(log.collect(dirty).value() == 0);
        ram.counter(5).fetch_add(1);
        if (mark) mark(5);
        CHECK(log.collect(dirty).value() == pages_together);
        REQUIRE(log.stop());
        REQUIRE(log.stop());
        ram.counter(7).fetch_add(1);
    }
}

constexpr std::size_t few_pages = 2048; // 8 MiB: four huge pages

const char* name_of(memory::kind what) {
    switch (what) {
    case memory::kind::anonymous:
        return "anonymous memory";
    case memory::kind::transparent_huge:
        return "transparent huge pages";
    case memory::kind::memfd:
        return "a memfd";
    case memory::kind::hugetlb:
        return "hugetlb pages";
    }
    return "";
}

} // namespace

TEST_CASE("marked log") {
    const memory ram = memory::map(memory::kind::anonymous, few_pages * page_size).value();
    marked_log log(ram.span().size());
    const after_write mark = [&](std::size_t page) { log.mark(page * page_size + 100, 8); };
    nothing_is_missed(ram, log, mark, 40000);
    only_what_is_written_is_told(ram, log, mark);
}

TEST_CASE("marked log: a write over several pages, and one that leaves the block") {
    marked_log log(10 * page_size);
    page_bitmap dirty(10);
    REQUIRE(log.start());
    log.mark(2 * page_size - 1, page_size + 2);
    CHECK(log.collect(dirty).value() == 3);
    CHECK(dirty.find_next_run(0) == page_run{1, 3});
    log.mark(9 * page_size, ~std::uint64_t{0});
    log.mark(100 * page_size, 1);
    log.mark(0, 0);
    CHECK(log.collect(dirty).value() == 1);
    CHECK(dirty.test(9));
}

TEST_CASE("merged log: a page is dirty where one of them says so") {
    const memory ram = memory::map(memory::kind::anonymous, few_pages * page_size).value();
    marked_log even(ram.span().size()), odd(ram.span().size());
    std::vector<any_dirty_log> logs;
    logs.emplace_back(even);
    logs.emplace_back(odd);
    merged_log log(std::move(logs));
    const after_write mark = [&](std::size_t page) { (page % 2 == 0 ? even : odd).mark(page * page_size, 8); };
    nothing_is_missed(ram, log, mark);
    only_what_is_written_is_told(ram, log, mark);

    REQUIRE(log.start());
    even.mark(0, 3 * page_size);
    odd.mark(2 * page_size, 2 * page_size);
    page_bitmap dirty(few_pages);
    CHECK(log.collect(dirty).value() == 4);
    REQUIRE(log.stop());
    CHECK(log.collect(dirty).has_error());
    // One that can't be started starts none.
    REQUIRE(odd.start());
    CHECK(log.start().has_error());
    CHECK(even.start());
}

TEST_CASE("PAGEMAP_SCAN log") {
    if (result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    const auto what = GENERATE(
        memory::kind::anonymous, memory::kind::transparent_huge, memory::kind::memfd, memory::kind::hugetlb);
    INFO(name_of(what));
    const std::optional<memory> ram = memory::map(what, few_pages * page_size);
    if (!ram) return skip(std::string("no ") + name_of(what) + " here");
    nothing_is_missed(*ram, pagemap_scan_log(ram->span()));
    const std::size_t together = what == memory::kind::hugetlb ? memory::huge_page / page_size : 1;
    if (what == memory::kind::transparent_huge) return; // by then it is split in ways of the kernel's own
    only_what_is_written_is_told(*ram, pagemap_scan_log(ram->span()), nothing, together);
}

TEST_CASE("PAGEMAP_SCAN log: pages that were never there are told when they come") {
    if (result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    const memory ram = memory::map(memory::kind::anonymous, few_pages * page_size).value();
    pagemap_scan_log log(ram.span());
    page_bitmap dirty(ram.pages());
    REQUIRE(log.start());
    ram.counter(1000).fetch_add(1);
    ram.counter(3).fetch_add(1);
    REQUIRE(log.collect(dirty));
    CHECK(dirty.test(1000));
    CHECK(dirty.test(3));
    CHECK(dirty.count() < ram.pages());
    REQUIRE(log.stop());
}

TEST_CASE("PAGEMAP_SCAN log: more stretches than one call brings") {
    if (result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    constexpr std::size_t pages = 16384;
    const memory ram = memory::map(memory::kind::anonymous, pages * page_size).value();
    for (std::size_t i = 0; i < pages; ++i) ram.counter(i).fetch_add(1);
    pagemap_scan_log log(ram.span());
    REQUIRE(log.start());
    page_bitmap expected(pages);
    for (std::size_t i = 0; i < pages; i += 2) {
        ram.counter(i).fetch_add(1);
        expected.set(i);
    }
    page_bitmap dirty(pages);
    CHECK(log.collect(dirty).value() == pages / 2);
    CHECK(dirty == expected);
}

TEST_CASE("PAGEMAP_SCAN log: target pages larger and smaller than the host's") {
    if (result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    const memory ram = memory::map(memory::kind::anonymous, 64 * page_size).value();
    for (std::size_t i = 0; i < ram.pages(); ++i) ram.counter(i).fetch_add(1);
    for (const std::size_t target : {std::size_t{1024}, std::size_t{16384}}) {
        pagemap_scan_log log(ram.span(), target);
        REQUIRE(log.start());
        ram.counter(5).fetch_add(1);
        page_bitmap dirty(ram.span().size() / target);
        REQUIRE(log.collect(dirty));
        CHECK(dirty.find_next_run(0) == (target == 1024 ? page_run{20, 4} : page_run{1, 1}));
        CHECK(dirty.count() == (target == 1024 ? 4 : 1));
        REQUIRE(log.stop());
    }
}

TEST_CASE("PAGEMAP_SCAN log: after memory was mapped anew it fails, and goes on failing") {
    if (result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    const memory ram = memory::map(memory::kind::anonymous, 64 * page_size).value();
    pagemap_scan_log log(ram.span());
    REQUIRE(log.start());
    REQUIRE(::mmap(ram.span().data() + 8 * page_size, page_size, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED);
    page_bitmap dirty(ram.pages());
    CHECK(log.collect(dirty).has_error());
    CHECK(log.collect(dirty).has_error());
}

TEST_CASE("userfault log") {
    const auto what = GENERATE(
        memory::kind::anonymous, memory::kind::transparent_huge, memory::kind::memfd, memory::kind::hugetlb);
    // As this kernel can, and as one before Linux 6.4 has to.
    const std::uint64_t without = GENERATE(std::uint64_t{0}, userfault_feature::wp_unpopulated);
    INFO(name_of(what));
    const std::optional<memory> ram = memory::map(what, few_pages * page_size);
    if (!ram) return skip(std::string("no ") + name_of(what) + " here");
    userfault_log::options how;
    how.without_features = without;
    if (what == memory::kind::hugetlb) how.host_page_size = memory::huge_page;
    {
        userfault_log log(ram->span(), how);
        if (result<void> there = log.start(); there.has_error() && there.error() == errc::unsupported)
            return skip(there.error().message());
    }
    nothing_is_missed(*ram, userfault_log(ram->span(), how));
    only_what_is_written_is_told(
        *ram, userfault_log(ram->span(), how), nothing, how.host_page_size / page_size);
}

TEST_CASE("userfault log: memory nobody has touched is protected, too") {
    const std::uint64_t without = GENERATE(std::uint64_t{0}, userfault_feature::wp_unpopulated);
    const memory ram = memory::map(memory::kind::anonymous, 64 * page_size).value();
    userfault_log::options how;
    how.without_features = without;
    userfault_log log(ram.span(), how);
    if (result<void> started = log.start(); !started) return skip(started.error().message());
    page_bitmap dirty(ram.pages());
    ram.counter(9).fetch_add(1);
    CHECK(log.collect(dirty).value() == 1);
    CHECK(dirty.test(9));
    ram.counter(9).fetch_add(1);
    ram.counter(63).fetch_add(1);
    CHECK(log.collect(dirty).value() == 1);
    REQUIRE(log.stop());
}

TEST_CASE("userfault log: a thread that waits for a page goes on when the log stops") {
    const memory ram = memory::map(memory::kind::anonymous, few_pages * page_size).value();
    for (int time = 0; time < 20; ++time) {
        userfault_log log(ram.span());
        if (result<void> started = log.start(); !started) return skip(started.error().message());
        std::atomic<bool> end{false};
        std::thread writer([&] {
            for (std::size_t i = 0; !end; ++i) ram.counter(i % ram.pages()).fetch_add(1);
        });
        while (ram.counter(40).load() == static_cast<std::uint32_t>(time)) std::this_thread::yield();
        const result<void> stopped = log.stop();
        end = true;
        writer.join();
        REQUIRE(stopped);
        for (std::size_t i = 0; i < ram.pages(); ++i) ram.counter(i).store(static_cast<std::uint32_t>(time) + 1);
    }
}

TEST_CASE("present pages: memory nobody has touched isn't there, what was written is") {
    const memory ram = memory::map(memory::kind::anonymous, few_pages * page_size).value();
    page_bitmap present(ram.pages());
    CHECK(find_present_pages(ram.span(), page_size, present).value() == 0);
    ram.counter(3).fetch_add(1);
    ram.counter(2000).fetch_add(1);
    std::uint32_t read = ram.counter(7).load(); // now it is the page of zeros
    CHECK(read == 0);
    const result<pagemap> map = pagemap::open();
    REQUIRE(map.has_value());
    std::uint64_t entries = 0;
    const auto count = [&](std::uint64_t, std::uint64_t length) { entries += length / page_size; };
    REQUIRE(map->read_entries(ram.span(), page_size, count));
    CHECK(entries >= 2);
    CHECK(entries <= 3);
    if (result<void> there = pagemap_scan_log::probe(); !there) return skip(there.error().message());
    CHECK(find_present_pages(ram.span(), page_size, present).value() == (vmstate::tests::has_zero_frame() ? 2U : 3U));
    CHECK(present.test(3));
    CHECK(present.test(2000));
    // What a running log has protected hides nothing.
    pagemap_scan_log log(ram.span());
    REQUIRE(log.start());
    ram.counter(4).fetch_add(1);
    REQUIRE(find_present_pages(ram.span(), page_size, present));
    CHECK(present.test(4));
    page_bitmap anew(ram.pages());
    REQUIRE(find_present_pages(ram.span(), page_size, anew));
    CHECK(anew.test(3));
    CHECK(anew.test(2000));
}

TEST_CASE("present pages: of shared memory the file knows what the page table doesn't") {
    const memory ram = memory::map(memory::kind::memfd, 64 * page_size).value();
    // Written by somebody else: this mapping has never been touched there.
    REQUIRE(::pwrite(ram.fd(), "x", 1, 10 * page_size) == 1);
    page_bitmap present(ram.pages());
    CHECK(find_present_pages(ram.span(), page_size, present, {ram.fd(), 0}).value() == 1);
    CHECK(present.test(10));
    // A part of the file.
    page_bitmap part(32);
    CHECK(find_present_pages(ram.span().subspan(8 * page_size, 32 * page_size), page_size, part, {ram.fd(), 8 * page_size}).value() == 1);
    CHECK(part.test(2));
    page_bitmap rest(32);
    CHECK(find_present_pages(ram.span().subspan(32 * page_size), page_size, rest, {ram.fd(), 32 * page_size}).value() == 0);
    // Without the file nothing is known.
    page_bitmap unknown(ram.pages());
    CHECK(find_present_pages(ram.span(), page_size, unknown).value() == ram.pages());
}

// ---- KVM

#if defined(__x86_64__)

namespace {

constexpr std::size_t guest_pages = 1200; // more than the smallest ring has entries for
constexpr std::uint32_t guest_rounds = 20;
constexpr std::size_t guest_memory = (guest_pages + 8) * page_size; // the device has the last few pages

/// A virtual machine with one vCPU in flat 32-bit mode, whose program adds 1 to the counter of each page, over and over.
class tiny_guest {
public:
    static constexpr std::uint64_t ram_address = 0x100000;

    /// `ring_entries`: 0 for none. Why it can't be is in `missing`.
    tiny_guest(const memory& ram, std::uint32_t ring_entries, std::uint32_t rounds)
        : code_(memory::map(memory::kind::anonymous, page_size).value()) {
        set_up(ram, ring_entries, rounds);
    }
    ~tiny_guest() {
        if (run_ != nullptr) ::munmap(run_, run_size_);
    }

    /// Runs until the program has ended; what it stopped for otherwise.
    std::string run() {
        for (;;) {
            if (::ioctl(vcpu_.get(), KVM_RUN, 0) != 0) {
                if (errno == EINTR || errno == EAGAIN) continue;
                return "KVM_RUN: " + std::string(std::strerror(errno));
            }
            if (run_->exit_reason == KVM_EXIT_HLT) return {};
            if (run_->exit_reason == KVM_EXIT_IO) continue;
            if (run_->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
                ++ring_was_full;
                if (result<void> harvested = ring->harvest(); !harvested) return harvested.error().message();
                continue;
            }
            return "exit " + std::to_string(run_->exit_reason);
        }
    }
    /// Once more, after it has ended.
    std::string run_again(std::uint32_t rounds) { return start(rounds) ? run() : "registers"; }
    int vm_fd() const { return vm_.get(); }
    /// The vCPU's ring as KVM sees it.
    std::vector<kvm_dirty_gfn> read_ring(std::uint32_t entries) const {
        const std::size_t bytes = entries * sizeof(kvm_dirty_gfn);
        void* const mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED, vcpu_.get(), KVM_DIRTY_LOG_PAGE_OFFSET * page_size);
        if (mapped == MAP_FAILED) throw std::runtime_error("mmap of a dirty ring");
        const auto* const first = static_cast<const kvm_dirty_gfn*>(mapped);
        std::vector<kvm_dirty_gfn> all(first, first + entries);
        ::munmap(mapped, bytes);
        return all;
    }

    std::string missing;
    std::optional<kvm_dirty_ring> ring;
    std::vector<kvm_slot> slots;
    int ring_was_full = 0;

private:
    void set_up(const memory& ram, std::uint32_t ring_entries, std::uint32_t rounds) {
        kvm_ = unique_fd(::open("/dev/kvm", O_RDWR | O_CLOEXEC));
        if (!kvm_) return missing_is("no /dev/kvm");
        vm_ = unique_fd(::ioctl(kvm_.get(), KVM_CREATE_VM, 0));
        if (!vm_) return missing_is("KVM_CREATE_VM");
        if (ring_entries != 0) {
            result<kvm_dirty_ring> enabled = kvm_dirty_ring::enable(vm_.get(), ring_entries);
            if (!enabled) {
                missing = enabled.error().message();
                return;
            }
            ring.emplace(std::move(*enabled));
        }
        // start: mov edi, ebx; mov ecx, edx; again: inc dword [edi]; add edi, ebp; out 0x10, al; dec ecx; jnz again;
        // dec eax; jnz start; hlt. The output lets KVM look after each page whether the ring is full: one that emulates
        // may otherwise carry out more writes in one go than a small ring has room for.
        constexpr unsigned char program[] = {0x89, 0xdf, 0x89, 0xd1, 0xff, 0x07, 0x03, 0xfd, 0xe6, 0x10, 0x49, 0x75,
            0xf7, 0x48, 0x75, 0xf0, 0xf4};
        std::memcpy(code_.span().data(), program, sizeof program);
        kvm_userspace_memory_region region{};
        region.slot = 0;
        region.memory_size = page_size;
        region.userspace_addr = reinterpret_cast<std::uintptr_t>(code_.span().data());
        if (::ioctl(vm_.get(), KVM_SET_USER_MEMORY_REGION, &region) != 0) return missing_is("a memory slot");
        // Two slots for one block, as a PC has it.
        const std::size_t half = ram.span().size() / 2;
        slots = {{1, 0, ram_address, ram.span().first(half), 0},
            {2, 0, ram_address + half, ram.span().subspan(half), half}};
        for (const kvm_slot& slot : slots) {
            region.slot = slot.slot;
            region.guest_phys_addr = slot.guest_phys_addr;
            region.memory_size = slot.memory.size();
            region.userspace_addr = reinterpret_cast<std::uintptr_t>(slot.memory.data());
            if (::ioctl(vm_.get(), KVM_SET_USER_MEMORY_REGION, &region) != 0) return missing_is("a memory slot");
        }
        vcpu_ = unique_fd(::ioctl(vm_.get(), KVM_CREATE_VCPU, 0));
        if (!vcpu_) return missing_is("KVM_CREATE_VCPU");
        if (ring)
            if (result<void> added = ring->add_vcpu(vcpu_.get()); !added) {
                missing = added.error().message();
                return;
            }
        const int run_size = ::ioctl(kvm_.get(), KVM_GET_VCPU_MMAP_SIZE, 0);
        void* const run = ::mmap(
            nullptr, static_cast<std::size_t>(run_size), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu_.get(), 0);
        if (run == MAP_FAILED) return missing_is("mmap of a vCPU");
        run_ = static_cast<kvm_run*>(run);
        run_size_ = static_cast<std::size_t>(run_size);
        kvm_sregs sregs{};
        ::ioctl(vcpu_.get(), KVM_GET_SREGS, &sregs);
        kvm_segment flat{};
        flat.limit = 0xffffffff;
        flat.present = flat.db = flat.s = flat.g = 1;
        flat.selector = 16;
        flat.type = 3;
        sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = flat;
        flat.selector = 8;
        flat.type = 11;
        sregs.cs = flat;
        sregs.cr0 |= 1;
        if (::ioctl(vcpu_.get(), KVM_SET_SREGS, &sregs) != 0 || !start(rounds)) return missing_is("registers");
    }
    bool start(std::uint32_t rounds) {
        kvm_regs regs{};
        regs.rip = 0;
        regs.rflags = 2;
        regs.rax = rounds;
        regs.rbx = ram_address;
        regs.rdx = guest_pages;
        regs.rbp = page_size;
        return ::ioctl(vcpu_.get(), KVM_SET_REGS, &regs) == 0;
    }
    void missing_is(const char* what) { missing = std::string(what) + ": " + std::strerror(errno); }

    unique_fd kvm_;
    unique_fd vm_;
    unique_fd vcpu_;
    memory code_;
    kvm_run* run_ = nullptr;
    std::size_t run_size_ = 0;
};

/// A guest and a thread of the program's own (a device) write while collects run.
template <class Log>
void no_write_of_the_guest_is_missed(tiny_guest& guest, const memory& ram, Log& log) {
    any_dirty_log any(log);
    follower destination(ram, guest_pages);
    REQUIRE(any.start());
    CHECK(any.start().error() == errc::invalid_argument);
    std::atomic<int> running{2};
    std::string stopped;
    std::thread vcpu([&] {
        stopped = guest.run();
        --running;
    });
    std::thread device([&] {
        std::mt19937 random(5);
        for (int i = 0; i < 2000; ++i) {
            // Beside the guest's counters, which the guest changes in steps of its own.
            const std::size_t page = ram.pages() - 1 - random() % 4;
            ram.counter(page).fetch_add(1);
            log.mark(page * page_size, 4);
            ++destination.marked[page];
        }
        --running;
    });
    while (running != 0 && destination.failure.empty()) {
        destination.follow(any);
        // Collects one after the other could protect each page again before the guest's write to it has succeeded, which
        // takes long where KVM is itself emulated.
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    vcpu.join();
    device.join();
    destination.follow(any);
    CHECK(stopped == "");
    CHECK(destination.failure == "");
    CHECK(destination.missed == 0);
    CHECK(destination.miscounted == 0);
    CHECK(destination.has_all());
    CHECK(ram.counter(guest_pages - 1).load() == guest_rounds);
    page_bitmap dirty(ram.pages());
    CHECK(any.collect(dirty).value() == 0);
    REQUIRE(any.stop());
    REQUIRE(any.stop());
    CHECK(any.collect(dirty).error() == errc::invalid_argument);
}

} // namespace

TEST_CASE("KVM's dirty bitmap") {
    const memory ram = memory::map(memory::kind::anonymous, guest_memory).value();
    tiny_guest guest(ram, 0, guest_rounds);
    if (!guest.missing.empty()) return skip(guest.missing);
    kvm_bitmap_log log(guest.vm_fd(), guest.slots, guest_memory);
    no_write_of_the_guest_is_missed(guest, ram, log);
}

TEST_CASE("KVM's dirty ring") {
    const std::uint32_t entries = GENERATE(1024U, 65536U);
    const memory ram = memory::map(memory::kind::anonymous, guest_memory).value();
    tiny_guest guest(ram, entries, guest_rounds);
    if (!guest.missing.empty()) return skip(guest.missing);
    kvm_ring_log log(*guest.ring, guest.slots, guest_memory);
    no_write_of_the_guest_is_missed(guest, ram, log);
}

TEST_CASE("KVM's dirty ring: a vCPU whose ring is full goes on after a harvest, and nothing is lost") {
    const memory ram = memory::map(memory::kind::anonymous, guest_memory).value();
    tiny_guest guest(ram, 1024, 2);
    if (!guest.missing.empty()) return skip(guest.missing);
    kvm_ring_log log(*guest.ring, guest.slots, guest_memory);
    REQUIRE(log.start());
    CHECK(guest.run() == "");
    CHECK(guest.ring_was_full > 0);
    page_bitmap dirty(ram.pages());
    CHECK(log.collect(dirty).value() == guest_pages);
    CHECK(dirty.find_next_run(0) == page_run{0, guest_pages});
}

TEST_CASE("KVM's dirty ring: KVM has all of it back after a harvest that signals disturb") {
    const memory ram = memory::map(memory::kind::anonymous, guest_memory).value();
    struct ::sigaction before {};
    struct ::sigaction ignored {};
    ignored.sa_handler = [](int) {};
    REQUIRE(::sigaction(SIGUSR1, &ignored, &before) == 0);
    constexpr int harvests = 50;
    std::size_t not_back = 0;
    for (int i = 0; i != harvests; ++i) {
        constexpr std::uint32_t entries = 2048;
        tiny_guest guest(ram, entries, 1);
        if (!guest.missing.empty()) return skip(guest.missing);
        kvm_ring_log log(*guest.ring, guest.slots, guest_memory);
        REQUIRE(log.start());
        REQUIRE(guest.run() == "");
        std::atomic<bool> harvested = false;
        std::thread disturbing([&harvested, harvesting = ::pthread_self()] {
            while (!harvested) ::pthread_kill(harvesting, SIGUSR1);
        });
        page_bitmap dirty(ram.pages());
        const result<std::uint64_t> collected = log.collect(dirty);
        harvested = true;
        disturbing.join();
        REQUIRE(collected.value() == guest_pages);
        // A page whose entry KVM hasn't taken back isn't protected, nor all that it counts when it is disturbed: the guest
        // could write them, and nobody would hear of it. (Of a KVM that emulates one always hears.)
        for (const kvm_dirty_gfn& entry : guest.read_ring(entries))
            if (entry.flags != 0) ++not_back;
        REQUIRE(guest.run_again(1) == "");
        page_bitmap again(ram.pages());
        CHECK(log.collect(again).value() == guest_pages);
    }
    REQUIRE(::sigaction(SIGUSR1, &before, nullptr) == 0);
    CHECK(not_back == 0);
}

TEST_CASE("KVM logs: what can't be is told") {
    const memory ram = memory::map(memory::kind::anonymous, guest_memory).value();
    tiny_guest guest(ram, 0, 1);
    if (!guest.missing.empty()) return skip(guest.missing);
    // Rings come before vCPUs.
    CHECK(kvm_dirty_ring::enable(guest.vm_fd()).has_error());
    CHECK(kvm_dirty_ring::enable(guest.vm_fd(), 1000).has_error());
    // A slot that isn't there as it is said to be; the other one isn't left with logging on.
    guest.slots[1].guest_phys_addr += 0x40000000;
    guest.slots[1].memory = guest.slots[1].memory.first(page_size);
    kvm_bitmap_log log(guest.vm_fd(), guest.slots, guest_memory);
    CHECK(log.start().error() == errc::io);
    kvm_dirty_log bitmap{};
    std::vector<std::uint64_t> words(guest_pages);
    bitmap.slot = 1;
    bitmap.dirty_bitmap = words.data();
    CHECK(::ioctl(guest.vm_fd(), KVM_GET_DIRTY_LOG, &bitmap) != 0);
}

#endif
