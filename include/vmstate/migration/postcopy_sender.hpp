// SPDX-License-Identifier: BSL-1.0
//
// The memory of a migration in postcopy, on its way out: pages that the destination asks for at once, over a channel of
// their own where there is one, the others behind them; and after a broken connection the destination's account of what it
// has. It decides nothing about connections and states; that is source.hpp. Depends on postcopy_pages.hpp, bandwidth.hpp,
// postcopy/, machine/, ram/ and stream/.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/migration/bandwidth.hpp>
#include <vmstate/migration/postcopy_pages.hpp>
#include <vmstate/postcopy/discard_memory.hpp>
#include <vmstate/postcopy/page_request.hpp>
#include <vmstate/postcopy/received_bitmap.hpp>
#include <vmstate/postcopy/request_queue.hpp>
#include <vmstate/ram/page_writer.hpp>
#include <vmstate/stream/buffered_writer.hpp>

namespace vmstate::migration {

/// The value of the PINGs behind which a destination has all that the main channel has brought before.
inline constexpr std::uint32_t ping_what_has_arrived = 0x766d7221; // "vmr!"

/// The value of the PING behind the devices in a package: when it is answered they are loaded, and RUN follows.
inline constexpr std::uint32_t ping_loaded = 3;

/// The value of the PING behind RUN, wherever that is.
inline constexpr std::uint32_t ping_run = 4;

/// The value of the PINGs of which nothing but their coming counts.
inline constexpr std::uint32_t ping_still_there = 1;

/// What went out in postcopy, on all channels of all connections.
struct postcopy_counts {
    std::uint64_t requests = 0;  ///< that came
    std::uint64_t bytes = 0;     ///< of records and commands
    std::uint64_t normal = 0;    ///< pages sent whole
    std::uint64_t duplicate = 0; ///< zero pages
};

/// The migration thread sends what nobody waits for. Those that hear what the destination asks for, the return-path thread
/// and perhaps one at the urgent channel, send that over the urgent channel themselves, where there is one. Each connection
/// begins with `attach` and ends with `detach`, between which the others may call what is said to be theirs.
class postcopy_sender {
public:
    using clock = std::chrono::steady_clock;

    /// `machine` outlives it. `release`: pages that the destination is known to have are given back.
    postcopy_sender(machine& of, std::vector<unsent_pages> unsent, bool release)
        : machine_(of), pages_(std::move(unsent), of.options().guest_page_size()), release_(release) {
        for (const std::unique_ptr<section>& entry : machine_.sections())
            if (entry->ram() != nullptr) entry_ = entry.get();
        for (std::size_t number = 0; release_ && number != pages_.block_count(); ++number)
            kinds_.push_back(discard_kind(pages_.block(number)));
    }
    postcopy_sender(const postcopy_sender&) = delete;
    postcopy_sender& operator=(const postcopy_sender&) = delete;

    const postcopy_pages& pages() const noexcept { return pages_; }
    std::uint64_t remaining() const { return pages_.remaining(); }
    postcopy_counts counts() const {
        return {queue_.requests() + urgent_requests_.load(), bytes_.load(), normal_.load(), duplicate_.load()};
    }

    /// Whether the destination is known to have loaded the devices: from then on its guest may run. Any thread may ask.
    bool is_loaded() const noexcept { return loaded_.load(); }

    // ---- the migration thread

