// SPDX-License-Identifier: BSL-1.0
//
// The virtual machine, whatever its processor: RAM, the time and a serial port, in a thread of its own; and how it is
// migrated. riscv_vm.hpp and kvm_vm.hpp add the processor and what is around it. Depends on the other headers here and
// on vmstate's machine/, migration/ and ram/.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>

#include <vmstate/machine/machine.hpp>
#include <vmstate/migration/guest.hpp>
#include <vmstate/support/result.hpp>

#include "guest_clock.hpp"
#include "guest_image.hpp"
#include "memory.hpp"
#include "uart.hpp"

namespace live {

enum class dirty_log_kind { marked, pagemap, kvm_bitmap, kvm_ring };

struct vm_options {
    std::uint64_t memory = std::uint64_t{64} << 20; ///< bytes, whole pages
    bool huge_pages = false;                         ///< of 2 MiB, behind the memory
    dirty_log_kind dirty_log = dirty_log_kind::marked;
    int serial = 1;                  ///< descriptor to which the serial port's characters are written; stays open
    std::function<void()> on_halt{}; ///< called by the machine's thread when its guest can't go on
};

class vm {
public:
    static constexpr std::uint64_t max_memory = std::uint64_t{1} << 30;

    vm(const vm&) = delete;
    vm& operator=(const vm&) = delete;
    virtual ~vm() = default;

    /// Puts the guest program into RAM and the processor, which is as it was made, before it. The machine must stand
    /// still.
    virtual vmstate::result<void> boot(const guest_parameters& parameters) = 0;
    /// Where RAM begins for the guest.
    std::uint32_t ram_base() const { return ram_base_; }

    /// Runs the guest, or has it stand still when it returns. Doing either twice is harmless. A guest that has halted is
    /// not run on, which is an error; it stands still already.
    vmstate::result<void> start();
    void stop();
    bool is_running() const;
    /// Why the guest can't go on; empty while it can, and after another `boot`. Any thread may ask.
    std::string why_halted() const;
    /// How many lines have left the serial port of this machine. Any thread may ask.
    std::uint64_t lines_printed() const { return lines_printed_.load(); }

    /// What is migrated, and how it is stopped, started and watched.
    vmstate::machine& machine() { return machine_; }
    vmstate::migration::guest& guest() { return guest_; }

protected:
    /// `name` goes into the stream: a machine with another one doesn't take it.
    vm(vm_options options, memory ram, std::string name, std::uint32_t ram_base);

    static vmstate::result<memory> make_memory(const vm_options& options);
    void put_program(std::span<const std::byte> image, const guest_parameters& parameters);

    /// The machine's thread: owns everything of the machine while it runs. It returns when `must_stop`, or after
    /// `halt_for`. A derived class stops it before its members go.
    virtual void run_guest() = 0;
    /// Makes the machine's thread look at `must_stop`, where it doesn't do so itself.
    virtual void kick(pthread_t) {}
    bool must_stop() const;
    /// Waits; true where the machine must stop.
    bool wait_until(guest_clock::clock::time_point time);
    void halt_for(std::string reason);

    /// Writes what has left the serial port by now; false where it can't, having said why the guest halts.
    bool send_serial();
    /// When the next character will have left it.
    std::optional<guest_clock::clock::time_point> next_character() const;
    /// How long the guest has to stand still for `auto-converge` after it has run so long.
    guest_clock::clock::duration throttled_after(guest_clock::clock::duration ran) const;
    bool is_throttled() const { return throttle_percent_.load() != 0; }

    const vm_options options_;
    memory ram_;
    guest_clock clock_;
    uart uart_;
    vmstate::machine machine_;
    vmstate::migration::guest guest_;

private:
    void make_thread_locked();
    /// Of the machine's thread, which is made where there is none, and waits for `start`.
    std::uint32_t thread_id();

    const std::uint32_t ram_base_;
    std::atomic<unsigned> throttle_percent_ = 0;
    std::atomic<std::uint64_t> lines_printed_ = 0;

    // Neither is held where guest memory is touched: in postcopy that may last until a page has come.
    std::mutex control_mutex_; ///< thread_
    std::thread thread_;
    mutable std::mutex wake_mutex_; ///< the next four
    std::condition_variable wake_;
    std::uint32_t thread_id_ = 0;
    bool may_run_ = false;
    bool must_stop_ = false;
    std::string why_halted_;
};

} // namespace live
