// SPDX-License-Identifier: BSL-1.0
//
// The VMM's end of a connection to a vhost-user backend: what they agree on, and one request and its answer at a time.
// Depends on message.hpp.
#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/message.hpp>

namespace vmstate::vhost_user {

/// Any thread calls anything. A VMM that has more to say to the backend (rings, its configuration) says it through this,
/// too: then no answer goes to the wrong thread. Whatever fails ends the connection, since nobody knows where in it the
/// next message begins; errors name the backend and the request.
class front_end {
public:
    /// A connected unix stream socket. `name` is the backend's, for errors and statistics; `patience` is the longest that it
    /// may take for an answer (0: as long as it takes), except while it may wait for pages (`set_waits_for_pages`).
    explicit front_end(unique_fd socket, std::string name, std::chrono::milliseconds patience = std::chrono::seconds(10))
        : socket_(std::move(socket)), name_(std::move(name)), patience_(patience) {}
    front_end(const front_end&) = delete;
    front_end& operator=(const front_end&) = delete;

    const std::string& name() const noexcept { return name_; }
    /// To be polled for its end, and for nothing else.
    int native_handle() const noexcept { return socket_.get(); }

    /// SET_OWNER, and of what the backend offers takes what is in `wanted`: first the device's features (and vhost's), then,
    /// where both have protocol features, those.
    result<void> negotiate(std::uint64_t wanted, std::uint64_t wanted_protocol) {
        set_protocol_features(0); // nothing is agreed upon yet
        if (result<void> told = tell(make_request(request::set_owner)); !told) return told;
        const result<std::uint64_t> offered = ask_value(request::get_features);
        if (!offered) return offered.error();
        std::uint64_t protocol = 0;
        if ((*offered & feature::protocol_features) != 0) {
            const result<std::uint64_t> offered_protocol = ask_value(request::get_protocol_features);
            if (!offered_protocol) return offered_protocol.error();
            protocol = *offered_protocol & wanted_protocol;
            if (result<void> told = tell(make_message(request::set_protocol_features, protocol)); !told) return told;
        }
        set_protocol_features(protocol);
        offered_features_ = *offered;
        return set_features(*offered & (wanted | feature::protocol_features));
    }
    /// What SET_FEATURES has said last.
    std::uint64_t features() const noexcept { return features_.load(); }
    /// When it returns the backend goes by them, in all of its threads.
    result<void> set_features(std::uint64_t features) {
        features_ = features;
        if (result<void> told = tell(make_message(request::set_features, features)); !told) return told;
        if (has(protocol_feature::reply_ack)) return {};
        // One after the other: it can't answer this before it is done with that.
        const result<std::uint64_t> answered = ask_value(request::get_features);
        if (!answered) return answered.error();
        return {};
    }
    /// After `negotiate`. SET_LOG_BASE: where the backend marks the pages that it writes, from the beginning of `file`; `size` bytes of bitmap.
    result<void> set_log(std::uint64_t size, const unique_fd& file) {
        if ((offered_features_ & feature::log_all) == 0 || !has(protocol_feature::log_shmfd))
            return within(request::set_log_base,
                error(errc::unsupported, "a backend that logs what it writes (VHOST_F_LOG_ALL, LOG_SHMFD)", "one that doesn't"));
        message m = make_message(request::set_log_base, size);
        m.put(std::uint64_t{0});
        m.descriptors.emplace_back(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0));
        if (!m.descriptors.back()) return within(request::set_log_base, detail::socket_error("descriptor of the log"));
        // It comes with an answer, in which some have a value and some nothing.
        const result<message> answer = ask(m);
        if (!answer) return answer.error();
        return {};
    }
    /// Whether it marks them: VHOST_F_LOG_ALL.
    result<void> set_logging(bool logging) {
        return set_features(logging ? features() | feature::log_all : features() & ~feature::log_all);
    }
    /// What was agreed upon; set by who has negotiated in another way.
    std::uint64_t protocol_features() const noexcept { return protocol_features_.load(); }
    void set_protocol_features(std::uint64_t agreed) noexcept { protocol_features_.store(agreed); }
    bool has(std::uint64_t protocol_features) const noexcept {
        return (this->protocol_features() & protocol_features) == protocol_features;
    }

