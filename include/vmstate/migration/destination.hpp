// SPDX-License-Identifier: BSL-1.0
//
// The destination of a live migration: reads the stream into a machine, answers the source, and starts the guest after
// a complete and valid load. Depends on the other headers of migration/, ram/, machine/ and stream/.
//
//     setup -> active -> device (everything is loaded) -> completed
//                active -> postcopy-active (the devices are loaded, the guest runs when the source says so) -> completed
//                          postcopy-active -> postcopy-paused -> postcopy-recover -> postcopy-active
//       any of them -> failed; setup and active -> cancelling -> cancelled
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
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

#include <vmstate/machine/load.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/migration/incoming_channels.hpp>
#include <vmstate/migration/monitor.hpp>
#include <vmstate/migration/multifd_receiver.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/postcopy_incoming.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/migration/uninvited_channels.hpp>
#include <vmstate/postcopy/observer.hpp>
#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/open.hpp>
#include <vmstate/support/guarded.hpp>

namespace vmstate::migration {

class destination {
public:
    /// All three have to outlive the migration. `loading` says what becomes of sections that nobody registered.
    destination(machine& into, guest& of, const parameters& settings = {}, const load_options& loading = {})
        : machine_(into), guest_(of), settings_(settings), loading_(loading) {}
    destination(const destination&) = delete;
    destination& operator=(const destination&) = delete;
    /// Ends a migration that is under way, as `cancel` and `give_up` do, and waits until its `run` is about to return.
    ~destination() {
        cancel();
        give_up();
        monitor_.wait_until([this](const migration::status&) { return !inside_.load(); });
    }

    /// Listens at a `tcp:` or `unix:` URI, so that `uri()` can be told to the source before `run()` waits for it. Not during
    /// a `run`.
    result<void> listen(std::string_view uri) {
        if (inside_.load()) return under_way();
        result<std::unique_ptr<socket_listener>> listener = make_listener(uri);
        if (!listener) return listener.error();
        const std::lock_guard lock(channel_mutex_);
        if (inside_.load()) return under_way();
        listener_ = std::move(*listener);
        return {};
    }
    /// Where `listen` really listens: with the port that was free where 0 was asked for. Empty before, and as soon as the
    /// source's channels are there: nobody else is let in.
    std::string uri() const {
        const std::lock_guard lock(channel_mutex_);
        return listener_ != nullptr ? listener_->uri() : std::string();
    }
    /// Waits for the source at the address of `listen`, loads, and starts the guest. Returns when the guest runs
    /// (with multifd, when the source has closed its channels, too, for which it has a second), or with what went wrong; then the
    /// guest was not started, and machine and memory may be partly loaded.
    ///
    /// With `postcopy_ram` the guest may run before: from `postcopy_active` on, as soon as the source says so. Then this
    /// returns when every page is there. A connection that breaks meanwhile is no end of it: see `recover` and `give_up`.
    result<void> run() { return run_with(accept_from_listener(), true); }
    /// The same at a URI: `tcp:` and `unix:` listen for one source, `exec:`, `fd:` and `file:` read.
    result<void> run(std::string_view uri) {
        const result<vmstate::uri> where = parse_uri(uri);
        if (where && (std::holds_alternative<tcp_uri>(*where) || std::holds_alternative<unix_uri>(*where)))
            return run_with(accept_from_listener(), true, uri);
        return run_with(
            [&](const opening_options& options) -> result<std::unique_ptr<input_channel>> { return open_input(uri, options); },
            false);
    }
    /// The same over a channel of the user's.
    result<void> run(std::unique_ptr<input_channel> channel) {
        if (!channel) return error(errc::invalid_argument, "a channel", "none");
        return run_with(
            [&](const opening_options&) -> result<std::unique_ptr<input_channel>> { return std::move(channel); }, false);
    }
    /// The same over as many channels as the migration needs (`multifd`), in whatever order `accept` gives them.
    result<void> run(const channel_acceptor& accept) {
        if (!accept) return error(errc::invalid_argument, "an acceptor", "none");
        return run_with(accept, true);
    }

