// SPDX-License-Identifier: BSL-1.0
#include "worker.hpp"

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <optional>
#include <random>
#include <span>
#include <utility>
#include <vector>

namespace worker {

using vmstate::errc;
using vmstate::error;
using vmstate::result;
using namespace vmstate::vhost_user;

namespace {

constexpr std::uint64_t page_size = 4096;

/// The payload of SET_VRING_BASE, GET_VRING_BASE and SET_VRING_ENABLE.
struct vring_state {
    std::uint32_t index;
    std::uint32_t number;
};

using words = std::array<std::uint64_t, page_size / sizeof(std::uint64_t)>;

/// What a page holds that was written so often.
std::uint64_t word_of(std::uint64_t address, std::uint64_t times, std::uint64_t word) {
    return times == 0 ? 0 : (address + 8 * word) * 0x9e3779b97f4a7c15U ^ times * 0xc2b2ae3d27d4eb4fU;
}

/// Where the `number`th page of all regions lies for the guest; 0 behind the last one.
std::uint64_t address_of(const memory_table& table, std::uint64_t number) {
    for (const memory_table::entry& one : table.entries()) {
        const std::uint64_t pages = one.region.size / page_size;
        if (number < pages) return one.region.guest_address + number * page_size;
        number -= pages;
    }
    return 0;
}

template <class... Values>
std::string text(const char* format, Values... values) {
    std::array<char, 192> line{};
    std::snprintf(line.data(), line.size(), format, values...);
    return line.data();
}

} // namespace

device::device(share part, unsigned rate, std::function<void(const std::string&)> say)
    : share_(part), rate_(rate), say_(std::move(say)),
      client_({.faults = vmstate::userfault_scope::user_only, // no system call is given an address in guest memory
          .on_memory = [this] {
              {
                  const std::lock_guard lock(memory_mutex_);
                  ++memory_changes_;
              }
              memory_changed_.notify_all();
          }}) {}

result<void> device::serve(int socket) {
    socket_ = socket;
    const result<void> ended = client_.run(socket, [&](message& m) { return handle(socket, m); });
    // If it waited for a page, it has been let go by now.
    stop();
    if (failure_) return *std::exchange(failure_, {});
    return ended;
}

result<handling> device::handle(int socket, message& m) {
    switch (m.request) {
    case request::set_owner: return handling::done;
    case request::set_vring_base:
    case request::set_vring_enable:
    case request::get_vring_base: break;
    default: return handling::not_mine;
    }
    result<vring_state> state = m.as<vring_state>();
    if (!state) return state.error();
    if (state->index != 0) return error(errc::bad_message, "queue 0", std::to_string(state->index));
    if (m.request == request::set_vring_enable && state->number != 0) {
        start();
        return handling::done;
    }
    // In postcopy this may have to wait for a page; the VMM serves it meanwhile.
    stop();
    if (m.request == request::set_vring_base) steps_ = state->number;
    if (m.request != request::get_vring_base) return handling::done;
    say_(text(R"({"event":"stopped","steps":%)" PRIu32 "}", steps_));
    state->number = steps_;
    if (result<void> sent = send_message(socket, make_message(m.request, *state, message_flag::reply)); !sent)
        return sent.error();
    return handling::answered;
}

void device::start() {
    if (thread_.joinable()) return;
    say_(text(R"({"event":"started","steps":%)" PRIu32 "}", steps_));
    thread_ = std::jthread([this](const std::stop_token& stopping) { work(stopping); });
}

void device::stop() {
    if (!thread_.joinable()) return;
    thread_.request_stop();
    thread_.join();
}

void device::work(std::stop_token stopping) {
    pages_ = count_pages(stopping);
    if (pages_ == 0 || !check_all(stopping)) return;
    const auto interval = std::chrono::duration_cast<std::chrono::steady_clock::duration>(std::chrono::seconds(1)) / rate_;
    auto next = std::chrono::steady_clock::now();
    std::mutex unused;
    std::condition_variable_any told;
    while (visit(steps_ % pages_, true, stopping)) {
        ++steps_;
        next = std::max(next + interval, std::chrono::steady_clock::now() - std::chrono::milliseconds(100)); // it catches up with no more
        std::unique_lock lock(unused);
        if (told.wait_until(lock, stopping, next, [] { return false; }) || stopping.stop_requested()) return;
    }
}

/// Every page, once, in no order: what has moved is all there, or comes when it is waited for.
bool device::check_all(const std::stop_token& stopping) {
    std::vector<std::uint64_t> order(pages_);
    std::iota(order.begin(), order.end(), std::uint64_t{0});
    std::shuffle(order.begin(), order.end(), std::mt19937_64(share_.number));
    std::uint64_t in_postcopy = 0;
    for (const std::uint64_t page : order) {
        in_postcopy += client_.postcopy_phase() == phase::running;
        if (!visit(page, false, stopping)) return false;
    }
    say_(text(R"({"event":"verified","pages":%)" PRIu64 R"(,"in-postcopy":%)" PRIu64 "}", pages_, in_postcopy));
    return true;
}

/// Looks whether a page holds what it has to, and writes it anew if asked to; false where it is over.
bool device::visit(std::uint64_t page, bool write, const std::stop_token& stopping) {
    for (;;) {
        if (stopping.stop_requested()) return false;
        const std::optional<memory_access> access = client_.access();
        if (!access || access->table().empty()) {
            if (!wait_for_memory(stopping)) return false;
            continue;
        }
        const std::uint64_t address = address_of(access->table(), share_.number * pages_ + page);
        const std::span<std::byte> memory = access->table().at_guest(address, page_size);
        if (memory.size() != page_size) return bad(address, memory.size(), page_size);
        words content;
        std::memcpy(content.data(), memory.data(), page_size); // in postcopy, this is what waits
        if (!access->intact()) return false;
        const std::uint64_t times = steps_ / pages_ + (page < steps_ % pages_ ? 1 : 0);
        for (std::uint64_t i = 0; i != content.size(); ++i)
            if (content[i] != word_of(address, times, i)) return bad(address + 8 * i, content[i], word_of(address, times, i));
        if (!write) return true;
        for (std::uint64_t i = 0; i != content.size(); ++i) content[i] = word_of(address, times + 1, i);
        std::memcpy(memory.data(), content.data(), page_size);
        access->mark_dirty(address, page_size);
        return true;
    }
}

/// The VMM hears of it by the end of the connection.
bool device::bad(std::uint64_t address, std::uint64_t found, std::uint64_t expected) {
    failure_ = std::move(error(errc::value_mismatch, text("0x%" PRIx64, expected), text("0x%" PRIx64, found))
                             .within(text("BAD page 0x%" PRIx64, address)));
    ::shutdown(socket_, SHUT_RDWR);
    return false;
}

std::uint64_t device::count_pages(const std::stop_token& stopping) {
    for (;;) {
        if (const std::optional<memory_access> access = client_.access(); access && !access->table().empty()) {
            std::uint64_t pages = 0;
            for (const memory_table::entry& one : access->table().entries()) pages += one.region.size / page_size;
            return pages / share_.of;
        }
        if (!wait_for_memory(stopping)) return 0;
    }
}

/// Until it may have changed.
bool device::wait_for_memory(const std::stop_token& stopping) {
    std::unique_lock lock(memory_mutex_);
    const std::uint64_t before = memory_changes_;
    // A change just before this is seen when the time is up.
    memory_changed_.wait_for(lock, stopping, std::chrono::milliseconds(10), [&] { return memory_changes_ != before; });
    return !stopping.stop_requested();
}

} // namespace worker
