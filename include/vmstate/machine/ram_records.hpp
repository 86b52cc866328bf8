// SPDX-License-Identifier: BSL-1.0
//
// The records of the "ram" section as they stand in the stream, one at a time and without allocating: whoever loads,
// shows or checks a stream reads them through this header, so that there is one reader of the format. It knows nothing
// of the machine: whether a block exists and a page lies inside it is the caller's to check. Depends on codec/reader.hpp.
#pragma once

#include <vmstate/codec/reader.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

namespace vmstate {

/// The flags in the low bits of a record's word.
namespace ram_flag {
inline constexpr std::uint64_t full = 0x01; ///< obsolete
inline constexpr std::uint64_t zero = 0x02;
inline constexpr std::uint64_t mem_size = 0x04;
inline constexpr std::uint64_t page = 0x08;
inline constexpr std::uint64_t eos = 0x10;
inline constexpr std::uint64_t continued = 0x20; ///< same block as the page record before: no name
inline constexpr std::uint64_t xbzrle = 0x40;
inline constexpr std::uint64_t hook = 0x80; ///< RDMA
inline constexpr std::uint64_t compress_page = 0x100;
inline constexpr std::uint64_t multifd_flush = 0x200;
} // namespace ram_flag

enum class ram_record_kind {
    block_list,    ///< MEM_SIZE: `value` bytes of RAM in all; the list follows, read it with `ram_block_list`
    zero,          ///< a page filled with `fill` (always 0 from QEMU)
    page,          ///< a page as it is: `payload_size` bytes follow
    xbzrle,        ///< the changes to a page: `payload_size` encoded bytes follow
    compress_page, ///< a page as zlib has compressed it: `payload_size` bytes follow (QEMU before 9.1)
    multifd_flush, ///< a sync point with the multifd channels
    end_of_section, ///< EOS
};

constexpr std::string_view to_string(ram_record_kind kind) noexcept {
    switch (kind) {
    case ram_record_kind::block_list:
        return "MEM_SIZE";
    case ram_record_kind::zero:
        return "ZERO";
    case ram_record_kind::page:
        return "PAGE";
    case ram_record_kind::xbzrle:
        return "XBZRLE";
    case ram_record_kind::compress_page:
        return "COMPRESS_PAGE";
    case ram_record_kind::multifd_flush:
        return "MULTIFD_FLUSH";
    case ram_record_kind::end_of_section:
        return "EOS";
    }
    return "unknown";
}

struct ram_record {
    ram_record_kind kind = ram_record_kind::end_of_section;
    std::uint64_t position = 0; ///< of the record's word, in the stream
    std::uint64_t value = 0;    ///< the page's offset in its block; of a block_list, total bytes of RAM
    std::uint32_t payload_size =
        0; ///< bytes that follow: the caller reads or skips them before the next record
    std::uint8_t fill = 0;
    bool names_block =
        false; ///< the record had its block's name: `ram_record_reader::block()` may be another now

    bool is_page() const noexcept {
        return kind == ram_record_kind::zero || kind == ram_record_kind::page ||
               kind == ram_record_kind::xbzrle || kind == ram_record_kind::compress_page;
    }
};

/// Reads records from one channel. It remembers the block that CONTINUE refers to, across sections.
class ram_record_reader {
public:
    /// `page_size` is the target's, a power of two from 1024.
    explicit ram_record_reader(std::size_t page_size = 4096) noexcept : page_size_(page_size) {}

    std::size_t page_size() const noexcept { return page_size_; }
    /// The block that the last page record belongs to; empty before the first.
    std::string_view block() const noexcept { return {name_.data(), name_size_}; }
    /// After a reconnect or a recovery the next page record has to name its block.
    void forget_block() noexcept { name_size_ = 0; }

    /// Reads the next record up to its payload. False after an error, which the reader has latched.
    bool next(reader& in, ram_record& record) {
        record = {};
        record.position = in.offset();
        const std::uint64_t word = in.get_be64();
        if (in.failed())
            return false;
        const std::uint64_t flags = word & (page_size_ - 1);
        record.value = word & ~std::uint64_t{page_size_ - 1};
        switch (flags & ~ram_flag::continued) {
        case ram_flag::zero:
            record.kind = ram_record_kind::zero;
            break;
        case ram_flag::page:
            record.kind = ram_record_kind::page;
            break;
        case ram_flag::xbzrle:
            record.kind = ram_record_kind::xbzrle;
            break;
        case ram_flag::compress_page:
            record.kind = ram_record_kind::compress_page;
            break;
        case ram_flag::mem_size:
            record.kind = ram_record_kind::block_list;
            break;
        case ram_flag::multifd_flush:
            record.kind = ram_record_kind::multifd_flush;
            break;
        case ram_flag::eos:
            record.kind = ram_record_kind::end_of_section;
            break;
        default:
            return refuse(in, record, "a RAM record's flags", flags);
        }
        if (!record.is_page())
            return (flags & ram_flag::continued) == 0 ||
                   refuse(in, record, "CONTINUE on a page alone", flags);
        if ((flags & ram_flag::continued) == 0) {
            if (!read_name(in, record))
                return false;
        } else if (name_size_ == 0) {
            return refuse(in, record, "a block's name in the first page record", flags);
        }
        return read_page_header(in, record);
    }

private:
    bool read_name(reader& in, ram_record& record) {
        const std::size_t size = in.get_u8();
        if (in.failed())
            return false;
        if (size == 0)
            return refuse(in, record, "a block's name", 0);
        std::array<char, 255> name;
        if (!in.read(name.data(), size))
            return false;
        name_ = name;
        name_size_ = size;
        record.names_block = true;
        return true;
    }
    bool read_page_header(reader& in, ram_record& record) {
        switch (record.kind) {
        case ram_record_kind::zero:
            record.fill = in.get_u8();
            break;
        case ram_record_kind::page:
            record.payload_size = static_cast<std::uint32_t>(page_size_);
            break;
        case ram_record_kind::xbzrle: {
            const std::uint8_t encoding = in.get_u8();
            record.payload_size = in.get_be16();
            if (!in.failed() && encoding != 1)
                return refuse(in, record, "XBZRLE encoding 1", encoding);
            if (record.payload_size > page_size_)
                return refuse(in, record, "an XBZRLE length within a page", record.payload_size);
            break;
        }
        case ram_record_kind::compress_page:
            record.payload_size = in.get_be32();
            // zlib's bound for data that doesn't compress.
            if (record.payload_size >
                page_size_ + (page_size_ >> 12) + (page_size_ >> 14) + (page_size_ >> 25) + 13)
                return refuse(in, record, "a compressed page's length", record.payload_size);
            break;
        default:
            break;
        }
        return !in.failed();
    }
    static bool refuse(reader& in, const ram_record& record, const char* expected, std::uint64_t found) {
        return in.fail(
            std::move(error(errc::bad_ram, expected, std::to_string(found)).at_offset(record.position)));
    }

