// SPDX-License-Identifier: BSL-1.0
//
// A bit per page of a RAM block: which pages are dirty, sent, received. Plain operations for the thread that owns the
// bitmap, atomic ones, named so, for a bitmap that several threads mark. Depends on the standard library alone.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace vmstate {

/// Pages that follow each other. None when `count` is 0.
struct page_run {
    std::size_t first = 0;
    std::size_t count = 0;

    friend bool operator==(const page_run&, const page_run&) = default;
};

/// Bit n is page n: bit n % 64 of word n / 64. Bits of the last word beyond the end are always clear.
///
/// A page or a range that is passed in lies within `size()`. Plain operations must not run while another thread uses the
/// same bitmap, not even its atomic operations.
class page_bitmap {
public:
    using word = std::uint64_t;
    static constexpr std::size_t bits_per_word = 64;

    page_bitmap() noexcept = default;
    /// All bits clear.
    explicit page_bitmap(std::size_t pages) : words_((pages + bits_per_word - 1) / bits_per_word), size_(pages) {}

    /// Pages, set or not.
    std::size_t size() const noexcept { return size_; }
    std::span<const word> words() const noexcept { return words_; }

    // ---- one page

    bool test(std::size_t page) const noexcept { return (words_[page / bits_per_word] & bit(page)) != 0; }
    void set(std::size_t page) noexcept { words_[page / bits_per_word] |= bit(page); }
    void clear(std::size_t page) noexcept { words_[page / bits_per_word] &= ~bit(page); }

    /// Sets the bit; whether it was clear before. What the thread did before is visible to who takes the bit.
    bool set_atomic(std::size_t page) noexcept {
        return (atomic(page / bits_per_word).fetch_or(bit(page)) & bit(page)) == 0;
    }
    /// Clears the bit; whether it was set before.
    bool test_and_clear_atomic(std::size_t page) noexcept {
        return (atomic(page / bits_per_word).fetch_and(~bit(page)) & bit(page)) != 0;
    }

    /// Sees what the thread that set the bit atomically did before.
    bool test_atomic(std::size_t page) const noexcept { return (load(page / bits_per_word) & bit(page)) != 0; }

    // ---- ranges

    /// How many of the pages were clear before.
    std::size_t set_range(std::size_t first, std::size_t count) noexcept {
        std::size_t added = 0;
        for_each_word(first, count, [&](std::size_t index, word mask) {
            added += ones(mask & ~words_[index]);
            words_[index] |= mask;
        });
        return added;
    }
    void clear_range(std::size_t first, std::size_t count) noexcept {
        for_each_word(first, count, [&](std::size_t index, word mask) { words_[index] &= ~mask; });
    }
    /// One step per word of the range: wait-free.
    void set_range_atomic(std::size_t first, std::size_t count) noexcept {
        for_each_word(first, count, [&](std::size_t index, word mask) { atomic(index).fetch_or(mask); });
    }
    void clear_range_atomic(std::size_t first, std::size_t count) noexcept {
        for_each_word(first, count, [&](std::size_t index, word mask) { atomic(index).fetch_and(~mask); });
    }
    /// Whether every bit of the range is set; of bits that others change meanwhile it may see some before, some after.
    bool all_atomic(std::size_t first, std::size_t count) const noexcept {
        bool all = true;
        for_each_word(first, count, [&](std::size_t index, word mask) { all = all && (load(index) & mask) == mask; });
        return all;
    }
    void clear_all() noexcept { std::fill(words_.begin(), words_.end(), word{0}); }

    /// The next pages at or after `from` whose bits are set.
    page_run find_next_run(std::size_t from) const noexcept {
        const std::size_t first = find_next<true>(from);
        if (first == size_) return {size_, 0};
        return {first, find_next<false>(first) - first};
    }

    std::size_t count() const noexcept {
        std::size_t total = 0;
        for (const word w : words_) total += ones(w);
        return total;
    }
    std::size_t count(std::size_t first, std::size_t count) const noexcept {
        std::size_t total = 0;
        for_each_word(first, count, [&](std::size_t index, word mask) { total += ones(words_[index] & mask); });
        return total;
    }
    bool none() const noexcept {
        return std::all_of(words_.begin(), words_.end(), [](word w) { return w == 0; });
    }

