// SPDX-License-Identifier: BSL-1.0
// A vhost-user backend made by hand, which does as the specification says, or something else at one request: the other end
// for tests of the VMM's half. Depends on the library alone.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/message.hpp>

namespace vmstate::tests {

/// What a backend does at a request instead of the right thing.
enum class backend_act { right, die, never_answer, refuse, answer_something_else, no_descriptor, other_descriptor };

struct backend_script {
    std::optional<vhost_user::request> at = {};
    backend_act act = backend_act::right;
    /// Changes the table that is answered.
    std::function<void(std::vector<vhost_user::memory_region>&)> answer = {};
    /// What its device does with a message, before it answers as if it had done it.
    std::function<void(vhost_user::request)> device = {};
    std::uint64_t offers = vhost_user::protocol_feature::pagefault | vhost_user::protocol_feature::reply_ack;
};

class hand_made_backend {
public:
    explicit hand_made_backend(unique_fd socket, backend_script script = {})
        : socket_(std::move(socket)), script_(std::move(script)) {}
    ~hand_made_backend() {
        stop();
        for (const std::span<std::byte> one : mapped_) ::munmap(one.data(), one.size());
    }
    hand_made_backend(const hand_made_backend&) = delete;
    hand_made_backend& operator=(const hand_made_backend&) = delete;

    void start() {
        thread_ = std::thread([this] { serve(); });
    }
    void stop() {
        ::shutdown(socket_.get(), SHUT_RDWR);
        if (thread_.joinable()) thread_.join();
        fault_.reset();
    }
    /// Until the front end closes the connection.
    void serve() {
        while (step()) {
        }
        // Who waits in its memory goes on, and elsewhere: the guest may live on without this backend.
        for (const std::span<std::byte> one : regions_)
            if (!ended_) {
                static_cast<void>(::mmap(one.data(), one.size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0));
                static_cast<void>(fault_->wake(one));
            }
        state_ = gone;
        state_.notify_all();
    }
    /// False where it never came so far.
    bool wait_until_registered() const {
        state_.wait(0);
        return state_ == registered;
    }
    /// The regions, in the order of the table.
    std::span<std::byte> memory(std::size_t region = 0) const { return regions_[region]; }
    bool has_ended() const { return ended_; }

private:
    enum : int { gone = 1, registered = 2 };

    bool answer(vhost_user::request to, std::uint64_t value) {
        return static_cast<bool>(
            send_message(socket_.get(), make_message(to, value, vhost_user::message_flag::reply)));
    }
    bool step() {
        using vhost_user::request;
        auto got = vhost_user::receive_message(socket_.get());
        if (!got || !*got) return false;
        const vhost_user::message& m = **got;
        const bool acts = script_.at == m.request && !table_is_answered_;
        if (acts && script_.act == backend_act::die) {
            ::shutdown(socket_.get(), SHUT_RDWR);
            return false;
        }
        if (acts && script_.act == backend_act::never_answer) return true;
        if (acts && script_.act == backend_act::refuse) return answer(m.request, 7);
        if (acts && script_.act == backend_act::answer_something_else) return answer(request::get_config, 0);
        switch (m.request) {
        case request::get_features: return answer(m.request, vhost_user::feature::protocol_features);
        case request::get_protocol_features: return answer(m.request, script_.offers);
        case request::postcopy_advise: return advise(acts);
        case request::set_mem_table: return table_is_answered_ ? add_faults() : take_table(m);
        case request::postcopy_end:
            // The front end may have its copy of the descriptor still.
            for (const std::span<std::byte> one : regions_) static_cast<void>(fault_->remove(one));
            ended_ = true;
            return answer(m.request, 0);
        default:
            if (script_.device) script_.device(m.request);
            return !m.needs_reply() || answer(m.request, 0);
        }
    }
    bool advise(bool acts) {
        auto opened = userfault::open(userfault_scope::user_and_kernel, userfault_feature::missing_shmem | userfault_feature::missing_hugetlbfs);
        if (!opened) return false;
        fault_.emplace(std::move(*opened));
        vhost_user::message reply = make_request(vhost_user::request::postcopy_advise, vhost_user::message_flag::reply);
        if (!(acts && script_.act == backend_act::no_descriptor))
            reply.descriptors.emplace_back(::dup(acts && script_.act == backend_act::other_descriptor ? socket_.get() : fault_->get()));
        return static_cast<bool>(send_message(socket_.get(), reply));
    }
    bool take_table(const vhost_user::message& m) {
        auto regions = memory_regions_of(m);
        if (!regions || m.descriptors.size() != regions->size()) return false;
        for (std::size_t i = 0; i < regions->size(); ++i) {
            vhost_user::memory_region& one = (*regions)[i];
            void* const at = ::mmap(nullptr, static_cast<std::size_t>(one.size + one.mmap_offset), PROT_READ | PROT_WRITE, MAP_SHARED,
                m.descriptors[i].get(), 0);
            if (at == MAP_FAILED) return false;
            mapped_.emplace_back(static_cast<std::byte*>(at), static_cast<std::size_t>(one.size + one.mmap_offset));
            regions_.push_back(mapped_.back().subspan(static_cast<std::size_t>(one.mmap_offset)));
            one.user_address = reinterpret_cast<std::uintptr_t>(regions_.back().data());
        }
        if (script_.answer) script_.answer(*regions);
        table_is_answered_ = true;
        return static_cast<bool>(
            send_message(socket_.get(), vhost_user::make_memory_table(*regions, {}, vhost_user::message_flag::reply)));
    }
    bool add_faults() {
        table_is_answered_ = false;
        for (const std::span<std::byte> one : regions_)
            if (!fault_->add(one, UFFDIO_REGISTER_MODE_MISSING)) return false;
        state_ = registered;
        state_.notify_all();
        return true;
    }

    unique_fd socket_;
    const backend_script script_;
    std::thread thread_;
    std::optional<userfault> fault_;
    std::vector<std::span<std::byte>> mapped_;
    std::vector<std::span<std::byte>> regions_;
    bool table_is_answered_ = false;
    std::atomic<bool> ended_ = false;
    std::atomic<int> state_ = 0;
};

} // namespace vmstate::tests
