// SPDX-License-Identifier: BSL-1.0
//
// A migration from its start to its end: of the guest that leaves, and of the one that comes. Each is watched from the main
// thread, which switches to postcopy when it is time, recovers connections that break, and ends it where somebody says so.
// Depends on vm.hpp, events.hpp, report.hpp and vmstate's migration/.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>

#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/parameters.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/migration/status.hpp>
#include <vmstate/postcopy/observer.hpp>
#include <vmstate/support/result.hpp>

#include "events.hpp"
#include "report.hpp"
#include "vm.hpp"

namespace live {

/// When a guest that leaves is switched to postcopy: so long after the start, or after so many passes over its memory.
struct postcopy_start {
    std::optional<std::chrono::duration<double>> time;
    std::uint64_t passes = 0;

    /// "2s", "0.5s" or "3"; empty where it is neither.
    static std::optional<postcopy_start> parse(const std::string& text);
};

struct migration_options {
    vmstate::migration::parameters parameters;
    std::optional<postcopy_start> postcopy_after;
    std::string recover_uri; ///< empty: a connection that breaks in postcopy is the end of it
};

/// What an observer has seen that the main thread doesn't want to miss.
class news {
public:
    explicit news(const events& told) : told_(told) {}
    void hear(const vmstate::migration::status& at) {
        const bool moved = state_.exchange(at.state) != at.state;
        if ((passes_.exchange(at.ram.dirty_sync_count) != at.ram.dirty_sync_count) || moved) told_.tell();
    }

private:
    const events& told_;
    std::atomic<vmstate::migration::state> state_ = vmstate::migration::state::none;
    std::atomic<std::uint64_t> passes_ = 0;
};

class outbound {
public:
    outbound(vm& from, const migration_options& options, const events& all, report& said);

    /// Success: the guest has left. After a failure it runs here, unless it had left when the migration failed.
    vmstate::result<void> send(const std::string& uri);
    vmstate::migration::status status() const { return source_.status(); }

private:
    void follow();
    bool end();

    const migration_options& options_;
    const events& events_;
    report& report_;
    news news_; ///< before the source, whose observer has it
    unsigned interruptions_ = 0;
    vmstate::migration::source source_;
};

class inbound {
public:
    /// `others`: who shares the memory, if anybody does.
    inbound(vm& into, vmstate::postcopy_observer* others, const migration_options& options, const events& all, report& said);

    /// Listens where `uri` says, if that is a socket, and says where.
    vmstate::result<void> prepare(const std::string& uri);
    /// Success: the guest runs here, and all of its memory is here.
    vmstate::result<void> receive();
    vmstate::migration::status status() const { return destination_.status(); }

private:
    bool end();
    bool recover();

    const migration_options& options_;
    const events& events_;
    report& report_;
    std::string uri_;
    bool is_socket_ = false;
    news news_; ///< before the destination, whose observer has it
    unsigned interruptions_ = 0;
    vmstate::migration::destination destination_;
};

} // namespace live