    migration::status status() const {
        const std::shared_ptr<postcopy_incoming> postcopy = [this] {
            const std::lock_guard lock(channel_mutex_);
            return postcopy_;
        }();
        migration::status now = monitor_.snapshot();
        if (postcopy) now.postcopy = postcopy->status();
        return now;
    }
    /// From another thread: ends a `run` that waits or reads. Too late once everything has been loaded, or the guest runs:
    /// from `postcopy_active` on it does nothing.
    void cancel() {
        if (!monitor_.enter_unless(state::device, state::cancelling)) return;
        const std::lock_guard lock(channel_mutex_);
        accepting_.request_stop();
        for (const std::shared_ptr<input_channel>& one : channels_) one->shutdown();
    }

    // ---- postcopy, from other threads than the one in `run`

    /// In `postcopy_paused`: listens at a `tcp:` or `unix:` URI for the source's next connection, and returns; `uri()` says
    /// where (QEMU: migrate-recover). When the source has come the state is `postcopy_recover`, and `postcopy_active` when
    /// the pages go on; where that fails it is `postcopy_paused` again, and this can be called again.
    result<void> recover(std::string_view uri) {
        if (result<void> paused = check_paused(); !paused) return paused;
        result<std::unique_ptr<socket_listener>> listener = make_listener(uri);
        if (!listener) return listener.error();
        return recover_by(accept_from_listener(), std::move(*listener));
    }
    /// The same over channels that `accept` gives: the main one first.
    result<void> recover(const channel_acceptor& accept) {
        if (!accept) return error(errc::invalid_argument, "an acceptor", "none");
        return recover_by(accept, nullptr);
    }
    /// Breaks the connection of a postcopy on purpose (QEMU: migrate-pause): the state becomes `postcopy_paused`. Does
    /// nothing in other states than `postcopy_active` and `postcopy_recover`.
    void pause() {
        const std::lock_guard lock(channel_mutex_);
        const state now = monitor_.now();
        if (postcopy_ && (now == state::postcopy_active || now == state::postcopy_recover))
            postcopy_->broken(error(errc::io, {}, "paused"));
    }
    /// Ends a postcopy that isn't complete, paused or not, as failed. What has not come is lost: whoever waits for a page
    /// goes on with zeros, so that a guest that runs is no longer one, but nothing hangs. Where the guest wasn't
    /// started yet it isn't any more: before RUN only the source can tell whether it goes on there.
    void give_up() {
        {
            const std::lock_guard lock(channel_mutex_);
            if (!is_postcopy(monitor_.now())) return;
            given_up_ = true;
            accepting_.request_stop();
            if (postcopy_) postcopy_->broken(error(errc::io, {}, "given up"));
        }
        monitor_.wake();
    }

    /// Who else uses the memory (a vhost-user backend), and hears of postcopy's phases; outlives `run`. Not during one.
    void add_postcopy_observer(postcopy_observer& who) { observers_.push_back(&who); }

    /// One at a time; an empty one for none.
    void observe(observer who) { monitor_.observe(std::move(who)); }

private:
    /// Answers the source's commands. The multifd channels' threads may end the migration; the rest is for the thread that
    /// loads.
    class answers final : public command_listener {
    public:
        /// `postcopy` is null where the migration can't go on in it.
        answers(const machine& into, input_channel& channel, return_path& back, bool acks_switchover, postcopy_incoming* postcopy)
            : machine_(into), channel_(channel), back_(back), acks_switchover_(acks_switchover), postcopy_(postcopy) {}