    /// While this is set, an answer has time until the connection ends: there is nothing wrong with a backend that waits for a
    /// page, and a page may take until the migration has been recovered. `postcopy_clients` sets it from LISTEN to END. An
    /// answer that is being waited for when it ends has `patience` from there on.
    void set_waits_for_pages(bool waits) noexcept { waits_for_pages_.store(waits); }

    /// A request that has an answer.
    result<message> ask(const message& what) {
        const std::lock_guard lock(socket_mutex_);
        if (result<void> sent = send_locked(what); !sent) return sent.error();
        return receive_locked(what.request);
    }
    result<std::uint64_t> ask_value(request what) {
        const result<message> answer = ask(make_request(what));
        if (!answer) return answer.error();
        const result<std::uint64_t> value = answer->as<std::uint64_t>();
        if (!value) return failed(what, value.error());
        return value;
    }
    /// A request without an answer of its own; says `need_reply`, and waits, where the backend understands it.
    result<void> tell(message what) {
        if (!has(protocol_feature::reply_ack)) {
            const std::lock_guard lock(socket_mutex_);
            return send_locked(what);
        }
        what.flags |= message_flag::need_reply;
        const result<message> answer = ask(what);
        if (!answer) return answer.error();
        return check_acknowledgement(*answer);
    }
    /// 0 in an answer is success; something else ends no connection.
    result<void> check_acknowledgement(const message& answer) {
        const result<std::uint64_t> value = answer.as<std::uint64_t>();
        if (!value) return failed(answer.request, value.error());
        if (*value == 0) return {};
        return within(answer.request, error(errc::unsupported, "success", "failure " + std::to_string(*value)));
    }
    /// Sends what isn't answered.
    result<void> send(const message& what) {
        const std::lock_guard lock(socket_mutex_);
        return send_locked(what);
    }
    /// An answer that is still to come; the connection is this request's alone until then.
    class pending_answer {
    public:
        result<message> wait() { return from_->receive_locked(what_); }

    private:
        friend front_end;
        pending_answer(front_end& from, request what, std::unique_lock<std::mutex> lock)
            : from_(&from), what_(what), lock_(std::move(lock)) {}

        front_end* from_;
        request what_;
        std::unique_lock<std::mutex> lock_;
    };
    /// For who asks several backends at the same time. `pending_answer::wait` has to follow.
    result<pending_answer> start(const message& what) {
        std::unique_lock lock(socket_mutex_);
        if (result<void> sent = send_locked(what); !sent) return sent.error();
        return pending_answer(*this, what.request, std::move(lock));
    }
    /// Ends the connection: who waits for an answer goes on, and everything after fails.
    void shutdown() noexcept { ::shutdown(socket_.get(), SHUT_RDWR); }

    /// An error that says whose it is.
    error within(request what, const error& why) const {
        return std::move(error(why).within(name_of(what)).within("vhost-user backend " + name_));
    }

private:
    result<void> send_locked(const message& what) {
        const std::chrono::milliseconds most = waits_for_pages_.load() ? std::chrono::milliseconds(0) : patience_;
        if (result<void> sent = send_message(socket_.get(), what, most); !sent) return failed(what.request, sent.error());
        return {};
    }
    result<message> receive_locked(request what) {
        // Until it begins. Short waits, as nothing here is told when the time is limited again.
        while (waits_for_pages_.load()) {
            pollfd ready{socket_.get(), POLLIN, 0};
            if (::poll(&ready, 1, 50) > 0) break;
        }
        result<std::optional<message>> got = receive_message(socket_.get(), patience_);
        if (!got) return failed(what, got.error());
        if (!*got) return failed(what, error(errc::io, "an answer", "the end of the connection"));
        message& answer = **got;
        if (answer.request != what || !answer.is_reply())
            return failed(what, error(errc::bad_message, "its answer",
                                    name_of(answer.request) + (answer.is_reply() ? "'s" : ", which is none")));
        return std::move(answer);
    }
    error failed(request what, const error& why) {
        shutdown();
        return within(what, why);
    }

    const unique_fd socket_;
    const std::string name_;
    const std::chrono::milliseconds patience_;
    std::atomic<std::uint64_t> protocol_features_ = 0;
    std::atomic<std::uint64_t> offered_features_ = 0;
    std::atomic<std::uint64_t> features_ = 0;
    std::atomic<bool> waits_for_pages_ = false;
    std::mutex socket_mutex_; ///< the socket, from a request to its answer
};

} // namespace vmstate::vhost_user
