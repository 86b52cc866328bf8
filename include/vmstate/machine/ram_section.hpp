// SPDX-License-Identifier: BSL-1.0
//
// The "ram" section of memory that stands still: writes every page once, and reads the records of any precopy stream.
// Depends on ram_records.hpp, ram_block.hpp and codec/.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/machine/options.hpp>
#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/ram_records.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/machine/xbzrle.hpp>

namespace vmstate {

/// Hears the points of the main stream up to which multifd channels have to have brought their pages, see
/// `load_options::ram_sync`. A failure ends the load.
class ram_sync_listener {
public:
    ram_sync_listener() = default;
    ram_sync_listener(const ram_sync_listener&) = delete;
    ram_sync_listener& operator=(const ram_sync_listener&) = delete;
    virtual ~ram_sync_listener() = default;

    /// EOS: the end of a section's body. A sync point in QEMU up to 8.0.
    virtual result<void> end_of_section() = 0;
    /// MULTIFD_FLUSH.
    virtual result<void> multifd_flush() = 0;
};

/// Hears what of the memory a stream has brought, see `load_options::ram_pages`.
class ram_page_listener {
public:
    ram_page_listener() = default;
    ram_page_listener(const ram_page_listener&) = delete;
    ram_page_listener& operator=(const ram_page_listener&) = delete;
    virtual ~ram_page_listener() = default;

    /// The stream's list of blocks has been read: those in `stream_order()`. A failure ends the load.
    virtual result<void> blocks_listed() = 0;
    /// A page is in memory.
    virtual void page_loaded(const ram_block& block, std::uint64_t offset) noexcept = 0;
};

/// All RAM blocks of a machine, and the body of the section that carries them.
class ram_section {
public:
    static constexpr std::string_view id = "ram";
    static constexpr int version_id = 4;

    using block_list = std::vector<std::unique_ptr<ram_block>>;

    // ---- blocks

    const block_list& blocks() const noexcept { return blocks_; }

    ram_block* find(std::string_view name) const noexcept {
        for (const std::unique_ptr<ram_block>& block : blocks_)
            if (block->name == name) return block.get();
        return nullptr;
    }
    /// Keeps QEMU's order, the largest first.
    void insert(std::unique_ptr<ram_block> block) {
        const auto smaller =
            std::find_if(blocks_.begin(), blocks_.end(), [&](const std::unique_ptr<ram_block>& other) {
                return other->memory.size() < block->memory.size();
            });
        blocks_.insert(smaller, std::move(block));
    }
    bool remove(std::string_view name) {
        return std::erase_if(blocks_,
                   [&](const std::unique_ptr<ram_block>& block) { return block->name == name; }) != 0;
    }
    /// The OR of the sizes of the pages that back the blocks.
    std::uint64_t page_size_summary() const noexcept {
        std::uint64_t summary = 0;
        for (const std::unique_ptr<ram_block>& block : blocks_) summary |= block->options.host_page_size;
        return summary;
    }

    // ---- saving: one START, one PART with all pages, one END

