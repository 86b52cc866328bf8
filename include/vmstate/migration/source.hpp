// SPDX-License-Identifier: BSL-1.0
//
// The source of a live migration: memory goes over while the guest runs, what it writes goes again, and when what is
// left fits into the downtime limit the guest stops and the rest follows. Depends on the other headers of migration/,
// ram/, machine/ and stream/.
//
//     setup -> active -> [pre-switchover ->] device -> completed
//       any of them -> failed, or -> cancelling -> cancelled
//
// In postcopy the guest stops at once, and runs at the destination while the rest of its memory goes after it:
//
//     setup -> active -> [pre-switchover -> device ->] postcopy-active -> completed, or -> failed
//                                                        | broken          ^ recovered
//                                                    postcopy-paused -> postcopy-recover
//
// A destination of ours is told to run it when it has said that the devices are loaded, and until then this is no postcopy:
// the migration can be cancelled, and what breaks ends it. A QEMU has RUN with the devices.
//
// Threads: the migration thread writes the stream and calls the guest; the return-path thread reads the destination's
// answers, and with postcopy-preempt sends the pages that it asks for. Until the destination has said that it has loaded
// everything, or has been told to run the guest, whatever fails leaves the guest running here, with its memory and devices
// as they are.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/migration/auto_converge.hpp>
#include <vmstate/migration/bandwidth.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/migration/monitor.hpp>
#include <vmstate/migration/multifd_sender.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/postcopy_pages.hpp>
#include <vmstate/migration/postcopy_sender.hpp>
#include <vmstate/migration/preempt_requests.hpp>
#include <vmstate/migration/ram_sender.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/postcopy/page_request.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/buffered_writer.hpp>
#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/open.hpp>
#include <vmstate/support/guarded.hpp>
#include <vmstate/support/short_slice.hpp>

namespace vmstate::migration {

class source {
public:
    using clock = std::chrono::steady_clock;

    /// All three have to outlive the migration; `machine` is not to be changed while it runs.
    source(machine& what, guest& of, const parameters& settings = {})
        : machine_(what), guest_(of), settings_(settings) {}
    source(const source&) = delete;
    source& operator=(const source&) = delete;
    /// Cancels what still runs; one in postcopy, which nobody can cancel, fails.
    ~source() {
        cancel();
        abandon();
        join();
    }

