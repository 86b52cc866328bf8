// SPDX-License-Identifier: BSL-1.0
//
// What live_machine says of a migration on stderr: lines to read, or one JSON object a line. Depends on vmstate's
// migration/ and Boost.JSON.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>

#include <boost/json.hpp>

#include <vmstate/migration/status.hpp>
#include <vmstate/support/error.hpp>

namespace live {

class report {
public:
    /// Lines about single passes are for terminals, and for JSON.
    report(bool json, bool is_terminal) : json_(json), passes_(json || is_terminal) {}

    /// `why` it is this one; may be empty.
    void processor(const std::string& name, const std::string& why) {
        say("processor: " + name + (why.empty() ? "" : " (" + why + ")"),
            {{"event", "processor"}, {"cpu", name}, {"why", why}});
    }
    void waiting(const std::string& uri) { say("waiting at " + uri, {{"event", "waiting"}, {"uri", uri}}); }
    void running() { say("the guest runs here", {{"event", "running"}}); }
    void failed(const std::string& what, const std::string& why) {
        say(what + ": " + why, {{"event", "failed"}, {"what", what}, {"error", why}});
    }
    void guest_runs_on() { say("the guest runs on here", {{"event", "running"}}); }
    void halted(const std::string& why) { say("the guest has halted: " + why, {{"event", "halted"}, {"error", why}}); }

    /// Observers of the source and of the destination: something is said whenever a pass begins, and of postcopy's states.
    void leaving(const vmstate::migration::status& at);
    void coming(const vmstate::migration::status& at);
    void no_way_back() {
        say("in postcopy there is no way back; another signal gives the guest up", {{"event", "interrupted"}});
    }
    void no_recovery() { say("without --recover on both sides that is the end of the guest", {{"event", "given-up"}}); }
    void cannot_recover(const std::string& what, const vmstate::error& why);
    /// The summary of a guest that has left, or has come.
    void left(const vmstate::migration::status& last);
    void arrived(const vmstate::migration::status& last);

private:
    void say(const std::string& text, const boost::json::object& object) { write(json_ ? serialize(object) : text); }
    void write(std::string line);
    void pass(const vmstate::migration::status& at);
    void postcopy(const vmstate::migration::status& at, const std::string& begun);

    const bool json_;
    const bool passes_;
    std::mutex mutex_; ///< the next three, and the order of lines
    std::uint64_t last_pass_ = 0;
    vmstate::migration::state last_state_ = vmstate::migration::state::none;
    std::string last_trouble_; ///< not said again and again
};

} // namespace live
