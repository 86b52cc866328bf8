// SPDX-License-Identifier: BSL-1.0
//
// The memory of a live migration on its way out: which pages have still to go, in which order they go, and in which form.
// It decides nothing about when; that is source.hpp. Depends on machine/, ram/, stream/, and on guest.hpp,
// multifd_sender.hpp, parameters.hpp and postcopy_pages.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/migration/multifd_sender.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/postcopy_pages.hpp>
#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/ram/page_writer.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/ram/xbzrle.hpp>
#include <vmstate/stream/buffered_writer.hpp>

namespace vmstate::migration {

/// For the migration thread alone. A page is in one of three sets: dirty (its content has to go), absent (nobody has
/// touched it, so it is zero and is not read), or neither. It leaves its set before it is read; what the guest writes
/// from then on is found by the log, and makes it dirty again.
class ram_sender {
public:
    /// All of them outlive this one.
    ram_sender(machine& of, guest& written_by, buffered_writer& out, stream_saver& saver)
        : machine_(of), guest_(written_by), out_(out), saver_(saver), pages_(out, of.options().guest_page_size()) {}
    ram_sender(const ram_sender&) = delete;
    ram_sender& operator=(const ram_sender&) = delete;
    ~ram_sender() { stop(); }

    /// The logs begin, and all pages have to go.
    result<void> start(const parameters& settings) {
        if (settings.xbzrle) {
            result<xbzrle_encoder> made = xbzrle_encoder::make(settings.xbzrle_cache_size, page_size());
            if (!made) return made.error();
            xbzrle_.emplace(std::move(*made));
        }
        ram_section* const ram = machine_.ram();
        if (ram == nullptr) return {};
        std::uint64_t address = 0;
        for (std::size_t number = 0; number != ram->blocks().size(); ++number) {
            ram_block& block = *ram->blocks()[number];
            if (ram->is_ignored(block)) continue;
            const auto log = guest_.dirty_logs.find(block.name);
            blocks_.push_back({&block, log == guest_.dirty_logs.end() ? nullptr : &log->second, number, address});
            if (result<void> began = begin(blocks_.back()); !began) return began.error().within(block.name);
            address += block.used_length;
        }
        count_pages();
        return {};
    }
    /// The logs end. Stopping twice is harmless.
    void stop() {
        for (const sent_block& one : blocks_)
            if (one.log != nullptr) static_cast<void>(one.log->stop());
        blocks_.clear();
        dirty_pages_ = absent_pages_ = 0;
    }

    /// From now on pages with content go over these channels, which outlive this. `after_each_section`: when the sync
    /// points are, see `parameters::multifd_flush_after_each_section`.
    void use(multifd_sender& multifd, bool after_each_section) noexcept {
        multifd_ = &multifd;
        after_each_section_ = after_each_section;
    }

    /// Nothing more goes from here: what has still to go, of each block, is for postcopy. The logs end.
    std::vector<unsent_pages> hand_over() {
        std::vector<unsent_pages> rest;
        for (sent_block& one : blocks_) {
            rest.push_back({one.block, std::move(one.dirty), std::move(one.absent)});
            rest.back().dirty.merge(rest.back().absent);
        }
        stop();
        return rest;
    }

    /// START, with the list of blocks; nothing for a machine without RAM. `postcopy`: they may go on in it.
    void put_setup(bool postcopy = false) {
        if (!begin_section(section_type::start)) return;
        // The channels wait for this section's end: before the list of blocks nothing may arrive.
        sync_channels();
        machine_.ram()->save_setup(out_, machine_.options(), multifd_ != nullptr && !after_each_section_, postcopy);
        saver_.end_section(*entry_);
    }
    /// PART or END; false for a machine without RAM. `send` and `end_section` follow.
    bool begin_section(section_type type) {
        if (entry_ == nullptr)
            for (const std::unique_ptr<section>& entry : machine_.sections())
                if (entry->ram() != nullptr) entry_ = entry.get();
        if (entry_ == nullptr) return false;
        saver_.begin_section(type, *entry_);
        type_ = type;
        // A page that comes again must not overtake itself on another channel.
        if (has_collected_ && multifd_ != nullptr && !after_each_section_) put_flush();
        has_collected_ = false;
        return true;
    }
    void end_section() {
        if (multifd_ != nullptr) {
            if (after_each_section_) sync_channels();
            else if (type_ == section_type::end) put_flush();
        }
        pages_.put_end();
        saver_.end_section(*entry_);
    }

