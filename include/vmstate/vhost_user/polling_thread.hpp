// SPDX-License-Identifier: BSL-1.0
//
// A thread that polls descriptors, one of which tells it to stop. Depends on ram/userfault.hpp (for errors) and Linux.
#pragma once

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate::vhost_user::detail {

/// One thread starts and stops it.
class polling_thread {
public:
    polling_thread() = default;
    polling_thread(const polling_thread&) = delete;
    polling_thread& operator=(const polling_thread&) = delete;
    ~polling_thread() { stop(); }

    bool is_running() const noexcept { return thread_.joinable(); }
    /// `work(stop)` returns when the descriptor `stop` can be read. Where none is running.
    template <class Work>
    result<void> start(Work work) {
        stop_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!stop_) return userfault::failure("eventfd");
        try {
            thread_ = std::thread(std::move(work), stop_.get());
        } catch (const std::system_error& refused) {
            return error(errc::io, {}, std::string("thread: ") + refused.what());
        }
        return {};
    }
    /// `work` has returned afterwards. Harmless twice.
    void stop() noexcept {
        if (!thread_.joinable()) return;
        const std::uint64_t one = 1;
        while (::write(stop_.get(), &one, sizeof one) < 0 && errno == EINTR) {
        }
        thread_.join();
    }

private:
    unique_fd stop_;
    std::thread thread_;
};

} // namespace vmstate::vhost_user::detail
