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

    /// An observer of the source: says something whenever a pass begins.
    void progress(const vmstate::migration::status& at);
    /// The summary of a guest that has left, or has come.
    void left(const vmstate::migration::status& last);
    void arrived(const vmstate::migration::status& last);

private:
    void say(const std::string& text, const boost::json::object& object) { write(json_ ? serialize(object) : text); }
    void write(std::string line);

    const bool json_;
    const bool passes_;
    std::mutex mutex_; ///< last_pass_, and the order of lines
    std::uint64_t last_pass_ = 0;
};

} // namespace live
