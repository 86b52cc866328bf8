// SPDX-License-Identifier: BSL-1.0
// page_bitmap against std::vector<bool>, and marked by several threads while it is taken.
#include <support/catch.hpp>

#include <vmstate/ram/page_bitmap.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <random>
#include <thread>
#include <vector>

using namespace vmstate;

namespace {

/// The bits one by one, and that nothing is set beyond the end.
bool same(const page_bitmap& bitmap, const std::vector<bool>& model) {
    if (bitmap.size() != model.size()) return false;
    for (std::size_t i = 0; i < model.size(); ++i)
        if (bitmap.test(i) != model[i]) return false;
    if (model.size() % 64 != 0 && (bitmap.words().back() >> (model.size() % 64)) != 0) return false;
    return bitmap.words().size() == (model.size() + 63) / 64;
}
std::size_t ones(const std::vector<bool>& model) {
    return static_cast<std::size_t>(std::count(model.begin(), model.end(), true));
}

} // namespace

TEST_CASE("a page bitmap does what a vector of bools does") {
    std::mt19937 random(GENERATE(1U, 2U, 3U));
    const std::size_t size = GENERATE(std::size_t{1}, std::size_t{63}, std::size_t{64}, std::size_t{65},
        std::size_t{128}, std::size_t{1000}, std::size_t{4096});
    const auto below = [&](std::size_t limit) {
        return std::uniform_int_distribution<std::size_t>(0, limit - 1)(random);
    };
    page_bitmap bitmap(size);
    std::vector<bool> model(size);
    bool right = same(bitmap, model) && bitmap.none();
    for (int step = 0; step < 400 && right; ++step) {
        const std::size_t page = below(size);
        const std::size_t first = below(size + 1);
        const std::size_t count = below(size - first + 1);
        const std::size_t was =
            static_cast<std::size_t>(std::count(model.begin() + static_cast<std::ptrdiff_t>(first),
                model.begin() + static_cast<std::ptrdiff_t>(first + count), true));
        const auto fill = [&](bool value) {
            for (std::size_t i = first; i < first + count; ++i) model[i] = value;
        };
        right = bitmap.count(first, count) == was;
        switch (below(10)) {
        case 0:
            bitmap.set(page);
            model[page] = true;
            break;
        case 1:
            bitmap.clear(page);
            model[page] = false;
            break;
        case 2:
            right = right && bitmap.set_atomic(page) == !model[page];
            model[page] = true;
            break;
        case 3:
            right = right && bitmap.test_and_clear_atomic(page) == model[page];
            model[page] = false;
            break;
        case 4:
            right = right && bitmap.set_range(first, count) == count - was;
            fill(true);
            break;
        case 5:
            bitmap.clear_range(first, count);
            fill(false);
            break;
        case 6:
            bitmap.set_range_atomic(first, count);
            fill(true);
            break;
        case 7: { // the pages of `other` that are new
            page_bitmap other(size);
            other.set_range(first, count);
            right = right && bitmap.merge(other) == count - was && other.count() == count;
            fill(true);
            break;
        }
        case 8: {
            page_bitmap other(size);
            other.set_range(first, count);
            right = right && bitmap.merge_and_clear(other) == count - was && other.none();
            fill(true);
            break;
        }
        case 9: {
            page_bitmap other(size);
            other.set_range(first, count);
            right = right && bitmap.subtract(other) == was && other.count() == count;
            fill(false);
            break;
        }
        }
        right = right && same(bitmap, model) && bitmap.count() == ones(model) && bitmap.none() == (ones(model) == 0);
    }
    CHECK(right);
    bitmap.clear_all();
    CHECK(same(bitmap, std::vector<bool>(size)));
}

TEST_CASE("runs of pages are found from any page on") {
    std::mt19937 random(7);
    const std::size_t size = GENERATE(std::size_t{1}, std::size_t{64}, std::size_t{130}, std::size_t{777});
    const unsigned share = GENERATE(0U, 3U, 50U, 97U, 100U);
    page_bitmap bitmap(size);
    std::vector<bool> model(size);
    for (std::size_t i = 0; i < size; ++i)
        if (random() % 100 < share) {
            bitmap.set(i);
            model[i] = true;
        }
    bool right = true;
    for (std::size_t from = 0; from <= size; ++from) {
        page_run expected{from, 0};
        while (expected.first < size && !model[expected.first]) ++expected.first;
        while (expected.first + expected.count < size && model[expected.first + expected.count]) ++expected.count;
        right = right && bitmap.find_next_run(from) == expected;
    }
    CHECK(right);
}

TEST_CASE("an empty bitmap has no pages") {
    page_bitmap bitmap;
    CHECK(bitmap.size() == 0);
    CHECK(bitmap.none());
    CHECK(bitmap.find_next_run(0) == page_run{0, 0});
    CHECK(bitmap.set_range(0, 0) == 0);
}

TEST_CASE("every page that threads mark is taken exactly once for each time it was clear") {
    constexpr std::size_t size = 1000; // several threads in each word, and a word that isn't full
    constexpr std::size_t threads = 4;
    constexpr int rounds = 20000;
    page_bitmap marked(size);
    std::atomic<std::uint64_t> became_set{0};
    std::atomic<std::size_t> running{threads};
    std::vector<std::thread> markers;
    for (std::size_t t = 0; t < threads; ++t)
        markers.emplace_back([&, t] {
            std::mt19937 random(static_cast<unsigned>(t));
            std::uint64_t mine = 0;
            for (int i = 0; i < rounds; ++i) mine += marked.set_atomic(random() % size) ? 1 : 0;
            became_set += mine;
            --running;
        });
    std::uint64_t taken = 0;
    bool clean = true;
    const auto take = [&] {
        page_bitmap into(size);
        const std::size_t added = into.merge_and_clear(marked);
        clean = clean && added == into.count();
        taken += added;
    };
    while (running != 0) take();
    for (std::thread& marker : markers) marker.join();
    take();
    CHECK(clean);
    CHECK(taken == became_set);
    CHECK(marked.none());
}

TEST_CASE("of several threads that take a page only one gets it") {
    constexpr std::size_t size = 4096;
    page_bitmap pages(size);
    pages.set_range(0, size);
    std::atomic<std::uint64_t> got{0};
    std::vector<std::thread> takers;
    for (int t = 0; t < 3; ++t)
        takers.emplace_back([&] {
            for (std::size_t i = 0; i < size; ++i) got += pages.test_and_clear_atomic(i) ? 1U : 0U;
        });
    for (std::thread& taker : takers) taker.join();
    CHECK(got == size);
    CHECK(pages.none());
}
