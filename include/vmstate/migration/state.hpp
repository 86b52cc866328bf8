// SPDX-License-Identifier: BSL-1.0
//
// The states of a migration under QEMU's names, and which may follow which. Depends on the standard library alone.
#pragma once

#include <string_view>

namespace vmstate::migration {

/// Where a migration is (QEMU: MigrationStatus, qapi/migration.json).
enum class state {
    none,
    setup,          ///< connecting, sending the list of RAM blocks
    active,         ///< memory goes over while the guest runs
    pre_switchover, ///< the guest stands still and the source waits to be told to go on
    device,         ///< the guest stands still; the rest of the memory and the devices go over
    postcopy_active, ///< the guest runs at the destination, and the rest of its memory goes after it
    postcopy_paused, ///< the connection broke meanwhile; each side keeps what it has until `recover`
    postcopy_recover, ///< a new connection finds out what is still missing
    completed,
    failed,
    cancelling,
    cancelled,
};

/// QEMU's name, as `query-migrate` says it.
constexpr std::string_view to_string(state at) noexcept {
    switch (at) {
    case state::none: return "none";
    case state::setup: return "setup";
    case state::active: return "active";
    case state::pre_switchover: return "pre-switchover";
    case state::device: return "device";
    case state::postcopy_active: return "postcopy-active";
    case state::postcopy_paused: return "postcopy-paused";
    case state::postcopy_recover: return "postcopy-recover";
    case state::completed: return "completed";
    case state::failed: return "failed";
    case state::cancelling: return "cancelling";
    case state::cancelled: return "cancelled";
    }
    return "?";
}

/// Nothing follows it but a migration of its own.
constexpr bool is_final(state at) noexcept {
    return at == state::completed || at == state::failed || at == state::cancelled;
}

/// The guest runs at the destination, or may: only the two sides together have all of it, and there is no way back.
constexpr bool is_postcopy(state at) noexcept {
    return at == state::postcopy_active || at == state::postcopy_paused || at == state::postcopy_recover;
}

/// Whether `to` may follow `from`. A source goes through all of the active states in order; a destination, which isn't
/// told when the source's guest stops, from active to its end.
constexpr bool may_follow(state from, state to) noexcept {
    switch (to) {
    case state::none: return false;
    case state::setup: return from == state::none || is_final(from);
    case state::active: return from == state::setup;
    case state::pre_switchover: return from == state::active;
    case state::device: return from == state::active || from == state::pre_switchover;
    case state::postcopy_active:
        return from == state::active || from == state::device || from == state::postcopy_recover;
    case state::postcopy_paused: return from == state::postcopy_active || from == state::postcopy_recover;
    case state::postcopy_recover: return from == state::postcopy_paused;
    // From cancelling where the destination had loaded everything before it could be told.
    case state::completed:
        return from == state::active || from == state::device || from == state::postcopy_active || from == state::cancelling;
    case state::cancelling:
        return !is_final(from) && !is_postcopy(from) && from != state::none && from != state::cancelling;
    case state::cancelled: return from == state::cancelling;
    case state::failed: return !is_final(from) && from != state::none;
    }
    return false;
}

} // namespace vmstate::migration
