// SPDX-License-Identifier: BSL-1.0
// A machine small enough to migrate hundreds of times in a test: memory, one device, and a thread for a guest that keeps
// writing both. Depends on the library and Catch2.
#pragma once

#include <sys/socket.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include <vmstate/describe.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/stream/socket_channel.hpp>

#include <support/catch.hpp>

namespace vmstate::tests {

using namespace std::chrono_literals;

inline constexpr std::size_t page = 4096;

/// A device that the guest keeps changing.
struct counter_card {
    std::uint64_t writes = 0;
    std::uint32_t control = 0;
};
inline constexpr auto vmstate_counter_card = describe<counter_card>(
    {.name = "counter-card"}, field<&counter_card::writes>, field<&counter_card::control>);

struct small_options {
    std::size_t written_share = 8; ///< of how many pages the guest writes one
    machine_options machine{.name = "small"};
    std::string block = "ram";
};

/// Memory, a device, and a thread that writes both. Each page begins with how often it was written and ends with the
/// same: a torn page shows.
class small_machine {
public:
    explicit small_machine(std::size_t pages, const small_options& options = {})
        : state(options.machine)
        , memory_(pages * page)
        , written_(pages / options.written_share)
        , log_(pages * page, options.machine.guest_page_size()) {
        state.add_device<vmstate_counter_card>(card);
        state.add_ram(options.block, std::span<std::byte>(memory_));
        control.stop = [this]() -> result<void> {
            stop();
            ++stops;
            return {};
        };
        control.start = [this]() -> result<void> {
            start();
            ++starts;
            return {};
        };
        control.dirty_logs.emplace(options.block, log_);
    }
    ~small_machine() { stop(); }

    void start() {
        if (runs_.exchange(true)) return;
        vcpu_ = std::thread([this] {
            while (runs_.load()) {
                write_page(next_);
                next_ = (next_ * 5 + 1) % written_;
                if (pause_ != 0us) std::this_thread::sleep_for(pause_);
            }
        });
    }
    void stop() {
        runs_.store(false);
        if (vcpu_.joinable()) vcpu_.join();
    }
    bool runs() const { return runs_.load(); }

    void write_page(std::size_t index) {
        count_up(memory_.data() + index * page);
        log_.mark(index * page, page);
        ++card.writes;
    }

    std::vector<std::byte>& memory() { return memory_; }
    const std::vector<std::byte>& memory() const { return memory_; }
    /// Between two writes.
    void slow_down(std::chrono::microseconds pause) { pause_ = pause; }

    machine state;
    migration::guest control;
    counter_card card;
    std::atomic<int> stops = 0;
    std::atomic<int> starts = 0;

private:
    // The migration thread reads what is being written, and reads it again when the log says so: a race by design, as with
    // a guest's vCPU, of which a sanitizer sees nothing either.
    [[gnu::no_sanitize_thread, gnu::noinline]] static void count_up(std::byte* at) {
        auto* const first = reinterpret_cast<volatile std::uint64_t*>(at);
        auto* const last = reinterpret_cast<volatile std::uint64_t*>(at + page - sizeof(std::uint64_t));
        const std::uint64_t times = *first + 1;
        *first = times;
        *last = times;
    }

    std::vector<std::byte> memory_;
    std::size_t written_;
    std::size_t next_ = 0;
    std::chrono::microseconds pause_{20};
    marked_log log_;
    std::atomic<bool> runs_ = false;
    std::thread vcpu_;
};

/// Two ends of a socket.
struct channel_pair {
    std::unique_ptr<duplex_channel> one;
    std::unique_ptr<duplex_channel> other;
};
inline channel_pair make_pair() {
    int ends[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
    return {std::make_unique<socket_channel>(unique_fd(ends[0])), std::make_unique<socket_channel>(unique_fd(ends[1]))};
}

inline void fill(small_machine& from) {
    // A third stays zero, a third is full of something, a third is written while it goes over.
    for (std::size_t i = from.memory().size() / 3; i < from.memory().size() * 2 / 3; ++i)
        from.memory()[i] = static_cast<std::byte>(i * 7 + (i >> 12));
}

} // namespace vmstate::tests
