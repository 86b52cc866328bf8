// SPDX-License-Identifier: BSL-1.0
//
// The source of a live migration: memory goes over while the guest runs, what it writes goes again, and when what is
// left fits into the downtime limit the guest stops and the rest follows. Depends on the other headers of migration/,
// ram/, machine/ and stream/.
//
//     setup -> active -> [pre-switchover ->] device -> completed
//       any of them -> failed, or -> cancelling -> cancelled
//
// Threads: the migration thread writes the stream and calls the guest; the return-path thread reads the destination's
// answers. Until the destination has said that it has loaded everything, whatever fails leaves the guest running here,
// with its memory and devices as they are.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/migration/bandwidth.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/migration/monitor.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/ram/page_bitmap.hpp>
#include <vmstate/ram/page_writer.hpp>
#include <vmstate/ram/xbzrle.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/buffered_writer.hpp>
#include <vmstate/stream/open.hpp>

namespace vmstate::migration {

class source {
public:
    using clock = std::chrono::steady_clock;

    /// All three have to outlive the migration; `machine` is not to be changed while it runs.
    source(machine& what, guest& of, const parameters& settings = {})
        : machine_(what), guest_(of), settings_(settings) {}
    source(const source&) = delete;
    source& operator=(const source&) = delete;
    /// Cancels what still runs.
    ~source() {
        cancel();
        join();
    }

    /// Begins to migrate to a URI (`tcp:`, `unix:`, `exec:`, `fd:`, `file:`) in a thread of its own. Fails at once only
    /// where a migration is running already, or the machine can't be migrated.
    result<void> start(std::string_view uri) {
        return start_thread([where = std::string(uri)]() -> result<std::unique_ptr<output_channel>> {
            return open_output(where);
        });
    }
    /// The same over a channel of the user's.
    result<void> start(std::unique_ptr<output_channel> channel) {
        if (!channel) return error(errc::invalid_argument, "a channel", "none");
        auto held = std::make_shared<std::unique_ptr<output_channel>>(std::move(channel));
        return start_thread([held]() -> result<std::unique_ptr<output_channel>> { return std::move(*held); });
    }

    /// Waits for the end of the migration: success, or why not.
    result<void> wait() {
        monitor_.wait_until([](const migration::status& at) { return at.state == state::none || is_final(at.state); });
        join();
        const migration::status last = status();
        if (last.state == state::completed) return {};
        if (last.error_desc) return last.error_desc;
        return error(errc::invalid_argument, "a migration", "none");
    }
    /// A consistent snapshot; any thread may ask.
    migration::status status() const { return monitor_.snapshot(); }
    /// Ends the migration at once and lets the guest run on here. Harmless at any time; too late once the destination
    /// has loaded everything.
    void cancel() {
        if (!monitor_.enter(state::cancelling)) return;
        const std::lock_guard lock(channel_mutex_);
        if (channel_ != nullptr) channel_->shutdown();
    }
    /// Goes on from `pre-switchover` (QEMU: migrate-continue).
    result<void> resume() {
        if (monitor_.now() != state::pre_switchover)
            return error(errc::invalid_argument, "state pre-switchover", std::string(to_string(monitor_.now())));
        may_switch_.store(true);
        monitor_.wake();
        return {};
    }
    /// New values for those parameters that may change while a migration runs.
    void set_parameters(const parameters& settings) {
        const std::lock_guard lock(settings_mutex_);
        settings_.downtime_limit = settings.downtime_limit;
        settings_.max_bandwidth = settings.max_bandwidth;
        if (!is_running()) settings_ = settings;
        monitor_.wake();
    }
    migration::parameters parameters() const {
        const std::lock_guard lock(settings_mutex_);
        return settings_;
    }
    /// One at a time; an empty one for none.
    void observe(observer who) { monitor_.observe(std::move(who)); }

private:
    /// A RAM block on its way.
    struct sent_block {
        ram_block* block;
        any_dirty_log* log; // null without one
        page_bitmap dirty;
        std::uint64_t address; // of its first page among all blocks, for the XBZRLE cache
    };