    /// Begins to migrate to a URI (`tcp:`, `unix:`, `exec:`, `fd:`, `file:`) in a thread of its own. Fails at once only
    /// where a migration is running already, or the machine can't be migrated.
    result<void> start(std::string_view uri) {
        const result<vmstate::uri> where = parse_uri(uri);
        if (where && (std::holds_alternative<tcp_uri>(*where) || std::holds_alternative<unix_uri>(*where)))
            return start_thread(connector_to(std::string(uri)), true);
        return start_thread(
            [text = std::string(uri)](const opening_options& options) -> result<std::unique_ptr<output_channel>> {
                return open_output(text, options);
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

    /// Waits for the end of the migration: success, or why not; why it didn't begin, where `start` refused. One in `postcopy-paused` hasn't ended.
    result<void> wait() {
        monitor_.wait_until([](const migration::status& at) { return at.state == state::none || is_final(at.state); });
        join();
        {
            const std::lock_guard lock(settings_mutex_);
            if (refusal_) return refusal_;
        }
        const migration::status last = status();
        if (last.state == state::completed) return {};
        if (last.error_desc) return last.error_desc;
        return error(errc::invalid_argument, "a migration", "none");
    }
    /// A consistent snapshot; any thread may ask.
    migration::status status() const { return monitor_.snapshot(); }
    /// Ends the migration at once and lets the guest run on here. Harmless at any time; too late once the destination
    /// has loaded everything, and in postcopy, which only its end or `give_up` ends. Where all has been sent the destination
    /// is asked to give up, and `wait` returns when it has said whether it did, or has said nothing for `peer_timeout`.
    /// A destination of ours that was just about to be told to run the guest stays paused: `destination::give_up` ends it.
    void cancel() {
        if (!monitor_.enter(state::cancelling)) return;
        const std::lock_guard lock(channel_mutex_);
        connecting_.request_stop();
        // When all has been sent the destination's last word decides where the guest runs: see settle.
        if (!end_sent_) shut_down_locked();
    }
    /// Goes on from `pre-switchover` (QEMU: migrate-continue).
    result<void> resume() {
        if (monitor_.now() != state::pre_switchover)
            return error(errc::invalid_argument, "state pre-switchover", std::string(to_string(monitor_.now())));
        may_switch_.store(true);
        monitor_.wake();
        return {};
    }
    /// Goes on in postcopy (QEMU: migrate-start-postcopy): the guest stops here as soon as the migration is under way, with
    /// `switchover_ack` when the destination is ready, and runs there. With `postcopy_ram` alone. Twice, or after the end, is
    /// harmless; so is too late, when the rest of the memory goes over anyway.
    result<void> start_postcopy() {
        if (!parameters().postcopy_ram) return error(errc::invalid_argument, "postcopy_ram among the parameters", "none");
        if (monitor_.now() == state::none) return error(errc::invalid_argument, "a migration under way", "none");
        postcopy_wanted_.store(true);
        monitor_.wake();
        return {};
    }
    /// Interrupts the connection in postcopy on purpose (QEMU: migrate-pause): `postcopy-paused` follows, unless it has
    /// ended by then.
    result<void> pause() {
        const state at = monitor_.now();
        if (at != state::postcopy_active && at != state::postcopy_recover)
            return error(errc::invalid_argument, "state postcopy-active", std::string(to_string(at)));
        {
            const std::lock_guard lock(channel_mutex_);
            pause_wanted_ = true;
            connecting_.request_stop();
        }
        shut_down_channels();
        return {};
    }
    /// Goes on over a new connection (QEMU: migrate with resume). It returns at once; `postcopy-active` follows, or
    /// `postcopy-paused` again, with the reason in `status().error_desc`. As often as needed.
    result<void> recover(std::string_view uri) {
        const result<vmstate::uri> where = parse_uri(uri);
        if (!where) return where.error();
        if (!std::holds_alternative<tcp_uri>(*where) && !std::holds_alternative<unix_uri>(*where))
            return error(errc::unsupported, "tcp:host:port or unix:path", std::string(uri));
        return recover(connector_to(std::string(uri)));
    }
    result<void> recover(channel_connector connect) {
        if (!connect) return error(errc::invalid_argument, "a connector", "none");
        {
            // What ended the connection before says nothing of the next; whoever pauses from here on means that.
            const std::lock_guard lock(channel_mutex_);
            if (monitor_.now() == state::postcopy_paused) {
                connecting_ = std::stop_source();
                pause_wanted_ = false;
            }
        }
        // Of two that come at once one finds it in another state.
        if (!monitor_.enter(state::postcopy_recover))
            return error(errc::invalid_argument, "state postcopy-paused", std::string(to_string(monitor_.now())));
        {
            const std::lock_guard lock(channel_mutex_);
            recovery_ = std::move(connect);
            recovery_is_there_ = true;
        }
        monitor_.wake();
        return {};
    }
    /// Ends a migration in `postcopy-paused`, or one that tries to recover, as failed. The guest at the destination never
    /// gets the rest of its memory, and the one here has not its latest: neither is of use, and this one isn't started.
    ///
    /// A QEMU may have run the guest without our hearing of it. Where the connection to one broke before it has said that the
    /// devices are loaded, its guest most likely never ran, and this one goes on: make sure first that the destination is
    /// gone. With a destination of ours that needs nobody: the migration isn't paused then, it has failed, and this guest runs.
    result<void> give_up() {
        const state at = monitor_.now();
        if (at != state::postcopy_paused && at != state::postcopy_recover)
            return error(errc::invalid_argument, "state postcopy-paused", std::string(to_string(at)));
        abandon();
        return {};
    }
    /// New values for those parameters that may change while a migration runs.
    void set_parameters(const parameters& settings) {
        const std::lock_guard lock(settings_mutex_);
        settings_.downtime_limit = settings.downtime_limit;
        settings_.max_bandwidth = settings.max_bandwidth;
        settings_.max_postcopy_bandwidth = settings.max_postcopy_bandwidth;
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
        if (is_running()) return error(errc::invalid_argument, "no migration under way", std::string(to_string(monitor_.now())));
        join();
        result<void> begun = check_all(several_channels);
        if (begun) begun = begin(std::move(connect));
        const std::lock_guard lock(settings_mutex_);
        refusal_ = begun ? error() : begun.error();
        return begun;
    }
    result<void> check_all(bool several_channels) {
        if (result<void> fit = machine_.check(); !fit) return fit;
        if (result<void> fit = check(parameters(), several_channels); !fit) return fit;
        if (!parameters().postcopy_ram) return {};
        if (result<void> fit = check_postcopy_machine(machine_); !fit) return fit;
        return check_postcopy_memory(machine_);
    }
    result<void> begin(channel_connector connect) {
        may_switch_.store(false);
        postcopy_wanted_.store(false);
        setup_read_.store(false);
        peer_waits_for_run_.store(false);
        preempt_offered_.store(false);
        peer_asks_by_preempt_.store(false);
        awaits_loaded_.store(false);
        serving_.store(nullptr);
        postcopy_.reset();
        to_postcopy_ = guest_left_ = false;
        peer_has_spoken_.store(false);
        peer_has_refused_.store(false);
        answer_ = {};
        zero_blocks_.clear();
        zero_blocks_told_ = switchover_acked_ = false;
        pages_before_window_ = sent_when_heard_ = 0;
        throttled_ = 0;
        ready_since_.reset();
        stopped_at_.reset();
        monitor_.enter(state::setup);
        // Until there is something to reckon with.
        monitor_.update([limit = parameters().downtime_limit](migration::status& at) { at.expected_downtime = limit; });
        {
            const std::lock_guard lock(channel_mutex_);
            connecting_ = std::stop_source();
            recovery_ = {};
            pause_wanted_ = false;
            recovery_is_there_ = abandoned_ = false;
            end_sent_ = false;
            if (monitor_.now() == state::cancelling) connecting_.request_stop(); // of the one before
        }
        result<void> started = vmstate::detail::guarded([&]() -> result<void> {
            migration_thread_ = std::thread([this, connect = std::move(connect)] { run(connect); });
            return {};
        });
        if (!started) finish(started);
        return started;
    }
    void join() {
        const std::lock_guard lock(thread_mutex_);
        if (migration_thread_.joinable()) migration_thread_.join();
    }
    /// What is in postcopy ends as failed, wherever it is.
    void abandon() {
        {
            const std::lock_guard lock(channel_mutex_);
            abandoned_ = true;
            if (is_postcopy(monitor_.now())) connecting_.request_stop();
        }
        if (is_postcopy(monitor_.now())) shut_down_channels();
        monitor_.wake();
    }

    // ---- the migration thread: owns the stream, meter_, and what counts passes and slows the guest down

    void run(const channel_connector& connect) {
        std::unique_ptr<output_channel> channel;
        result<void> done = vmstate::detail::guarded([&]() -> result<void> {
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
        });
        if (done && guest_left_) done = vmstate::detail::guarded([&] { return run_postcopy(channel); });
        if (!done && end_sent_ && channel) settle(done, *channel);
        if (!done) prefer_answer(done);
        if (throttled_ != 0) unthrottle();
        if (!done && channel) shut_down_channels(); // and that for urgent pages, which another thread may be writing
        if (return_path_thread_.joinable()) return_path_thread_.join();
        urgent_requests_.stop();
        const bool has_word = has_return_path();
        way_back_.reset();
        serving_.store(nullptr);
        if (postcopy_) postcopy_->detach();
        // The destination's word says where the guest runs; without one, that all could be stored does.
        if (done && channel) {
            const result<void> closed = vmstate::detail::guarded([&] { return channel->close(); });
            if (!has_word) done = closed;
        }
        std::unique_ptr<output_channel> urgent;
        {
            const std::lock_guard lock(channel_mutex_);
            channel_ = nullptr;
            urgent = std::move(urgent_channel_);
        }
        channel.reset();
        if (urgent) (void)vmstate::detail::guarded([&] { return urgent->close(); }); // all that went over it has arrived, or the error is known
        finish(done);
    }
    /// All has been sent, and something ended the wait for the destination's last word. That may be on its way, and it alone
    /// says where the guest runs. Our output's end tells a destination that still loads that we have given up, and one that
    /// is alive answers or hangs up: however far away it is, that is worth waiting for as long as for any other answer.
    void settle(result<void>& done, output_channel& channel) {
        if (!return_path_thread_.joinable()) return;
        channel.end_output();
        const auto has_spoken = [&](const migration::status&) { return peer_has_spoken_.load(); };
        std::chrono::milliseconds patience = parameters().peer_timeout;
        if (patience.count() != 0) patience = std::max<std::chrono::milliseconds>(patience, std::chrono::seconds(1));
        if (!monitor_.wait_for(patience, has_spoken)) return;
        const std::lock_guard lock(answer_mutex_);
        if (!answer_) return;
        done = {};
        note_downtime();
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
            stopped_at_.reset();
            monitor_.enter(state::completed);
            return;
        }
        // The guest first: whoever waits for the end finds it running.
        error failure = done.error();
        if (stopped_at_ && guest_.start) {
            if (result<void> started = vmstate::detail::guarded(guest_.start); !started) failure = started.error().within("start");
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
        result<void> done = vmstate::detail::guarded([&] { return migrate_over(stream, channel, connect, settings); });
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
        if (to_postcopy_) {
            if (result<void> done = switch_to_postcopy(stream, channel, settings); !done)
                return std::move(done.error()).within(to_string(monitor_.now()));
            return {};
        }
        if (result<void> done = switch_over(stream); !done)
            return std::move(done.error()).within(to_string(monitor_.now()));
        return await_return_path(settings);
    }
    /// What breaks there may leave the destination waiting, and with it whoever writes the main channel. First it may say
    /// whether it was the destination that has given up.
    void give_up_multifd() {
        if (has_return_path()) let_peer_speak(std::chrono::milliseconds(100));
        shut_down_channels();
    }
    /// What the destination says itself comes before what a channel says of it.
    void let_peer_speak(std::chrono::milliseconds patience) {
        monitor_.wait_until(clock::now() + patience, [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load();
        });
    }
    /// From any thread: whoever reads or writes one of them goes on, with an error.
    void shut_down_channels() {
        const std::lock_guard lock(channel_mutex_);
        shut_down_locked();
    }
    void shut_down_locked() {
        if (channel_ != nullptr) channel_->shutdown();
        if (multifd_ != nullptr) multifd_->shutdown();
        if (urgent_channel_) urgent_channel_->shutdown();
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
        if (settings.postcopy_ram) {
            if (!has_return_path()) return error(errc::invalid_argument, "a return path for postcopy-ram", "none");
            std::array<std::byte, 16> advice;
            const std::uint64_t page_sizes = machine_.ram() != nullptr ? machine_.ram()->page_size_summary() : 0;
            std::byte* const end = vmstate::detail::store_big(advice.data(), page_sizes);
            vmstate::detail::store_big(end, std::uint64_t{machine_.options().guest_page_size()});
            stream.saver.put_command(command::postcopy_advise, advice);
        }
        if (settings.switchover_ack && !has_return_path())
            return error(errc::invalid_argument, "a return path for switchover-ack", "none");
        if (settings.multifd)
            if (result<void> started = start_multifd(stream, connect, settings); !started) return started;
        if (settings.postcopy_preempt) {
            // A QEMU 7.2 begins when it has all its channels, and takes the first for the main one; newer ones take it now, too.
            if (result<void> sent = stream.out.flush(); !sent) return sent;
            if (result<void> opened = open_urgent_channel(connect, settings); !opened) return opened;
            if (result<void> listening = urgent_requests_.open(*urgent_channel_); !listening) return listening;
            if (urgent_requests_.is_open() && machine_.ram() != nullptr) {
                preempt_offered_.store(true);
                ping(stream.saver, ping_preempt_requests);
            }
        }
        if (result<void> started = stream.ram.start(settings); !started) return started;
        stream.ram.put_setup(settings.postcopy_ram);
        // Behind the list of blocks: the answers are by their number in it. In postcopy each page has to be told: what the
        // destination has no news of it would ask for.
        if (settings.postcopy_ram) ping(stream.saver, ping_setup);
        else if (has_return_path()) ping(stream.saver, ping_which_blocks_are_zero);
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
        const std::array<std::uint8_t, 16> uuid =
            settings.multifd_uuid ? *settings.multifd_uuid : machine_.options().uuid.value_or(std::array<std::uint8_t, 16>{});
        return stream.multifd->start(settings.multifd_channels, uuid, open, settings.peer_timeout);
    }
    result<void> open_urgent_channel(const channel_connector& connect, const migration::parameters& settings) {
        result<std::unique_ptr<output_channel>> opened = connect({settings.peer_timeout, stop_token()});
        if (opened && !*opened) opened = error(errc::invalid_argument, "a channel", "none");
        if (!opened) return std::move(opened.error().within("preempt channel"));
        if (settings.peer_timeout.count() != 0) (*opened)->set_timeout(settings.peer_timeout);
        const std::lock_guard lock(channel_mutex_);
        urgent_channel_ = std::move(*opened);
        if (connecting_.stop_requested()) urgent_channel_->shutdown();
        return {};
    }
    /// A destination without postcopy-preempt lets nobody in behind the main channel. What goes over a channel that it
    /// doesn't read would be missing there for ever.
    result<void> check_urgent_channel() const {
        if (!urgent_channel_ || !urgent_channel_->is_ended()) return {};
        return error(errc::invalid_argument, "a destination with postcopy-preempt, as here", "one that has closed the channel for it")
            .within("preempt channel");
    }
    bool has_return_path() const { return way_back_ != nullptr; }
    static void ping(stream_saver& saver, std::uint32_t value) {
        std::array<std::byte, 4> payload;
        vmstate::detail::store_big(payload.data(), value);
        saver.put_command(command::ping, payload);
    }

    // ---- the guest runs

    result<void> precopy(outgoing& stream) {
        active_since_ = clock::now();
        meter_.start(stream.sent());
        auto_converge_.start(stream.sent());
        for (;;) {
            if (result<void> fine = check_peer(); !fine) return fine;
            const migration::parameters settings = parameters();
            const bool may_switch = is_destination_ready(settings);
            if (may_switch && postcopy_wanted_.load()) {
                // A destination that refuses the machine says so to the setup, which costs the guest nothing.
                if (result<void> read = await_answer("PONG", [&] { return setup_read_.load(); }); !read) return read;
                if (result<void> there = check_urgent_channel(); !there) return there;
                to_postcopy_ = true;
                return {};
            }
            if (!may_switch)
                if (result<void> patient = await_switchover_ack(stream, settings); !patient) return patient;
            if (may_switch && is_little_left(stream, settings)) {
                leave_out_zero_blocks(stream, settings); // which may wait, as the guest may not
                if (result<void> fine = check_peer(); !fine) return fine;
                // Only now ask the logs: each time costs the guest.
                if (result<void> read = read_logs(stream, false, settings); !read) return read;
                if (is_little_left(stream, settings)) return {};
            }
            if (stream.ram.remaining() != 0) {
                if (result<void> sent = send_part(stream, settings); !sent) return sent;
            } else {
                // The destination isn't ready. What the guest writes meanwhile need not wait for it.
                if (result<void> sent = keep_alive(stream, settings); !sent) return sent;
                sleep_until_window_ends(settings);
                if (result<void> read = read_logs(stream, false, settings); !read) return read;
            }
            account(stream);
        }
    }
    /// Whether the destination is as far as it has to be; in postcopy, too.
    bool is_destination_ready(const migration::parameters& settings) const {
        return !settings.switchover_ack || switchover_acked_.load();
    }
    /// Nothing but the destination's SWITCHOVER_ACK keeps the guest from being stopped: not for longer than a peer may take.
    result<void> await_switchover_ack(const outgoing& stream, const migration::parameters& settings) {
        if (!ready_since_ && (postcopy_wanted_.load() || is_little_left(stream, settings))) ready_since_ = clock::now();
        if (!ready_since_ || settings.peer_timeout.count() == 0 || clock::now() - *ready_since_ < settings.peer_timeout) return {};
        return error(errc::io, {}, "no SWITCHOVER_ACK from the destination").within("return path");
    }
    /// The destination hears that we are there, also where nothing is left to be sent: its patience with a silent source is
    /// taken to be ours.
    result<void> keep_alive(outgoing& stream, const migration::parameters& settings) {
        const clock::time_point now = clock::now();
        if (std::exchange(sent_when_heard_, stream.sent()) != stream.sent()) heard_at_ = now;
        if (!has_return_path() || settings.peer_timeout.count() == 0 || now - heard_at_ < settings.peer_timeout / 4) return {};
        ping(stream.saver, 1);
        heard_at_ = now;
        sent_when_heard_ = stream.sent();
        return stream.out.flush();
    }
    /// Whether what is left, and what goes again since nobody logs it, can be sent in the time that the guest may stand still.
    /// Where the latter alone can't, waiting doesn't change that: then it is what is left that counts.
    bool is_little_left(const outgoing& stream, const migration::parameters& settings) const {
        const std::uint64_t most = affordable(stream, settings);
        const std::uint64_t again = stream.ram.unlogged_on_wire();
        return stream.ram.remaining_on_wire() <= (again <= most ? most - again : most);
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
            sleep_until_window_ends(settings);
            return {};
        }
        // What was never touched comes last: by then the destination may have told that it needn't.
        const bool dirty = stream.ram.has_dirty();
        if (!dirty) leave_out_zero_blocks(stream, settings);
        const clock::time_point enough = clock::now() + std::chrono::milliseconds(50);
        stream.ram.begin_section(section_type::part);
        const auto batch = [&]() -> std::size_t {
            const std::uint64_t pages = meter_.left(stream.sent(), settings.max_bandwidth) / stream.ram.page_size();
            return static_cast<std::size_t>(std::clamp<std::uint64_t>(pages, 1, 64));
        };
        while (stream.ram.send(batch()) && stream.ram.has_dirty() == dirty && clock::now() < enough &&
               !meter_.is_spent(stream.sent(), settings.max_bandwidth) && !(postcopy_wanted_.load() && is_destination_ready(settings))) {
        }
        stream.ram.end_section();
        return stream.out.flush();
    }
    /// Where the destination has told that a block is zero there, pages of it that nobody has touched need not be said.
    /// Its answer has been under way since the setup.
    void leave_out_zero_blocks(outgoing& stream, const migration::parameters& settings) {
        if (!has_return_path() || settings.postcopy_ram || !stream.ram.has_absent()) return;
        const auto is_told = [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load() || zero_blocks_told_.load();
        };
        static_cast<void>(monitor_.wait_for(settings.peer_timeout, is_told));
        const std::lock_guard lock(answer_mutex_);
        for (const std::uint32_t number : zero_blocks_) stream.ram.leave_out_absent(number);
    }
    /// Or until the destination is ready, where it wasn't, or postcopy is wanted of one that is.
    void sleep_until_window_ends(const migration::parameters& settings) {
        const bool was_ready = is_destination_ready(settings);
        monitor_.wait_until(meter_.window_end(), [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load() ||
                   (is_destination_ready(settings) && (!was_ready || postcopy_wanted_.load()));
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
                    static_cast<std::int64_t>(1000 * static_cast<double>(stream.ram.remaining_on_wire() + stream.ram.unlogged_on_wire()) / meter_.rate()));
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
            count_pages(at, stream);
            if (time.count() > 0) at.ram.dirty_pages_rate = static_cast<std::uint64_t>(static_cast<double>(*newly) / time.count());
        });
        if (!standing_still && settings.auto_converge) {
            const std::optional<unsigned> percent = auto_converge_.judge(*newly * stream.ram.page_size(), stream.sent(), settings, now);
            if (percent) set_throttle(*percent);
        }
        last_sync_ = now;
        return {};
    }
    void set_throttle(unsigned percent) {
        if (percent == throttled_) return;
        throttled_ = percent;
        if (guest_.throttle) guest_.throttle(percent);
        monitor_.update([&](migration::status& at) { at.cpu_throttle_percentage = percent; });
    }

    void unthrottle() {
        static_cast<void>(vmstate::detail::guarded([&]() -> result<void> {
            set_throttle(0);
            return {};
        }));
    }

    // ---- the guest stands still

    result<void> stop_guest(outgoing& stream, const migration::parameters& settings) {
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
        return {};
    }
    result<void> switch_over(outgoing& stream) {
        const migration::parameters settings = parameters();
        if (result<void> fine = check_peer(); !fine) return fine;
        if (result<void> stopped = stop_guest(stream, settings); !stopped) return stopped;
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
        {
            const std::lock_guard lock(channel_mutex_);
            end_sent_ = true;
        }
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
    result<void> await_last_word(const migration::parameters& settings) {
        const auto has_spoken = [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load();
        };
        if (!monitor_.wait_for(settings.peer_timeout, has_spoken))
            return error(errc::io, {}, "no answer from the destination").within("return path");
        if (!peer_has_spoken_.load()) return error(errc::io, {}, "cancelled");
        const std::lock_guard lock(answer_mutex_);
        return answer_;
    }
    /// The destination's last word; without a return path, that the bytes have left is all there is to know.
    result<void> await_return_path(const migration::parameters& settings) {
        if (return_path_thread_.joinable())
            if (result<void> answered = await_last_word(settings); !answered) return answered;
        note_downtime();
        return {};
    }
    void note_downtime() {
        const auto downtime = std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - *stopped_at_);
        monitor_.update([&](migration::status& at) {
            at.downtime = downtime;
            at.ram.mbps = whole_mbps(at);
        });
    }
    /// Of the whole transfer: it may have been over before there was a window to measure.
    double whole_mbps(const migration::status& at) const {
        const std::chrono::duration<double> time = std::max<clock::duration>(clock::now() - active_since_, std::chrono::microseconds(1));
        return static_cast<double>(at.ram.transferred) * 8 / 1e6 / time.count();
    }

    // ---- postcopy

    /// From the guest's stop until the destination has been told to run it. What fails here leaves it here.
    result<void> switch_to_postcopy(outgoing& stream, output_channel& channel, const migration::parameters& settings) {
        const bool runs_later = peer_waits_for_run_.load();
        if (result<void> stopped = stop_guest(stream, settings); !stopped) return stopped;
        if (settings.pause_before_switchover && !monitor_.enter(state::device)) return error(errc::io, {}, "cancelled");
        if (result<void> read = read_logs(stream, true, settings); !read) return read;
        postcopy_ = std::make_unique<postcopy_sender>(machine_, stream.ram.hand_over(), settings.release_ram);
        if (result<void> put = postcopy_->pages().put_discards(stream.saver); !put) return put;
        ping(stream.saver, 2);
        if (result<void> put = put_package(stream, !runs_later); !put) return put;
        monitor_.update([&](migration::status& at) {
            count_pages(at, stream);
            at.ram.remaining = postcopy_->remaining();
            at.ram.precopy_bytes = at.ram.transferred;
            at.ram.downtime_bytes = 0;
            before_postcopy_ = at.ram;
        });
        if (result<void> fine = check_peer(); !fine) return fine;
        if (result<void> there = check_urgent_channel(); !there) return there;
        postcopy_->attach(channel, urgent_channel_.get());
        postcopy_->serve_requests();
        serving_.store(postcopy_.get());
        listen_to_urgent_requests();
        if (runs_later) {
            if (result<void> sent = stream.out.flush(); !sent) return sent;
            if (result<void> loaded = await_loaded(settings); !loaded) return loaded;
            postcopy_->saver().put_command(command::postcopy_run);
        }
        if (!monitor_.enter(state::postcopy_active)) return error(errc::io, {}, "cancelled");
        // What leaves now ends with RUN: where it doesn't leave whole, the guest isn't run there.
        if (result<void> sent = runs_later ? postcopy_->flush() : stream.out.flush(); !sent) return sent;
        guest_left_ = true;
        stopped_at_.reset();
        if (runs_later) note_postcopy_downtime();
        ping(postcopy_->saver(), ping_run);
        return {};
    }
    /// All but RUN has been sent. Until the destination has loaded the devices it gets the pages that these look at, and no
    /// others: RUN would have to wait behind them. It may take its time, as long as it answers.
    result<void> await_loaded(const migration::parameters& settings) {
        const std::chrono::milliseconds patience = settings.peer_timeout;
        const std::chrono::milliseconds between_pings = (patience + std::chrono::milliseconds(3)) / 4;
        const auto is_news = [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load() || postcopy_->is_loaded() || postcopy_->has_requests();
        };
        awaits_loaded_.store(true);
        std::uint64_t heard = messages_.load();
        clock::time_point heard_at = clock::now();
        for (;;) {
            if (result<void> fine = check_peer(); !fine) return fine;
            if (postcopy_->is_loaded()) break;
            if (result<void> sent = postcopy_->send_asked(); !sent) return sent;
            if (monitor_.wait_for(between_pings, is_news)) continue;
            if (std::exchange(heard, messages_.load()) != heard) heard_at = clock::now();
            if (clock::now() - heard_at >= patience)
                return error(errc::io, {}, "no PONG behind the devices from the destination").within("return path");
            ping(postcopy_->saver(), 1);
            if (result<void> sent = postcopy_->flush(); !sent) return sent;
        }
        awaits_loaded_.store(false);
        return {};
    }
    /// What the destination takes in one piece: it listens for faults before it loads a device that may cause one.
    result<void> put_package(outgoing& stream, bool with_run) {
        vector_writer package;
        stream_saver saver(machine_, package);
        saver.put_command(command::postcopy_listen);
        if (result<void> saved = saver.save_devices(); !saved) return saved;
        ping(saver, ping_loaded);
        if (with_run) saver.put_command(command::postcopy_run);
        if (package.failed()) return package.failure();
        const std::vector<std::byte> bytes = package.take();
        if (bytes.size() > std::numeric_limits<std::uint32_t>::max())
            return error(errc::invalid_argument, "a package of less than 4 GiB", std::to_string(bytes.size()));
        std::array<std::byte, 4> size;
        vmstate::detail::store_big(size.data(), static_cast<std::uint32_t>(bytes.size()));
        stopped_for_postcopy_ = *stopped_at_;
        stream.saver.put_command(command::packaged, size);
        // Its end leaves with the flush, and not before: all else may have left by then.
        const std::size_t last = std::min<std::size_t>(bytes.size(), 64);
        stream.out.write(std::span(bytes).first(bytes.size() - last));
        if (result<void> sent = stream.out.flush(); !sent) return sent;
        stream.out.write(std::span(bytes).last(last));
        return stream.out.status();
    }
    /// Until the end: the rest of the memory, over as many connections as it takes.
    result<void> run_postcopy(std::unique_ptr<output_channel>& channel) {
        result<void> done = serve_destination();
        while (!done) {
            // What the destination has said comes before what the channel says of it, see prefer_answer.
            if (channel && !is_pause_wanted())
                monitor_.wait_until(clock::now() + std::chrono::milliseconds(100),
                    [&](const migration::status&) { return peer_has_spoken_.load(); });
            const bool was_active = monitor_.now() == state::postcopy_active;
            disconnect(channel);
            error why = explain_pause(done.error());
            // It asks for what can't be, or has said that it is over: nothing to recover. What it could not load it can't
            // have run.
            if (was_active && peer_has_refused_.load()) take_guest_back();
            if (was_active && (peer_has_refused_.load() || why == errc::bad_command || why == errc::bad_ram)) return why;
            monitor_.update([&](migration::status& at) {
                count_postcopy(at);
                at.error_desc = why;
            });
            monitor_.enter(state::postcopy_paused);
            std::optional<channel_connector> connect = await_recovery();
            if (!connect) take_guest_back();
            if (!connect) return why;
            done = recover_over(channel, *connect);
            if (done) done = serve_destination();
        }
        return {};
    }
    /// Its memory and devices are as they were when it stopped: what fails now lets it go on here, unless the destination
    /// is known to have come as far as to run it.
    void take_guest_back() {
        if (!postcopy_->is_loaded()) stopped_at_ = stopped_for_postcopy_;
    }
    result<void> serve_destination() {
        const auto fine = [&]() -> result<void> {
            account_postcopy();
            return check_peer();
        };
        // What is thrown ends the connection alone, as what fails: the guest at the destination needs the next.
        result<void> done = vmstate::detail::guarded([&]() -> result<void> {
            const auto bandwidth = [&] { return parameters().max_postcopy_bandwidth; };
            if (result<void> sent = postcopy_->send_rest(bandwidth, parameters().peer_timeout / 4, fine); !sent) return sent;
            return await_last_word(parameters());
        });
        monitor_.update([&](migration::status& at) {
            count_postcopy(at);
            if (done) at.ram.mbps = whole_mbps(at);
        });
        if (!done) return std::move(done.error().within(to_string(monitor_.now())));
        return {};
    }
    void disconnect(std::unique_ptr<output_channel>& channel) {
        shut_down_channels();
        if (return_path_thread_.joinable()) return_path_thread_.join();
        urgent_requests_.stop();
        serving_.store(nullptr);
        postcopy_->detach();
        way_back_.reset();
        std::unique_ptr<output_channel> urgent;
        {
            const std::lock_guard lock(channel_mutex_);
            channel_ = nullptr;
            urgent = std::move(urgent_channel_);
        }
        channel.reset();
    }
    bool is_pause_wanted() const {
        const std::lock_guard lock(channel_mutex_);
        return pause_wanted_;
    }
    /// Why there is no connection any more; the return-path thread has ended. What the destination has said, or that it
    /// takes no more urgent pages, comes before what follows from it on the main channel.
    error explain_pause(const error& of_channel) {
        const std::string_view where = to_string(monitor_.now());
        if (is_pause_wanted() && !peer_has_refused_.load()) return error(errc::io, {}, "paused").within(where);
        const std::lock_guard lock(answer_mutex_);
        if (answer_) return of_channel;
        const error& answer = answer_.error();
        const bool is_end = answer == errc::truncated || (answer == errc::io && !peer_has_refused_.load());
        if (is_end && answer.path().find("preempt channel") == std::string_view::npos) return of_channel;
        return error(answer).within(where);
    }
    /// None where it was given up.
    std::optional<channel_connector> await_recovery() {
        for (;;) {
            {
                const std::lock_guard lock(channel_mutex_);
                if (abandoned_) return std::nullopt;
                if (recovery_) {
                    recovery_is_there_ = false;
                    return std::exchange(recovery_, {});
                }
            }
            monitor_.wait_until([&](const migration::status&) { return abandoned_.load() || recovery_is_there_.load(); });
        }
    }
    result<void> recover_over(std::unique_ptr<output_channel>& channel, const channel_connector& connect) {
        result<void> done = vmstate::detail::guarded([&] { return shake_hands_again(channel, connect); });
        if (!done) return std::move(done.error().within("postcopy-recover"));
        monitor_.update([&](migration::status& at) { at.error_desc = {}; });
        if (!monitor_.enter(state::postcopy_active)) return error(errc::io, {}, "abandoned");
        return {};
    }
    result<void> shake_hands_again(std::unique_ptr<output_channel>& channel, const channel_connector& connect) {
        const migration::parameters settings = parameters();
        peer_has_spoken_.store(false);
        peer_has_refused_.store(false);
        {
            const std::lock_guard lock(answer_mutex_);
            answer_ = {};
        }
        result<std::unique_ptr<output_channel>> opened = connect({settings.peer_timeout, stop_token()});
        if (opened && !*opened) opened = error(errc::invalid_argument, "a channel", "none");
        if (!opened) return opened.error();
        channel = std::move(*opened);
        {
            const std::lock_guard lock(channel_mutex_);
            channel_ = channel.get();
            if (connecting_.stop_requested()) channel_->shutdown();
        }
        if (settings.peer_timeout.count() != 0) channel->set_timeout(settings.peer_timeout);
        postcopy_->attach(*channel, nullptr);
        result<std::unique_ptr<duplex_channel>> back = channel->get_return_path();
        if (!back) return back.error();
        way_back_ = std::move(*back);
        way_back_->set_timeout(std::chrono::milliseconds(0));
        serving_.store(postcopy_.get());
        postcopy_->saver().put_command(command::open_return_path);
        if (result<void> sent = postcopy_->flush(); !sent) return sent;
        return_path_thread_ = std::thread([this] { read_return_path(); });
        if (settings.postcopy_preempt) {
            if (result<void> opened_too = open_urgent_channel(connect, settings); !opened_too) return opened_too;
            postcopy_->attach_urgent(*urgent_channel_);
        }
        if (result<void> asked = postcopy_->ask_for_bitmaps(); !asked) return asked;
        if (result<void> there = await_answer("RECV_BITMAP", [&] { return postcopy_->has_bitmaps(); }); !there) return there;
        if (result<void> there = check_urgent_channel(); !there) return there;
        if (peer_asks_by_preempt_.load() && urgent_channel_) {
            if (result<void> listening = urgent_requests_.open(*urgent_channel_); !listening) return listening;
            if (!urgent_requests_.is_open())
                return error(errc::invalid_argument, "a channel with a way back, as the one before", "none").within("preempt channel");
            listen_to_urgent_requests();
        }
        if (result<void> asked = postcopy_->resume(peer_waits_for_run_.load()); !asked) return asked;
        return await_answer("RESUME_ACK", [&] { return postcopy_->has_resumed(); });
    }
    template <class Done>
    result<void> await_answer(const char* which, Done done) {
        const std::chrono::milliseconds patience = parameters().peer_timeout;
        const auto is_over = [&](const migration::status& at) {
            return at.state == state::cancelling || peer_has_spoken_.load() || done();
        };
        if (!monitor_.wait_for(patience, is_over))
            return error(errc::io, {}, std::string("no ") + which + " from the destination").within("return path");
        if (done()) return {};
        return check_peer();
    }
    void account_postcopy() {
        const clock::time_point now = clock::now();
        if (now < next_account_) return;
        next_account_ = now + bandwidth_meter::window;
        monitor_.update([&](migration::status& at) { count_postcopy(at); });
    }
    void count_postcopy(migration::status& at) const {
        const postcopy_counts counts = postcopy_->counts();
        at.ram.transferred = before_postcopy_.transferred + counts.bytes;
        at.ram.postcopy_bytes = counts.bytes;
        at.ram.postcopy_requests = counts.requests;
        at.ram.normal = before_postcopy_.normal + counts.normal;
        at.ram.normal_bytes = at.ram.normal * at.ram.page_size;
        at.ram.duplicate = before_postcopy_.duplicate + counts.duplicate;
        at.ram.remaining = postcopy_->remaining();
    }

    // ---- the return-path thread: owns way_back_

    void read_return_path() {
        if (parameters().postcopy_ram) vmstate::detail::prefer_short_slice(); // it sends what a guest stands still for
        note_answer(vmstate::detail::guarded([this] { return listen_to_peer(); }));
    }
    /// The first counts.
    void note_answer(const result<void>& answer) {
        {
            const std::lock_guard lock(answer_mutex_);
            if (peer_has_spoken_.load()) return;
            answer_ = answer;
            peer_has_spoken_.store(true);
        }
        if (postcopy_sender* const sender = serving_.load()) sender->wake();
        // A destination that has given up reads no more: don't wait for it to.
        if (!answer) shut_down_channels();
        monitor_.wake();
    }
    /// Until the last message: whether it said that all was loaded.
    result<void> listen_to_peer() {
        buffered_reader in(*way_back_, 4096);
        received_message message;
        std::optional<page_request_decoder> requests;
        if (machine_.ram() != nullptr) requests.emplace(*machine_.ram());
        for (;;) {
            if (awaits_loaded_.load()) monitor_.wake(); // for the one before
            if (result<void> read = read_return_message(in, message); !read) {
                if (read.error() != errc::truncated) return read;
                return error(errc::truncated, "an answer", "the destination hung up; its own error says why").within("return path");
            }
            ++messages_;
            switch (message.type) {
            case return_message::pong: take_pong(message.value()); break;
            case return_message::switchover_ack:
                switchover_acked_.store(true);
                monitor_.wake();
                break;
            case return_message::shut:
                if (message.value() == 0) return {};
                peer_has_refused_.store(true);
                return error(errc::io, {}, "the destination could not load the stream").within("return path");
            default:
                if (result<void> taken = take_postcopy_message(message, in, requests); !taken)
                    return std::move(taken.error().within("return path"));
            }
        }
    }
    result<void> take_postcopy_message(const received_message& message, reader& in, std::optional<page_request_decoder>& requests) {
        postcopy_sender* const sender = serving_.load();
        if (sender == nullptr)
            return error(errc::bad_command, "a message of precopy", std::to_string(static_cast<unsigned>(message.type)));
        const std::span<const std::byte> payload = std::span(message.payload).first(message.size);
        switch (message.type) {
        case return_message::req_pages_id:
        case return_message::req_pages: {
            if (!requests) return error(errc::bad_ram, "no request to a machine without RAM", "one");
            const result<page_request> request = requests->decode(static_cast<page_request_type>(message.type), payload);
            if (!request) return request.error();
            return sender->request(*request);
        }
        case return_message::recv_bitmap: {
            memory_reader name(payload);
            const std::string block = name.get_counted_string();
            if (name.failed() || name.remaining() != 0)
                return error(errc::bad_command, "a block's name", std::to_string(payload.size()) + " bytes").within("RECV_BITMAP");
            if (result<void> taken = sender->take_bitmap(block, in); !taken) return taken;
            break;
        }
        default:
            if (result<void> taken = sender->take_resume_ack(message.value()); !taken) return taken;
            break;
        }
        monitor_.wake();
        return {};
    }
    void take_pong(std::uint32_t pong) {
        postcopy_sender* const sender = serving_.load();
        if (sender == nullptr) {
            if (pong == pong_waits_for_run && !setup_read_.load()) peer_waits_for_run_.store(true);
            if (pong == pong_preempt_requests && !setup_read_.load()) peer_asks_by_preempt_.store(preempt_offered_.load());
            if (pong != ping_setup) return note_zero_block(pong);
            setup_read_.store(true);
            monitor_.wake();
            return;
        }
        sender->take_pong(pong);
        if (pong != (peer_waits_for_run_.load() ? ping_run : ping_loaded)) return;
        note_postcopy_downtime();
    }
    void note_postcopy_downtime() {
        const auto downtime = std::chrono::duration_cast<std::chrono::milliseconds>(clock::now() - stopped_for_postcopy_);
        monitor_.update([&](migration::status& at) { at.downtime = downtime; });
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

    // ---- in postcopy, the thread at the preempt channel, where the destination asks there

    void listen_to_urgent_requests() {
        if (!peer_asks_by_preempt_.load()) return;
        urgent_requests_.start(
            *machine_.ram(),
            [this](const page_request& what) {
                ++messages_;
                return serving_.load()->request(what);
            },
            [this](const error& why) {
                if (serving_.load()->has_ended_urgent()) return;
                // Where the channel has but ended the destination may have more to say, on another connection.
                if (why == errc::truncated || why == errc::io) {
                    std::chrono::milliseconds patience{300}; // longer than TCP takes to send something again
                    if (const auto most = parameters().peer_timeout; most.count() != 0) patience = std::min(patience, most);
                    let_peer_speak(patience);
                }
                note_answer(why);
            });
    }

    machine& machine_;
    guest& guest_;
    mutable std::mutex settings_mutex_; ///< settings_, refusal_
    migration::parameters settings_;
    error refusal_; ///< of the last `start`

    detail::monitor monitor_;
    std::mutex thread_mutex_; ///< migration_thread_, when it is joined
    std::thread migration_thread_;
    std::atomic<bool> may_switch_ = false;

    mutable std::mutex channel_mutex_; ///< the next nine
    output_channel* channel_ = nullptr;
    multifd_sender* multifd_ = nullptr;
    std::unique_ptr<output_channel> urgent_channel_; ///< with postcopy_preempt; only the migration thread changes it
    std::stop_source connecting_;
    channel_connector recovery_; ///< what `recover` brought, until the migration thread takes it
    bool pause_wanted_ = false;
    std::atomic<bool> end_sent_ = false; ///< all but the stream's end has been sent; set by the migration thread
    std::atomic<bool> recovery_is_there_ = false; ///< changed with the mutex, for a look without it
    std::atomic<bool> abandoned_ = false;         ///< the same

    std::thread return_path_thread_;
    std::unique_ptr<duplex_channel> way_back_;
    std::atomic<bool> peer_has_spoken_ = false;
    std::atomic<bool> peer_has_refused_ = false; ///< with its last word
    std::atomic<bool> switchover_acked_ = false;
    std::atomic<bool> zero_blocks_told_ = false;
    std::mutex answer_mutex_; ///< answer_, zero_blocks_
    result<void> answer_;
    std::vector<std::uint32_t> zero_blocks_; ///< by their number in the stream's list

    std::atomic<bool> postcopy_wanted_ = false;
    std::atomic<bool> setup_read_ = false; ///< by the destination
    preempt_requests urgent_requests_; ///< of the connection's preempt channel, where it has a way back
    std::atomic<bool> preempt_offered_ = false;      ///< to the destination, for its requests
    std::atomic<bool> peer_asks_by_preempt_ = false; ///< known when the setup is read
    std::atomic<bool> peer_waits_for_run_ = false; ///< which then isn't in the package; known when the setup is read
    std::atomic<bool> awaits_loaded_ = false;      ///< the migration thread, and wants to be woken by what is said
    std::atomic<std::uint64_t> messages_ = 0;      ///< that the destination has sent
    std::unique_ptr<postcopy_sender> postcopy_;        ///< from the switch on
    std::atomic<postcopy_sender*> serving_ = nullptr;  ///< the same while a connection is there, for those who hear requests
    clock::time_point stopped_for_postcopy_{};         ///< when the guest was; written before `serving_`
    bool to_postcopy_ = false;
    bool guest_left_ = false; ///< the destination has been told to run it
    ram_status before_postcopy_;
    clock::time_point next_account_{};

    std::uint64_t pages_before_window_ = 0;
    std::uint64_t sent_when_heard_ = 0;  ///< bytes on all channels
    clock::time_point heard_at_{};       ///< the destination, of us
    unsigned throttled_ = 0;             ///< what the guest was told last
    auto_converge auto_converge_;
    bandwidth_meter meter_;
    clock::time_point last_sync_{};
    clock::time_point active_since_{}; ///< when the first page could go
    std::optional<clock::time_point> ready_since_; ///< but for the destination's SWITCHOVER_ACK
    std::optional<clock::time_point> stopped_at_;
};

} // namespace vmstate::migration