    // ---- whole bitmaps

    /// Sets every bit that is set in `other`, of the same size; how many were clear before.
    std::size_t merge(const page_bitmap& other) noexcept {
        std::size_t added = 0;
        for (std::size_t i = 0; i < words_.size(); ++i) added += merge_word(i, other.words_[i]);
        return added;
    }
    /// Clears every bit that is set in `other`, of the same size; how many were set before.
    std::size_t subtract(const page_bitmap& other) noexcept {
        std::size_t removed = 0;
        for (std::size_t i = 0; i < words_.size(); ++i) {
            removed += ones(words_[i] & other.words_[i]);
            words_[i] &= ~other.words_[i];
        }
        return removed;
    }
    /// As `merge`, and takes the bits out of `other`, in which other threads may set bits meanwhile: each is either taken
    /// or still there.
    std::size_t merge_and_clear(page_bitmap& other) noexcept { return merge_and_clear(other, 0, words_.size()); }
    /// The same for some of the words.
    std::size_t merge_and_clear(page_bitmap& other, std::size_t first_word, std::size_t count) noexcept {
        std::size_t added = 0;
        for (std::size_t i = first_word; i < first_word + count; ++i) {
            // Most words are empty; a look doesn't take their cache line away from who marks pages next to them.
            if (other.atomic(i).load(std::memory_order_relaxed) == 0) continue;
            added += merge_word(i, other.atomic(i).exchange(0));
        }
        return added;
    }

    /// A copy of the first `pages`, taken while other threads set bits: each is either in it or not.
    page_bitmap copy_atomic(std::size_t pages) const {
        page_bitmap copy(pages);
        for (std::size_t i = 0; i < copy.words_.size(); ++i) copy.words_[i] = load(i);
        if (pages % bits_per_word != 0) copy.words_.back() &= bit(pages) - 1;
        return copy;
    }

    friend bool operator==(const page_bitmap&, const page_bitmap&) = default;

private:
    static constexpr word bit(std::size_t page) noexcept { return word{1} << (page % bits_per_word); }
    static std::size_t ones(word w) noexcept { return static_cast<std::size_t>(std::popcount(w)); }

    std::atomic_ref<word> atomic(std::size_t index) noexcept { return std::atomic_ref<word>(words_[index]); }
    word load(std::size_t index) const noexcept {
        // atomic_ref takes no const before C++26; a load writes nothing.
        return std::atomic_ref<word>(const_cast<word&>(words_[index])).load();
    }

    std::size_t merge_word(std::size_t index, word w) noexcept {
        const std::size_t added = ones(w & ~words_[index]);
        words_[index] |= w;
        return added;
    }

    /// Calls `visit(index, mask)` for each word that has a part in the range.
    template <class Visit>
    static void for_each_word(std::size_t first, std::size_t count, Visit visit) {
        while (count != 0) {
            const std::size_t shift = first % bits_per_word;
            const std::size_t here = std::min(count, bits_per_word - shift);
            visit(first / bits_per_word, (~word{0} >> (bits_per_word - here)) << shift);
            first += here;
            count -= here;
        }
    }

    /// The next page at or after `from` whose bit is `Set`; `size()` if there is none.
    template <bool Set>
    std::size_t find_next(std::size_t from) const noexcept {
        if (from >= size_) return size_;
        std::size_t index = from / bits_per_word;
        word w = (Set ? words_[index] : ~words_[index]) & (~word{0} << (from % bits_per_word));
        while (w == 0) {
            if (++index == words_.size()) return size_;
            w = Set ? words_[index] : ~words_[index];
        }
        // The bits beyond the end are clear, so that a search for a clear one may find them.
        return std::min(size_, index * bits_per_word + static_cast<std::size_t>(std::countr_zero(w)));
    }

    std::vector<word> words_;
    std::size_t size_ = 0;
};

} // namespace vmstate
