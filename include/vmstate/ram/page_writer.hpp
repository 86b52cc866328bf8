// SPDX-License-Identifier: BSL-1.0
//
// The records of pages on their way out: pages leave by reference, straight from guest memory, many in one call. Depends
// on machine/ram_records.hpp, machine/ram_block.hpp, stream/buffered_writer.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/stream/buffered_writer.hpp>

namespace vmstate {

/// What went out, under the names of QEMU's query-migrate.
struct page_counts {
    std::uint64_t normal = 0;      ///< pages sent whole
    std::uint64_t duplicate = 0;   ///< zero pages
    std::uint64_t xbzrle = 0;      ///< pages sent as XBZRLE
    std::uint64_t transferred = 0; ///< bytes of all records with their headers
    std::uint64_t normal_bytes = 0;
};

/// Writes page records to one channel, in one section after the other. It remembers the block of the last record, whose
/// name the next one of the same block leaves out (CONTINUE), also across sections: every record of this channel that
/// names a block has to go through it.
class page_writer {
public:
    /// `out` outlives it. `page_size` is the target's.
    explicit page_writer(buffered_writer& out, std::size_t page_size = 4096) noexcept
        : out_(out), page_size_(page_size) {}

    std::size_t page_size() const noexcept { return page_size_; }

    /// A page as it is when it leaves, which is at `flush` of the writer at the latest: until then its memory has to stay,
    /// and what is written to it meanwhile may or may not be in the stream. A write that the dirty log tells of comes
    /// again.
    void put_page(const ram_block& block, std::uint64_t offset, std::span<const std::byte> page) {
        const std::uint64_t begin = put_header(block, offset | ram_flag::page);
        out_.write_reference(page);
        count_normal(begin);
    }
    /// The same with a copy made now: for bytes that don't stay.
    void put_page_copy(const ram_block& block, std::uint64_t offset, std::span<const std::byte> page) {
        const std::uint64_t begin = put_header(block, offset | ram_flag::page);
        out_.write(page);
        count_normal(begin);
    }
    void put_zero(const ram_block& block, std::uint64_t offset) {
        const std::uint64_t begin = put_header(block, offset | ram_flag::zero);
        out_.put_u8(0);
        ++counts_.duplicate;
        counts_.transferred += out_.offset() - begin;
    }
    /// A page as its difference from what was sent before; `encoded`, of at most a page, is copied.
    void put_xbzrle(const ram_block& block, std::uint64_t offset, std::span<const std::byte> encoded) {
        const std::uint64_t begin = put_header(block, offset | ram_flag::xbzrle);
        out_.put_u8(1); // ENCODING_FLAG_XBZRLE
        out_.put_be16(static_cast<std::uint16_t>(encoded.size()));
        out_.write(encoded);
        ++counts_.xbzrle;
        counts_.transferred += out_.offset() - begin;
    }
    /// The end of a section's body.
    void put_end() {
        out_.put_be64(ram_flag::eos);
        counts_.transferred += 8;
    }
    /// The next record names its block: on a new channel, and after a recovery.
    void forget_block() noexcept { block_ = nullptr; }

    const page_counts& counts() const noexcept { return counts_; }

private:
    /// Where the record begins in the stream.
    std::uint64_t put_header(const ram_block& block, std::uint64_t word) {
        const std::uint64_t begin = out_.offset();
        if (block_ == &block) {
            out_.put_be64(word | ram_flag::continued);
        } else {
            out_.put_be64(word);
            out_.put_counted_string(block.name);
            block_ = &block;
        }
        return begin;
    }
    void count_normal(std::uint64_t begin) noexcept {
        ++counts_.normal;
        counts_.normal_bytes += page_size_;
        counts_.transferred += out_.offset() - begin;
    }

    buffered_writer& out_;
    std::size_t page_size_;
    const ram_block* block_ = nullptr; ///< of the last record
    page_counts counts_;
};

} // namespace vmstate
