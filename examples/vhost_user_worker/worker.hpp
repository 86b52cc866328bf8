// SPDX-License-Identifier: BSL-1.0
//
// A device that does nothing but write guest memory, page after page, and find out whether it is still what it wrote.
// Depends on vmstate/vhost_user and threads.
#pragma once

#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/client.hpp>
#include <vmstate/vhost_user/message.hpp>

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <stop_token>
#include <string>
#include <thread>

namespace worker {

/// Of the pages that the VMM shares, the `number`th of so many equal parts.
struct share {
    std::uint64_t number = 0;
    std::uint64_t of = 1;
};

/// Page p of n is written at the steps p, p + n, p + 2n and so on, each time with something else: at every step it is known
/// what each of them holds. Where it is, the VMM takes with it as it does with a queue's position: SET_VRING_BASE and
/// GET_VRING_BASE of queue 0, which has no rings, say how many steps there have been.
class device {
public:
    /// `rate`: steps in a second. `say` is given lines of JSON, by any thread.
    device(share part, unsigned rate, std::function<void(const std::string&)> say);

    /// Serves one VMM until it closes the connection; an error also where a page was not what it has to be.
    vmstate::result<void> serve(int socket);

private:
    using message = vmstate::vhost_user::message;
    using handling = vmstate::vhost_user::handling;

    vmstate::result<handling> handle(int socket, message& m);
    void start();
    void stop();

    void work(std::stop_token stopping);
    bool check_all(const std::stop_token& stopping);
    bool visit(std::uint64_t page, bool write, const std::stop_token& stopping);
    bool bad(std::uint64_t address, std::uint64_t found, std::uint64_t expected);
    std::uint64_t count_pages(const std::stop_token& stopping);
    bool wait_for_memory(const std::stop_token& stopping);

    const share share_;
    const unsigned rate_;
    const std::function<void(const std::string&)> say_;
    vmstate::vhost_user::client client_;
    int socket_ = -1;

    std::jthread thread_;      // owns the next three while it runs
    std::uint32_t steps_ = 0;
    std::uint64_t pages_ = 0;  // of its share
    std::optional<vmstate::error> failure_;

    std::mutex memory_mutex_; // guards what follows
    std::condition_variable_any memory_changed_;
    std::uint64_t memory_changes_ = 0;
};

} // namespace worker