        result<void> open_return_path() override {
            if (result<void> opened = back_.open(channel_); !opened) return opened;
            // Nothing here needs to see a part of the memory before the source stops.
            return acks_switchover_ ? back_.send(return_message::switchover_ack) : result<void>();
        }
        result<void> ping(std::uint32_t value) override {
            if (value == ping_setup && postcopy_ != nullptr) {
                postcopy_->let_run_come_later();
                if (result<void> told = back_.send(return_message::pong, pong_waits_for_run); !told) return told;
            }
            if (value == ping_preempt_requests && postcopy_ != nullptr && postcopy_->let_preempt_carry_requests())
                if (result<void> told = back_.send(return_message::pong, pong_preempt_requests); !told) return told;
            if (value == ping_which_blocks_are_zero) {
                if (!zero_blocks_) find_zero_blocks();
                for (const std::uint32_t number : *zero_blocks_) {
                    if (result<void> told = back_.send(return_message::pong, pong_block_is_zero | number); !told) return told;
                    if (postcopy_ != nullptr) postcopy_->block_is_zero(*machine_.ram()->stream_order()[number]);
                }
            }
            return back_.send(return_message::pong, value);
        }
        result<void> postcopy_advise(bool with_memory) override {
            if (with_memory != (postcopy_ != nullptr))
                return error(errc::bad_command, postcopy_ != nullptr ? "the source's postcopy-ram, as here" : "no postcopy-ram, as here",
                    with_memory ? "it on" : "it off");
            return with_memory ? postcopy_->advise() : result<void>();
        }
        /// The last message: the first of them.
        result<void> shut(bool loaded) {
            if (!back_.is_open() || is_over_.exchange(true)) return {};
            return back_.send(return_message::shut, loaded ? 0u : 1u);
        }
        /// Before the first page: it may have come over another channel by the time that the source asks.
        void find_zero_blocks() {
            zero_blocks_.emplace();
            const ram_section* const ram = machine_.ram();
            if (ram == nullptr) return;
            for (std::uint32_t number = 0; number < ram->stream_order().size() && number <= pong_block_number; ++number) {
                const ram_block& block = *ram->stream_order()[number];
                if (is_known_to_be_zero(block.used(), machine_.options().guest_page_size(), block.options.file))
                    zero_blocks_->push_back(number);
            }
        }

    private:
        const machine& machine_;
        input_channel& channel_;
        return_path& back_;
        bool acks_switchover_;
        postcopy_incoming* postcopy_;
        std::atomic<bool> is_over_ = false;
        std::optional<std::vector<std::uint32_t>> zero_blocks_; ///< by their number in the stream's list
    };

    /// Where the source has opened all channels that it has, and no page has come: with the first section's end.
    class setup_watch final : public ram_sync_listener {
    public:
        explicit setup_watch(destination& whose) : whose_(whose) {}
        result<void> end_of_section() override {
            return std::exchange(is_over_, true) ? result<void>() : whose_.close_listener();
        }
        result<void> multifd_flush() override { return {}; } // of QEMU 8.1 without multifd, too

    private:
        destination& whose_;
        bool is_over_ = false;
    };

    error under_way() const { return error(errc::invalid_argument, "no migration under way", std::string(to_string(monitor_.now()))); }
    static result<std::unique_ptr<socket_listener>> make_listener(std::string_view uri) {
        result<socket_listener> listener = socket_listener::listen(uri);
        if (!listener) return listener.error();
        return std::make_unique<socket_listener>(std::move(*listener));
    }
    result<void> recover_by(const channel_acceptor& accept, std::unique_ptr<socket_listener> listener) {
        {
            const std::lock_guard lock(channel_mutex_);
            if (result<void> paused = check_paused_locked(); !paused) return paused;
            if (listener != nullptr) listener_ = std::move(listener);
            recovery_ = accept;
            recovery_asked_ = true;
        }
        monitor_.wake();
        return {};
    }
    channel_acceptor accept_from_listener() {
        return [this](const opening_options& options) -> result<std::unique_ptr<input_channel>> {
            if (listener_ == nullptr) return error(errc::invalid_argument, "listen() before run()", "none");
            listener_->set_timeout(options.timeout);
            const std::stop_callback end(options.stop, [this] { listener_->cancel(); });
            result<std::unique_ptr<duplex_channel>> accepted = listener_->accept();
            if (!accepted) return accepted.error();
            return std::unique_ptr<input_channel>(std::move(*accepted));
        };
    }

    /// `address`: where `accept` is to listen, where it does and isn't yet.
    result<void> run_with(const channel_acceptor& accept, bool several_channels, std::string_view address = {}) {
        if (result<void> fit = check(settings_, several_channels); !fit) return fit;
        if (result<void> fit = settings_.postcopy_ram ? check_postcopy_machine(machine_) : result<void>(); !fit) return fit;
        {
            const std::lock_guard lock(channel_mutex_);
            if (inside_.exchange(true)) return under_way();
        }
        result<void> done = run_inside(accept, address);
        // Under the monitor's lock: the destructor is over as soon as it sees this.
        monitor_.leave(inside_);
        return done;
    }

