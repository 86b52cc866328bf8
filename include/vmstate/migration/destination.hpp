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
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include <vmstate/machine/load.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/migration/monitor.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/return_path.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/stream/buffered_reader.hpp>
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
        return run_with([this]() -> result<std::unique_ptr<input_channel>> {
            if (listener_ == nullptr) return error(errc::invalid_argument, "listen() before run()", "none");
            result<std::unique_ptr<duplex_channel>> accepted = listener_->accept();
            if (!accepted) return accepted.error();
            return std::unique_ptr<input_channel>(std::move(*accepted));
        });
    }
    /// The same at a URI: `tcp:` and `unix:` listen for one source, `exec:`, `fd:` and `file:` read.
    result<void> run(std::string_view uri) {
        const result<vmstate::uri> where = parse_uri(uri);
        if (where && (std::holds_alternative<tcp_uri>(*where) || std::holds_alternative<unix_uri>(*where))) {
            if (result<void> listening = listen(uri); !listening) return fail_at_once(listening.error().within("setup"));
            return run();
        }
        return run_with([&]() -> result<std::unique_ptr<input_channel>> { return open_input(uri); });
    }
    /// The same over a channel of the user's.
    result<void> run(std::unique_ptr<input_channel> channel) {
        if (!channel) return error(errc::invalid_argument, "a channel", "none");
        return run_with([&]() -> result<std::unique_ptr<input_channel>> { return std::move(channel); });
    }

    migration::status status() const { return monitor_.snapshot(); }
    /// From another thread: ends a `run` that waits or reads. Too late once everything has been loaded.
    void cancel() {
        if (!monitor_.enter_unless(state::device, state::cancelling)) return;
        const std::lock_guard lock(channel_mutex_);
        if (listener_ != nullptr) listener_->cancel();
        if (channel_ != nullptr) channel_->shutdown();
    }
    /// One at a time; an empty one for none.
    void observe(observer who) { monitor_.observe(std::move(who)); }

private:
    /// Answers the source's commands.
    class answers final : public command_listener {
    public:
        answers(const machine& into, input_channel& channel, bool acks_switchover)
            : machine_(into), channel_(channel), acks_switchover_(acks_switchover) {}

        result<void> open_return_path() override {
            result<std::unique_ptr<duplex_channel>> back = channel_.get_return_path();
            if (!back) return back.error();
            way_back_ = std::move(*back);
            sender_ = std::make_unique<return_path_sender>(*way_back_);
            // Nothing here needs to see a part of the memory before the source stops.
            return acks_switchover_ ? sender_->send(return_message::switchover_ack) : result<void>();
        }
        result<void> ping(std::uint32_t value) override {
            if (sender_ == nullptr) return {};
            if (value == ping_which_blocks_are_zero)
                if (result<void> told = tell_zero_blocks(); !told) return told;
            return sender_->send(return_message::pong, value);
        }
        /// The last message.
        result<void> shut(bool loaded) {
            return sender_ != nullptr ? sender_->send(return_message::shut, loaded ? 0u : 1u) : result<void>();
        }

    private:
        result<void> tell_zero_blocks() {
            const ram_section* const ram = machine_.ram();
            if (ram == nullptr) return {};
            for (std::uint32_t number = 0; number < ram->stream_order().size() && number <= pong_block_number; ++number) {
                const ram_block& block = *ram->stream_order()[number];
                if (!is_known_to_be_zero(block.used(), machine_.options().guest_page_size(), block.options.file)) continue;
                if (result<void> told = sender_->send(return_message::pong, pong_block_is_zero | number); !told) return told;
            }
            return {};
        }

        const machine& machine_;
        input_channel& channel_;
        bool acks_switchover_;
        std::unique_ptr<duplex_channel> way_back_;
        std::unique_ptr<return_path_sender> sender_;
    };

    result<void> fail_at_once(const error& failure) {
        if (!monitor_.enter(state::setup)) return failure;
        monitor_.update([&](migration::status& at) { at.error_desc = failure; });
        monitor_.enter(state::failed);
        return failure;
    }

    template <class Open>
    result<void> run_with(Open open) {
        if (!monitor_.enter(state::setup))
            return error(errc::invalid_argument, "no migration under way", std::string(to_string(monitor_.now())));
        std::unique_ptr<input_channel> channel;
        result<void> done = [&]() -> result<void> {
            result<std::unique_ptr<input_channel>> opened = open();
            if (!opened) return std::move(opened.error()).within("setup");
            channel = std::move(*opened);
            {
                const std::lock_guard lock(channel_mutex_);
                channel_ = channel.get();
            }
            return receive(*channel);
        }();
        {
            const std::lock_guard lock(channel_mutex_);
            channel_ = nullptr;
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

    result<void> receive(input_channel& channel) {
        if (settings_.peer_timeout.count() != 0) channel.set_timeout(settings_.peer_timeout);
        if (!monitor_.enter(state::active)) return error(errc::io, {}, "cancelled");
        answers back(machine_, channel, settings_.switchover_ack);
        load_options loading = loading_;
        loading.commands = &back;
        buffered_reader in(channel);
        const result<void> loaded = load(machine_, static_cast<reader&>(in), loading);
        monitor_.update([&](migration::status& at) {
            at.ram.transferred = in.offset();
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
    mutable std::mutex channel_mutex_; ///< listener_, channel_
    std::unique_ptr<socket_listener> listener_;
    input_channel* channel_ = nullptr;
};

} // namespace vmstate::migration
