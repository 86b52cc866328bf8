// SPDX-License-Identifier: BSL-1.0
//
// multifd at the destination: a thread per channel reads pages straight to where they belong, and waits with the others
// at the sync points that the main channel names. Depends on ram/, machine/ and stream/.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/ram/multifd_compression.hpp>
#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/stream/channel.hpp>
#include <vmstate/support/guarded.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate::migration {

/// The thread that loads the main channel calls `start`, the sync points, `complete`, `drain` and `finish`.
///
/// Which sync points a source has is seen from its first section: MULTIFD_FLUSH records (QEMU 8.1), or, where there is
/// none before the first EOS, each EOS (QEMU's multifd-flush-after-each-section).
class multifd_receiver final : public ram_sync_listener {
public:
    /// `into` outlives it. `patience`: how long a sync point may wait without a byte on any channel, 0 for ever. `failed`
    /// is called once, by a channel's thread, where something is wrong that the main channel may never show.
    /// `before_pages` is called at the first sync point, when all channels and the list of blocks are there, and no page
    /// yet.
    multifd_receiver(const machine& into, vmstate::multifd_compression compression, std::chrono::milliseconds patience,
        std::function<void()> failed, std::function<result<void>()> before_pages)
        : machine_(into)
        , page_size_(into.options().guest_page_size())
        , compression_(std::move(compression))
        , patience_(patience)
        , failed_(std::move(failed))
        , before_pages_(std::move(before_pages)) {}
    ~multifd_receiver() override { static_cast<void>(finish()); }

    /// Channels by their ids; their initial packets have been read.
    result<void> start(std::vector<std::shared_ptr<input_channel>> channels) {
        for (std::shared_ptr<input_channel>& channel : channels) {
            auto made = std::make_unique<worker>();
            made->id = static_cast<unsigned>(workers_.size());
            made->channel = std::move(channel);
            // A channel may have nothing to say for long; the sync points are bounded.
            made->channel->set_timeout(std::chrono::milliseconds(0));
            if (!compression_.is_none()) {
                result<std::unique_ptr<multifd_decompressor>> decompressor = compression_.make_decompressor();
                if (!decompressor) return std::move(decompressor.error()).within(name_of(made->id));
                made->decompressor = std::move(*decompressor);
            }
            workers_.push_back(std::move(made));
        }
        for (const std::unique_ptr<worker>& one : workers_) one->thread = std::thread([this, &it = *one] { run(it); });
        return {};
    }

    result<void> end_of_section() override {
        if (!flushes_) flushes_ = false;
        return *flushes_ ? result<void>() : sync();
    }
    result<void> multifd_flush() override {
        if (!flushes_) flushes_ = true;
        return sync();
    }

    /// The main stream has been loaded: an error if pages came that no sync point waited for. A SYNC alone may be left:
    /// QEMU 9.1 and 9.2 send one at the very end, and no MULTIFD_FLUSH with it (since its commit 637280aeb2). From here on
    /// no page is written any more, and no channel's failure matters.
    result<void> complete() {
        const std::lock_guard lock(workers_mutex_);
        complete_.store(true);
        for (const std::unique_ptr<worker>& one : workers_)
            if (!failure_ && (one->has_new_pages.load() || (syncs_ == 0 && machine_.ram() != nullptr)))
                failure_ = error(errc::bad_ram, "a sync point in the main stream", "none").within(name_of(one->id));
        resume_.notify_all();
        return failure_ ? result<void>(failure_) : result<void>();
    }
    /// After `complete`: reads on until the source has closed all channels, at most for so long. QEMU up to 8.2 may owe a
    /// packet behind the last SYNC: its thread, asked for pages and for a SYNC at once, sends both in one, and then an empty
    /// one. A channel that is closed before that fails its migration.
    void drain(std::chrono::milliseconds patience) {
        std::unique_lock lock(workers_mutex_);
        arrived_.wait_for(lock, patience, [&] {
            return std::all_of(workers_.begin(), workers_.end(), [](const std::unique_ptr<worker>& one) { return one->ended; });
        });
    }
    /// Ends all threads. Why the first channel failed that did, if one did.
    result<void> finish() {
        {
            const std::lock_guard lock(workers_mutex_);
            ending_ = true;
            for (const std::unique_ptr<worker>& one : workers_) one->channel->shutdown();
        }
        resume_.notify_all();
        for (const std::unique_ptr<worker>& one : workers_)
            if (one->thread.joinable()) one->thread.join();
        return failure_ ? result<void>(failure_) : result<void>();
    }