    /// At none, where there is none.
    result<void> listen_at(std::string_view address) {
        if (address.empty()) return {};
        result<std::unique_ptr<socket_listener>> listener = make_listener(address);
        if (!listener) return listener.error();
        const std::lock_guard lock(channel_mutex_);
        listener_ = std::move(*listener);
        return {};
    }
    result<void> run_inside(const channel_acceptor& accept, std::string_view address) {
        // Before anyone hears of `setup`: who observes reads `uri()` then.
        const result<void> listening = vmstate::detail::guarded([&] { return listen_at(address); });
        if (!monitor_.enter(state::setup)) return under_way();
        {
            const std::lock_guard lock(channel_mutex_);
            accepting_ = std::stop_source();
            if (monitor_.now() == state::cancelling) accepting_.request_stop(); // of the one before
            given_up_ = false;
            recovery_asked_ = false;
        }
        std::shared_ptr<input_channel> channel;
        result<void> done = vmstate::detail::guarded([&]() -> result<void> {
            if (!listening) return error(listening.error()).within("setup");
            result<incoming_channels> opened = open(accept);
            if (!opened) return std::move(opened.error()).within("setup");
            channel = std::move(opened->main);
            return receive(channel, std::move(opened->multifd), accept);
        });
        const std::shared_ptr<postcopy_incoming> postcopy = [this] {
            const std::lock_guard lock(channel_mutex_);
            channels_.clear();
            listener_.reset();
            return std::exchange(postcopy_, nullptr);
        }();
        uninvited_.close();
        if (postcopy) monitor_.update([&](migration::status& at) { at.postcopy = postcopy->status(); });
        // Where all is loaded the guest runs here, whatever a channel says of its end.
        if (channel) static_cast<void>(vmstate::detail::guarded([&] { return channel->close(); }));
        if (done) return done;
        const bool cancelled = monitor_.now() == state::cancelling;
        if (cancelled) done = error(errc::io, {}, "cancelled");
        monitor_.update([&](migration::status& at) { at.error_desc = done.error(); });
        monitor_.enter(cancelled ? state::cancelled : state::failed);
        return done;
    }

    /// All channels first, then a look at each: a source may write to its main channel only when it has the others (QEMU
    /// with TLS). Waits for the first as long as it takes.
    result<incoming_channels> open(const channel_acceptor& accept) {
        std::vector<std::shared_ptr<input_channel>> accepted;
        for (unsigned number = 0; number <= (settings_.multifd ? settings_.multifd_channels : 0); ++number) {
            const std::chrono::milliseconds patience = number == 0 ? std::chrono::milliseconds(0) : settings_.peer_timeout;
            result<std::unique_ptr<input_channel>> next = accept({patience, stop_token()});
            if (next && !*next) next = error(errc::invalid_argument, "a channel", "none");
            if (!next && number == 0) return next.error();
            if (!next)
                return std::move(next.error())
                    .within("channel " + std::to_string(number + 1) + " of " + std::to_string(settings_.multifd_channels + 1));
            accepted.push_back(std::move(*next));
            if (settings_.peer_timeout.count() != 0) accepted.back()->set_timeout(settings_.peer_timeout);
            const std::lock_guard lock(channel_mutex_);
            channels_.push_back(accepted.back());
            if (accepting_.stop_requested()) accepted.back()->shutdown();
        }
        if (!settings_.multifd) {
            incoming_channels one;
            one.main = std::move(accepted.front());
            return one;
        }
        return tell_apart(accepted, machine_.options().uuid);
    }
    /// The source's channels are there: from here on nobody else is let in, as QEMU does it. Pages that go over a channel that
    /// nobody reads are lost; of an acceptor of the user's it isn't known whether it would come back without one.
    result<void> close_listener() {
        if (listener_ == nullptr) return {};
        uninvited_.take_from(*listener_);
        {
            const std::lock_guard lock(channel_mutex_);
            listener_.reset();
        }
        if (result<void> nobody = refuse_uninvited(); !nobody) return nobody;
        // One may be for pages that the guest is to wait for: its source has to see, before it stops the guest, that nobody
        // reads there. One of multifd whose first packet is late hears of it, too.
        if (is_postcopy_advised()) uninvited_.close();
        return {};
    }
    bool is_postcopy_advised() const {
        const std::lock_guard lock(channel_mutex_);
        return postcopy_ && postcopy_->now() != postcopy_state::none;
    }
    /// Of those who have connected before: what tells them apart may have come later. Who has no part in this doesn't matter.
    result<void> refuse_uninvited() const {
        if (!uninvited_.has_multifd()) return {};
        if (!settings_.multifd) return error(errc::invalid_argument, "a source without multifd, as here", "a multifd channel");
        return error(errc::invalid_argument,
            std::to_string(settings_.multifd_channels) + " multifd channels and the main one", "more");
    }
    std::stop_token stop_token() const {
        const std::lock_guard lock(channel_mutex_);
        return accepting_.get_token();
    }