    /// The body of START: the list of blocks, with `postcopy` the size of their pages where it isn't the system's, and
    /// with `multifd_flush` the first sync point.
    void save_setup(writer& out, const machine_options& machine, bool multifd_flush = false, bool postcopy = false) {
        ignore_shared_ = machine.has_capability("x-ignore-shared");
        sent_block_ = nullptr;
        const auto ordinary = std::max<std::uint64_t>(static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)), machine.guest_page_size());
        std::uint64_t total = 0;
        for (const std::unique_ptr<ram_block>& block : blocks_) total += block->used_length;
        out.put_be64(total | ram_flag::mem_size);
        for (const std::unique_ptr<ram_block>& block : blocks_) {
            out.put_counted_string(block->name);
            out.put_be64(block->used_length);
            if (postcopy && block->options.host_page_size != ordinary)
                out.put_be64(block->options.host_page_size);
            if (ignore_shared_) out.put_be64(block->options.guest_address);
        }
        if (multifd_flush) out.put_be64(ram_flag::multifd_flush);
        out.put_be64(ram_flag::eos);
    }
    /// The body of PART: every page once.
    void save_pages(writer& out, const machine_options& machine) {
        const std::size_t page_size = machine.guest_page_size();
        for (const std::unique_ptr<ram_block>& block : blocks_) {
            if (is_ignored(*block)) continue;
            for (std::uint64_t offset = 0; offset < block->used_length && !out.failed();
                 offset += page_size) {
                const std::span<const std::byte> page = block->page(offset, page_size);
                if (is_zero_page(page)) {
                    put_page_header(out, *block, offset | ram_flag::zero);
                    out.put_u8(0);
                } else {
                    put_page_header(out, *block, offset | ram_flag::page);
                    out.write(page);
                }
            }
        }
        out.put_be64(ram_flag::eos);
    }
    /// The body of END: nothing is left to send, since the memory stood still.
    void save_complete(writer& out) { out.put_be64(ram_flag::eos); }

    // ---- loading

    struct load_rules {
        std::uint64_t advised_page_sizes = 0; ///< of POSTCOPY_ADVISE, 0 without one
        bool adopt_unknown = false;           ///< blocks that nobody registered get memory here
        std::uint64_t adopt_limit = 0;        ///< bytes of such memory, all blocks together
        ram_sync_listener* sync = nullptr;    ///< who has multifd channels; null for none
        ram_page_listener* pages = nullptr;   ///< who keeps account of the pages; null for nobody
    };

    /// Before a stream begins: forgets which block the last page belonged to, and the blocks of an earlier stream.
    void begin_load(const machine_options& machine) {
        records_ = ram_record_reader(machine.guest_page_size());
        ignore_shared_ = machine.has_capability("x-ignore-shared");
        current_ = nullptr;
        stream_order_.clear();
        adopted_ = 0;
        adopted_blocks_ = 0;
        std::erase_if(
            blocks_, [](const std::unique_ptr<ram_block>& block) { return block->owned.has_value(); });
    }

    /// The body of START, PART, END or FULL, up to its EOS record. Errors name the block.
    result<void> load(reader& in, const load_rules& rules) {
        ram_record record;
        while (records_.next(in, record)) {
            if (record.kind == ram_record_kind::end_of_section)
                return rules.sync != nullptr ? rules.sync->end_of_section() : result<void>();
            // Without multifd channels there is nothing to wait for. It doesn't tell that there were any: QEMU 8.1 sends
            // it without multifd, too, and up to 8.0 multifd goes without it.
            if (record.kind == ram_record_kind::multifd_flush) {
                if (rules.sync == nullptr) continue;
                if (result<void> there = rules.sync->multifd_flush(); !there) return there;
                continue;
            }
            result<void> done = record.kind == ram_record_kind::block_list
                                    ? load_block_list(in, record, rules)
                                    : load_page(in, record, rules.pages);
            if (!done) return done;
        }
        error failure = in.failure();
        if (failure.path().empty()) failure.within(records_.block());
        return failure;
    }

    /// Whether the block's pages stay out of the stream: both sides see the same memory.
    bool is_ignored(const ram_block& block) const noexcept { return ignore_shared_ && block.options.shared; }

    /// The reader of the stream's records as it is now, with the block that CONTINUE refers to: for whoever reads the
    /// records from here on.
    const ram_record_reader& records() const noexcept { return records_; }

    /// The blocks of the stream's list, in its order.
    const std::vector<ram_block*>& stream_order() const noexcept { return stream_order_; }
    /// Whether the stream's list of blocks had this one.
    bool was_in_stream(const ram_block& block) const noexcept {
        return std::find(stream_order_.begin(), stream_order_.end(), &block) != stream_order_.end();
    }
    /// Gives the blocks the order of the stream that was loaded; those that it hadn't follow in theirs.
    void adopt_order() {
        block_list ordered;
        ordered.reserve(blocks_.size());
        const auto take = [&](std::unique_ptr<ram_block>& block) {
            if (block) ordered.push_back(std::move(block));
        };
        for (const ram_block* const next : stream_order_)
            for (std::unique_ptr<ram_block>& block : blocks_)
                if (block.get() == next) take(block);
        for (std::unique_ptr<ram_block>& block : blocks_) take(block);
        blocks_ = std::move(ordered);
    }

