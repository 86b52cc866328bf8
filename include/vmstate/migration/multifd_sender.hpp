// SPDX-License-Identifier: BSL-1.0
//
// multifd at the source: pages go over several channels at once, by a thread each. Depends on ram/, machine/ram_block.hpp
// and stream/.
//
// The migration thread gathers pages of one block into a batch and hands it to the next thread that has none waiting. A
// page that goes twice may arrive in either order, over two channels: between the two there has to be a `sync`.
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
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/machine/ram_block.hpp>
#include <vmstate/ram/multifd_compression.hpp>
#include <vmstate/ram/multifd_packet.hpp>
#include <vmstate/stream/channel.hpp>
#include <vmstate/support/guarded.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate::migration {

class multifd_sender {
public:
    /// `failed` is called once, by a channel's thread, when something has gone wrong: whoever writes the main channel may
    /// wait for a destination that waits for that one.
    multifd_sender(std::size_t page_size, vmstate::multifd_compression compression, std::function<void()> failed)
        : page_size_(page_size), compression_(std::move(compression)), failed_(std::move(failed)) {
        batch_.offsets.reserve(multifd_pages_per_packet(page_size_));
    }
    multifd_sender(const multifd_sender&) = delete;
    multifd_sender& operator=(const multifd_sender&) = delete;
    ~multifd_sender() {
        shutdown();
        join();
    }

    /// Opens `count` channels, 1 to 255, and starts their threads. The first packet of each is written here, so that a
    /// peer that waits for all of them goes on. `timeout` as of `channel::set_timeout`.
    result<void> start(unsigned count, const std::array<std::uint8_t, 16>& uuid,
        const std::function<result<std::unique_ptr<output_channel>>()>& open, std::chrono::milliseconds timeout) {
        for (unsigned id = 0; id != count; ++id)
            if (result<void> started = start_one(id, uuid, open, timeout); !started)
                return std::move(started.error()).within(name_of(id));
        return {};
    }

    /// A page as it is when it leaves, by reference: see `page_writer::put_page`. Waits where all threads have enough to
    /// do.
    result<void> put_page(const ram_block& block, std::uint64_t offset) {
        if (batch_.block != &block && !batch_.offsets.empty())
            if (result<void> handed = hand_over(); !handed) return handed;
        batch_.block = &block;
        batch_.offsets.push_back(offset);
        return batch_.offsets.size() == multifd_pages_per_packet(page_size_) ? hand_over() : result<void>();
    }
    /// All pages put so far have left, and each channel has a SYNC behind them. The main channel's sync point follows.
    result<void> sync() {
        if (!batch_.offsets.empty())
            if (result<void> handed = hand_over(); !handed) return handed;
        std::unique_lock lock(workers_mutex_);
        for (const std::unique_ptr<worker>& one : workers_) {
            one->sync_num = packet_num_++;
            one->sync_wanted = true;
            one->work.notify_one();
        }
        idle_.wait(lock, [&] {
            return failure_ || std::all_of(workers_.begin(), workers_.end(),
                                   [](const std::unique_ptr<worker>& one) { return !one->sync_wanted && !one->has_batch; });
        });
        return status();
    }
    /// After the last sync: ends the threads and closes the channels. A destination that has all may have closed them
    /// before, so that they fail here says nothing.
    void finish() {
        join();
        for (const std::unique_ptr<worker>& one : workers_) static_cast<void>(vmstate::detail::guarded([&] { return one->channel->close(); }));
    }

    /// From any thread: every channel fails.
    void shutdown() noexcept {
        const std::lock_guard lock(workers_mutex_);
        shut_down_ = true;
        for (const std::unique_ptr<worker>& one : workers_) one->channel->shutdown();
    }
    /// Why the first channel failed that did.
    error failure() const {
        const std::lock_guard lock(workers_mutex_);
        return failure_;
    }
    /// Of all packets with their headers, the first ones of the channels aside, as QEMU counts them (`multifd-bytes`).
    std::uint64_t bytes() const noexcept { return bytes_.load(std::memory_order_relaxed); }

private:
    /// Pages of one block.
    struct batch {
        const ram_block* block = nullptr;
        std::vector<std::uint64_t> offsets;
        std::uint64_t packet_num = 0;
    };
    struct worker {
        unsigned id = 0;
        std::unique_ptr<output_channel> channel;
        std::unique_ptr<multifd_compressor> compressor;
        std::thread thread;
        // Under workers_mutex_, as is what follows:
        std::condition_variable work;
        bool has_batch = false;
        batch next;
        bool sync_wanted = false;
        std::uint64_t sync_num = 0;
    };

    static std::string name_of(unsigned id) { return "multifd channel " + std::to_string(id); }
    std::size_t header_size() const noexcept { return multifd_packet_header::wire_size(page_size_); }

    result<void> start_one(unsigned id, const std::array<std::uint8_t, 16>& uuid,
        const std::function<result<std::unique_ptr<output_channel>>()>& open, std::chrono::milliseconds timeout) {
        auto made = std::make_unique<worker>();
        made->id = id;
        if (!compression_.is_none()) {
            result<std::unique_ptr<multifd_compressor>> compressor = compression_.make_compressor();
            if (!compressor) return compressor.error();
            made->compressor = std::move(*compressor);
        }
        result<std::unique_ptr<output_channel>> opened = open();
        if (!opened) return opened.error();
        if (!*opened) return error(errc::invalid_argument, "a channel", "none");
        made->channel = std::move(*opened);
        if (timeout.count() != 0) made->channel->set_timeout(timeout);
        worker& one = *made;
        {
            const std::lock_guard lock(workers_mutex_);
            workers_.push_back(std::move(made));
            if (shut_down_) one.channel->shutdown();
        }
        const auto packet = multifd_initial_packet{uuid, static_cast<std::uint8_t>(id)}.encode();
        const std::span<const std::byte> bytes(packet);
        if (result<void> sent = one.channel->writev({&bytes, 1}); !sent) return sent;
        one.thread = std::thread([this, &one] { run(one); });
        return {};
    }
    void join() {
        {
            const std::lock_guard lock(workers_mutex_);
            ending_ = true;
            for (const std::unique_ptr<worker>& one : workers_) one->work.notify_one();
        }
        for (const std::unique_ptr<worker>& one : workers_)
            if (one->thread.joinable()) one->thread.join();
    }
    /// Called with workers_mutex_ held.
    result<void> status() const { return failure_ ? result<void>(failure_) : result<void>(); }

