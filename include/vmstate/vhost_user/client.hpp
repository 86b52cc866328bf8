// SPDX-License-Identifier: BSL-1.0
//
// The backend's half of vhost-user, as far as memory is concerned: features, the table of regions, the log of dirty pages,
// and postcopy, in which the backend opens a userfaultfd, hands it to the VMM, and registers what it maps. The device, its
// queues and its configuration stay the backend's own. Facts from QEMU's docs/interop/vhost-user.rst. Depends on
// guest_memory.hpp, mapped_region.hpp, notice_resolver.hpp, hangup_watch.hpp, postcopy/support.hpp and Linux.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/socket.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/postcopy/support.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/dirty_pages.hpp>
#include <vmstate/vhost_user/guest_memory.hpp>
#include <vmstate/vhost_user/hangup_watch.hpp>
#include <vmstate/vhost_user/mapped_region.hpp>
#include <vmstate/vhost_user/memory_table.hpp>
#include <vmstate/vhost_user/message.hpp>
#include <vmstate/vhost_user/notice_resolver.hpp>
#include <vmstate/vhost_user/page_notices.hpp>

namespace vmstate::vhost_user {

/// Where a backend is in postcopy, by the messages that lead there.
///
///     none --ADVISE--> advise --LISTEN--> listen --table, acknowledged--> running
///                                            ^------ SET_MEM_TABLE ----------'
///     END leads from each of them to none
enum class phase {
    none,    ///< no postcopy: memory is there when it is mapped
    advise,  ///< the VMM has our userfaultfd; else as before, since the migration may end without postcopy
    listen,  ///< no guest memory may be touched: the VMM doesn't yet know where we have it
    running, ///< guest memory may be touched, and who does may have to wait until a page has come
};

constexpr std::string_view to_string(phase p) noexcept {
    switch (p) {
    case phase::none: return "none";
    case phase::advise: return "advise";
    case phase::listen: return "listen";
    case phase::running: return "running";
    }
    return "unknown";
}

/// What became of a message.
enum class handling {
    answered, ///< it is done with, and answered where it had to be
    done,     ///< it is done with, and has no answer of its own: an acknowledgement is due where it asks for one
    not_mine, ///< it is for somebody else
};

struct client_options {
    /// The device's bits for GET_FEATURES; the client adds VHOST_F_LOG_ALL and VHOST_USER_F_PROTOCOL_FEATURES.
    std::uint64_t features = 0;
    /// The device's bits for GET_PROTOCOL_FEATURES (MQ, CONFIG, ...); the client adds those that it speaks.
    std::uint64_t protocol_features = 0;
    /// PAGEFAULT, and what goes with it.
    bool postcopy = true;
    /// With a VMM of this library that wants it, faults are resolved here, by page notices (page_notices.hpp), where the kernel
    /// can (Linux 5.14): the VMM then has neither our userfaultfd nor our addresses. Regions can't be added one by one then.
    bool page_notices = false;
    /// CONFIGURE_MEM_SLOTS: the VMM adds and removes regions one by one.
    bool memory_slots = true;
    std::size_t most_regions = memory_table::default_most;
    /// Where guest memory is touched by the process's own instructions alone, never by a system call that is given an
    /// address in it, `user_only` does, which needs no privilege.
    userfault_scope faults = userfault_scope::user_and_kernel;
    /// Called by the thread of the messages when guest memory can be touched again or anew: queues look for work then.
    std::function<void()> on_memory{};
    /// The most that a message which has begun, or an answer, may take; 0: as long as it takes.
    std::chrono::milliseconds patience = std::chrono::seconds(10);
};

/// One connection to a VMM. A backend gives it each message that arrives (`handle`), or lets it run the loop (`run`); that is
/// one thread. All threads may ask for guest memory (`access`) and for `postcopy_phase` and `features`.
class client {
public:
    explicit client(client_options options = {}) : options_(std::move(options)), memory_(options_.most_regions) {}
    ~client() { disconnect(); }
    client(const client&) = delete;
    client& operator=(const client&) = delete;