    bool is_running() const {
        const state at = monitor_.now();
        return at != state::none && !is_final(at);
    }
    template <class Open>
    result<void> start_thread(Open open) {
        if (result<void> fit = machine_.check(); !fit) return fit;
        if (is_running()) return error(errc::invalid_argument, "no migration under way", std::string(to_string(monitor_.now())));
        join();
        may_switch_.store(false);
        peer_has_spoken_.store(false);
        answer_ = {};
        blocks_.clear();
        at_block_ = at_page_ = 0;
        pages_before_window_ = sent_before_sync_ = 0;
        pass_ = 1;
        xbzrle_.reset();
        outrun_ = throttled_ = 0;
        stopped_at_.reset();
        monitor_.enter(state::setup);
        migration_thread_ = std::thread([this, open = std::move(open)] { run(open); });
        return {};
    }
    void join() {
        if (migration_thread_.joinable()) migration_thread_.join();
    }

    // ---- the migration thread: owns blocks_, out_, saver_, meter_

    template <class Open>
    void run(const Open& open) {
        std::unique_ptr<output_channel> channel;
        result<void> done = [&]() -> result<void> {
            result<std::unique_ptr<output_channel>> opened = open();
            if (!opened) return opened.error().within("setup");
            channel = std::move(*opened);
            {
                const std::lock_guard lock(channel_mutex_);
                channel_ = channel.get();
            }
            if (monitor_.now() == state::cancelling) return error(errc::io, {}, "cancelled");
            return migrate(*channel);
        }();
        stop_logs();
        if (throttled_ != 0) set_throttle(0);
        if (!done && channel) channel->shutdown();
        if (return_path_thread_.joinable()) return_path_thread_.join();
        way_back_.reset();
        if (done && channel) done = channel->close();
        {
            const std::lock_guard lock(channel_mutex_);
            channel_ = nullptr;
        }
        channel.reset();
        finish(done);
    }
    void finish(const result<void>& done) {
        if (done) {
            monitor_.enter(state::completed);
            return;
        }
        // The guest first: whoever waits for the end finds it running.
        error failure = done.error();
        if (stopped_at_ && guest_.start) {
            if (result<void> started = guest_.start(); !started) failure = started.error().within("start");
        }
        stopped_at_.reset();
        const bool cancelled = monitor_.now() == state::cancelling;
        if (cancelled) failure = error(errc::io, {}, "cancelled");
        monitor_.update([&](migration::status& at) { at.error_desc = failure; });
        monitor_.enter(cancelled ? state::cancelled : state::failed);
    }

    result<void> migrate(output_channel& channel) {
        const migration::parameters settings = parameters();
        if (settings.peer_timeout.count() != 0) channel.set_timeout(settings.peer_timeout);
        buffered_writer out(channel);
        stream_saver saver(machine_, out);
        if (result<void> done = setup(channel, out, saver, settings); !done) return std::move(done.error()).within("setup");
        if (!monitor_.enter(state::active)) return error(errc::io, {}, "cancelled");
        page_writer pages(out, page_size());
        if (result<void> done = precopy(out, saver, pages); !done) return std::move(done.error()).within("active");
        if (result<void> done = switch_over(out, saver, pages); !done) return std::move(done.error()).within("device");
        return await_return_path(settings);
    }

    // ---- setup