    /// What lies ready is copied to its page from the processor's cache; more than this would have left it.
    static constexpr std::size_t read_ahead = 256 * 1024;
    /// A source whose migration is over closes its channels at once.
    static constexpr std::chrono::milliseconds farewell{1000};

    void prepare_memory() {
        if (!settings_.advise_huge_pages || machine_.ram() == nullptr) return;
        for (const std::unique_ptr<ram_block>& block : machine_.ram()->blocks())
            if (block->options.host_page_size == ram_memory::small_page) advise_huge_pages(block->memory);
    }
    /// Ends it at the end of its own life.
    struct end_of_postcopy {
        postcopy_incoming* of; ///< null without
        ~end_of_postcopy() {
            if (of != nullptr) of->release();
        }
    };
    result<void> receive(std::shared_ptr<input_channel>& main, std::vector<std::shared_ptr<input_channel>> multifd,
        const channel_acceptor& accept) {
        if (!monitor_.enter(state::active)) return error(errc::io, {}, "cancelled");
        prepare_memory();
        input_channel& channel = *main;
        return_path way_back;
        std::shared_ptr<postcopy_incoming> postcopy;
        if (settings_.postcopy_ram) {
            postcopy = std::make_shared<postcopy_incoming>(
                machine_, settings_, way_back, [this] { return enter_postcopy(); },
                [this] { monitor_.enter(state::postcopy_active); }, observers_);
            postcopy->connect(main, accept);
            const std::lock_guard lock(channel_mutex_);
            postcopy_ = postcopy;
        }
        answers back(machine_, channel, way_back, settings_.switchover_ack, postcopy.get());
        load_options loading = loading_;
        loading.commands = &back;
        loading.postcopy = postcopy.get();
        loading.ram_pages = postcopy.get();
        std::optional<multifd_receiver> pages;
        setup_watch watch(*this);
        // Their channel for urgent pages comes later.
        if (!settings_.postcopy_preempt) loading.ram_sync = &watch;
        if (settings_.multifd) {
            // The source is told, and whoever waits for the main channel goes on.
            pages.emplace(machine_, settings_.multifd_compression, settings_.peer_timeout,
                [&] {
                    static_cast<void>(vmstate::detail::guarded([&] { return back.shut(false); }));
                    channel.shutdown();
                },
                [&] {
                    back.find_zero_blocks();
                    return close_listener();
                });
            if (result<void> started = pages->start(std::move(multifd)); !started) return std::move(started.error()).within("setup");
            loading.ram_sync = &*pages;
        }
        buffered_reader in(channel, read_ahead);
        // Whatever is thrown from here on: no thread that reads through it may be left when the reader goes.
        const end_of_postcopy released{postcopy.get()};
        result<void> loaded = vmstate::detail::guarded([&] { return load(machine_, static_cast<reader&>(in), loading); });
        monitor_.update([&](migration::status& at) { at.has_return_path = way_back.is_open(); });
        if (pages) {
            // What has gone wrong there is the reason for what is wrong here.
            if (result<void> complete = loaded ? pages->complete() : pages->finish(); !complete) loaded = complete;
        }
        if (loaded && !(postcopy && postcopy->is_listening())) loaded = refuse_uninvited();
        if (postcopy && postcopy->is_listening()) {
            // A source that hears that the devices could not be loaded lets its own guest go on: while there is a way to say so.
            if (!loaded) {
                postcopy->note_failure(loaded.error());
                static_cast<void>(back.shut(false));
            }
            result<void> done = loaded ? vmstate::detail::guarded([&] { return run_in_postcopy(*postcopy, main, way_back, back); })
                                       : fail_before_run(*postcopy);
            if (loaded && !done) static_cast<void>(back.shut(false));
            postcopy->release();
            update_ram(postcopy->bytes(), 0);
            if (done) static_cast<void>(back.shut(true));
            if (done) monitor_.enter(state::completed);
            return done;
        }
        if (loaded && postcopy && postcopy->now() == postcopy_state::discard)
            loaded = error(errc::bad_command, "POSTCOPY_LISTEN after POSTCOPY_RAM_DISCARD", "the end").within("postcopy");
        // It may be gone; that it could not be told is no news then. Otherwise it hears of it before the preempt channel ends.
        if (!loaded) static_cast<void>(back.shut(false));
        if (postcopy) postcopy->release();
        update_ram(in.offset(), pages ? pages->bytes() : 0);
        if (!loaded) return std::move(loaded.error()).within("active");
        if (guest_.accept) {
            if (result<void> accepted = guest_.accept(); !accepted) {
                static_cast<void>(back.shut(false));
                return std::move(accepted.error()).within("accept");
            }
        }
        // Said before the guest runs: a source that never hears it lets its own guest go on. From here on there is no way
        // back: a guest that the source has given up is not left standing by a late cancel.
        if (!monitor_.enter(state::device)) return error(errc::io, {}, "cancelled");
        // A source that waits for this keeps its end open. Writing to one that has given up may succeed all the same (TCP).
        if (way_back.is_open() && channel.is_ended())
            return error(errc::io, "a source that waits for the answer", "one that has given up").within("return path");
        if (result<void> told = back.shut(true); !told) return std::move(told.error()).within("return path");
        if (guest_.start) {
            if (result<void> started = guest_.start(); !started) return std::move(started.error()).within("start");
        }
        monitor_.enter(state::completed);
        if (pages) pages->drain(farewell);
        return {};
    }
    void update_ram(std::uint64_t main_bytes, std::uint64_t multifd_bytes) {
        monitor_.update([&](migration::status& at) {
            at.ram.multifd_bytes = multifd_bytes;
            at.ram.transferred = main_bytes + multifd_bytes;
            at.ram.page_size = machine_.options().guest_page_size();
        });
    }