    /// A connection, new pages' names and all. Requests only gather until `serve_requests`.
    void attach(output_channel& main, output_channel* urgent) {
        // What lies in the socket ahead of a page decides how long its guest waits. With a channel for those pages it is
        // those that have left and not arrived, which are few; without one, all.
        main.limit_unsent(urgent != nullptr ? 64 * 1024 : 32 * 1024);
        main_.emplace(machine_, main);
        queue_.reset();
        sent_.clear();
        unacknowledged_.clear();
        acknowledged_.store(0);
        sent_since_ping_ = 0;
        const std::lock_guard lock(urgent_mutex_);
        serving_ = urgent_ended_ = false;
        if (urgent == nullptr) return;
        urgent->limit_unsent(64 * 1024);
        urgent_.emplace(*urgent, pages_.page_size());
    }
    /// The same connection gets the channel for what is urgent, which came after it.
    void attach_urgent(output_channel& urgent) {
        urgent.limit_unsent(64 * 1024);
        const std::lock_guard lock(urgent_mutex_);
        urgent_.emplace(urgent, pages_.page_size());
    }
    /// The other threads have ended.
    void detach() {
        const std::lock_guard lock(urgent_mutex_);
        urgent_.reset();
        main_.reset();
    }
    stream_saver& saver() noexcept { return main_->saver; }
    result<void> flush() {
        heard_at_ = clock::now();
        return main_->flush(bytes_);
    }
    /// From now on what is asked for leaves at once over the urgent channel, where there is one.
    void serve_requests() {
        const std::lock_guard lock(urgent_mutex_);
        serving_ = true;
    }
    /// Nothing more goes over the urgent channel: the destination has no need of it.
    bool has_ended_urgent() const {
        const std::lock_guard lock(urgent_mutex_);
        return urgent_ended_;
    }
    bool has_requests() const { return !queue_.empty(); }
    /// The pages that have been asked for over the main channel, and no others.
    result<void> send_asked() {
        if (queue_.empty()) return {};
        begin_section(section_type::part);
        if (result<void> sent = send_requested(); !sent) return sent;
        end_section();
        return flush();
    }
    /// The rest of the memory in PART sections, at most `bandwidth()` bytes per second of what nobody waits for (0: no
    /// limit), and the stream's end. Where that leaves nothing to be sent for so long, a large page being paid for, a PING
    /// says every `silence` (0: never) that we are there. `fine()` is asked between the sections, and may end it.
    template <class Bandwidth, class Fine>
    result<void> send_rest(Bandwidth bandwidth, std::chrono::milliseconds silence, Fine fine) {
        meter_.start(background_);
        heard_at_ = clock::now();
        while (pages_.remaining() != 0) {
            if (result<void> is = fine(); !is) return is;
            const std::uint64_t most = bandwidth();
            if (meter_.is_spent(background_, most) && queue_.empty()) {
                release_acknowledged();
                if (silence.count() != 0 && clock::now() - heard_at_ >= silence) {
                    put_ping(ping_still_there);
                    if (result<void> sent = flush(); !sent) return sent;
                }
                queue_.wait_until(meter_.window_end());
            } else if (result<void> sent = send_part(most); !sent) {
                return sent;
            }
            meter_.update(background_);
        }
        // First, so that a channel which broke unnoticed is heard of while there is something to recover.
        if (result<void> ended = end_urgent(); !ended) return ended;
        begin_section(section_type::end);
        end_section();
        // No description: the destination's devices are loaded already.
        main_->out.put_u8(static_cast<std::uint8_t>(section_type::eof));
        return flush();
    }
    /// Nobody waits in `send_rest` any longer: whatever it is, `fine()` knows. Any thread may.
    void wake() { queue_.close(); }

    // ---- after a broken connection; the migration thread

    /// RECV_BITMAP for each block: the return-path thread takes the answers.
    result<void> ask_for_bitmaps() {
        {
            const std::lock_guard lock(answers_mutex_);
            received_.assign(pages_.block_count(), std::nullopt);
            asked_.assign(pages_.block_count(), true);
            unanswered_ = pages_.block_count();
            resume_asked_ = resumed_ = false;
        }
        for (std::size_t number = 0; number != pages_.block_count(); ++number) {
            std::array<std::byte, 1 + max_name_size> payload;
            memory_writer out(payload);
            out.put_counted_string(pages_.block(number).name);
            main_->saver.put_command(command::recv_bitmap, out.written());
        }
        return flush();
    }
    bool has_bitmaps() const {
        const std::lock_guard lock(answers_mutex_);
        return unanswered_ == 0;
    }
    /// Once all are there: what the destination lacks has to go. POSTCOPY_RESUME asks for an answer, too. `run`: RUN has gone
    /// on its own, and whether it arrived isn't known.
    result<void> resume(bool run) {
        {
            const std::lock_guard lock(answers_mutex_);
            for (std::size_t number = 0; number != received_.size(); ++number)
                if (result<void> fits = pages_.set_received(number, *received_[number]); !fits) return fits;
            received_.clear();
            resume_asked_ = true;
        }
        // The destination asks again for what it waits for, perhaps before it answers.
        serve_requests();
        main_->saver.put_command(command::postcopy_resume);
        if (run) main_->saver.put_command(command::postcopy_run);
        return flush();
    }
    bool has_resumed() const {
        const std::lock_guard lock(answers_mutex_);
        return resumed_;
    }

    // ---- the return-path thread, and for requests any other