    std::size_t page_size_;
    std::size_t name_size_ = 0;
    std::array<char, 255> name_{};
};

/// What a stream was announced with, before its block list: that decides which fields an entry of the list has.
struct ram_list_format {
    /// POSTCOPY_ADVISE's first number, the OR of all blocks' page sizes; 0 without one. A block whose page size is
    /// neither the host's nor the target's states it then.
    std::uint64_t advised_page_sizes = 0;
    bool ignore_shared = false; ///< capability x-ignore-shared: every entry has a guest-physical address
    bool mapped_ram = false;    ///< capability mapped-ram: every entry says where in the file its pages are
};

/// Where a mapped-ram file has a block's pages.
struct ram_mapping {
    std::uint64_t page_size = 0;
    std::uint64_t bitmap_offset = 0;
    std::uint64_t pages_offset = 0;
};

/// One entry of the block list.
struct ram_block_entry {
    std::string_view name; ///< valid until the next entry is read
    std::uint64_t used_length = 0;
    std::optional<std::uint64_t> page_size;
    std::optional<std::uint64_t> guest_address;
    std::optional<ram_mapping> mapping;
    std::uint64_t position = 0; ///< of the entry, in the stream
};

/// Reads the list behind a `block_list` record: entries until their lengths add up to its total.
class ram_block_list {
public:
    ram_block_list(std::uint64_t total, ram_list_format format) noexcept : left_(total), format_(format) {}

    bool done() const noexcept { return left_ == 0; }

    /// Reads the next entry; call while not `done()`. False after an error, which the reader has latched.
    bool next(reader& in, ram_block_entry& entry) {
        entry = {};
        entry.position = in.offset();
        const std::size_t size = in.get_u8();
        if (in.failed())
            return false;
        if (size == 0)
            return refuse(in, entry, "a block's name", "none");
        if (!in.read(name_.data(), size))
            return false;
        entry.name = {name_.data(), size};
        entry.used_length = in.get_be64();
        if (in.failed())
            return false;
        // QEMU would go on below zero here and read whatever follows as blocks.
        if (entry.used_length > left_)
            return refuse(
                in, entry, "a length of at most " + std::to_string(left_), std::to_string(entry.used_length));
        left_ -= entry.used_length;
        if (states_page_size(in))
            entry.page_size = in.get_be64();
        if (format_.ignore_shared)
            entry.guest_address = in.get_be64();
        if (format_.mapped_ram) {
            const std::uint32_t version = in.get_be32();
            ram_mapping mapping;
            mapping.page_size = in.get_be64();
            mapping.bitmap_offset = in.get_be64();
            mapping.pages_offset = in.get_be64();
            if (!in.failed() && version != 1)
                return refuse(in, entry, "mapped-ram version 1", std::to_string(version));
            entry.mapping = mapping;
        }
        return !in.failed();
    }

private:
    /// The sender decides by its host's page size, which a stream doesn't tell; but a page size is recognised: it is
    /// one of the advised ones, and what else can follow begins with a name's length, which isn't 0, or is the word of
    /// a record without a value.
    bool states_page_size(reader& in) const {
        if ((format_.advised_page_sizes & ~std::uint64_t{4096}) == 0 || in.peek(8) < 8)
            return false;
        std::uint64_t value = 0;
        for (std::size_t i = 0; i < 8; ++i)
            value = value << 8 | std::to_integer<std::uint64_t>(in.cursor()[i]);
        return value > ram_flag::multifd_flush && (value & (value - 1)) == 0 &&
               (value & format_.advised_page_sizes) != 0;
    }
    static bool refuse(reader& in, const ram_block_entry& entry, std::string expected, std::string found) {
        return in.fail(std::move(error(errc::bad_ram, std::move(expected), std::move(found))
                                     .within(entry.name)
                                     .at_offset(entry.position)));
    }

    std::uint64_t left_;
    ram_list_format format_;
    std::array<char, 255> name_{};
};

} // namespace vmstate
