// SPDX-License-Identifier: BSL-1.0
//
// The destination of a live migration: reads the stream into a machine, answers the source, and starts the guest after
// a complete and valid load. Depends on the other headers of migration/, ram/, machine/ and stream/.
//
//     setup -> active -> device (everything is loaded) -> completed
//       any of them -> failed; setup and active -> cancelling -> cancelled
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <string_view>
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
#include <vmstate/migration/return_path.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/stream/buffered_reader.hpp>
#include <vmstate/stream/connector.hpp>
#include <vmstate/stream/listener.hpp>
#include <vmstate/stream/open.hpp>

namespace vmstate::migration {

class destination {
public:
    /// All three have to outlive the migration. `loading` says what becomes of sections that nobody registered.
    destination(machine& into, guest& of, const parameters& settings = {}, const load_options& loading = {})
        : machine_(into), guest_(of), settings_(settings), loading_(loading) {}
    destination(const destination&) = delete;
    destination& operator=(const destination&) = delete;

    /// Listens at a `tcp:` or `unix:` URI, so that `uri()` can be told to the source before `run()` waits for it.
    result<void> listen(std::string_view uri) {
        result<socket_listener> listener = socket_listener::listen(uri);
        if (!listener) return listener.error();
        const std::lock_guard lock(channel_mutex_);
        listener_ = std::make_unique<socket_listener>(std::move(*listener));
        return {};
    }
    /// Where `listen` really listens: with the port that was free where 0 was asked for. Empty before.
    std::string uri() const {
        const std::lock_guard lock(channel_mutex_);
        return listener_ != nullptr ? listener_->uri() : std::string();
    }
    /// Waits for the source at the address of `listen`, loads, and starts the guest. Returns when the guest runs, or
    /// with what went wrong; then the guest was not started, and machine and memory may be partly loaded.
    result<void> run() {
        const channel_acceptor accept = [this](const opening_options& options) -> result<std::unique_ptr<input_channel>> {
            if (listener_ == nullptr) return error(errc::invalid_argument, "listen() before run()", "none");
            listener_->set_timeout(options.timeout);
            const std::stop_callback end(options.stop, [this] { listener_->cancel(); });
            result<std::unique_ptr<duplex_channel>> accepted = listener_->accept();
            if (!accepted) return accepted.error();
            return std::unique_ptr<input_channel>(std::move(*accepted));
        };
        return run_with(accept, true);
    }
    /// The same at a URI: `tcp:` and `unix:` listen for one source, `exec:`, `fd:` and `file:` read.
    result<void> run(std::string_view uri) {
        const result<vmstate::uri> where = parse_uri(uri);
        if (where && (std::holds_alternative<tcp_uri>(*where) || std::holds_alternative<unix_uri>(*where))) {
            if (result<void> listening = listen(uri); !listening) return fail_at_once(listening.error().within("setup"));
            return run();
        }
        return run_with([&](const opening_options&) -> result<std::unique_ptr<input_channel>> { return open_input(uri); }, false);
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

    migration::status status() const { return monitor_.snapshot(); }
    /// From another thread: ends a `run` that waits or reads. Too late once everything has been loaded.
    void cancel() {
        if (!monitor_.enter_unless(state::device, state::cancelling)) return;
        const std::lock_guard lock(channel_mutex_);
        accepting_.request_stop();
        for (const std::shared_ptr<input_channel>& one : channels_) one->shutdown();
    }
    /// One at a time; an empty one for none.
    void observe(observer who) { monitor_.observe(std::move(who)); }

private:
    /// Answers the source's commands. The multifd channels' threads may end the migration; the rest is for the thread that
    /// loads.
    class answers final : public command_listener {
    public:
        answers(const machine& into, input_channel& channel, bool acks_switchover)
            : machine_(into), channel_(channel), acks_switchover_(acks_switchover) {}

        result<void> open_return_path() override {
            result<std::unique_ptr<duplex_channel>> back = channel_.get_return_path();
            if (!back) return back.error();
            {
                const std::lock_guard lock(sender_mutex_);
                way_back_ = std::move(*back);
                sender_ = std::make_unique<return_path_sender>(*way_back_);
            }
            // Nothing here needs to see a part of the memory before the source stops.
            return acks_switchover_ ? sender_->send(return_message::switchover_ack) : result<void>();
        }
        result<void> ping(std::uint32_t value) override {
            if (sender_ == nullptr) return {};
            if (value == ping_which_blocks_are_zero) {
                if (!zero_blocks_) find_zero_blocks();
                for (const std::uint32_t number : *zero_blocks_)
                    if (result<void> told = sender_->send(return_message::pong, pong_block_is_zero | number); !told) return told;
            }
            return sender_->send(return_message::pong, value);
        }
        /// The last message.
        result<void> shut(bool loaded) {
            const std::lock_guard lock(sender_mutex_);
            return sender_ != nullptr ? sender_->send(return_message::shut, loaded ? 0u : 1u) : result<void>();
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
        bool acks_switchover_;
        std::optional<std::vector<std::uint32_t>> zero_blocks_; ///< by their number in the stream's list
        std::unique_ptr<duplex_channel> way_back_;
        std::mutex sender_mutex_; ///< sender_, where it is made and where a channel's thread uses it
        std::unique_ptr<return_path_sender> sender_;
    };

    result<void> fail_at_once(const error& failure) {
        if (!monitor_.enter(state::setup)) return failure;
        monitor_.update([&](migration::status& at) { at.error_desc = failure; });
        monitor_.enter(state::failed);
        return failure;
    }

    result<void> run_with(const channel_acceptor& accept, bool several_channels) {
        if (result<void> fit = check(settings_, several_channels); !fit) return fit;
        if (!monitor_.enter(state::setup))
            return error(errc::invalid_argument, "no migration under way", std::string(to_string(monitor_.now())));
        {
            const std::lock_guard lock(channel_mutex_);
            accepting_ = std::stop_source();
            if (monitor_.now() == state::cancelling) accepting_.request_stop(); // of the one before
        }
        std::shared_ptr<input_channel> channel;
        result<void> done = [&]() -> result<void> {
            result<incoming_channels> opened = open(accept);
            if (!opened) return std::move(opened.error()).within("setup");
            channel = std::move(opened->main);
            return receive(*channel, std::move(opened->multifd));
        }();
        {
            const std::lock_guard lock(channel_mutex_);
            channels_.clear();
            listener_.reset();
        }
        if (channel) {
            const result<void> closed = channel->close();
            if (done) done = closed;
        }
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
    /// Pages that go over a channel that nobody accepts are lost. Of an acceptor of the user's it isn't known whether it
    /// would come back without one.
    result<void> refuse_more_channels() {
        if (listener_ == nullptr) return {};
        listener_->set_timeout(std::chrono::milliseconds(1));
        if (!listener_->accept()) return {};
        return error(errc::not_a_stream, std::to_string(settings_.multifd_channels + 1) + " channels", "more");
    }
    std::stop_token stop_token() const {
        const std::lock_guard lock(channel_mutex_);
        return accepting_.get_token();
    }

    /// What lies ready is copied to its page from the processor's cache; more than this would have left it.
    static constexpr std::size_t read_ahead = 256 * 1024;

    void prepare_memory() {
        if (!settings_.advise_huge_pages || machine_.ram() == nullptr) return;
        for (const std::unique_ptr<ram_block>& block : machine_.ram()->blocks())
            if (block->options.host_page_size == ram_memory::small_page) advise_huge_pages(block->memory);
    }
    result<void> receive(input_channel& channel, std::vector<std::shared_ptr<input_channel>> multifd) {
        if (!monitor_.enter(state::active)) return error(errc::io, {}, "cancelled");
        prepare_memory();
        answers back(machine_, channel, settings_.switchover_ack);
        load_options loading = loading_;
        loading.commands = &back;
        std::optional<multifd_receiver> pages;
        if (settings_.multifd) {
            // The source is told, and whoever waits for the main channel goes on.
            pages.emplace(machine_, settings_.multifd_compression, settings_.peer_timeout,
                [&] {
                    static_cast<void>(back.shut(false));
                    channel.shutdown();
                },
                [&] {
                    back.find_zero_blocks();
                    return refuse_more_channels();
                });
            if (result<void> started = pages->start(std::move(multifd)); !started) return std::move(started.error()).within("setup");
            loading.ram_sync = &*pages;
        }
        buffered_reader in(channel, read_ahead);
        result<void> loaded = load(machine_, static_cast<reader&>(in), loading);
        if (pages) {
            // What has gone wrong there is the reason for what is wrong here.
            if (result<void> complete = pages->finish(loaded.has_value()); !complete) loaded = complete;
        }
        monitor_.update([&](migration::status& at) {
            at.ram.multifd_bytes = pages ? pages->bytes() : 0;
            at.ram.transferred = in.offset() + at.ram.multifd_bytes;
            at.ram.page_size = machine_.options().guest_page_size();
        });
        // It may be gone; that it could not be told is no news then.
        if (!loaded) {
            static_cast<void>(back.shut(false));
            return std::move(loaded.error()).within("active");
        }
        // Said before the guest runs: a source that never hears it lets its own guest go on. From here on there is no way
        // back: a guest that the source has given up is not left standing by a late cancel.
        if (!monitor_.enter(state::device)) return error(errc::io, {}, "cancelled");
        if (result<void> told = back.shut(true); !told) return std::move(told.error()).within("return path");
        if (guest_.start) {
            if (result<void> started = guest_.start(); !started) return std::move(started.error()).within("start");
        }
        monitor_.enter(state::completed);
        return {};
    }

    machine& machine_;
    guest& guest_;
    migration::parameters settings_;
    load_options loading_;
    detail::monitor monitor_;
    mutable std::mutex channel_mutex_; ///< listener_, channels_, accepting_
    std::unique_ptr<socket_listener> listener_;
    std::vector<std::shared_ptr<input_channel>> channels_; ///< the main one and those of multifd, during a migration
    std::stop_source accepting_;
};

} // namespace vmstate::migration
