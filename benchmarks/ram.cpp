// SPDX-License-Identifier: BSL-1.0
//
// What finding pages costs: zero pages in touched zero memory against a plain AVX2 read of it, pages that are there in
// memory nobody touched, and the dirty pages of 1 GiB, 1% of them, by PAGEMAP_SCAN against the bare ioctl. The contenders
// take turns within each round, so that a machine whose speed drifts treats them alike; compare medians of one run: the
// counter `ratio` is our time over the other's. The limits are 1.11 for zero pages (90% of the read) and 1.2 for dirty
// ones. VMSTATE_BENCH_GIB sets how much zero memory is read (2; the goal speaks of 8).
#include <benchmark/benchmark.h>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/ram/pagemap_scan_log.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/ram/userfault.hpp>

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

constexpr std::size_t page_size = 4096;

struct mapping {
    explicit mapping(std::size_t bytes)
        : size(bytes), address(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
    mapping(const mapping&) = delete;
    mapping& operator=(const mapping&) = delete;
    ~mapping() { ::munmap(address, size); }
    std::span<std::byte> span() const { return {static_cast<std::byte*>(address), size}; }

    std::size_t size;
    void* address;
};

double seconds(auto&& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}
double median(std::vector<double>& times) {
    std::nth_element(times.begin(), times.begin() + static_cast<std::ptrdiff_t>(times.size() / 2), times.end());
    return times[times.size() / 2];
}

using four_quads [[gnu::vector_size(32)]] = long long;

/// The limit: every byte goes through a register, and nothing is decided.
[[gnu::target("avx2"), gnu::noinline]] bool read_all(std::span<const std::byte> memory) {
    four_quads any[4] = {};
    for (std::size_t i = 0; i != memory.size(); i += 128)
        for (std::size_t k = 0; k != 4; ++k) {
            four_quads v;
            std::memcpy(&v, memory.data() + i + 32 * k, 32);
            any[k] |= v;
        }
    const four_quads all = (any[0] | any[1]) | (any[2] | any[3]);
    return (all[0] | all[1] | all[2] | all[3]) == 0;
}

/// 2 MiB pages or 4 KiB ones behind the memory.
void zero_pages(benchmark::State& state) {
    if (__builtin_cpu_supports("avx2") == 0) return state.SkipWithError("no AVX2 to compare with");
    const char* const gib = std::getenv("VMSTATE_BENCH_GIB");
    const mapping ram(static_cast<std::size_t>(std::max(1, gib != nullptr ? std::atoi(gib) : 2)) << 30);
    ::madvise(ram.address, ram.size, state.range(0) != 0 ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    std::memset(ram.address, 0, ram.size);
    std::vector<double> ours;
    std::vector<double> plain;
    for (auto _ : state) {
        std::size_t found = 0;
        ours.push_back(seconds([&] {
            for (std::size_t i = 0; i != ram.size; i += page_size)
                found += vmstate::is_zero_page(ram.span().subspan(i, page_size)) ? 1 : 0;
        }));
        bool zero = false;
        plain.push_back(seconds([&] { zero = read_all(ram.span()); }));
        if (found != ram.size / page_size || !zero) return state.SkipWithError("zero memory that isn't zero");
    }
    state.counters["GB/s"] = static_cast<double>(ram.size) / median(ours) / 1e9;
    state.counters["plain_GB/s"] = static_cast<double>(ram.size) / median(plain) / 1e9;
    state.counters["ratio"] = median(ours) / median(plain);
}

/// 8 GiB that nobody touched.
void absent_pages(benchmark::State& state) {
    const mapping ram(std::size_t{8} << 30);
    vmstate::page_bitmap present(ram.size / page_size);
    std::vector<double> times;
    for (auto _ : state)
        times.push_back(seconds([&] {
            if (vmstate::find_present_pages(ram.span(), page_size, present).value() != 0)
                state.SkipWithError("pages where none should be");
        }));
    state.counters["ms"] = median(times) * 1e3;
}

/// The kernel's call and nothing else, with room for every answer.
struct bare_ioctl {
    struct region {
        std::uint64_t start, end, categories;
    };
    struct arguments {
        std::uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
    };
    explicit bare_ioctl(std::span<std::byte> memory)
        : fd(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)), regions(memory.size() / page_size) {
        scan = {sizeof scan, 1, reinterpret_cast<std::uintptr_t>(memory.data()),
            reinterpret_cast<std::uintptr_t>(memory.data()) + memory.size(), 0,
            reinterpret_cast<std::uintptr_t>(regions.data()), regions.size(), 0, 0, 2, 0, 2};
    }
    long collect() { return ::ioctl(fd.get(), _IOWR('f', 16, arguments), &scan); }

    vmstate::unique_fd fd;
    std::vector<region> regions;
    arguments scan{};
};

void dirty_pages(benchmark::State& state) {
    if (vmstate::result<void> there = vmstate::pagemap_scan_log::probe(); !there)
        return state.SkipWithError(there.error().message().c_str());
    const mapping ram(std::size_t{1} << 30);
    ::madvise(ram.address, ram.size, MADV_NOHUGEPAGE);
    std::memset(ram.address, 1, ram.size);
    const std::size_t pages = ram.size / page_size;
    vmstate::pagemap_scan_log log(ram.span());
    log.start().value();
    bare_ioctl bare(ram.span());
    vmstate::page_bitmap dirty(pages);
    std::vector<double> ours;
    std::vector<double> plain;
    const auto write = [&] {
        for (std::size_t i = 0; i < pages; i += 100) ram.span()[i * page_size] ^= std::byte{1};
    };
    const std::size_t expected = (pages + 99) / 100;
    for (auto _ : state) {
        write();
        std::uint64_t collected = 0;
        dirty.clear_all();
        ours.push_back(seconds([&] { collected = log.collect(dirty).value(); }));
        write();
        long found = 0;
        plain.push_back(seconds([&] { found = bare.collect(); }));
        if (collected != expected || found != static_cast<long>(expected))
            return state.SkipWithError("not the pages that were written");
    }
    state.counters["ms"] = median(ours) * 1e3;
    state.counters["bare_ms"] = median(plain) * 1e3;
    state.counters["ratio"] = median(ours) / median(plain);
}

BENCHMARK(zero_pages)->Name("zero_pages/4_KiB_behind")->Arg(0)->Iterations(11)->Unit(benchmark::kMillisecond);
BENCHMARK(zero_pages)->Name("zero_pages/2_MiB_behind")->Arg(1)->Iterations(11)->Unit(benchmark::kMillisecond);
BENCHMARK(absent_pages)->Name("absent_pages/8_GiB")->Iterations(51)->Unit(benchmark::kMillisecond);
BENCHMARK(dirty_pages)->Name("dirty_pages/1_GiB_1_percent")->Iterations(51)->Unit(benchmark::kMillisecond);

} // namespace