    /// The batch goes to the next thread, in turn, that has none waiting.
    result<void> hand_over() {
        std::unique_lock lock(workers_mutex_);
        worker* free = nullptr;
        idle_.wait(lock, [&] {
            if (failure_) return true;
            for (std::size_t i = 0; i != workers_.size() && free == nullptr; ++i) {
                worker& one = *workers_[(turn_ + i) % workers_.size()];
                if (!one.has_batch) free = &one;
            }
            return free != nullptr;
        });
        if (failure_) return failure_;
        turn_ = free->id + 1;
        batch_.packet_num = packet_num_++;
        if (compression_.is_none()) count(header_size() + batch_.offsets.size() * page_size_);
        std::swap(free->next, batch_);
        free->has_batch = true;
        free->work.notify_one();
        lock.unlock();
        batch_.block = nullptr;
        batch_.offsets.clear();
        return {};
    }

    // ---- a channel's thread: owns the channel and the compressor; what it is to do is under workers_mutex_

    void run(worker& one) {
        result<void> done = vmstate::detail::guarded([&] { return work(one); });
        if (!done) break_off(std::move(done.error()).within(name_of(one.id)));
    }
    result<void> work(worker& one) {
        packet_room room;
        room.header.resize(header_size());
        batch current;
        std::unique_lock lock(workers_mutex_);
        for (;;) {
            one.work.wait(lock, [&] { return ending_ || one.has_batch || one.sync_wanted; });
            if (ending_) return {};
            result<void> sent;
            if (one.has_batch) {
                std::swap(current, one.next);
                one.has_batch = false;
                lock.unlock();
                idle_.notify_one();
                sent = send(one, current, room);
                lock.lock();
            } else {
                const std::uint64_t number = one.sync_num;
                lock.unlock();
                sent = send_sync(one, number, room);
                lock.lock();
                one.sync_wanted = false;
            }
            if (!sent) return sent;
            idle_.notify_one();
        }
    }
    void break_off(error why) {
        {
            const std::lock_guard lock(workers_mutex_);
            idle_.notify_one();
            if (failure_) return;
            failure_ = std::move(why);
        }
        if (failed_) failed_();
    }

    struct packet_room {
        std::vector<std::byte> header;
        std::vector<std::byte> pages; ///< held still for the compressor
        std::vector<std::span<const std::byte>> parts;
    };
    result<void> send(worker& one, const batch& what, packet_room& room) {
        multifd_packet_header header;
        header.flags = compression_.method;
        header.packet_num = what.packet_num;
        header.block = what.block->name;
        header.normal = what.offsets;
        room.parts.assign(1, room.header);
        if (one.compressor == nullptr) {
            // Pages beside each other are one part.
            for (std::size_t i = 0; i != what.offsets.size();) {
                std::size_t end = i + 1;
                while (end != what.offsets.size() && what.offsets[end] == what.offsets[end - 1] + page_size_) ++end;
                room.parts.push_back(what.block->page(what.offsets[i], (end - i) * page_size_));
                i = end;
            }
            header.next_packet_size = static_cast<std::uint32_t>(what.offsets.size() * page_size_);
        } else {
            // The guest goes on writing, which a compressor doesn't expect of its input.
            room.pages.resize(what.offsets.size() * page_size_);
            for (std::size_t i = 0; i != what.offsets.size(); ++i)
                std::memcpy(room.pages.data() + i * page_size_, what.block->page(what.offsets[i], page_size_).data(), page_size_);
            const result<std::span<const std::byte>> compressed = one.compressor->compress(room.pages);
            if (!compressed) return compressed.error();
            header.next_packet_size = static_cast<std::uint32_t>(compressed->size());
            room.parts.push_back(*compressed);
            count(header_size() + compressed->size());
        }
        header.encode(room.header, page_size_);
        return one.channel->writev(room.parts);
    }
    result<void> send_sync(worker& one, std::uint64_t number, packet_room& room) {
        multifd_packet_header header;
        header.flags = multifd_flag::sync | compression_.method;
        header.packet_num = number;
        header.encode(room.header, page_size_);
        count(room.header.size());
        const std::span<const std::byte> bytes(room.header);
        return one.channel->writev({&bytes, 1});
    }
    void count(std::uint64_t bytes) noexcept { bytes_.fetch_add(bytes, std::memory_order_relaxed); }

    std::size_t page_size_;
    vmstate::multifd_compression compression_;
    std::function<void()> failed_;
    batch batch_; ///< the migration thread's

    mutable std::mutex workers_mutex_; ///< workers_ as a list and what they are to do, failure_, ending_, shut_down_
    std::condition_variable idle_;     ///< for the migration thread: something has been done
    std::vector<std::unique_ptr<worker>> workers_;
    error failure_;
    bool ending_ = false;
    bool shut_down_ = false;
    std::size_t turn_ = 0;
    std::uint64_t packet_num_ = 0;
    std::atomic<std::uint64_t> bytes_ = 0;
};

} // namespace vmstate::migration
