// SPDX-License-Identifier: BSL-1.0
//
// The states that postcopy goes through at a destination, and which may follow which (QEMU: PostcopyState,
// migration/postcopy-ram.h). Depends on support/.
#pragma once

#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include <vmstate/support/result.hpp>

namespace vmstate {

enum class postcopy_state {
    none,
    advise,  ///< POSTCOPY_ADVISE: the source may go on in postcopy; memory and kernel were found fit for it
    discard, ///< POSTCOPY_RAM_DISCARD: pages that have to come again are gone
    listen,  ///< POSTCOPY_LISTEN: missing pages are asked for
    running, ///< POSTCOPY_RUN: the guest runs here
    end,     ///< every page is there
    paused,  ///< the connection broke since; the guest stands still where it touches a missing page
    recover, ///< a new connection finds out what is still missing
};

constexpr std::string_view to_string(postcopy_state at) noexcept {
    switch (at) {
    case postcopy_state::none: return "none";
    case postcopy_state::advise: return "advise";
    case postcopy_state::discard: return "discard";
    case postcopy_state::listen: return "listen";
    case postcopy_state::running: return "running";
    case postcopy_state::end: return "end";
    case postcopy_state::paused: return "paused";
    case postcopy_state::recover: return "recover";
    }
    return "?";
}

/// Whether `to` may follow `from`:
///
///     none -> advise -> [discard ->] listen -> running -> end
///                                              running -> paused -> recover -> running
///                                                         paused <- recover
///
/// Where RUN comes behind the package, the connection may break before it, and a recovery bring it: then it is
/// listen -> paused -> recover -> listen. A second DISCARD is no step: the state stays.
constexpr bool may_follow(postcopy_state from, postcopy_state to) noexcept {
    switch (to) {
    case postcopy_state::none: return false;
    case postcopy_state::advise: return from == postcopy_state::none;
    case postcopy_state::discard: return from == postcopy_state::advise;
    case postcopy_state::listen:
        return from == postcopy_state::advise || from == postcopy_state::discard || from == postcopy_state::recover;
    case postcopy_state::running: return from == postcopy_state::listen || from == postcopy_state::recover;
    case postcopy_state::end: return from == postcopy_state::running;
    case postcopy_state::paused:
        return from == postcopy_state::listen || from == postcopy_state::running || from == postcopy_state::recover;
    case postcopy_state::recover: return from == postcopy_state::paused;
    }
    return false;
}

/// What may follow, for a message: "discard or listen".
inline std::string steps_after(postcopy_state from) {
    std::string steps;
    for (int i = 0; i <= static_cast<int>(postcopy_state::recover); ++i) {
        const auto to = static_cast<postcopy_state>(i);
        if (!may_follow(from, to)) continue;
        if (!steps.empty()) steps += " or ";
        steps += to_string(to);
    }
    return steps.empty() ? "nothing" : steps;
}

/// Where a destination is; any thread may ask, and go on.
class postcopy_progress {
public:
    postcopy_state now() const {
        const std::lock_guard lock(state_mutex_);
        return state_;
    }
    /// Goes on to `next`. `errc::bad_command` where it may not follow: then the state stays as it is.
    result<void> enter(postcopy_state next) {
        const std::lock_guard lock(state_mutex_);
        if (!may_follow(state_, next)) return refused(state_, next);
        state_ = next;
        return {};
    }
    /// The same, and harmless where `next` is the state already: for commands that come more than once
    /// (POSTCOPY_RAM_DISCARD). The state before.
    result<postcopy_state> enter_or_stay(postcopy_state next) {
        const std::lock_guard lock(state_mutex_);
        if (state_ != next && !may_follow(state_, next)) return refused(state_, next);
        return std::exchange(state_, next);
    }

private:
    static error refused(postcopy_state from, postcopy_state next) {
        return error(errc::bad_command,
            "a step after " + std::string(to_string(from)) + ": " + steps_after(from), std::string(to_string(next)))
            .within("postcopy");
    }

    mutable std::mutex state_mutex_;
    postcopy_state state_ = postcopy_state::none;
};

} // namespace vmstate
