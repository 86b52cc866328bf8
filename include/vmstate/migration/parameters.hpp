// SPDX-License-Identifier: BSL-1.0
//
// What can be set on a migration: QEMU's parameters and capabilities, under their names. Depends on
// ram/multifd_compression.hpp.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include <vmstate/ram/multifd_compression.hpp>

namespace vmstate::migration {

/// QEMU: migrate-set-parameters and migrate-set-capabilities. Those marked so may be changed while a migration runs.
struct parameters {
    /// The longest that the guest should stand still (`downtime-limit`); may change. What is left is sent in one go as
    /// soon as it is expected to fit into this.
    std::chrono::milliseconds downtime_limit{300};
    /// Bytes per second on the channel, 0 for no limit (`max-bandwidth`); may change. Not kept once the guest stands
    /// still.
    std::uint64_t max_bandwidth = 0;
    /// Bytes per second to count on once the guest stands still, 0 for what was measured while it ran
    /// (`avail-switchover-bandwidth`): with `max_bandwidth` that is less than the channel can do.
    std::uint64_t avail_switchover_bandwidth = 0;
    /// The destination's answers come back over the same channel (`return-path`): then the source knows, rather than
    /// hopes, that all was loaded. A channel without a way back is migrated over without it.
    bool return_path = true;
    /// The guest isn't stopped before the destination has said that it is ready (`switchover-ack`, QEMU 8.1), on both
    /// sides; needs the return path.
    bool switchover_ack = false;
    /// The source stops in `pre-switchover` until `source::resume()` (`pause-before-switchover`).
    bool pause_before_switchover = false;
    /// Slows the guest down where its writes outrun the channel (`auto-converge`): see `guest::throttle`.
    bool auto_converge = false;
    /// The first slowdown and the steps by which it grows, in percent of the guest's time (`cpu-throttle-initial`,
    /// `cpu-throttle-increment`), each 1 to 99, and the most (`max-cpu-throttle`), not less than the first and at most 99.
    unsigned cpu_throttle_initial = 20;
    unsigned cpu_throttle_increment = 10;
    unsigned max_cpu_throttle = 99;
    /// Pages that are sent again go as their difference from before, where that is smaller (`xbzrle`), with a cache of so
    /// many bytes, a power of two (`xbzrle-cache-size`): for channels that are slower than a comparison.
    bool xbzrle = false;
    std::uint64_t xbzrle_cache_size = std::uint64_t{64} << 20;
    /// Pages go over this many channels of their own, by a thread each (`multifd`, `multifd-channels`, 1 to 255), on both
    /// sides alike. Needs a connector at the source and an acceptor at the destination, as `tcp:` and `unix:` have them;
    /// not with `xbzrle`.
    bool multifd = false;
    unsigned multifd_channels = 2;
    /// At the source: the uuid that the channels' first packets carry, which a QEMU compares with its own `-uuid`; without it
    /// the machine's, or zeros.
    std::optional<std::array<std::uint8_t, 16>> multifd_uuid = {};
    /// On both sides alike (`multifd-compression`): `multifd_zlib()` or `multifd_zstd()`, each from a header of its own.
    vmstate::multifd_compression multifd_compression = {};
    /// At the source: what a QEMU up to 8.0 at the other end expects, and a newer one with a machine type of those
    /// (QEMU's property `multifd-flush-after-each-section`). A destination of ours finds out by itself.
    bool multifd_flush_after_each_section = false;
    /// At the destination: asks for huge pages behind memory of small ones before it is filled (madvise's MADV_HUGEPAGE, as
    /// QEMU does for its RAM). What the first touch of small pages costs may be half of the transfer.
    bool advise_huge_pages = true;
    /// The migration may go on in postcopy, when `source::start_postcopy()` says so (`postcopy-ram`); on both sides alike.
    /// Needs a return path, and at the destination memory and a kernel that are fit for it.
    bool postcopy_ram = false;
    /// Pages that the guest waits for come over a channel of their own (`postcopy-preempt`, QEMU 7.1); on both sides alike,
    /// and with `postcopy_ram` alone. Needs a connector and an acceptor, as multifd does.
    bool postcopy_preempt = false;
    /// Bytes per second in postcopy for the pages that nobody waits for, 0 for no limit (`max-postcopy-bandwidth`); may
    /// change.
    std::uint64_t max_postcopy_bandwidth = 0;
    /// At the source: pages that have been sent in postcopy are given back to the system (`release-ram`), once the
    /// destination is known to have them: those on the main channel, of blocks whose memory begins at a host page.
    bool release_ram = false;
    /// The longest that a peer may take nothing and send nothing before it counts as gone; 0 waits forever. QEMU leaves
    /// this to TCP.
    std::chrono::milliseconds peer_timeout{60'000};
};

/// Whether they go together. `several_channels`: the peer can be reached more than once.
inline result<void> check(const parameters& settings, bool several_channels) {
    const auto refuse = [](std::string expected, std::string found) {
        return error(errc::invalid_argument, std::move(expected), std::move(found));
    };
    if (settings.cpu_throttle_initial < 1 || settings.cpu_throttle_initial > 99)
        return refuse("cpu_throttle_initial from 1 to 99", std::to_string(settings.cpu_throttle_initial));
    if (settings.cpu_throttle_increment < 1 || settings.cpu_throttle_increment > 99)
        return refuse("cpu_throttle_increment from 1 to 99", std::to_string(settings.cpu_throttle_increment));
    if (settings.max_cpu_throttle < settings.cpu_throttle_initial || settings.max_cpu_throttle > 99)
        return refuse("max_cpu_throttle from cpu_throttle_initial to 99", std::to_string(settings.max_cpu_throttle));
    if (settings.multifd) {
        if (settings.xbzrle) return refuse("multifd or xbzrle", "both");
        if (settings.postcopy_ram) return refuse("multifd or postcopy_ram", "both");
        if (settings.multifd_channels < 1 || settings.multifd_channels > 255)
            return refuse("1 to 255 multifd channels", std::to_string(settings.multifd_channels));
        if (!several_channels) return refuse("tcp:, unix:, or a way to have more channels for multifd", "one channel");
    }
    if (settings.postcopy_ram && !settings.return_path) return refuse("return_path with postcopy_ram", "none");
    if (settings.postcopy_preempt) {
        if (!settings.postcopy_ram) return refuse("postcopy_ram with postcopy_preempt", "none");
        if (!several_channels) return refuse("tcp:, unix:, or a way to have another channel for postcopy_preempt", "one channel");
    }
    return {};
}

} // namespace vmstate::migration