    /// Guest memory for one request of a queue, or nothing while none may be touched.
    std::optional<memory_access> access() { return memory_.access(); }
    phase postcopy_phase() const noexcept { return phase_.load(); }

    /// What the VMM has set with SET_FEATURES and SET_PROTOCOL_FEATURES.
    std::uint64_t features() const noexcept { return features_.load(); }
    std::uint64_t protocol_features() const noexcept { return protocol_features_; }
    /// The socket that came with SET_BACKEND_REQ_FD, for requests of the backend's own; -1 when there is none.
    int backend_request_socket() const noexcept { return backend_requests_.get(); }

    /// Does what a message asks where that is the client's part, and answers on `socket`. Of an error, the VMM has been told
    /// where it had asked; the connection can't go on then, unless the error is ADVISE's: there the migration can't.
    result<handling> handle(int socket, message& m) {
        const result<handling> handled = act(socket, m);
        if (std::exchange(memory_is_new_, false) && handled && options_.on_memory) options_.on_memory();
        if (handled && *handled != handling::done) return handled;
        if (result<void> told = acknowledge(socket, m, handled.has_value()); !told && handled) return told.error();
        if (!handled) return std::move(error(handled.error()).within(name_of(m.request)));
        return handling::answered;
    }
    /// For a message that was the backend's own: tells the VMM how it went, where it asked for that.
    result<void> acknowledge(int socket, const message& m, bool success) const {
        if (!awaits_reply_of(m)) return {};
        return send_message(socket, make_acknowledgement(m.request, success), options_.patience);
    }

    /// Reads messages until the VMM closes the connection (success) or something fails. What isn't the client's goes to
    /// `device(message&)`, which returns `result<handling>`; what isn't the device's either is refused where it asks for an
    /// acknowledgement, and else is a failure. To end it from elsewhere, shut the socket down.
    template <class Device>
    result<void> run(int socket, Device device) {
        const result<void> ended = run_until_end(socket, device);
        disconnect();
        return ended;
    }

    /// The connection is at its end: whoever waits for a page is let go (and finds `memory_access::intact()` false), and nothing
    /// is mapped any more. Returns when no thread is in guest memory. The VMM may live on: in its memory this leaves no trace.
    void disconnect() noexcept {
        watch_.stop();
        if (faults_) let_go();
        memory_.change(false, [&](memory_table& table, dirty_pages& log) {
            const std::lock_guard lock(mappings_mutex_);
            table.clear();
            log = {};
            mappings_.clear();
        });
        resolver_.reset();
        faults_.reset();
        memory_.set_intact(true);
        memory_.set_logging(false);
        backend_requests_.reset();
        features_ = 0;
        protocol_features_ = 0;
        phase_ = phase::none;
    }

private:
    struct mapping {
        mapped_region mapped;
        bool watched = false;
    };

    /// Ends every wait for a page, the pages that are still to come being lost to us. Between ADVISE and END.
    void let_go() noexcept {
        memory_.set_intact(false);
        const std::lock_guard lock(mappings_mutex_);
        for (const mapping& one : mappings_)
            if (one.watched) one.mapped.abandon(*faults_);
    }

    /// Whether a message wants to be acknowledged. QEMU waits for LISTEN's in any case.
    bool awaits_reply_of(const message& m) const noexcept {
        const bool obeyed = (protocol_features_ & protocol_feature::reply_ack) != 0 || m.request == request::postcopy_listen;
        return m.needs_reply() && obeyed;
    }

    template <class Device>
    result<void> run_until_end(int socket, Device& device) {
        for (;;) {
            // Between messages, the VMM may be silent as long as it likes.
            if (result<void> ready = detail::patience({}).wait(socket, POLLIN); !ready) return ready;
            result<std::optional<message>> got = receive_message(socket, options_.patience);
            if (!got) return got.error();
            if (!*got) return {};
            message& m = **got;
            result<handling> handled = handle(socket, m);
            if (handled && *handled == handling::not_mine) {
                handled = device(m);
                if (handled && *handled == handling::not_mine) {
                    // Where the VMM can be told that, it goes on; an answer that it waits for nobody could give.
                    if (awaits_reply_of(m)) {
                        if (result<void> told = acknowledge(socket, m, false); !told) return told;
                        continue;
                    }
                    handled = error(errc::unsupported, "a request that this device knows", name_of(m.request));
                }
                if (!handled || *handled == handling::done)
                    if (result<void> told = acknowledge(socket, m, handled.has_value()); !told) return told;
            }
            if (!handled && m.request != request::postcopy_advise) return handled.error();
        }
    }