private:
    void put_page_header(writer& out, const ram_block& block, std::uint64_t word) {
        if (sent_block_ == &block) return out.put_be64(word | ram_flag::continued);
        out.put_be64(word);
        out.put_counted_string(block.name);
        sent_block_ = &block;
    }

    result<void> load_block_list(reader& in, const ram_record& record, const load_rules& rules) {
        stream_order_.clear();
        ram_block_list list(record.value, {rules.advised_page_sizes, ignore_shared_, false});
        ram_block_entry entry;
        while (!list.done()) {
            if (!list.next(in, entry)) return in.failure();
            result<void> checked = check_block(entry, rules);
            if (!checked) return checked.error().within(entry.name).at_offset(entry.position);
        }
        return rules.pages != nullptr ? rules.pages->blocks_listed() : result<void>();
    }

    result<void> check_block(const ram_block_entry& entry, const load_rules& rules) {
        ram_block* block = find(entry.name);
        if (block == nullptr) {
            if (!rules.adopt_unknown)
                return error(errc::bad_ram, "a block of this machine", std::string(entry.name));
            result<ram_block*> adopted = adopt(entry, rules);
            if (!adopted) return adopted.error();
            block = *adopted;
        }
        if (entry.used_length != block->used_length) {
            if (!block->options.resizable)
                return error(errc::bad_ram, length_text(block->used_length), length_text(entry.used_length));
            if (entry.used_length > block->memory.size())
                return error(errc::bad_ram, "at most " + length_text(block->memory.size()),
                    length_text(entry.used_length));
            if (entry.used_length % records_.page_size() != 0)
                return error(errc::bad_ram, "whole pages", length_text(entry.used_length));
            block->used_length = entry.used_length;
            if (block->options.on_resize) block->options.on_resize(entry.used_length);
        }
        if (entry.page_size && *entry.page_size != block->options.host_page_size)
            return error(errc::bad_ram,
                "pages of " + std::to_string(block->options.host_page_size) + " bytes",
                std::to_string(*entry.page_size));
        if (entry.guest_address && block->options.shared &&
            *entry.guest_address != block->options.guest_address)
            return error(errc::bad_ram, "guest address " + std::to_string(block->options.guest_address),
                std::to_string(*entry.guest_address));
        stream_order_.push_back(block);
        return {};
    }

    result<ram_block*> adopt(const ram_block_entry& entry, const load_rules& rules) {
        if (entry.used_length > rules.adopt_limit - std::min(adopted_, rules.adopt_limit))
            return error(errc::bad_ram, "unregistered blocks of at most " + length_text(rules.adopt_limit),
                length_text(entry.used_length));
        if (adopted_blocks_ == max_adopted_blocks)
            return error(errc::bad_ram,
                "at most " + std::to_string(max_adopted_blocks) + " unregistered blocks", "more");
        if (entry.used_length % records_.page_size() != 0)
            return error(errc::bad_ram, "whole pages", length_text(entry.used_length));
        result<ram_memory> memory = ram_memory::anonymous(entry.used_length);
        if (!memory) return memory.error();
        advise_huge_pages(memory->span());
        adopted_ += entry.used_length;
        ++adopted_blocks_;
        auto block = std::make_unique<ram_block>(
            ram_block{std::string(entry.name), memory->span(), entry.used_length, {}, std::move(*memory)});
        block->options.guest_address = entry.guest_address.value_or(0);
        block->options.host_page_size = entry.page_size.value_or(4096);
        ram_block* const adopted = block.get();
        insert(std::move(block));
        return adopted;
    }

    result<void> load_page(reader& in, const ram_record& record, ram_page_listener* pages) {
        if (record.names_block || current_ == nullptr) {
            current_ = find(records_.block());
            // A source lists all that it sends pages of: where one is missing, another has its place in the list.
            if (current_ == nullptr || !was_in_stream(*current_)) {
                current_ = nullptr;
                return error(errc::bad_ram, "a block of the stream's list", std::string(records_.block()))
                    .at_offset(record.position);
            }
        }
        result<void> loaded = load_page_into(*current_, in, record);
        if (!loaded) return loaded.error().within(current_->name).at_offset(record.position);
        if (pages != nullptr) pages->page_loaded(*current_, record.value);
        return {};
    }

    result<void> load_page_into(ram_block& block, reader& in, const ram_record& record) {
        const std::size_t page_size = records_.page_size();
        if (is_ignored(block)) return error(errc::bad_ram, "no pages of a shared block", "one");
        if (block.used_length < page_size || record.value > block.used_length - page_size)
            return error(errc::bad_ram, "a page within " + length_text(block.used_length),
                "offset " + std::to_string(record.value));
        const std::span<std::byte> page = block.page(record.value, page_size);
        switch (record.kind) {
        case ram_record_kind::zero:
            if (record.fill == 0) make_zero(page, block.options.file, record.value);
            else std::memset(page.data(), record.fill, page.size());
            return {};
        case ram_record_kind::page:
            if (!in.read(page.data(), page.size())) return in.failure();
            return {};
        case ram_record_kind::xbzrle: {
            encoded_.resize(record.payload_size);
            if (!in.read(encoded_.data(), encoded_.size())) return in.failure();
            if (!xbzrle_decode(encoded_, page))
                return error(errc::bad_ram, "an XBZRLE encoding of a page", "a broken one");
            return {};
        }
        default:
            return error(errc::unsupported, {}, std::string(to_string(record.kind)));
        }
    }

    /// Blocks are looked up one after the other, and each has a mapping of its own.
    static constexpr std::size_t max_adopted_blocks = 1024;

    static std::string length_text(std::uint64_t length) { return std::to_string(length) + " bytes"; }

    block_list blocks_;
    bool ignore_shared_ = false;
    const ram_block* sent_block_ = nullptr; ///< CONTINUE on the way out

    ram_record_reader records_;
    ram_block* current_ = nullptr; ///< CONTINUE on the way in
    std::vector<ram_block*> stream_order_;
    std::vector<std::byte> encoded_;
    std::uint64_t adopted_ = 0;
    std::size_t adopted_blocks_ = 0;
};

} // namespace vmstate