    // ---- postcopy

    /// The package could not be loaded, and a reason that a thread of pages has had before goes first.
    static result<void> fail_before_run(postcopy_incoming& postcopy) {
        postcopy.break_off();
        return std::move(postcopy.wait().error()).within("active");
    }
    /// Before the source hears that the devices are loaded: from then on it may have told us to run the guest.
    result<void> enter_postcopy() {
        if (monitor_.now() == state::postcopy_active || monitor_.enter_unless(state::cancelling, state::postcopy_active)) return {};
        return error(errc::io, {}, "cancelled");
    }
    /// The package is loaded: the guest runs when the source says so, and its memory comes, over as many connections as
    /// either takes. Those are for a thread of their own: who starts the guest may stand still at a page that only the next
    /// one brings.
    result<void> run_in_postcopy(
        postcopy_incoming& postcopy, std::shared_ptr<input_channel>& main, return_path& way_back, answers& back) {
        if (result<void> entered = enter_postcopy(); !entered) return entered;
        result<void> received;
        std::thread receiving([&] {
            channel_acceptor accept; // of the connection
            received = vmstate::detail::guarded([&] { return receive_memory(postcopy, main, way_back, accept); });
            // Whoever waits for a page goes on, who starts the guest, too.
            if (!received) postcopy.release();
        });
        result<void> started = vmstate::detail::guarded([&]() -> result<void> {
            if (!postcopy.await_run()) return {};
            if (guest_.vcpu_threads) postcopy.set_vcpu_threads(guest_.vcpu_threads());
            return guest_.start ? guest_.start() : result<void>();
        });
        if (!started) {
            given_up_ = true; // it isn't paused when the source hears of it and goes
            static_cast<void>(vmstate::detail::guarded([&] { return back.shut(false); }));
            give_up();
        }
        receiving.join();
        if (!started) return std::move(started.error()).within("start");
        return received;
    }
    /// Waits for the guest's memory.
    result<void> receive_memory(
        postcopy_incoming& postcopy, std::shared_ptr<input_channel>& main, return_path& back, channel_acceptor& accept) {
        result<void> session = postcopy.wait();
        while (!session) {
            postcopy.pause();
            back.close();
            main->shutdown();
            {
                const std::lock_guard lock(channel_mutex_);
                channels_.clear();
                listener_.reset();
                accepting_ = std::stop_source();
                recovery_asked_ = false;
                if (given_up_) return std::move(session.error()).within("postcopy");
            }
            static_cast<void>(vmstate::detail::guarded([&] { return main->close(); }));
            monitor_.update([&](migration::status& at) { at.error_desc = session.error(); });
            monitor_.enter(state::postcopy_paused);
            session = recover_once(postcopy, main, accept);
        }
        postcopy.finish();
        monitor_.update([](migration::status& at) { at.error_desc = {}; });
        return {};
    }
    /// Waits to be told to recover, and for the source; then for the end of that connection.
    result<void> recover_once(postcopy_incoming& postcopy, std::shared_ptr<input_channel>& main, channel_acceptor& accept) {
        monitor_.wait_until([this](const migration::status&) { return given_up_.load() || recovery_asked_.load(); });
        {
            const std::lock_guard lock(channel_mutex_);
            if (given_up_) return error(errc::io, {}, "given up");
            accept = recovery_;
        }
        result<std::unique_ptr<input_channel>> next =
            vmstate::detail::guarded([&] { return accept({std::chrono::milliseconds(0), stop_token()}); });
        if (!next) return std::move(next.error()).within("recover");
        if (!*next) return error(errc::invalid_argument, "a channel", "none").within("recover");
        main = std::move(*next);
        // As at first: what would be for urgent pages is refused.
        if (!settings_.postcopy_preempt) {
            const std::lock_guard lock(channel_mutex_);
            listener_.reset();
        }
        if (settings_.peer_timeout.count() != 0) main->set_timeout(settings_.peer_timeout);
        postcopy.connect(main, accept);
        monitor_.enter(state::postcopy_recover);
        {
            // Who gave up before there was something to break.
            const std::lock_guard lock(channel_mutex_);
            if (given_up_) postcopy.broken(error(errc::io, {}, "given up"));
        }
        if (result<void> started = vmstate::detail::guarded([&] { return postcopy.recover(); }); !started) postcopy.broken(started.error());
        return postcopy.wait();
    }
    result<void> check_paused() const {
        const std::lock_guard lock(channel_mutex_);
        return check_paused_locked();
    }
    result<void> check_paused_locked() const {
        if (monitor_.now() != state::postcopy_paused)
            return error(errc::invalid_argument, "a postcopy that is paused", std::string(to_string(monitor_.now())));
        if (recovery_asked_) return error(errc::invalid_argument, "one recovery at a time", "a second one");
        return {};
    }

    machine& machine_;
    guest& guest_;
    migration::parameters settings_;
    load_options loading_;
    std::vector<postcopy_observer*> observers_;
    detail::monitor monitor_;
    mutable std::mutex channel_mutex_; ///< all below but inside_
    std::unique_ptr<socket_listener> listener_; ///< during a `run` its thread's, or the one's that waits for the memory
    std::vector<std::shared_ptr<input_channel>> channels_; ///< the main one and those of multifd, during a migration
    std::stop_source accepting_;
    std::shared_ptr<postcopy_incoming> postcopy_; ///< during a migration that may go on in it
    channel_acceptor recovery_;                   ///< asked for while paused, where `recovery_asked_` says so
    std::atomic<bool> recovery_asked_ = false;    ///< with given_up_ looked at without the mutex, too
    std::atomic<bool> given_up_ = false;
    std::atomic<bool> inside_ = false; ///< of `run`; set with the mutex
    detail::uninvited_channels uninvited_; ///< the thread's that is in `run`
};

} // namespace vmstate::migration