    // ---- messages ----

    result<handling> act(int socket, message& m) {
        if (m.is_reply()) return error(errc::bad_message, "a request", "a reply");
        // A table in which nothing changed QEMU acknowledges all the same, and there no message came before it.
        if (m.request == request{} && is_acknowledgement(m) && !m.payload.empty()) return acknowledged(socket, m);
        switch (m.request) {
        case request::get_features: return answer(socket, m, offered_features());
        case request::set_features: return set_features(m);
        case request::get_protocol_features: return answer(socket, m, offered_protocol_features());
        case request::set_protocol_features: return set_protocol_features(m);
        case request::set_backend_req_fd: return set_backend_requests(m);
        case request::set_log_base: return set_log(socket, m);
        case request::get_max_mem_slots: return answer(socket, m, std::uint64_t{options_.most_regions});
        case request::set_mem_table: return awaits_acknowledgement() ? acknowledged(socket, m) : set_table(socket, m);
        // The acknowledgement bears the request of the last message before it.
        case request::add_mem_reg: return is_acknowledgement(m) ? acknowledged(socket, m) : add_region(socket, m);
        case request::rem_mem_reg: return is_acknowledgement(m) ? acknowledged(socket, m) : remove_region(m);
        case request::postcopy_advise: return advise(socket, m);
        case request::postcopy_listen: return listen(m);
        case request::postcopy_end: return end(socket, m);
        default: return handling::not_mine;
        }
    }

    template <class T>
    result<handling> answer(int socket, const message& m, const T& value) const {
        if (result<void> sent = send_message(socket, make_message(m.request, value, message_flag::reply), options_.patience);
            !sent)
            return sent.error();
        return handling::answered;
    }

    std::uint64_t offered_features() const noexcept {
        return options_.features | feature::log_all | feature::protocol_features;
    }
    std::uint64_t offered_protocol_features() const noexcept {
        std::uint64_t bits = options_.protocol_features | protocol_feature::log_shmfd | protocol_feature::reply_ack
                           | protocol_feature::backend_req | protocol_feature::backend_send_fd;
        if (options_.postcopy) bits |= protocol_feature::pagefault;
        if (options_.postcopy && options_.page_notices && supports_page_notices()) bits |= protocol_feature::page_notices;
        if (options_.memory_slots) bits |= protocol_feature::configure_mem_slots;
        return bits;
    }
    static bool supports_page_notices() noexcept {
        const result<std::uint64_t> supported = userfault::supported_features();
        return supported && (*supported & notice_resolver::features) == notice_resolver::features;
    }
    bool has_page_notices() const noexcept { return (protocol_features_ & protocol_feature::page_notices) != 0; }
    static error wrong_bits(std::uint64_t offered, std::uint64_t asked) {
        return error(errc::bad_message, "features among those offered", std::to_string(asked & ~offered));
    }

