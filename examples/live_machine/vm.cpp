// SPDX-License-Identifier: BSL-1.0
#include "vm.hpp"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>
#include <vector>

#include <vmstate/migrate.hpp>
#include <vmstate/ram/pagemap_scan_log.hpp>

namespace live {

vmstate::result<memory> vm::make_memory(const vm_options& options) {
    const std::uint64_t page = options.huge_pages ? memory::huge_page : memory::small_page;
    if (options.memory % page != 0 || options.memory < 16 * memory::small_page || options.memory > max_memory)
        return vmstate::error(vmstate::errc::invalid_argument,
            "memory of 64 KiB to 1 GiB, whole pages of " + std::to_string(page), std::to_string(options.memory) + " bytes");
    if (options.dirty_log == dirty_log_kind::pagemap)
        if (const vmstate::result<void> can = vmstate::pagemap_scan_log::probe(); !can) return can.error();
    return memory::make(options.memory, page);
}

vm::vm(vm_options options, memory ram, std::string name, std::uint32_t ram_base)
    : options_(std::move(options)), ram_(std::move(ram)), machine_({.name = std::move(name)}), ram_base_(ram_base) {
    machine_.add_ram("ram", ram_.mapping(), {.guest_address = ram_base});
    machine_.add_device<guest_clock::vm::description>(clock_);
    machine_.add_device<vmstate_uart>(uart_);
    guest_.stop = [this]() -> vmstate::result<void> {
        stop();
        return {};
    };
    guest_.start = [this] { return start(); };
    guest_.throttle = [this](unsigned percent) { throttle_percent_.store(std::min(percent, 99u)); };
    guest_.vcpu_threads = [this] { return std::vector{thread_id()}; };
    if (options_.dirty_log == dirty_log_kind::pagemap)
        guest_.dirty_logs.emplace("ram", vmstate::pagemap_scan_log(ram_.bytes()));
}

void vm::put_program(std::span<const std::byte> image, const guest_parameters& parameters) {
    const std::span<std::byte> bytes = ram_.bytes();
    std::copy(image.begin(), image.end(), bytes.begin());
    std::memcpy(bytes.data() + guest_parameters::offset, &parameters, sizeof parameters);
    const std::lock_guard lock(wake_mutex_);
    why_halted_.clear();
}

vmstate::result<void> vm::start() {
    const std::lock_guard control(control_mutex_);
    if (const std::string why = why_halted(); !why.empty())
        return vmstate::error(vmstate::errc::invalid_argument, "a guest that can go on", why);
    make_thread_locked();
    {
        const std::lock_guard lock(wake_mutex_);
        may_run_ = true;
    }
    wake_.notify_all();
    return {};
}

void vm::make_thread_locked() {
    if (thread_.joinable()) return;
    {
        const std::lock_guard lock(wake_mutex_);
        must_stop_ = false;
    }
    thread_ = std::thread([this] {
        {
            std::unique_lock lock(wake_mutex_);
            thread_id_ = static_cast<std::uint32_t>(::gettid());
            wake_.notify_all();
            wake_.wait(lock, [this] { return may_run_ || must_stop_; });
            if (!may_run_) return;
        }
        clock_.start();
        run_guest();
        clock_.stop();
    });
}

std::uint32_t vm::thread_id() {
    const std::lock_guard control(control_mutex_);
    make_thread_locked();
    std::unique_lock lock(wake_mutex_);
    wake_.wait(lock, [this] { return thread_id_ != 0; });
    return thread_id_;
}

void vm::stop() {
    const std::lock_guard control(control_mutex_);
    if (!thread_.joinable()) return;
    {
        const std::lock_guard lock(wake_mutex_);
        must_stop_ = true;
    }
    wake_.notify_all();
    kick(thread_.native_handle());
    thread_.join();
    const std::lock_guard lock(wake_mutex_);
    thread_id_ = 0;
    may_run_ = false;
}

bool vm::is_running() const {
    const std::lock_guard lock(wake_mutex_);
    return may_run_;
}

std::string vm::why_halted() const {
    const std::lock_guard lock(wake_mutex_);
    return why_halted_;
}

bool vm::must_stop() const {
    const std::lock_guard lock(wake_mutex_);
    return must_stop_;
}

bool vm::wait_until(guest_clock::clock::time_point time) {
    std::unique_lock lock(wake_mutex_);
    return wake_.wait_until(lock, time, [this] { return must_stop_; });
}

void vm::halt_for(std::string reason) {
    {
        const std::lock_guard lock(wake_mutex_);
        why_halted_ = std::move(reason);
    }
    if (options_.on_halt) options_.on_halt();
}

bool vm::send_serial() {
    std::array<std::uint8_t, 16> out{};
    std::size_t count = 0;
    uart_.advance(clock_.now(), [&](std::uint8_t byte) { out[count++] = byte; });
    for (std::size_t done = 0; done != count;) {
        const ssize_t written = ::write(options_.serial, out.data() + done, count - done);
        if (written < 0 && errno == EINTR) continue;
        if (written < 0) {
            halt_for("serial port: " + std::system_category().message(errno));
            return false;
        }
        done += static_cast<std::size_t>(written);
    }
    lines_printed_ += static_cast<std::uint64_t>(std::count(out.begin(), out.begin() + count, '\n'));
    return true;
}

std::optional<guest_clock::clock::time_point> vm::next_character() const {
    if (uart_.to_send.is_empty()) return {};
    // A stream may claim any time; then it is asked for now and again.
    return std::min(clock_.when(uart_.sent_at), guest_clock::clock::now() + std::chrono::seconds(1));
}

guest_clock::clock::duration vm::throttled_after(guest_clock::clock::duration ran) const {
    const unsigned percent = throttle_percent_.load();
    return ran * percent / (100 - percent);
}

} // namespace live
