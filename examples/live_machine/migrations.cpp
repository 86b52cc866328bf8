// SPDX-License-Identifier: BSL-1.0
#include "migrations.hpp"

#include <charconv>
#include <thread>

namespace live {

namespace {

using vmstate::migration::state;
using clock = events::clock;

/// Between two tries to recover.
constexpr auto breath = std::chrono::milliseconds(50);

bool is_socket(const std::string& uri) { return uri.starts_with("unix:") || uri.starts_with("tcp:"); }

} // namespace

std::optional<postcopy_start> postcopy_start::parse(const std::string& text) {
    const char* const begin = text.data();
    const char* const end = begin + text.size();
    postcopy_start when;
    if (text.ends_with('s')) {
        double seconds = 0;
        const auto [rest, wrong] = std::from_chars(begin, end - 1, seconds);
        if (wrong != std::errc{} || rest != end - 1 || !(seconds >= 0) || seconds > 1e6) return std::nullopt;
        when.time = std::chrono::duration<double>(seconds);
        return when;
    }
    const auto [rest, wrong] = std::from_chars(begin, end, when.passes);
    if (wrong != std::errc{} || rest != end) return std::nullopt;
    return when;
}

// ---- the guest leaves -------------------------------------------------------------------------------------------

outbound::outbound(vm& from, const migration_options& options, const events& all, report& said)
    : options_(options)
    , events_(all)
    , report_(said)
    , news_(all)
    , source_(from.machine(), from.guest(), options.parameters) {
    source_.observe([this](const vmstate::migration::status& at) {
        report_.leaving(at);
        news_.hear(at);
        // Here, where the migration waits for it: a pass over few pages is over before anybody else hears of it. The pass of
        // that number, which has begun, is the one after those.
        if (at.state == state::active && options_.postcopy_after && !options_.postcopy_after->time &&
            at.ram.dirty_sync_count > options_.postcopy_after->passes)
            static_cast<void>(source_.start_postcopy());
    });
}

vmstate::result<void> outbound::send(const std::string& uri) {
    if (vmstate::result<void> started = source_.start(uri); !started) return started;
    follow();
    return source_.wait();
}

void outbound::follow() {
    std::optional<clock::time_point> switch_at;
    if (options_.postcopy_after && options_.postcopy_after->time)
        switch_at = clock::now() + std::chrono::duration_cast<clock::duration>(*options_.postcopy_after->time);
    // After passes the observer does it; after none there is nothing to wait for.
    bool switched = !options_.postcopy_after || (!switch_at && options_.postcopy_after->passes != 0);
    clock::time_point next_try{};
    for (;;) {
        const vmstate::migration::status at = source_.status();
        if (is_final(at.state)) return;
        std::optional<clock::time_point> wake;
        if (!switched) {
            if (!switch_at || clock::now() >= *switch_at) switched = source_.start_postcopy().has_value();
            else wake = switch_at;
        }
        if (at.state == state::postcopy_paused) {
            if (interruptions_ > 1) {
                static_cast<void>(source_.give_up());
            } else if (options_.recover_uri.empty()) {
                report_.no_recovery();
                static_cast<void>(source_.give_up());
            } else if (clock::now() >= next_try) {
                // Whether it comes to anything its state says: the destination may not listen yet.
                static_cast<void>(source_.recover(options_.recover_uri));
                next_try = clock::now() + breath;
            }
            wake = next_try;
        }
        if (events_.wait(wake) == events::what::interrupted && end()) break;
    }
}

/// Whether it is over. A guest that has left can't be taken back: that is said first, and the second time it is given up.
bool outbound::end() {
    if (!is_postcopy(source_.status().state)) {
        source_.cancel();
        return !is_postcopy(source_.status().state);
    }
    events_.take_interruption();
    if (++interruptions_ == 1) {
        report_.no_way_back();
    } else {
        static_cast<void>(source_.pause());
        static_cast<void>(source_.give_up());
    }
    return false;
}

// ---- the guest comes --------------------------------------------------------------------------------------------

inbound::inbound(
    vm& into, vmstate::postcopy_observer* others, const migration_options& options, const events& all, report& said)
    : options_(options)
    , events_(all)
    , report_(said)
    , news_(all)
    , destination_(into.machine(), into.guest(), options.parameters) {
    if (others != nullptr) destination_.add_postcopy_observer(*others);
    destination_.observe([this](const vmstate::migration::status& at) {
        report_.coming(at);
        news_.hear(at);
    });
}

vmstate::result<void> inbound::prepare(const std::string& uri) {
    uri_ = uri;
    is_socket_ = is_socket(uri);
    if (!is_socket_) return {};
    if (vmstate::result<void> listening = destination_.listen(uri); !listening) return listening;
    report_.waiting(destination_.uri());
    return {};
}

vmstate::result<void> inbound::receive() {
    vmstate::result<void> arrived;
    std::atomic<bool> is_over = false;
    std::thread receiving([&] {
        arrived = is_socket_ ? destination_.run() : destination_.run(uri_);
        is_over.store(true);
        events_.tell();
    });
    while (!is_over.load()) {
        std::optional<clock::time_point> wake;
        if (destination_.status().state == state::postcopy_paused && !recover()) wake = clock::now() + breath;
        if (events_.wait(wake) == events::what::interrupted && end()) break;
    }
    receiving.join();
    return arrived;
}

/// Whether the source is waited for.
bool inbound::recover() {
    if (options_.recover_uri.empty()) {
        report_.no_recovery();
        destination_.give_up();
        return true;
    }
    const vmstate::result<void> listening = destination_.recover(options_.recover_uri);
    if (listening) report_.waiting(destination_.uri());
    else if (listening.error() != vmstate::errc::invalid_argument) report_.cannot_recover(options_.recover_uri, listening.error());
    return listening.has_value();
}

bool inbound::end() {
    if (!is_postcopy(destination_.status().state)) {
        destination_.cancel();
        return !is_postcopy(destination_.status().state);
    }
    events_.take_interruption();
    if (++interruptions_ == 1) report_.no_way_back();
    else destination_.give_up();
    return false;
}

} // namespace live