    /// A request that was checked. `errc::bad_ram` for a block that isn't sent.
    result<void> request(const page_request& what) {
        const std::optional<std::size_t> number = pages_.find(*what.block);
        if (!number) return error(errc::bad_ram, "a block of the stream", '"' + what.block->name + '"').within("REQ_PAGES");
        {
            const std::lock_guard lock(urgent_mutex_);
            if (urgent_ && serving_) {
                ++urgent_requests_;
                return send_urgent(*number, what);
            }
        }
        queue_.push(what);
        return {};
    }
    /// RECV_BITMAP with the block's name; its bitmap follows in `in`.
    result<void> take_bitmap(std::string_view name, reader& in) {
        const auto refuse = [&](std::string expected) {
            return error(errc::bad_command, std::move(expected), '"' + std::string(name) + '"').within("RECV_BITMAP");
        };
        std::size_t number = 0;
        while (number != pages_.block_count() && pages_.block(number).name != name) ++number;
        if (number == pages_.block_count()) return refuse("a block of the stream");
        {
            const std::lock_guard lock(answers_mutex_);
            if (number >= asked_.size() || !asked_[number]) return refuse("an answer that was asked for");
        }
        result<page_bitmap> received = decode_received_bitmap(in, pages_.pages_of(number));
        if (!received) return std::move(received.error().within(name));
        const std::lock_guard lock(answers_mutex_);
        received_[number] = std::move(*received);
        asked_[number] = false;
        --unanswered_;
        loaded_.store(true); // it has come to a pause, which it can't before it runs
        return {};
    }
    result<void> take_resume_ack(std::uint32_t value) {
        const std::lock_guard lock(answers_mutex_);
        if (!resume_asked_) return error(errc::bad_command, "an answer that was asked for", "RESUME_ACK");
        if (value != 1) return error(errc::bad_command, "1 in RESUME_ACK", std::to_string(value));
        resume_asked_ = false;
        resumed_ = true;
        return {};
    }
    void take_pong(std::uint32_t value) {
        if (value == ping_what_has_arrived) ++acknowledged_;
        if (value == ping_loaded) loaded_.store(true);
    }

private:
    /// The main channel of a connection, from the switch on.
    struct main_stream {
        main_stream(machine& of, output_channel& channel)
            : out(channel), saver(of, out), pages(out, of.options().guest_page_size()) {}

        result<void> flush(std::atomic<std::uint64_t>& count) {
            result<void> sent = out.flush();
            count += out.offset() - counted;
            counted = out.offset();
            return sent;
        }

        buffered_writer out;
        stream_saver saver;
        page_writer pages;
        std::uint64_t counted = 0;
    };
    /// The channel for what the destination waits for: raw records, one block's name after the other.
    struct urgent_stream {
        urgent_stream(output_channel& channel, std::size_t page_size) : out(channel), pages(out, page_size) {}

        buffered_writer out;
        page_writer pages;
        std::uint64_t counted = 0;
    };
    /// What has gone over the main channel before a PING.
    using sent_run = std::vector<page_claim>;

    /// So much between two looks at the requests.
    static constexpr std::uint64_t small_batch = 8 * 4096;
    static constexpr std::uint64_t large_batch = 16 * 4096;
    /// So much between two PINGs.
    static constexpr std::uint64_t ping_distance = 1 << 20;

    bool begin_section(section_type type) {
        if (entry_ != nullptr) main_->saver.begin_section(type, *entry_);
        return entry_ != nullptr;
    }
    void end_section() {
        if (entry_ == nullptr) return;
        main_->pages.put_end();
        main_->saver.end_section(*entry_);
    }
    bool has_urgent() const {
        const std::lock_guard lock(urgent_mutex_);
        return urgent_.has_value();
    }
    /// One PART: 50 ms, or what the bandwidth allows.
    result<void> send_part(std::uint64_t bandwidth) {
        const std::uint64_t batch = has_urgent() ? large_batch : small_batch;
        const clock::time_point enough = clock::now() + std::chrono::milliseconds(50);
        begin_section(section_type::part);
        do {
            if (result<void> sent = send_requested(); !sent) return sent;
            if (meter_.is_spent(background_, bandwidth)) break;
            const std::optional<page_claim> next = pages_.claim_next(batch);
            if (!next) break;
            const std::uint64_t begin = main_->out.offset();
            put(main_->pages, *next);
            background_ += main_->out.offset() - begin;
            note_sent(*next);
            if (result<void> sent = flush(); !sent) return sent;
        } while (clock::now() < enough && sent_since_ping_ < ping_distance);
        end_section();
        ping_if_due();
        if (result<void> sent = flush(); !sent) return sent;
        release_acknowledged();
        return {};
    }
    /// What is in the queue, over the main channel.
    result<void> send_requested() {
        while (const std::optional<page_request_queue::entry> next = queue_.try_pop()) {
            const std::optional<std::size_t> number = pages_.find(*next->block);
            const std::optional<page_claim> claim = number ? pages_.claim(*number, next->offset) : std::nullopt;
            if (!claim) continue;
            put(main_->pages, *claim);
            note_sent(*claim);
            if (result<void> sent = flush(); !sent) return sent;
        }
        return {};
    }
    /// With urgent_mutex_ held: two writers never get at the channel.
    result<void> send_urgent(std::size_t number, const page_request& what) {
        const std::uint64_t unit = what.block->options.host_page_size;
        for (std::uint64_t offset = what.start; offset != what.start + what.length; offset += unit) {
            const std::optional<page_claim> claim = pages_.claim(number, offset);
            if (!claim) continue;
            put(urgent_->pages, *claim);
            if (result<void> sent = flush_urgent(); !sent) return sent;
        }
        return {};
    }
    result<void> flush_urgent() {
        result<void> sent = urgent_->out.flush();
        bytes_ += urgent_->out.offset() - urgent_->counted;
        urgent_->counted = urgent_->out.offset();
        if (!sent) return std::move(sent.error().within("preempt channel"));
        return {};
    }
    /// Its last record, behind all that was asked for (QEMU up to 7.2 waits for it).
    result<void> end_urgent() {
        const std::lock_guard lock(urgent_mutex_);
        if (!urgent_) return {};
        urgent_->pages.put_end();
        serving_ = false;
        urgent_ended_ = true;
        return flush_urgent();
    }
    /// All target pages of whole host pages, one behind the other.
    void put(page_writer& out, const page_claim& claim) {
        const ram_block& block = pages_.block(claim.number);
        const std::size_t page_size = pages_.page_size();
        std::uint64_t normal = 0;
        for (std::size_t page = claim.pages.first; page != claim.pages.first + claim.pages.count; ++page) {
            const std::uint64_t offset = std::uint64_t{page} * page_size;
            if (!pages_.is_absent(claim.number, page)) {
                const std::span<const std::byte> bytes = block.page(offset, page_size);
                if (!is_zero_page(bytes)) {
                    out.put_page(block, offset, bytes);
                    ++normal;
                    continue;
                }
            }
            out.put_zero(block, offset);
        }
        normal_ += normal;
        duplicate_ += claim.pages.count - normal;
    }

