// SPDX-License-Identifier: BSL-1.0
#include "vm.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <system_error>
#include <utility>

#include <vmstate/migrate.hpp>
#include <vmstate/ram/pagemap_scan_log.hpp>

namespace live {

namespace {

std::string describe_halt(const hart_state& hart) {
    const char* const why = hart.halted == halt::ebreak                ? "the guest has stopped itself"
                            : hart.halted == halt::illegal_instruction ? "illegal instruction"
                                                                       : "nothing to access";
    std::array<char, 96> text{};
    std::snprintf(text.data(), text.size(), "%s: 0x%08x at pc 0x%08x", why, hart.halted_by, hart.pc);
    return text.data();
}

} // namespace

vmstate::result<std::unique_ptr<vm>> vm::make(vm_options options) {
    if (options.memory % 4096 != 0 || options.memory < 16 * 4096 || options.memory > max_memory)
        return vmstate::error(vmstate::errc::invalid_argument, "memory of 64 KiB to 1 GiB, whole pages",
            std::to_string(options.memory) + " bytes");
    if (options.dirty_log == dirty_log_kind::pagemap)
        if (const vmstate::result<void> can = vmstate::pagemap_scan_log::probe(); !can) return can.error();
    vmstate::result<memory> ram = memory::make(options.memory);
    if (!ram) return ram.error();
    return std::unique_ptr<vm>(new vm(std::move(options), std::move(*ram)));
}

vm::vm(vm_options options, memory ram)
    : options_(std::move(options)), ram_(std::move(ram)), marked_log_(ram_.bytes().size()) {
    machine_.add_ram("ram", ram_.bytes(), {.guest_address = ram_base});
    machine_.add_device<vmstate_hart>(hart_);
    machine_.add_device<timer::vm::description>(timer_);
    machine_.add_device<vmstate_uart>(uart_);
    guest_.stop = [this]() -> vmstate::result<void> {
        stop();
        return {};
    };
    guest_.start = [this]() -> vmstate::result<void> {
        start();
        return {};
    };
    guest_.throttle = [this](unsigned percent) { throttle_percent_.store(percent); };
    if (options_.dirty_log == dirty_log_kind::pagemap)
        guest_.dirty_logs.emplace("ram", vmstate::pagemap_scan_log(ram_.bytes()));
    else guest_.dirty_logs.emplace("ram", marked_log_);
}

void vm::boot(const guest_parameters& parameters) {
    const std::span<std::byte> bytes = ram_.bytes();
    const std::span<const std::byte> image = guest_image();
    static_assert(sizeof(guest_parameters) == 24);
    std::copy(image.begin(), image.end(), bytes.begin());
    std::memcpy(bytes.data() + guest_parameters::offset, &parameters, sizeof parameters);
    hart_ = {.pc = ram_base};
}

void vm::start() {
    const std::lock_guard control(control_mutex_);
    if (thread_.joinable()) return;
    {
        const std::lock_guard lock(wake_mutex_);
        must_stop_ = false;
        why_halted_.clear();
    }
    thread_ = std::thread([this] { run_guest(); });
}

void vm::stop() {
    const std::lock_guard control(control_mutex_);
    if (!thread_.joinable()) return;
    {
        const std::lock_guard lock(wake_mutex_);
        must_stop_ = true;
    }
    wake_.notify_all();
    thread_.join();
}

std::string vm::why_halted() const {
    const std::lock_guard lock(wake_mutex_);
    return why_halted_;
}

void vm::run_guest() {
    timer_.start();
    bus all{*this};
    for (;;) {
        // Short enough for the serial port to be served in time, long enough for that to cost nothing.
        const timer::clock::time_point began = timer::clock::now();
        const run_end end = run(hart_, all, 20'000);
        if (!send_serial()) {
            halt_for("serial port: " + std::system_category().message(errno));
            break;
        }
        if (end == run_end::halted) {
            halt_for(describe_halt(hart_));
            break;
        }
        timer::clock::time_point go_on = began;
        if (end == run_end::wait) {
            go_on = next_event();
        } else if (const unsigned percent = throttle_percent_.load(); percent != 0) {
            const timer::clock::time_point now = timer::clock::now();
            go_on = now + (now - began) * percent / (100 - std::min(percent, 99u));
        }
        std::unique_lock lock(wake_mutex_);
        if (go_on > began) wake_.wait_until(lock, go_on, [this] { return must_stop_; });
        if (must_stop_) break;
    }
    timer_.stop();
}

/// When the timer or the serial port has something to do.
timer::clock::time_point vm::next_event() const {
    const timer::clock::time_point timer_at = timer_.pending_at();
    if (uart_.to_send.is_empty()) return timer_at;
    const std::uint64_t now = timer_.now();
    const std::uint64_t left = uart_.sent_at > now ? std::min<std::uint64_t>(uart_.sent_at - now, 1'000'000) : 0;
    return std::min(timer_at, timer::clock::now() + std::chrono::microseconds(left));
}

/// Writes what has left the serial port by now; false where it can't, with errno.
bool vm::send_serial() {
    std::array<std::uint8_t, 16> out{};
    std::size_t count = 0;
    uart_.advance(timer_.now(), [&](std::uint8_t byte) { out[count++] = byte; });
    for (std::size_t done = 0; done != count;) {
        const ssize_t written = ::write(options_.serial, out.data() + done, count - done);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) return false;
        done += static_cast<std::size_t>(written);
    }
    return true;
}

void vm::halt_for(std::string reason) {
    {
        const std::lock_guard lock(wake_mutex_);
        why_halted_ = std::move(reason);
    }
    if (options_.on_halt) options_.on_halt();
}

bool vm::bus::load(std::uint32_t address, std::uint32_t size, std::uint32_t& value) {
    if (address % size != 0) return false;
    if (address >= ram_base) {
        if (address - ram_base >= self.ram_.bytes().size()) return false;
        value = self.ram_.load(address - ram_base, size);
        return true;
    }
    if (address >= uart_base && address - uart_base < 8 && size == 1) {
        value = self.uart_.load(address - uart_base);
        return true;
    }
    return address >= timer_base && size == 4 && self.timer_.load(address - timer_base, value);
}

bool vm::bus::store(std::uint32_t address, std::uint32_t size, std::uint32_t value) {
    if (address % size != 0) return false;
    if (address >= ram_base) {
        if (address - ram_base >= self.ram_.bytes().size()) return false;
        self.ram_.store(address - ram_base, size, value);
        // After the write: see marked_log.
        if (self.options_.dirty_log == dirty_log_kind::marked) self.marked_log_.mark(address - ram_base, size);
        return true;
    }
    if (address >= uart_base && address - uart_base < 8 && size == 1) {
        self.uart_.store(address - uart_base, static_cast<std::uint8_t>(value), self.timer_.now());
        return true;
    }
    return address >= timer_base && size == 4 && self.timer_.store(address - timer_base, value);
}

} // namespace live
