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
#include <stop_token>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/migration/bandwidth.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/migration/monitor.hpp>
#include <vmstate/migration/multifd_sender.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/ram_sender.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/buffered_writer.hpp>
#include <vmstate/stream/connector.hpp>
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
        const result<vmstate::uri> where = parse_uri(uri);
        if (where && (std::holds_alternative<tcp_uri>(*where) || std::holds_alternative<unix_uri>(*where)))
            return start_thread(connector_to(std::string(uri)), true);
        return start_thread(
            [text = std::string(uri)](const opening_options&) -> result<std::unique_ptr<output_channel>> {
                return open_output(text);
            },
            false);
    }
    /// The same over a channel of the user's.
    result<void> start(std::unique_ptr<output_channel> channel) {
        if (!channel) return error(errc::invalid_argument, "a channel", "none");
        auto held = std::make_shared<std::unique_ptr<output_channel>>(std::move(channel));
        return start_thread(
            [held](const opening_options&) -> result<std::unique_ptr<output_channel>> { return std::move(*held); }, false);
    }
    /// The same over as many channels as the migration needs (`multifd`): the first that `connect` gives is the main one.
    result<void> start(channel_connector connect) {
        if (!connect) return error(errc::invalid_argument, "a connector", "none");
        return start_thread(std::move(connect), true);
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
        {
            const std::lock_guard lock(channel_mutex_);
            connecting_.request_stop();
        }
        shut_down_channels();
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
    /// The stream on its way out.
    struct outgoing {
        outgoing(machine& what, guest& of, output_channel& channel)
            : out(channel), saver(what, out), ram(what, of, out, saver) {}

        buffered_writer out;
        stream_saver saver;
        ram_sender ram;
        std::unique_ptr<multifd_sender> multifd; ///< null without

        /// Bytes on all channels.
        std::uint64_t sent() const { return out.offset() + (multifd ? multifd->bytes() : 0); }
    };

    bool is_running() const {
        const state at = monitor_.now();
        return at != state::none && !is_final(at);
    }
    static channel_connector connector_to(std::string uri) {
        return [where = std::move(uri)](const opening_options& options) -> result<std::unique_ptr<output_channel>> {
            result<std::unique_ptr<duplex_channel>> connected = connect(where, options);
            if (!connected) return connected.error();
            return std::unique_ptr<output_channel>(std::move(*connected));
        };
    }
    result<void> start_thread(channel_connector connect, bool several_channels) {
        if (result<void> fit = machine_.check(); !fit) return fit;
        if (result<void> fit = check(parameters(), several_channels); !fit) return fit;
        if (is_running()) return error(errc::invalid_argument, "no migration under way", std::string(to_string(monitor_.now())));
        join();
        may_switch_.store(false);
        peer_has_spoken_.store(false);
        peer_has_refused_.store(false);
        answer_ = {};
        zero_blocks_.clear();
        zero_blocks_told_ = switchover_acked_ = false;
        pages_before_window_ = sent_before_sync_ = 0;
        outrun_ = throttled_ = 0;
        stopped_at_.reset();
        monitor_.enter(state::setup);
        {
            const std::lock_guard lock(channel_mutex_);
            connecting_ = std::stop_source();
            if (monitor_.now() == state::cancelling) connecting_.request_stop(); // of the one before
        }
        migration_thread_ = std::thread([this, connect = std::move(connect)] { run(connect); });
        return {};
    }
    void join() {
        if (migration_thread_.joinable()) migration_thread_.join();
    }

    // ---- the migration thread: owns the stream, meter_, and what counts passes and slows the guest down

    void run(const channel_connector& connect) {
        std::unique_ptr<output_channel> channel;
        result<void> done = [&]() -> result<void> {
            result<std::unique_ptr<output_channel>> opened = connect({parameters().peer_timeout, stop_token()});
            if (opened && !*opened) opened = error(errc::invalid_argument, "a channel", "none");
            if (!opened) return opened.error().within("setup");
            channel = std::move(*opened);
            {
                const std::lock_guard lock(channel_mutex_);
                channel_ = channel.get();
            }
            if (monitor_.now() == state::cancelling) return error(errc::io, {}, "cancelled");
            return migrate(*channel, connect);
        }();
        if (!done) prefer_answer(done);
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
    /// A destination that has given up says why and then closes: of the two, what the channel says of it is the lesser
    /// news, and may come first. `done` keeps the stage that it names.
    void prefer_answer(result<void>& done) {
        if (!return_path_thread_.joinable() || monitor_.now() == state::cancelling) return;
        if (done.error() != errc::io || done.error().path().ends_with("return path")) return;
        // What was said before the channel broke is there to be read, and so is its end. Nothing comes of one that hangs.
        const auto has_spoken = [&](const migration::status&) { return peer_has_spoken_.load(); };
        if (!monitor_.wait_until(clock::now() + std::chrono::milliseconds(100), has_spoken)) return;
        const std::lock_guard lock(answer_mutex_);
        if (answer_) return;
        const error of_channels = done.error();
        std::string_view where = of_channels.path();
        // Of a multifd channel that breaks it is told by its name, unless the destination has broken it off.
        const bool of_channel = where.find("multifd channel") != std::string_view::npos;
        if (of_channel && !peer_has_refused_.load()) return;
        if (!of_channel) where = where.substr(0, where.find('/'));
        error answer = answer_.error();
        done = answer.within(where);
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

    result<void> migrate(output_channel& channel, const channel_connector& connect) {
        const migration::parameters settings = parameters();
        if (settings.peer_timeout.count() != 0) channel.set_timeout(settings.peer_timeout);
        outgoing stream(machine_, guest_, channel);
        if (settings.multifd) {
            stream.multifd = std::make_unique<multifd_sender>(
                stream.ram.page_size(), settings.multifd_compression, [this] { give_up_multifd(); });
            stream.ram.use(*stream.multifd, settings.multifd_flush_after_each_section);
            const std::lock_guard lock(channel_mutex_);
            multifd_ = stream.multifd.get();
        }
        result<void> done = migrate_over(stream, channel, connect, settings);
        if (!stream.multifd) return done;
        {
            const std::lock_guard lock(channel_mutex_);
            multifd_ = nullptr;
        }
        // The main channel's error may be but a consequence.
        if (error failure = stream.multifd->failure(); !done && failure) return failure.within(to_string(monitor_.now()));
        if (done) stream.multifd->finish();
        return done;
    }
    result<void> migrate_over(
        outgoing& stream, output_channel& channel, const channel_connector& connect, const migration::parameters& settings) {
        if (result<void> done = setup(channel, stream, connect, settings); !done) return std::move(done.error()).within("setup");
        if (!monitor_.enter(state::active)) return error(errc::io, {}, "cancelled");
        if (result<void> done = precopy(stream); !done) return std::move(done.error()).within("active");
        if (result<void> done = switch_over(stream); !done)
            return std::move(done.error()).within(to_string(monitor_.now()));
        return await_return_path(settings);
    }
    /// What breaks there may leave the destination waiting, and with it whoever writes the main channel. First it may say
    /// whether it was the destination that has given up.
    void give_up_multifd() {
        if (has_return_path())
            monitor_.wait_until(clock::now() + std::chrono::milliseconds(100), [&](const migration::status& at) {
                return at.state == state::cancelling || peer_has_spoken_.load();
            });
        shut_down_channels();
    }
    /// From any thread: whoever reads or writes one of them goes on, with an error.
    void shut_down_channels() {
        const std::lock_guard lock(channel_mutex_);
        if (channel_ != nullptr) channel_->shutdown();
        if (multifd_ != nullptr) multifd_->shutdown();
    }
    std::stop_token stop_token() const {
        const std::lock_guard lock(channel_mutex_);
        return connecting_.get_token();
    }

    // ---- setup

    result<void> setup(
        output_channel& channel, outgoing& stream, const channel_connector& connect, const migration::parameters& settings) {
        if (result<void> done = stream.saver.save_header(); !done) return done;
        if (settings.return_path) {
            result<std::unique_ptr<duplex_channel>> back = channel.get_return_path();
            if (back) {
                way_back_ = std::move(*back);
                // While memory goes over, the destination has nothing to say for as long as it takes.
                way_back_->set_timeout(std::chrono::milliseconds(0));
                stream.saver.put_command(command::open_return_path);
                return_path_thread_ = std::thread([this] { read_return_path(); });
                ping(stream.saver, 1);
            } else if (!(back.error() == errc::unsupported)) {
                return back.error();
            }
        }
        if (settings.switchover_ack && !has_return_path())
            return error(errc::invalid_argument, "a return path for switchover-ack", "none");
        if (settings.multifd)
            if (result<void> started = start_multifd(stream, connect, settings); !started) return started;
        if (result<void> started = stream.ram.start(settings); !started) return started;
        stream.ram.put_setup();
        // Behind the list of blocks: the answers are by their number in it.
        if (has_return_path()) ping(stream.saver, ping_which_blocks_are_zero);
        if (result<void> sent = stream.out.flush(); !sent) return sent;
        monitor_.update([&](migration::status& at) {
            at.ram.page_size = stream.ram.page_size();
            at.ram.total = at.ram.remaining = stream.ram.remaining();
            at.ram.dirty_sync_count = 1;
        });
        last_sync_ = clock::now();
        return {};
    }
    /// The main channel shows itself first: a QEMU 7.2 may take the channel that came first for it.
    result<void> start_multifd(outgoing& stream, const channel_connector& connect, const migration::parameters& settings) {
        if (result<void> sent = stream.out.flush(); !sent) return sent;
        const auto open = [&]() -> result<std::unique_ptr<output_channel>> {
            return connect({settings.peer_timeout, stop_token()});
        };
        return stream.multifd->start(
            settings.multifd_channels, machine_.options().uuid.value_or(std::array<std::uint8_t, 16>{}), open, settings.peer_timeout);
    }
    bool has_return_path() const { return way_back_ != nullptr; }
    static void ping(stream_saver& saver, std::uint32_t value) {
        std::array<std::byte, 4> payload;
        vmstate::detail::store_big(payload.data(), value);
        saver.put_command(command::ping, payload);
    }

    // ---- the guest runs

    result<void> precopy(outgoing& stream) {
        meter_.start(stream.sent());
        for (;;) {
            if (result<void> fine = check_peer(); !fine) return fine;
            const migration::parameters settings = parameters();
            const bool may_switch = !settings.switchover_ack || switchover_acked_.load();
            if (may_switch && stream.ram.remaining_on_wire() <= affordable(stream, settings)) {
                leave_out_zero_blocks(stream, settings); // which may wait, as the guest may not
                // Only now ask the logs: each time costs the guest.
                if (result<void> read = read_logs(stream, false, settings); !read) return read;
                if (stream.ram.remaining_on_wire() <= affordable(stream, settings)) return {};
            }
            if (stream.ram.remaining() != 0) {
                if (result<void> sent = send_part(stream, settings); !sent) return sent;
            } else {
                // The destination isn't ready. What the guest writes meanwhile need not wait for it.
                sleep_until_window_ends(settings.switchover_ack);
                if (result<void> read = read_logs(stream, false, settings); !read) return read;
            }
            account(stream);
        }
    }
    /// What could be sent in the time that the guest may stand still.
    std::uint64_t affordable(const outgoing& stream, const migration::parameters& settings) const {
        double per_second = meter_.rate(stream.sent());
        if (settings.max_bandwidth != 0) per_second = std::min(per_second, static_cast<double>(settings.max_bandwidth));
        if (settings.avail_switchover_bandwidth != 0) per_second = static_cast<double>(settings.avail_switchover_bandwidth);
        return static_cast<std::uint64_t>(per_second * std::chrono::duration<double>(settings.downtime_limit).count());
    }
    /// One PART: as much as goes out in 50 ms, or as the bandwidth allows in this window.
    result<void> send_part(outgoing& stream, const migration::parameters& settings) {
        if (meter_.is_spent(stream.sent(), settings.max_bandwidth)) {
            sleep_until_window_ends(false);
            return {};
        }
        // What was never touched comes last: by then the destination may have told that it needn't.
        const bool dirty = stream.ram.has_dirty();
        if (!dirty) leave_out_zero_blocks(stream, settings);
        const clock::time_point enough = clock::now() + std::chrono::milliseconds(50);
        stream.ram.begin_section(section_type::part);
        while (stream.ram.send(64) && stream.ram.has_dirty() == dirty && clock::now() < enough &&
               !meter_.is_spent(stream.sent(), settings.max_bandwidth)) {
        }
        stream.ram.end_section();
        return stream.out.flush();
    }
    /// Where the destination has told that a block is zero there, pages of it that nobody has touched need not be said.
    /// Its answer has been under way since the setup.
    void leave_out_zero_blocks(outgoing& stream, const migration::parameters& settings) {
        if (!has_return_path() || !stream.ram.has_absent()) return;
        const auto is_told = [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load() || zero_blocks_told_.load();
        };
        if (settings.peer_timeout.count() == 0) monitor_.wait_until(is_told);
        else monitor_.wait_until(clock::now() + settings.peer_timeout, is_told);
        const std::lock_guard lock(answer_mutex_);
        for (const std::uint32_t number : zero_blocks_) stream.ram.leave_out_absent(number);
    }
    void sleep_until_window_ends(bool or_ready) {
        monitor_.wait_until(meter_.window_end(), [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load() || (or_ready && switchover_acked_.load());
        });
    }
    void account(outgoing& stream) {
        const bool window_over = meter_.update(stream.sent());
        if (!window_over) return;
        const page_counts counts = stream.ram.counts();
        monitor_.update([&](migration::status& at) {
            count_pages(at, stream);
            at.ram.mbps = meter_.rate() * 8 / 1e6;
            at.ram.pages_per_second = (counts.normal + counts.duplicate - pages_before_window_) *
                                      static_cast<std::uint64_t>(std::chrono::seconds(1) / bandwidth_meter::window);
            if (meter_.rate() > 0)
                at.expected_downtime = std::chrono::milliseconds(
                    static_cast<std::int64_t>(1000 * static_cast<double>(stream.ram.remaining_on_wire()) / meter_.rate()));
        });
        pages_before_window_ = counts.normal + counts.duplicate;
    }
    void count_pages(migration::status& at, const outgoing& stream) const {
        const page_counts counts = stream.ram.counts();
        at.ram.transferred = stream.sent();
        at.ram.multifd_bytes = stream.multifd ? stream.multifd->bytes() : 0;
        at.ram.remaining = stream.ram.remaining();
        at.ram.duplicate = counts.duplicate;
        at.ram.skipped = stream.ram.skipped();
        at.ram.normal = counts.normal;
        at.ram.normal_bytes = counts.normal_bytes;
        at.xbzrle_cache = stream.ram.cache_counts();
        if (stopped_at_) at.ram.downtime_bytes = at.ram.transferred - at.ram.precopy_bytes;
        else at.ram.precopy_bytes = at.ram.transferred;
    }
    /// What was written since the last time is dirty again. With `standing_still` also what nobody logs.
    result<void> read_logs(outgoing& stream, bool standing_still, const migration::parameters& settings) {
        const result<std::uint64_t> newly = stream.ram.collect(standing_still);
        if (!newly) return newly.error();
        const clock::time_point now = clock::now();
        const std::chrono::duration<double> time = now - last_sync_;
        monitor_.update([&](migration::status& at) {
            ++at.ram.dirty_sync_count;
            at.ram.remaining = stream.ram.remaining();
            if (time.count() > 0) at.ram.dirty_pages_rate = static_cast<std::uint64_t>(static_cast<double>(*newly) / time.count());
        });
        const std::uint64_t sent = stream.ram.counts().normal_bytes;
        if (!standing_still && settings.auto_converge)
            slow_down(*newly * stream.ram.page_size(), sent - sent_before_sync_, settings);
        last_sync_ = now;
        sent_before_sync_ = sent;
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

    result<void> switch_over(outgoing& stream) {
        const migration::parameters settings = parameters();
        const clock::time_point stopped_at = clock::now();
        if (guest_.stop) {
            if (result<void> stopped = guest_.stop(); !stopped) return stopped.error().within("stop");
        }
        stopped_at_ = stopped_at;
        if (settings.pause_before_switchover) {
            if (!monitor_.enter(state::pre_switchover)) return error(errc::io, {}, "cancelled");
            if (result<void> told = wait_to_switch(stream, settings); !told) return told;
            if (result<void> fine = check_peer(); !fine) return fine;
        }
        if (!monitor_.enter(state::device)) return error(errc::io, {}, "cancelled");
        monitor_.update([&](migration::status& at) { at.ram.precopy_bytes = stream.sent(); });
        if (result<void> read = read_logs(stream, true, settings); !read) return read;
        if (stream.ram.begin_section(section_type::end)) {
            while (stream.ram.send(256)) {
            }
            stream.ram.end_section();
        }
        if (result<void> saved = stream.saver.save_devices(); !saved) return saved;
        // The destination can't have loaded what it hasn't got: its last word comes after the stream's end, or is wrong.
        if (result<void> fine = check_peer(); !fine) return fine;
        if (result<void> saved = stream.saver.save_end(); !saved) return saved;
        if (result<void> sent = stream.out.flush(); !sent) return sent;
        monitor_.update([&](migration::status& at) { count_pages(at, stream); });
        return {};
    }
    /// Until the user says so, or all is over. However long that takes, the destination hears that we are there: its
    /// patience with a silent source is taken to be ours.
    result<void> wait_to_switch(outgoing& stream, const migration::parameters& settings) {
        const auto may_go_on = [&](const migration::status& at) {
            return at.state == state::cancelling || may_switch_.load() || peer_has_spoken_.load();
        };
        if (!has_return_path() || settings.peer_timeout.count() == 0) {
            monitor_.wait_until(may_go_on);
            return {};
        }
        while (!monitor_.wait_until(clock::now() + settings.peer_timeout / 4, may_go_on)) {
            ping(stream.saver, 1);
            if (result<void> sent = stream.out.flush(); !sent) return sent;
        }
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

    void read_return_path() {
        const result<void> answer = listen_to_peer();
        {
            const std::lock_guard lock(answer_mutex_);
            answer_ = answer;
        }
        peer_has_spoken_.store(true);
        // A destination that has given up reads no more: don't wait for it to.
        if (!answer) shut_down_channels();
        monitor_.wake();
    }
    /// Until the last message: whether it said that all was loaded.
    result<void> listen_to_peer() {
        buffered_reader in(*way_back_, 4096);
        received_message message;
        for (;;) {
            if (result<void> read = read_return_message(in, message); !read) return read;
            switch (message.type) {
            case return_message::pong: note_zero_block(message.value()); break;
            case return_message::switchover_ack:
                switchover_acked_.store(true);
                monitor_.wake();
                break;
            case return_message::shut:
                if (message.value() == 0) return {};
                peer_has_refused_.store(true);
                return error(errc::io, {}, "the destination could not load the stream").within("return path");
            default:
                return error(errc::bad_command, "a message of precopy", std::to_string(static_cast<unsigned>(message.type)))
                    .within("return path");
            }
        }
    }
    /// One of ours says which of its blocks are zero; any gives the question back, which ends that.
    void note_zero_block(std::uint32_t pong) {
        if (pong == ping_which_blocks_are_zero) {
            zero_blocks_told_.store(true);
            monitor_.wake();
        } else if ((pong & ~pong_block_number) == pong_block_is_zero && !zero_blocks_told_.load()) {
            const std::lock_guard lock(answer_mutex_);
            // Each once: who sends more of them isn't to fill our memory.
            if (zero_blocks_.size() <= pong_block_number) zero_blocks_.push_back(pong & pong_block_number);
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

    machine& machine_;
    guest& guest_;
    mutable std::mutex settings_mutex_; ///< settings_
    migration::parameters settings_;

    detail::monitor monitor_;
    std::thread migration_thread_;
    std::atomic<bool> may_switch_ = false;

    mutable std::mutex channel_mutex_; ///< channel_, multifd_, connecting_
    output_channel* channel_ = nullptr;
    multifd_sender* multifd_ = nullptr;
    std::stop_source connecting_;

    std::thread return_path_thread_;
    std::unique_ptr<duplex_channel> way_back_;
    std::atomic<bool> peer_has_spoken_ = false;
    std::atomic<bool> peer_has_refused_ = false; ///< with its last word
    std::atomic<bool> switchover_acked_ = false;
    std::atomic<bool> zero_blocks_told_ = false;
    std::mutex answer_mutex_; ///< answer_, zero_blocks_
    result<void> answer_;
    std::vector<std::uint32_t> zero_blocks_; ///< by their number in the stream's list

    std::uint64_t pages_before_window_ = 0;
    std::uint64_t sent_before_sync_ = 0; ///< bytes of whole pages
    unsigned outrun_ = 0;
    unsigned throttled_ = 0;
    bandwidth_meter meter_;
    clock::time_point last_sync_{};
    std::optional<clock::time_point> stopped_at_;
};

} // namespace vmstate::migration