    // ---- release-ram: a page that has left may yet be lost, and asked for again after a recovery. What came before a PING
    // that was answered is there.

    void note_sent(const page_claim& claim) {
        if (!release_) return;
        sent_.push_back(claim);
        sent_since_ping_ += claim.pages.count * pages_.page_size();
    }
    void put_ping(std::uint32_t value) {
        std::array<std::byte, 4> payload;
        vmstate::detail::store_big(payload.data(), value);
        main_->saver.put_command(command::ping, payload);
    }
    void ping_if_due() {
        if (sent_since_ping_ < ping_distance) return;
        sent_since_ping_ = 0;
        put_ping(ping_what_has_arrived);
        unacknowledged_.push_back(std::exchange(sent_, {}));
    }
    void release_acknowledged() {
        if (!is_loaded()) return; // the guest may yet go on here
        for (std::uint64_t count = acknowledged_.exchange(0); count != 0 && !unacknowledged_.empty(); --count) {
            for (const page_claim& claim : unacknowledged_.front()) {
                const ram_block& block = pages_.block(claim.number);
                // What is given back is whole pages of the system: of the small blocks that lie somewhere, nothing.
                if (reinterpret_cast<std::uintptr_t>(block.memory.data()) % block.options.host_page_size != 0) continue;
                pages_.set_released(claim);
                const std::uint64_t size = pages_.page_size();
                // To give back less than one could is no failure.
                (void)discard_range(block, {claim.pages.first * size, claim.pages.count * size}, kinds_[claim.number]);
            }
            unacknowledged_.pop_front();
        }
    }

    machine& machine_;
    postcopy_pages pages_;
    const bool release_;
    std::vector<vmstate::detail::memory_kind> kinds_; ///< by the blocks' numbers, where pages are given back
    const section* entry_ = nullptr; ///< the machine's RAM
    page_request_queue queue_;       ///< without an urgent channel, and before requests are served
    std::atomic<bool> loaded_ = false;
    std::atomic<std::uint64_t> urgent_requests_ = 0;
    std::atomic<std::uint64_t> bytes_ = 0;
    std::atomic<std::uint64_t> normal_ = 0;
    std::atomic<std::uint64_t> duplicate_ = 0;

    // the migration thread's
    std::optional<main_stream> main_;
    bandwidth_meter meter_;
    clock::time_point heard_at_{}; ///< when something went over the main channel
    std::uint64_t background_ = 0; ///< bytes of pages that nobody waited for
    sent_run sent_;                ///< since the last PING
    std::uint64_t sent_since_ping_ = 0;
    std::deque<sent_run> unacknowledged_;
    std::atomic<std::uint64_t> acknowledged_ = 0; ///< of those, since they were looked at

    mutable std::mutex urgent_mutex_; ///< the next three
    std::optional<urgent_stream> urgent_;
    bool serving_ = false;
    bool urgent_ended_ = false;

    mutable std::mutex answers_mutex_; ///< all below
    std::vector<std::optional<page_bitmap>> received_; ///< by the blocks' numbers
    std::vector<bool> asked_;                          ///< and not answered yet
    std::size_t unanswered_ = 0;
    bool resume_asked_ = false;
    bool resumed_ = false;
};

} // namespace vmstate::migration