    /// At most `count` of the pages that have to go, from where the last ones were, absent ones when no dirty one is left;
    /// false when none is left. What goes wrong shows at the writer.
    bool send(std::size_t count) {
        if (dirty_pages_ != 0)
            while (count != 0 && dirty_pages_ != 0 && !out_.failed()) count -= send_dirty(count);
        else
            while (count != 0 && absent_pages_ != 0 && !out_.failed()) count -= send_absent(count);
        return dirty_pages_ + absent_pages_ != 0 && !out_.failed();
    }
    bool has_dirty() const noexcept { return dirty_pages_ != 0; }
    bool has_absent() const noexcept { return absent_pages_ != 0; }
    /// The block with this number in the stream's list is known to be zero at the destination: what is absent of it need
    /// not be said. A number that no block has is harmless.
    void leave_out_absent(std::size_t number) {
        for (sent_block& one : blocks_) {
            if (one.number != number) continue;
            const std::size_t count = one.absent.count();
            one.absent.clear_all();
            absent_pages_ -= count;
            skipped_ += count;
        }
    }

    /// What was written since the last time is dirty again: how many pages it is. With `standing_still` also what nobody
    /// logs.
    result<std::uint64_t> collect(bool standing_still) {
        ++pass_;
        has_collected_ = true;
        if (xbzrle_) xbzrle_->end_pass(std::exchange(pages_in_pass_, 0));
        const std::uint64_t before = dirty_pages_;
        for (sent_block& one : blocks_) {
            if (one.log != nullptr) {
                if (const result<std::uint64_t> found = one.log->collect(one.dirty); !found)
                    return found.error().within(one.block->name);
            } else if (standing_still) {
                one.dirty.set_range(0, one.dirty.size());
            }
            one.absent.subtract(one.dirty);
        }
        if (standing_still) unlogged_sent_ = 0;
        count_pages();
        return dirty_pages_ - before;
    }

    std::size_t page_size() const { return pages_.page_size(); }
    /// Bytes of guest memory that have to go.
    std::uint64_t remaining() const noexcept { return (dirty_pages_ + absent_pages_) * pages_.page_size(); }
    /// About what that takes on the channel, if no page that was touched is zero.
    std::uint64_t remaining_on_wire() const noexcept {
        return dirty_pages_ * pages_.page_size() + absent_pages_ * zero_record_size;
    }
    /// The same of what was sent and goes again when the guest stands still, since no log tells of it.
    std::uint64_t unlogged_on_wire() const noexcept { return unlogged_sent_ * pages_.page_size(); }
    /// 1 until the logs are asked for the first time.
    std::uint64_t pass() const noexcept { return pass_; }
    page_counts counts() const noexcept {
        page_counts all = pages_.counts();
        all.normal += multifd_pages_;
        all.normal_bytes += multifd_pages_ * page_size();
        return all;
    }
    /// Pages that were left out, since the destination has them as they are.
    std::uint64_t skipped() const noexcept { return skipped_; }
    xbzrle_counts cache_counts() const { return xbzrle_ ? xbzrle_->counts() : xbzrle_counts{}; }

private:
    /// The word and the fill byte; a name goes with one of very many.
    static constexpr std::uint64_t zero_record_size = 9;

    struct sent_block {
        ram_block* block;
        any_dirty_log* log;    ///< null without one
        std::size_t number;    ///< in the stream's list
        std::uint64_t address; ///< of its first page among all blocks, for the XBZRLE cache
        page_bitmap dirty = {};
        page_bitmap absent = {};
    };

    result<void> begin(sent_block& one) {
        const auto pages = static_cast<std::size_t>(one.block->used_length / page_size());
        one.dirty = page_bitmap(pages);
        one.absent = page_bitmap(pages);
        // The log first: a page that comes into being after it was looked for is in the log.
        if (one.log != nullptr)
            if (result<void> started = one.log->start(); !started) return started;
        if (find_present_pages(one.block->used(), page_size(), one.dirty, one.block->options.file)) {
            one.absent.set_range(0, pages);
            one.absent.subtract(one.dirty);
        } else {
            one.dirty.set_range(0, pages);
        }
        return {};
    }

