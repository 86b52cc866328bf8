// SPDX-License-Identifier: BSL-1.0
//
// Somebody beside the guest who uses its memory while it comes: what a destination tells them in postcopy. Depends on
// fault_thread.hpp and machine/.
#pragma once

#include <cstdint>

#include <vmstate/machine/ram_section.hpp>
#include <vmstate/postcopy/fault_thread.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// `advise`, `listen`, `end`, in this order and on one thread; `listen` may be left out. Those after `advise` are never
/// called without it.
class postcopy_observer {
public:
    postcopy_observer() = default;
    postcopy_observer(const postcopy_observer&) = delete;
    postcopy_observer& operator=(const postcopy_observer&) = delete;
    virtual ~postcopy_observer() = default;

    /// POSTCOPY_ADVISE: the source may go on in postcopy. An error ends the migration while its guest is still there.
    virtual result<void> advise(const ram_section& ram) = 0;
    /// POSTCOPY_LISTEN: from here on until `end` `faults` hears of others' faults, and `placed` is called. An error ends the
    /// migration, at which the guest may be lost.
    virtual result<void> listen(fault_thread& faults) = 0;
    /// A host page has come and is in memory: whoever waits for it in a mapping of their own has to be woken. On any thread,
    /// and on several at once.
    virtual void placed(ram_block& block, std::uint64_t offset, std::uint64_t size) noexcept = 0;
    /// Nothing comes any more. `complete`: every page is there; otherwise the migration has failed, and what is missing never
    /// comes. The fault thread is still there, and isn't afterwards.
    virtual void end(bool complete) noexcept = 0;
};

} // namespace vmstate
