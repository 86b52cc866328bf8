// SPDX-License-Identifier: BSL-1.0
//
// Plays the guest of a machine that comes by postcopy, where nobody runs it: threads read its memory in random order while it
// arrives, and later it is checked that each page was whole when it was read. Depends on the standard library alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <span>
#include <thread>
#include <vector>

namespace park {

class reader_of_guest {
public:
    static constexpr std::size_t page_size = 4096;
    static constexpr unsigned threads = 2; ///< so that two wait at once, now and then for the same page

    explicit reader_of_guest(const std::vector<std::span<const std::byte>>& blocks) {
        for (const std::span<const std::byte>& block : blocks)
            for (std::size_t at = 0; at + page_size <= block.size(); at += page_size) pages_.push_back(block.subspan(at, page_size));
        for (std::vector<std::uint64_t>& one : seen_) one.resize(pages_.size());
    }
    reader_of_guest(const reader_of_guest&) = delete;
    reader_of_guest& operator=(const reader_of_guest&) = delete;
    ~reader_of_guest() { join(); }

    /// The guest runs from here on: any page may be missing, and whoever reads it waits until it is there.
    void start() {
        for (unsigned number = 0; number != threads; ++number) readers_.emplace_back([this, number] { read(number); });
    }
    /// Returns when every page has been read.
    void join() {
        for (std::thread& one : readers_) one.join();
        readers_.clear();
    }
    std::size_t pages() const noexcept { return pages_.size(); }
    /// After `join`, with all of the memory here: how many pages aren't what a reader has seen. Nobody writes them, so one
    /// that is, was whole when it was read.
    std::size_t count_changed() const {
        std::size_t changed = 0;
        for (std::size_t i = 0; i != pages_.size(); ++i) {
            const std::uint64_t now = sum(pages_[i]);
            if (std::any_of(seen_.begin(), seen_.end(), [&](const std::vector<std::uint64_t>& one) { return one[i] != now; }))
                ++changed;
        }
        return changed;
    }

private:
    void read(unsigned number) {
        std::vector<std::size_t> order(pages_.size());
        std::iota(order.begin(), order.end(), std::size_t{0});
        std::shuffle(order.begin(), order.end(), std::mt19937(number));
        for (const std::size_t page : order) seen_[number][page] = sum(pages_[page]);
    }
    /// Of all its words, by their places.
    static std::uint64_t sum(std::span<const std::byte> page) {
        std::uint64_t sum = 0;
        for (std::size_t at = 0; at != page_size; at += sizeof sum) {
            std::uint64_t word = 0;
            std::memcpy(&word, page.data() + at, sizeof word);
            sum = (sum ^ word) * 0x9e3779b97f4a7c15u;
            sum ^= sum >> 32;
        }
        return sum;
    }

    std::vector<std::span<const std::byte>> pages_;
    std::array<std::vector<std::uint64_t>, threads> seen_;
    std::vector<std::thread> readers_;
};

} // namespace park