    /// Of all packets with their headers, as `multifd_sender::bytes`.
    std::uint64_t bytes() const noexcept { return bytes_.load(std::memory_order_relaxed); }

private:
    struct worker {
        unsigned id = 0;
        std::shared_ptr<input_channel> channel;
        std::unique_ptr<multifd_decompressor> decompressor;
        std::thread thread;
        std::atomic<bool> has_new_pages = false; ///< since the last sync point that the main channel has named
        // Under workers_mutex_:
        bool at_sync = false;
        std::optional<error> ended{}; ///< between two packets: no harm if nothing else was to come
    };
    /// What the stream's list says of a block. The threads have a copy, which changes only while they all wait.
    struct known_block {
        std::string name;
        std::span<std::byte> memory;
        ram_file file;
    };

    static std::string name_of(unsigned id) { return "multifd channel " + std::to_string(id); }

    // ---- the main channel's thread

    result<void> sync() {
        using clock = std::chrono::steady_clock;
        std::unique_lock lock(workers_mutex_);
        const auto is_there = [&] {
            return failure_ || std::all_of(workers_.begin(), workers_.end(),
                                   [](const std::unique_ptr<worker>& one) { return one->at_sync || one->ended; });
        };
        for (;;) {
            const std::uint64_t before = reads_.load(std::memory_order_relaxed);
            if (patience_.count() == 0) arrived_.wait(lock, is_there);
            else arrived_.wait_until(lock, clock::now() + patience_, is_there);
            if (is_there() || reads_.load(std::memory_order_relaxed) == before) break;
        }
        if (failure_) return failure_;
        for (const std::unique_ptr<worker>& one : workers_) {
            if (one->at_sync) continue;
            if (one->ended) return error(*one->ended).within(name_of(one->id));
            return error(errc::io, {}, "no SYNC for " + std::to_string(patience_.count()) + " ms").within(name_of(one->id));
        }
        if (syncs_++ == 0 && before_pages_)
            if (result<void> fine = before_pages_(); !fine) return fine;
        copy_blocks();
        for (const std::unique_ptr<worker>& one : workers_) {
            one->has_new_pages.store(false);
            one->at_sync = false;
        }
        lock.unlock();
        resume_.notify_all();
        return {};
    }
    void copy_blocks() {
        blocks_.clear();
        const ram_section* const ram = machine_.ram();
        if (ram == nullptr) return;
        for (const std::unique_ptr<ram_block>& block : ram->blocks())
            if (ram->was_in_stream(*block) && !ram->is_ignored(*block)) blocks_.push_back({block->name, block->used(), block->options.file});
    }

    // ---- a channel's thread: owns the channel and the decompressor, reads blocks_

    void run(worker& one) {
        const result<void> done = vmstate::detail::guarded([&]() -> result<void> {
            receive(one);
            return {};
        });
        if (!done) break_off(one, done.error());
    }
    void receive(worker& one) {
        packet_room room;
        room.header.resize(multifd_packet_header::wire_size(page_size_));
        for (;;) {
            std::size_t there = std::exchange(room.ahead, 0);
            bool has_kind = false;
            while (there != room.header.size() || !has_kind) {
                if (!has_kind && there >= multifd_packet_header::kind_size) {
                    if (result<void> fits = multifd_packet_header::check_kind(room.header); !fits) return break_off(one, fits.error());
                    has_kind = true;
                    continue;
                }
                const std::span<std::byte> rest = std::span(room.header).subspan(there);
                const result<std::size_t> got = one.channel->read_some({&rest, 1});
                reads_.fetch_add(1, std::memory_order_relaxed);
                if (!got || *got == 0) {
                    const error why = got ? error(errc::truncated, "a packet", "the end of the channel") : got.error();
                    return there == 0 ? end_quietly(one, why) : break_off(one, why);
                }
                there += *got;
            }
            const result<multifd_packet_header> header = multifd_packet_header::decode(room.header, page_size_, room.offsets);
            if (!header) return break_off(one, header.error());
            if (header->normal.size() + header->zero.size() != 0) {
                one.has_new_pages.store(true);
                // One of the two sees what the other has stored.
                if (complete_.load()) return end_quietly(one, error(errc::bad_ram, "the end", "a page"));
                if (result<void> done = receive_pages(one, *header, room); !done) return break_off(one, done.error());
            }
            bytes_.fetch_add(room.header.size() + header->next_packet_size, std::memory_order_relaxed);
            if (header->is_sync() && !wait_for_main(one)) return;
        }
    }
    /// False when there is nothing to wait for any more.
    bool wait_for_main(worker& one) {
        std::unique_lock lock(workers_mutex_);
        one.at_sync = true;
        arrived_.notify_one();
        resume_.wait(lock, [&] { return ending_ || complete_ || !one.at_sync; });
        return !ending_;
    }
    void end_quietly(worker& one, const error& why) {
        const std::lock_guard lock(workers_mutex_);
        end_locked(one, why);
    }
    void end_locked(worker& one, const error& why) {
        one.ended = why;
        arrived_.notify_one();
    }
    void break_off(worker& one, error why) {
        {
            const std::lock_guard lock(workers_mutex_);
            if (complete_) return end_locked(one, why);
            if (ending_ || failure_) return;
            failure_ = why.within(name_of(one.id));
            arrived_.notify_one();
        }
        if (failed_) failed_();
    }

