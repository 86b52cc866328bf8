// SPDX-License-Identifier: BSL-1.0
// globalstate: the run state that the source was in. Its table is in QEMU's migration/global_state.c, the names
// of the states in qapi/run-state.json. Depends on vmstate/describe.hpp only.
#pragma once

#include <vmstate/describe.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>

namespace pc_devices {

enum class run_state : std::uint8_t {
    debug,
    inmigrate,
    internal_error,
    io_error,
    paused,
    postmigrate,
    prelaunch,
    finish_migrate,
    restore_vm,
    running,
    save_vm,
    shutdown,
    suspended,
    watchdog,
    guest_panicked,
    colo,
};

/// The names on the wire, in the order of the enumerators.
inline constexpr std::array<std::string_view, 16> run_state_names = {
    // clang-format off
    "debug", "inmigrate", "internal-error", "io-error", "paused", "postmigrate", "prelaunch", "finish-migrate",
    "restore-vm", "running", "save-vm", "shutdown", "suspended", "watchdog", "guest-panicked", "colo",
    // clang-format on
};

struct GlobalState {
    std::uint32_t size = 0; ///< of the name with its NUL; the buffer is sent in full all the same
    std::uint8_t runstate[100] = {};
    run_state state = run_state::prelaunch;
    bool received = false;
    bool store_global_state = true; ///< machine property, off for machine types up to 2.3
};

/// The name in the buffer: up to its first NUL, or all of it.
inline std::string_view global_state_name(const GlobalState& s) {
    const auto* const end = std::find(std::begin(s.runstate), std::end(s.runstate), std::uint8_t{0});
    return {reinterpret_cast<const char*>(s.runstate), static_cast<std::size_t>(end - s.runstate)};
}

inline std::optional<run_state> run_state_named(std::string_view name) {
    const auto found = std::find(run_state_names.begin(), run_state_names.end(), name);
    if (found == run_state_names.end()) {
        return std::nullopt;
    }
    return static_cast<run_state>(found - run_state_names.begin());
}

/// Puts a state where it will be saved from.
inline void global_state_store(GlobalState& s, run_state state) {
    const std::string_view name = run_state_names[static_cast<std::size_t>(state)];
    std::fill(std::begin(s.runstate), std::end(s.runstate), std::uint8_t{0});
    std::memcpy(s.runstate, name.data(), name.size());
}

// Old machine types leave out the two states that a destination assumes by itself.
inline bool global_state_needed(const GlobalState& s) {
    const std::string_view name = global_state_name(s);
    return s.store_global_state || (name != "running" && name != "paused");
}

inline bool global_state_pre_save(GlobalState& s) {
    // Nobody loads a state without a name: where none was stored, it is the one that the machine is in.
    if (global_state_name(s).empty()) {
        global_state_store(s, s.state);
    }
    const std::size_t length = global_state_name(s).size();
    s.size = static_cast<std::uint32_t>(length + 1);
    return s.size <= std::size(s.runstate);
}

inline void global_state_pre_load(GlobalState& s) { s.received = false; }

/// Fails on a name that no run state has.
inline vmstate::result<void> global_state_post_load(GlobalState& s, int /*version_id*/) {
    s.received = true;
    const std::string_view name = global_state_name(s);
    const std::optional<run_state> state = run_state_named(name);
    if (!state) {
        return vmstate::error(vmstate::errc::out_of_range, "the name of a run state", '"' + std::string(name) + '"');
    }
    s.state = *state;
    return {};
}

// clang-format off: tables, one item a line
inline constexpr auto vmstate_globalstate = vmstate::describe<GlobalState>(
    {.name = "globalstate", .version_id = 1, .minimum_version_id = 1},
    vmstate::needed<global_state_needed>,
    vmstate::pre_save<global_state_pre_save>,
    vmstate::pre_load<global_state_pre_load>,
    vmstate::post_load<global_state_post_load>,
    vmstate::field<&GlobalState::size>,
    vmstate::field<&GlobalState::runstate>,
    vmstate::transient<&GlobalState::state, &GlobalState::received, &GlobalState::store_global_state>);
// clang-format on

} // namespace pc_devices