    result<void> setup(output_channel& channel, buffered_writer& out, stream_saver& saver, const migration::parameters& settings) {
        if (result<void> done = saver.save_header(); !done) return done;
        if (settings.return_path) {
            result<std::unique_ptr<duplex_channel>> back = channel.get_return_path();
            if (back) {
                way_back_ = std::move(*back);
                // While memory goes over, the destination has nothing to say for as long as it takes.
                way_back_->set_timeout(std::chrono::milliseconds(0));
                saver.put_command(command::open_return_path);
                return_path_thread_ = std::thread([this, &channel] { read_return_path(channel); });
                ping(saver, 1);
            } else if (!(back.error() == errc::unsupported)) {
                return back.error();
            }
        }
        collect_blocks();
        if (settings.xbzrle) {
            result<xbzrle_encoder> made = xbzrle_encoder::make(settings.xbzrle_cache_size, page_size());
            if (!made) return made.error();
            xbzrle_.emplace(std::move(*made));
        }
        for (sent_block& one : blocks_) {
            one.dirty.set_range(0, one.dirty.size());
            if (one.log == nullptr) continue;
            if (result<void> started = one.log->start(); !started) return started.error().within(one.block->name);
        }
        if (ram_section* ram = machine_.ram()) {
            const section& entry = ram_entry();
            saver.begin_section(section_type::start, entry);
            ram->save_setup(out, machine_.options());
            saver.end_section(entry);
        }
        if (result<void> sent = out.flush(); !sent) return sent;
        monitor_.update([&](migration::status& at) {
            at.ram.page_size = page_size();
            at.ram.total = at.ram.remaining = pending_bytes();
            at.ram.dirty_sync_count = 1;
        });
        last_sync_ = clock::now();
        return {};
    }
    void collect_blocks() {
        ram_section* const ram = machine_.ram();
        if (ram == nullptr) return;
        std::uint64_t address = 0;
        for (const std::unique_ptr<ram_block>& block : ram->blocks()) {
            if (ram->is_ignored(*block)) continue;
            const auto log = guest_.dirty_logs.find(block->name);
            blocks_.push_back({block.get(), log == guest_.dirty_logs.end() ? nullptr : &log->second,
                               page_bitmap(static_cast<std::size_t>(block->used_length / page_size())), address});
            address += block->used_length;
        }
    }
    void stop_logs() {
        for (sent_block& one : blocks_)
            if (one.log != nullptr) static_cast<void>(one.log->stop());
    }
    void ping(stream_saver& saver, std::uint32_t value) {
        std::array<std::byte, 4> payload;
        vmstate::detail::store_big(payload.data(), value);
        saver.put_command(command::ping, payload);
    }

    // ---- the guest runs