    result<handling> set_features(const message& m) {
        const result<std::uint64_t> bits = m.as<std::uint64_t>();
        if (!bits) return bits.error();
        if ((*bits & ~offered_features()) != 0) return wrong_bits(offered_features(), *bits);
        // A thread that is writing guest memory now either marks it, or is done before the answer.
        memory_.change(may_touch(), [&](memory_table&, dirty_pages&) {
            memory_.set_logging((*bits & feature::log_all) != 0);
            features_ = *bits;
        });
        return handling::done;
    }
    result<handling> set_protocol_features(const message& m) {
        const result<std::uint64_t> bits = m.as<std::uint64_t>();
        if (!bits) return bits.error();
        if ((*bits & ~offered_protocol_features()) != 0) return wrong_bits(offered_protocol_features(), *bits);
        protocol_features_ = *bits;
        return handling::done;
    }
    result<handling> set_backend_requests(message& m) {
        if (m.descriptors.size() != 1)
            return error(errc::bad_message, "one descriptor", std::to_string(m.descriptors.size()));
        backend_requests_ = std::move(m.descriptors.front());
        return handling::done;
    }
    result<handling> set_log(int socket, message& m) {
        struct description {
            std::uint64_t size, offset;
        };
        const result<description> asked = m.as<description>();
        if (!asked) return asked.error();
        if (m.descriptors.size() != 1)
            return error(errc::bad_message, "one descriptor", std::to_string(m.descriptors.size()));
        result<dirty_pages> log = dirty_pages::map(asked->size, asked->offset, m.descriptors.front());
        if (!log) return log.error();
        for (const memory_table::entry& one : memory_.table().entries())
            if (one.region.guest_address + one.region.size > log->end())
                return error(errc::bad_message, "a log that has a bit for all memory", memory_table::describe(one.region));
        memory_.change(may_touch(), [&](memory_table&, dirty_pages& now) { now = std::move(*log); });
        return answer(socket, m, std::uint64_t{0});
    }

    // ---- the table ----

    /// Whether memory that is mapped now is to be watched, and its address told.
    bool is_watching() const noexcept { return phase_ == phase::listen || phase_ == phase::running; }
    bool may_touch() const noexcept { return phase_ != phase::listen; }
    /// Some regions were told, and the VMM hasn't yet said that it knows.
    bool awaits_acknowledgement() const noexcept {
        if (!is_watching()) return false;
        for (const mapping& one : mappings_)
            if (!one.watched) return true;
        return false;
    }
    bool is_acknowledgement(const message& m) const noexcept {
        return m.payload.size() <= sizeof(std::uint64_t) && is_watching();
    }

    /// Maps a region; it can be touched at once, or in postcopy when the VMM knows it.
    result<mapping> map(const memory_region& region, const unique_fd& file) const {
        result<mapped_region> mapped = mapped_region::map(region, file);
        if (!mapped) return mapped.error();
        if (result<void> ready = is_watching() ? mapped->check_whole_pages() : mapped->open_up(); !ready)
            return ready.error();
        return mapping{std::move(*mapped)};
    }
    /// What threads may look up: the regions that can be touched.
    void rebuild(memory_table& table) {
        table.clear();
        for (const mapping& one : mappings_)
            if (!is_watching() || one.watched) (void)table.add(one.mapped.region(), one.mapped.memory());
    }
    /// As the mappings would be if this one came: refused where it doesn't go with them.
    result<void> check(const std::vector<mapping>& beside, const memory_region& region) const {
        memory_table trial(options_.most_regions);
        for (const mapping& one : beside)
            if (result<void> added = trial.add(one.mapped.region()); !added) return added;
        return trial.check(region);
    }