    void count_pages() {
        dirty_pages_ = absent_pages_ = 0;
        for (const sent_block& one : blocks_) {
            dirty_pages_ += one.dirty.count();
            absent_pages_ += one.absent.count();
        }
    }
    /// Moves to the next run of pages in one of the sets, which has some, from where the last ones were; over the end of
    /// the memory to its beginning.
    page_run find_next(page_bitmap sent_block::* set) {
        for (;;) {
            if (at_block_ == blocks_.size()) at_block_ = at_page_ = 0;
            const page_run run = (blocks_[at_block_].*set).find_next_run(at_page_);
            if (run.count != 0) return run;
            ++at_block_;
            at_page_ = 0;
        }
    }
    std::size_t send_dirty(std::size_t count) {
        const page_run run = find_next(&sent_block::dirty);
        sent_block& one = blocks_[at_block_];
        count = std::min(run.count, count);
        one.dirty.clear_range(run.first, count);
        dirty_pages_ -= count;
        if (one.log == nullptr) unlogged_sent_ += count;
        for (std::size_t page = run.first; page != run.first + count; ++page) send_page(one, page);
        at_page_ = run.first + count;
        pages_in_pass_ += count;
        return count;
    }
    std::size_t send_absent(std::size_t count) {
        const page_run run = find_next(&sent_block::absent);
        sent_block& one = blocks_[at_block_];
        count = std::min(run.count, count);
        one.absent.clear_range(run.first, count);
        absent_pages_ -= count;
        for (std::size_t page = run.first; page != run.first + count; ++page)
            pages_.put_zero(*one.block, std::uint64_t{page} * page_size());
        at_page_ = run.first + count;
        pages_in_pass_ += count;
        return count;
    }
    void send_page(const sent_block& one, std::size_t page) {
        const std::uint64_t offset = std::uint64_t{page} * page_size();
        const std::span<const std::byte> bytes = one.block->page(offset, page_size());
        if (is_zero_page(bytes)) {
            pages_.put_zero(*one.block, offset);
            if (xbzrle_) xbzrle_->sent_zero(one.address + offset, pass_);
        } else if (multifd_ != nullptr) {
            ++multifd_pages_;
            if (result<void> put = multifd_->put_page(*one.block, offset); !put) out_.fail(put.error());
        } else if (xbzrle_ && pass_ != 1) { // in the first pass there is nothing yet that a page could differ from
            send_difference(one, offset, bytes);
        } else {
            pages_.put_page(*one.block, offset, bytes);
        }
    }
    void sync_channels() {
        if (multifd_ == nullptr || out_.failed()) return;
        if (result<void> synced = multifd_->sync(); !synced) out_.fail(synced.error());
    }
    /// A sync point. It leaves at once: until it arrives the destination's channels take nothing more.
    void put_flush() {
        sync_channels();
        out_.put_be64(ram_flag::multifd_flush);
        static_cast<void>(out_.flush()); // what goes wrong shows at the writer
    }
    void send_difference(const sent_block& one, std::uint64_t offset, std::span<const std::byte> bytes) {
        const xbzrle_page how = xbzrle_->encode(one.address + offset, bytes, pass_);
        switch (how.how) {
        case xbzrle_page::kind::skip: break;
        case xbzrle_page::kind::encoded: pages_.put_xbzrle(*one.block, offset, how.bytes); break;
        case xbzrle_page::kind::plain:
            if (how.bytes.data() == bytes.data()) pages_.put_page(*one.block, offset, bytes);
            else pages_.put_page_copy(*one.block, offset, how.bytes); // the cache goes on to other pages
            break;
        }
    }

    machine& machine_;
    guest& guest_;
    buffered_writer& out_;
    stream_saver& saver_;
    page_writer pages_;
    const section* entry_ = nullptr; ///< the machine's RAM
    std::optional<xbzrle_encoder> xbzrle_;

    multifd_sender* multifd_ = nullptr; ///< null without
    bool after_each_section_ = false;
    bool has_collected_ = false;            ///< since the last section
    section_type type_ = section_type::end; ///< of the section that was begun
    std::uint64_t multifd_pages_ = 0;

    std::vector<sent_block> blocks_;
    std::uint64_t dirty_pages_ = 0; ///< of all blocks
    std::uint64_t absent_pages_ = 0;
    std::uint64_t unlogged_sent_ = 0; ///< pages
    std::uint64_t skipped_ = 0;
    std::size_t at_block_ = 0; ///< where the scan goes on
    std::size_t at_page_ = 0;
    std::uint64_t pass_ = 1; ///< over the memory
    std::uint64_t pages_in_pass_ = 0;
};

} // namespace vmstate::migration