    result<void> precopy(buffered_writer& out, stream_saver& saver, page_writer& pages) {
        meter_.start(out.offset());
        for (;;) {
            if (result<void> fine = check_peer(); !fine) return fine;
            const migration::parameters settings = parameters();
            const std::uint64_t left = pending_bytes();
            if (left == 0 || left <= affordable(out, settings)) {
                // Only now ask the logs: each time costs the guest.
                if (result<void> read = read_logs(false, pages.counts(), settings); !read) return read;
                if (pending_bytes() <= affordable(out, settings)) return {};
            }
            if (result<void> sent = send_part(out, saver, pages, settings); !sent) return sent;
            account(out, pages.counts());
        }
    }
    /// What could be sent in the time that the guest may stand still.
    std::uint64_t affordable(const buffered_writer& out, const migration::parameters& settings) const {
        double per_second = meter_.rate(out.offset());
        if (settings.max_bandwidth != 0) per_second = std::min(per_second, static_cast<double>(settings.max_bandwidth));
        if (settings.avail_switchover_bandwidth != 0) per_second = static_cast<double>(settings.avail_switchover_bandwidth);
        return static_cast<std::uint64_t>(per_second * std::chrono::duration<double>(settings.downtime_limit).count());
    }
    /// One PART: as much as goes out in 50 ms, or as the bandwidth allows in this window.
    result<void> send_part(buffered_writer& out, stream_saver& saver, page_writer& pages, const migration::parameters& settings) {
        if (meter_.is_spent(out.offset(), settings.max_bandwidth)) return sleep_until_window_ends();
        const section& entry = ram_entry();
        const clock::time_point enough = clock::now() + std::chrono::milliseconds(50);
        saver.begin_section(section_type::part, entry);
        bool more = true;
        while (more && clock::now() < enough && !meter_.is_spent(out.offset(), settings.max_bandwidth))
            if (result<void> sent = send_some(pages, 64, more); !sent) return sent;
        pages.put_end();
        saver.end_section(entry);
        return out.flush();
    }
    /// At most `count` dirty pages, from where the last ones were; clears `more` when none is left.
    result<void> send_some(page_writer& pages, std::size_t count, bool& more) {
        while (count != 0) {
            if (at_block_ >= blocks_.size()) at_block_ = at_page_ = 0;
            const std::size_t first_block = at_block_;
            page_run run;
            for (;;) {
                run = blocks_[at_block_].dirty.find_next_run(at_page_);
                if (run.count != 0) break;
                at_page_ = 0;
                at_block_ = at_block_ + 1 == blocks_.size() ? 0 : at_block_ + 1;
                if (at_block_ == first_block) {
                    run = blocks_[at_block_].dirty.find_next_run(0);
                    break;
                }
            }
            if (run.count == 0) {
                more = false;
                return {};
            }
            sent_block& one = blocks_[at_block_];
            const std::size_t end = run.first + std::min(run.count, count);
            for (std::size_t page = run.first; page != end; ++page) {
                // Cleared before it is read: what the guest writes from here on is found by the log.
                one.dirty.clear(page);
                const std::uint64_t offset = static_cast<std::uint64_t>(page) * page_size();
                const std::span<const std::byte> bytes = one.block->page(offset, page_size());
                send_page(pages, one, offset, bytes);
            }
            count -= end - run.first;
            at_page_ = end;
        }
        return {};
    }
    void send_page(page_writer& pages, const sent_block& one, std::uint64_t offset, std::span<const std::byte> bytes) {
        const bool is_zero = is_zero_page(bytes);
        if (is_zero) pages.put_zero(*one.block, offset);
        // In the first pass there is nothing yet that a page could differ from.
        if (!xbzrle_ || pass_ == 1) {
            if (!is_zero) pages.put_page(*one.block, offset, bytes);
            return;
        }
        if (is_zero) return xbzrle_->sent_zero(one.address + offset, pass_);
        const xbzrle_page how = xbzrle_->encode(one.address + offset, bytes, pass_);
        if (how.how == xbzrle_page::kind::encoded) pages.put_xbzrle(*one.block, offset, how.bytes);
        else if (how.how == xbzrle_page::kind::plain) {
            if (how.bytes.data() == bytes.data()) pages.put_page(*one.block, offset, bytes);
            else pages.put_page_copy(*one.block, offset, how.bytes); // the cache goes on to other pages
        }
    }
    result<void> sleep_until_window_ends() {
        monitor_.wait_until(meter_.window_end(), [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load();
        });
        return {};
    }
    void account(const buffered_writer& out, const page_counts& counts) {
        const std::uint64_t transferred = out.offset();
        const bool window_over = meter_.update(transferred);
        if (!window_over) return;
        const std::uint64_t left = pending_bytes();
        monitor_.update([&](migration::status& at) {
            count_pages(at, counts, transferred, left);
            at.ram.mbps = meter_.rate() * 8 / 1e6;
            at.ram.pages_per_second = (counts.normal + counts.duplicate - pages_before_window_) *
                                      static_cast<std::uint64_t>(std::chrono::seconds(1) / bandwidth_meter::window);
            if (meter_.rate() > 0)
                at.expected_downtime = std::chrono::milliseconds(
                    static_cast<std::int64_t>(1000 * static_cast<double>(left) / meter_.rate()));
        });
        pages_before_window_ = counts.normal + counts.duplicate;
    }
    void count_pages(migration::status& at, const page_counts& counts, std::uint64_t transferred, std::uint64_t left) const {
        at.ram.transferred = transferred;
        at.ram.remaining = left;
        at.ram.duplicate = counts.duplicate;
        at.ram.normal = counts.normal;
        at.ram.normal_bytes = counts.normal_bytes;
        if (xbzrle_) at.xbzrle_cache = xbzrle_->counts();
        if (stopped_at_) at.ram.downtime_bytes = transferred - at.ram.precopy_bytes;
        else at.ram.precopy_bytes = transferred;
    }
    /// What was written since the last time is dirty again. With `standing_still` also what nobody logs.
    result<void> read_logs(bool standing_still, const page_counts& counts, const migration::parameters& settings) {
        std::uint64_t newly = 0;
        for (sent_block& one : blocks_) {
            if (one.log == nullptr) {
                if (standing_still) one.dirty.set_range(0, one.dirty.size());
                continue;
            }
            const result<std::uint64_t> found = one.log->collect(one.dirty);
            if (!found) return found.error().within(one.block->name);
            newly += *found;
        }
        ++pass_;
        const clock::time_point now = clock::now();
        const std::chrono::duration<double> time = now - last_sync_;
        const std::uint64_t left = pending_bytes();
        monitor_.update([&](migration::status& at) {
            ++at.ram.dirty_sync_count;
            at.ram.remaining = left;
            if (time.count() > 0) at.ram.dirty_pages_rate = static_cast<std::uint64_t>(static_cast<double>(newly) / time.count());
        });
        if (!standing_still && settings.auto_converge) slow_down(newly * page_size(), counts.normal_bytes - sent_before_sync_, settings);
        last_sync_ = now;
        sent_before_sync_ = counts.normal_bytes;
        return {};
    }
    /// Where the guest has written, twice in a row, half as much as was sent, it gets less time (QEMU:
    /// migration_trigger_throttle).
    void slow_down(std::uint64_t written, std::uint64_t sent, const migration::parameters& settings) {
        if (written * 2 <= sent) return;
        if (++outrun_ < 2) return;
        outrun_ = 0;
        set_throttle(throttled_ == 0 ? settings.cpu_throttle_initial
                                     : std::min(throttled_ + settings.cpu_throttle_increment, settings.max_cpu_throttle));
    }
    void set_throttle(unsigned percent) {
        if (percent == throttled_) return;
        throttled_ = percent;
        if (guest_.throttle) guest_.throttle(percent);
        monitor_.update([&](migration::status& at) { at.cpu_throttle_percentage = percent; });
    }