    result<handling> set_table(int socket, message& m) {
        const result<std::vector<memory_region>> regions = memory_regions_of(m);
        if (!regions) return regions.error();
        if (result<memory_table> table = memory_table::from(*regions, m.descriptors.size(), options_.most_regions); !table)
            return table.error();
        std::vector<mapping> mapped;
        for (std::size_t i = 0; i < regions->size(); ++i) {
            result<mapping> one = map((*regions)[i], m.descriptors[i]);
            if (!one) return one.error();
            mapped.push_back(std::move(*one));
        }
        if (phase_ == phase::running) phase_ = phase::listen;
        // Those that go are no longer watched when they are unmapped.
        memory_.change(may_touch(), [&](memory_table& seen, dirty_pages&) {
            const std::lock_guard lock(mappings_mutex_);
            mappings_ = std::move(mapped);
            rebuild(seen);
        });
        memory_is_new_ = may_touch();
        if (!is_watching()) return handling::done;
        std::vector<memory_region> told = *regions;
        for (std::size_t i = 0; i < told.size() && !has_page_notices(); ++i)
            told[i].user_address = mappings_[i].mapped.address();
        if (result<void> sent = send_message(socket, make_memory_table(told, {}, message_flag::reply), options_.patience); !sent)
            return sent.error();
        return handling::answered;
    }
    result<handling> add_region(int socket, message& m) {
        const result<memory_region> region = memory_region_of(m);
        if (!region) return region.error();
        if (m.descriptors.size() != 1)
            return error(errc::bad_message, "one descriptor", std::to_string(m.descriptors.size()));
        if (is_watching() && has_page_notices())
            return error(errc::unsupported, "a table of all regions with page notices", "one more region");
        if (result<void> fits = check(mappings_, *region); !fits) return fits.error();
        result<mapping> one = map(*region, m.descriptors.front());
        if (!one) return one.error();
        memory_.change(may_touch(), [&](memory_table& seen, dirty_pages&) {
            const std::lock_guard lock(mappings_mutex_);
            mappings_.push_back(std::move(*one));
            rebuild(seen);
        });
        memory_is_new_ = !is_watching();
        if (!is_watching()) return handling::done;
        memory_region told = *region;
        told.user_address = mappings_.back().mapped.address();
        if (result<void> sent = send_message(
                socket, make_memory_region(m.request, told, {}, message_flag::reply), options_.patience);
            !sent)
            return sent.error();
        return handling::answered;
    }
    result<handling> remove_region(message& m) {
        const result<memory_region> region = memory_region_of(m);
        if (!region) return region.error();
        m.descriptors.clear(); // some send one; it has no use
        memory_table all(options_.most_regions);
        for (const mapping& one : mappings_)
            (void)all.add(one.mapped.region());
        const result<std::size_t> found = all.find(*region);
        if (!found) return found.error();
        memory_.change(may_touch(), [&](memory_table& seen, dirty_pages&) {
            const std::lock_guard lock(mappings_mutex_);
            mappings_.erase(mappings_.begin() + static_cast<std::ptrdiff_t>(*found));
            rebuild(seen);
        });
        return handling::done;
    }

    // ---- postcopy ----

    error wrong_phase(std::string expected) const {
        return error(errc::bad_message, std::move(expected), std::string(to_string(phase_)));
    }

