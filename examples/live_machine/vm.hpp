// SPDX-License-Identifier: BSL-1.0
//
// The virtual machine: a hart, RAM, a timer and a serial port, in a thread of its own; and how it is migrated. Depends
// on the other headers here and on vmstate's machine/, migration/ and ram/.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/support/result.hpp>

#include "guest_image.hpp"
#include "hart.hpp"
#include "memory.hpp"
#include "timer.hpp"
#include "uart.hpp"

namespace live {

enum class dirty_log_kind { marked, pagemap };

struct vm_options {
    std::uint64_t memory = std::uint64_t{64} << 20; ///< bytes, whole pages
    dirty_log_kind dirty_log = dirty_log_kind::marked;
    int serial = 1;                  ///< descriptor to which the serial port's characters are written; stays open
    std::function<void()> on_halt{}; ///< called by the machine's thread when its guest can't go on
};

class vm {
public:
    static constexpr std::uint32_t ram_base = 0x80000000;
    static constexpr std::uint32_t timer_base = 0x02000000;
    static constexpr std::uint32_t uart_base = 0x10000000;
    static constexpr std::uint64_t max_memory = std::uint64_t{1} << 30;

    static vmstate::result<std::unique_ptr<vm>> make(vm_options options);
    vm(const vm&) = delete;
    vm& operator=(const vm&) = delete;
    ~vm() { stop(); }

    /// Puts the guest program into RAM and the hart before it. The machine must stand still.
    void boot(const guest_parameters& parameters);

    /// Runs the guest, or has it stand still when it returns. Doing either twice is harmless.
    void start();
    void stop();
    /// Why the guest can't go on; empty while it can. Any thread may ask.
    std::string why_halted() const;

    /// What is migrated, and how it is stopped, started and watched.
    vmstate::machine& machine() { return machine_; }
    vmstate::migration::guest& guest() { return guest_; }

private:
    vm(vm_options options, memory ram);

    /// What the hart sees.
    struct bus {
        vm& self;
        bool load(std::uint32_t address, std::uint32_t size, std::uint32_t& value);
        bool store(std::uint32_t address, std::uint32_t size, std::uint32_t value);
        bool is_interrupt_pending() { return self.timer_.is_pending(); }
    };

    /// The machine's thread: owns everything of the machine while it runs.
    void run_guest();
    timer::clock::time_point next_event() const;
    bool send_serial();
    void halt_for(std::string reason);

    const vm_options options_;
    memory ram_;
    vmstate::marked_log marked_log_;
    hart_state hart_;
    timer timer_;
    uart uart_;
    vmstate::machine machine_{{.name = "live-machine"}};
    vmstate::migration::guest guest_;
    std::atomic<unsigned> throttle_percent_ = 0;

    std::mutex control_mutex_; ///< thread_
    std::thread thread_;
    mutable std::mutex wake_mutex_; ///< must_stop_, why_halted_
    std::condition_variable wake_;
    bool must_stop_ = false;
    std::string why_halted_;
};

} // namespace live