    // ---- the guest stands still

    result<void> switch_over(buffered_writer& out, stream_saver& saver, page_writer& pages) {
        const migration::parameters settings = parameters();
        const clock::time_point stopped_at = clock::now();
        if (guest_.stop) {
            if (result<void> stopped = guest_.stop(); !stopped) return stopped.error().within("stop");
        }
        stopped_at_ = stopped_at;
        if (settings.pause_before_switchover) {
            if (!monitor_.enter(state::pre_switchover)) return error(errc::io, {}, "cancelled");
            monitor_.wait_until([&](const migration::status& at) {
                return at.state == state::cancelling || may_switch_.load() || peer_has_spoken_.load();
            });
            if (result<void> fine = check_peer(); !fine) return fine;
        }
        if (!monitor_.enter(state::device)) return error(errc::io, {}, "cancelled");
        monitor_.update([&](migration::status& at) { at.ram.precopy_bytes = out.offset(); });
        if (result<void> read = read_logs(true, pages.counts(), settings); !read) return read;
        if (machine_.ram() != nullptr) {
            const section& entry = ram_entry();
            saver.begin_section(section_type::end, entry);
            bool more = !blocks_.empty();
            while (more)
                if (result<void> sent = send_some(pages, 256, more); !sent) return sent;
            pages.put_end();
            saver.end_section(entry);
        }
        if (result<void> saved = saver.save_devices(); !saved) return saved;
        if (result<void> saved = saver.save_end(); !saved) return saved;
        if (result<void> sent = out.flush(); !sent) return sent;
        const std::uint64_t transferred = out.offset();
        monitor_.update([&](migration::status& at) { count_pages(at, pages.counts(), transferred, 0); });
        return {};
    }
    /// The destination's last word; without a return path, that the bytes have left is all there is to know.
    result<void> await_return_path(const migration::parameters& settings) {
        if (return_path_thread_.joinable()) {
            const auto has_spoken = [&](const migration::status& at) {
                return at.state == state::cancelling || peer_has_spoken_.load();
            };
            if (settings.peer_timeout.count() == 0) monitor_.wait_until(has_spoken);
            else if (!monitor_.wait_until(clock::now() + settings.peer_timeout, has_spoken))
                return error(errc::io, {}, "no answer from the destination").within("return path");
            if (!peer_has_spoken_.load()) return error(errc::io, {}, "cancelled");
            const std::lock_guard lock(answer_mutex_);
            if (!answer_) return answer_;
        }
        const auto downtime = std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - *stopped_at_);
        monitor_.update([&](migration::status& at) { at.downtime = downtime; });
        stopped_at_.reset();
        return {};
    }