    struct packet_room {
        std::vector<std::byte> header;
        std::size_t ahead = 0; ///< bytes of the next header that came with the data
        std::vector<std::uint64_t> offsets;
        std::vector<std::byte> compressed;
        std::vector<std::span<std::byte>> parts;
    };
    result<void> receive_pages(worker& one, const multifd_packet_header& header, packet_room& room) {
        const auto block = std::find_if(
            blocks_.begin(), blocks_.end(), [&](const known_block& known) { return known.name == header.block; });
        if (block == blocks_.end()) return error(errc::bad_ram, "a block of the stream's list", std::string(header.block));
        const std::span<std::byte> memory = block->memory;
        const auto fail = [&](error why) { return why.within(block->name); };
        if (result<void> fit = header.check_offsets(memory.size(), page_size_); !fit) return fail(fit.error());
        for (const std::uint64_t offset : header.zero)
            make_zero(memory.subspan(static_cast<std::size_t>(offset), page_size_), block->file, offset);
        if (header.normal.empty()) return {};
        if ((header.flags & multifd_flag::compression) != compression_.method)
            return fail(error(errc::bad_ram, "pages compressed by " + std::string(compression_.name),
                std::string(multifd_method_name(header.flags))));
        const std::size_t size = header.next_packet_size;
        // Pages beside each other are one part. The header isn't looked at any more: the next one may come into its place.
        room.parts.clear();
        for (std::size_t i = 0; i != header.normal.size();) {
            std::size_t end = i + 1;
            while (end != header.normal.size() && header.normal[end] == header.normal[end - 1] + page_size_) ++end;
            room.parts.push_back(memory.subspan(static_cast<std::size_t>(header.normal[i]), (end - i) * page_size_));
            i = end;
        }
        if (one.decompressor == nullptr) {
            if (size != header.normal.size() * page_size_)
                return fail(error(errc::bad_ram, std::to_string(header.normal.size() * page_size_) + " bytes of pages", std::to_string(size)));
            room.parts.push_back(room.header);
            if (result<void> read = read_parts(one, room.parts, size, room.ahead); !read) return fail(read.error());
            return {};
        }
        if (size > multifd_max_compressed)
            return fail(error(errc::bad_ram, "at most " + std::to_string(multifd_max_compressed) + " bytes of compressed pages",
                std::to_string(size)));
        room.compressed.resize(size);
        std::array<std::span<std::byte>, 2> parts{room.compressed, room.header};
        if (result<void> read = read_parts(one, parts, size, room.ahead); !read) return fail(read.error());
        if (result<void> done = one.decompressor->decompress(room.compressed, room.parts); !done) return fail(done.error());
        return {};
    }
    /// Reads `size` bytes into `parts`, of which the last is for what comes after them: `ahead` bytes of it did.
    result<void> read_parts(worker& one, std::span<std::span<std::byte>> parts, std::size_t size, std::size_t& ahead) {
        std::size_t left = size;
        while (left != 0) {
            const result<std::size_t> got = one.channel->read_some(parts);
            reads_.fetch_add(1, std::memory_order_relaxed);
            if (!got) return got.error();
            if (*got == 0) return error(errc::truncated, std::to_string(size) + " bytes of pages", std::to_string(size - left));
            if (*got >= left) {
                ahead = *got - left;
                return {};
            }
            left -= *got;
            std::size_t skip = *got;
            while (skip >= parts.front().size()) {
                skip -= parts.front().size();
                parts = parts.subspan(1);
            }
            parts.front() = parts.front().subspan(skip);
        }
        return {};
    }

    const machine& machine_;
    std::size_t page_size_;
    vmstate::multifd_compression compression_;
    std::chrono::milliseconds patience_;
    std::function<void()> failed_;
    std::function<result<void>()> before_pages_;
    std::optional<bool> flushes_; ///< the main channel's thread's: whether the source sends MULTIFD_FLUSH

    std::vector<std::unique_ptr<worker>> workers_; ///< the list itself stays as it is once the threads run
    std::vector<known_block> blocks_;              ///< changes while all threads are at a sync point

    std::mutex workers_mutex_; ///< failure_, ending_, syncs_, and parts of the workers
    std::condition_variable arrived_;
    std::condition_variable resume_;
    error failure_;
    bool ending_ = false;
    std::atomic<bool> complete_ = false; ///< stored under it
    std::uint64_t syncs_ = 0;
    std::atomic<std::uint64_t> reads_ = 0;
    std::atomic<std::uint64_t> bytes_ = 0;
};

} // namespace vmstate::migration