    result<handling> advise(int socket, const message& m) {
        result<unique_fd> descriptor = open_faults(m);
        // The VMM waits for an answer; one without a descriptor tells it that there is no postcopy.
        message reply = make_request(m.request, message_flag::reply);
        if (descriptor) {
            reply.descriptors.push_back(std::move(*descriptor));
            phase_ = phase::advise;
        }
        if (result<void> sent = send_message(socket, reply, options_.patience); !sent) return sent.error();
        if (!descriptor) return descriptor.error();
        return handling::answered;
    }
    /// A userfaultfd for us, and its twin for the VMM.
    result<unique_fd> open_faults(const message& m) {
        if (result<void> fits = m.no_payload(); !fits) return fits.error();
        if (!options_.postcopy) return error(errc::unsupported, "a backend with postcopy", "client_options::postcopy = false");
        if (is_watching()) return wrong_phase("phase none");
        const result<std::uint64_t> supported = userfault::supported_features();
        if (!supported) return vmstate::detail::why_no_userfault(supported.error());
        if ((*supported & userfault_feature::missing_shmem) == 0)
            return error(errc::unsupported, "Linux 4.11", "a kernel without UFFD_FEATURE_MISSING_SHMEM");
        result<userfault> opened = userfault::open(options_.faults,
            *supported & (userfault_feature::missing_shmem | userfault_feature::missing_hugetlbfs |
                             (has_page_notices() ? notice_resolver::features : 0)));
        if (!opened) return vmstate::detail::why_no_userfault(opened.error());
        resolver_.reset();
        if (has_page_notices()) {
            int ends[2];
            if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) return userfault::failure("socketpair");
            faults_ = std::move(*opened);
            resolver_.emplace(*faults_, unique_fd(ends[0]));
            return unique_fd(ends[1]);
        }
        unique_fd twin(::fcntl(opened->get(), F_DUPFD_CLOEXEC, 0));
        if (!twin) return userfault::failure("dup");
        faults_ = std::move(*opened);
        return twin;
    }
    result<handling> listen(const message& m) {
        if (result<void> fits = m.no_payload(); !fits) return fits.error();
        if (phase_ != phase::advise) return wrong_phase("phase advise");
        // The VMM hasn't been told where these are, so it could serve no fault in them.
        if (!mappings_.empty())
            return error(errc::bad_message, "the memory table after POSTCOPY_LISTEN", "one from before");
        memory_.change(false, [&](memory_table&, dirty_pages&) { phase_ = phase::listen; });
        return handling::done;
    }
    /// The VMM knows where the regions are and sees to their faults from now on.
    result<handling> acknowledged(int socket, const message& m) {
        if (!m.payload.empty()) {
            const result<std::uint64_t> value = m.as<std::uint64_t>();
            if (!value) return value.error();
            if (*value != 0) return error(errc::bad_message, "an acknowledgement of the table", std::to_string(*value));
        }
        if (phase_ == phase::running && !awaits_acknowledgement()) return handling::answered; // of nothing that is new
        // From here on threads wait for pages, and we may have to wait for them where we don't read what the VMM says.
        if (result<void> started = watch_.start(socket, [this] { let_go(); }); !started) return started.error();
        if (resolver_) {
            std::vector<notice_resolver::region> regions;
            for (const mapping& one : mappings_)
                regions.push_back({one.mapped.memory(), static_cast<std::size_t>(one.mapped.page_size())});
            if (result<void> started = resolver_->start(std::move(regions)); !started) return started.error();
        }
        if (result<void> watched = watch_mappings(); !watched) return watched.error();
        phase_ = phase::running;
        memory_.change(true, [&](memory_table& seen, dirty_pages&) { rebuild(seen); });
        memory_is_new_ = true;
        // Nothing answers it: the VMM waits for no more.
        return handling::answered;
    }
    result<void> watch_mappings() {
        const std::lock_guard lock(mappings_mutex_);
        for (mapping& one : mappings_) {
            if (one.watched) continue;
            const std::uint64_t mode = resolver_ ? notice_resolver::register_mode : UFFDIO_REGISTER_MODE_MISSING;
            if (result<void> watched = one.mapped.watch(*faults_, mode); !watched) return watched;
            one.watched = true;
        }
        return {};
    }
    result<void> unwatch_mappings() {
        const std::lock_guard lock(mappings_mutex_);
        for (mapping& one : mappings_)
            if (std::exchange(one.watched, false))
                if (result<void> ended = one.mapped.unwatch(*faults_); !ended) return ended;
        return {};
    }
    result<handling> end(int socket, const message& m) {
        if (result<void> fits = m.no_payload(); !fits) return fits.error();
        if (phase_ == phase::none) return wrong_phase("phase advise, listen or running");
        if (awaits_acknowledgement()) return wrong_phase("an acknowledgement of the table before POSTCOPY_END");
        watch_.stop();
        if (result<void> ended = unwatch_mappings(); !ended) return ended.error();
        resolver_.reset();
        faults_.reset();
        phase_ = phase::none;
        memory_.change(true, [&](memory_table& seen, dirty_pages&) { rebuild(seen); });
        memory_is_new_ = true;
        return answer(socket, m, std::uint64_t{0});
    }

    const client_options options_;
    guest_memory memory_;
    bool memory_is_new_ = false;
    // Changes on the thread of the messages alone, which needs the mutex only for that.
    std::mutex mappings_mutex_;     // guards this against let_go
    std::vector<mapping> mappings_; // all of them, the table's and those that wait for an acknowledgement
    hangup_watch watch_;            // while memory is watched
    std::optional<userfault> faults_;
    std::optional<notice_resolver> resolver_; // with page notices, from ADVISE on
    unique_fd backend_requests_;
    std::uint64_t protocol_features_ = 0;
    std::atomic<std::uint64_t> features_ = 0;
    std::atomic<phase> phase_ = phase::none;
};

} // namespace vmstate::vhost_user