    // ---- the return-path thread: owns way_back_

    void read_return_path(output_channel& channel) {
        const result<void> answer = listen_to_peer();
        {
            const std::lock_guard lock(answer_mutex_);
            answer_ = answer;
        }
        peer_has_spoken_.store(true);
        // A destination that has given up reads no more: don't wait for it to.
        if (!answer) channel.shutdown();
        monitor_.wake();
    }
    /// Until the last message: whether it said that all was loaded.
    result<void> listen_to_peer() {
        buffered_reader in(*way_back_, 4096);
        received_message message;
        for (;;) {
            if (result<void> read = read_return_message(in, message); !read) return read;
            switch (message.type) {
            case return_message::pong:
            case return_message::switchover_ack: break;
            case return_message::shut:
                if (message.value() == 0) return {};
                return error(errc::io, {}, "the destination could not load the stream").within("return path");
            default:
                return error(errc::bad_command, "a message of precopy", std::to_string(static_cast<unsigned>(message.type)))
                    .within("return path");
            }
        }
    }
    /// Before its time, the destination's last word is that something is wrong.
    result<void> check_peer() {
        if (monitor_.now() == state::cancelling) return error(errc::io, {}, "cancelled");
        if (!peer_has_spoken_.load()) return {};
        const std::lock_guard lock(answer_mutex_);
        if (!answer_) return answer_;
        return error(errc::bad_command, "no end before the stream's", "SHUT").within("return path");
    }

    // ---- small things

    std::size_t page_size() const { return machine_.options().guest_page_size(); }
    std::uint64_t pending_bytes() const {
        std::uint64_t pages = 0;
        for (const sent_block& one : blocks_) pages += one.dirty.count();
        return pages * page_size();
    }
    const section& ram_entry() const {
        for (const std::unique_ptr<section>& entry : machine_.sections())
            if (entry->ram() != nullptr) return *entry;
        return *machine_.sections().front(); // never: asked only where there is RAM
    }

    machine& machine_;
    guest& guest_;
    mutable std::mutex settings_mutex_; ///< settings_
    migration::parameters settings_;

    detail::monitor monitor_;
    std::thread migration_thread_;
    std::atomic<bool> may_switch_ = false;

    std::mutex channel_mutex_; ///< channel_
    output_channel* channel_ = nullptr;

    std::thread return_path_thread_;
    std::unique_ptr<duplex_channel> way_back_;
    std::atomic<bool> peer_has_spoken_ = false;
    std::mutex answer_mutex_; ///< answer_
    result<void> answer_;

    std::vector<sent_block> blocks_;
    std::size_t at_block_ = 0; ///< where the scan goes on
    std::size_t at_page_ = 0;
    std::uint64_t pass_ = 1; ///< over the memory
    std::optional<xbzrle_encoder> xbzrle_;
    std::uint64_t pages_before_window_ = 0;
    std::uint64_t sent_before_sync_ = 0; ///< bytes of whole pages
    unsigned outrun_ = 0;
    unsigned throttled_ = 0;
    bandwidth_meter meter_;
    clock::time_point last_sync_{};
    std::optional<clock::time_point> stopped_at_;
};

} // namespace vmstate::migration
