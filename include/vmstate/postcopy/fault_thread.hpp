// SPDX-License-Identifier: BSL-1.0
//
// The thread that hears of threads that stopped at a missing page, ours and those of processes that share the memory, and
// asks for their pages. Depends on page_placer.hpp, page_requests.hpp, statistics.hpp and Linux.
#pragma once

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include <vmstate/postcopy/page_placer.hpp>
#include <vmstate/postcopy/page_requests.hpp>
#include <vmstate/postcopy/received_pages.hpp>
#include <vmstate/postcopy/statistics.hpp>
#include <vmstate/support/guarded.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/short_slice.hpp>
#include <vmstate/support/unique_fd.hpp>

namespace vmstate {

/// It never touches guest memory, and waits for nothing but the return path: a page that it needed itself would never
/// come.
class fault_thread {
public:
    /// Who is told of a fault.
    using found_function = std::function<void(const ram_address& where)>;
    /// Another process's userfaultfd for memory that it shares with us.
    struct client {
        int fd = -1; ///< stays its owner's; made non-blocking
        /// Where an address of that process lies; none for one outside of guest memory. On the fault thread.
        std::function<std::optional<ram_address>(std::uint64_t address)> translate;
        /// Lets its threads that wait in the host page at `where` go on: UFFDIO_WAKE on `fd`. On the fault thread; pages
        /// that come later are `page_placer::on_placed`'s to tell.
        std::function<result<void>(const ram_address& where)> wake;
        std::string name = {}; ///< in the statistics
        /// On the fault thread: what was wrong with this client, which nobody else suffers from, and whether it is served
        /// any more; empty for `on_failure`. It must not call `remove`.
        std::function<void(const error& why, bool is_over)> failed = {};
        /// For one that tells its faults in its own way: reads from `fd` what there is, without waiting. On the fault thread.
        std::function<result<void>(const found_function& found)> read = {};
        /// A connection to it, which is looked at only for its end; -1 where there is none. Stays its owner's.
        int connection = -1;
    };
    /// On the fault thread: what it could not do. A request that couldn't be sent stays wanted, and the thread goes on.
    using failure_function = std::function<void(const error& why)>;

    /// All three have to outlive this. `placer`, which isn't started yet, tells the others of each page from here on.
    fault_thread(page_placer& placer, page_requests& requests, postcopy_statistics& statistics, failure_function on_failure)
        : placer_(placer), requests_(requests), statistics_(statistics), on_failure_(std::move(on_failure)) {
        placer_.on_placed([&requests, &statistics](ram_block& block, std::uint64_t offset, std::uint64_t) {
            statistics.placed(block, offset, postcopy_statistics::clock::now());
            requests.placed(block, offset);
        });
    }
    fault_thread(const fault_thread&) = delete;
    fault_thread& operator=(const fault_thread&) = delete;
    ~fault_thread() { stop(); }

    /// After `page_placer::start`. Faults that happened since are seen, too.
    result<void> start() {
        if (thread_.joinable()) return error(errc::invalid_argument, "a fault thread that isn't started yet");
        wake_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!wake_) return userfault::failure("eventfd");
        {
            const std::lock_guard lock(clients_mutex_);
            ending_ = false;
        }
        try {
            thread_ = std::thread([this] { serve(); });
        } catch (const std::system_error& refused) {
            return error(errc::io, {}, std::string("thread: ") + refused.what());
        }
        return {};
    }
    /// Harmless twice. Who waits for a page then waits on: end this when every page is there. A request that is being
    /// sent is waited for.
    void stop() {
        if (!thread_.joinable()) return;
        {
            const std::lock_guard lock(clients_mutex_);
            ending_ = true;
        }
        poke();
        thread_.join();
    }

    /// Hears of another process's faults from now on; a number for `remove`.
    result<unsigned> add(client other) {
        const int flags = ::fcntl(other.fd, F_GETFL);
        // One that blocks can't be polled: the kernel calls that an error.
        if (flags < 0 || ::fcntl(other.fd, F_SETFL, flags | O_NONBLOCK) < 0) return userfault::failure("fcntl");
        unsigned number = 0;
        {
            const std::lock_guard lock(clients_mutex_);
            number = statistics_.add_client(other.name);
            clients_.push_back({number, std::move(other)});
        }
        poke();
        return number;
    }
    /// Its descriptor is not used after this. Harmless for one that is gone. Not from a client's functions.
    void remove(unsigned number) {
        {
            const std::lock_guard lock(clients_mutex_);
            if (std::erase_if(clients_, [&](const numbered_client& one) { return one.number == number; }) == 0) return;
            statistics_.remove_client(number, clock::now());
        }
        poke();
    }

private:
    struct numbered_client {
        unsigned number;
        client who;
    };
    using clock = postcopy_statistics::clock;

    void poke() const noexcept {
        const std::uint64_t one = 1;
        while (wake_ && ::write(wake_.get(), &one, sizeof one) < 0 && errno == EINTR) {
        }
    }

    /// The thread. Owns nothing; takes `clients_mutex_` for each round of faults, and what placing and asking take.
    void serve() {
        detail::prefer_short_slice();
        std::vector<pollfd> events;
        std::vector<unsigned> numbers; // of the clients in `events`, behind the first two
        for (bool goes_on = true; goes_on;)
            report(detail::guarded([&]() -> result<void> {
                goes_on = serve_round(events, numbers);
                return {};
            }));
    }
    /// False at the end.
    bool serve_round(std::vector<pollfd>& events, std::vector<unsigned>& numbers) {
        events.assign({{wake_.get(), POLLIN, 0}, {placer_.fault().get(), POLLIN, 0}});
        numbers.clear();
        {
            const std::lock_guard lock(clients_mutex_);
            if (ending_) return false;
            for (const numbered_client& one : clients_) {
                events.push_back({one.who.fd, POLLIN, 0});
                events.push_back({one.who.connection, POLLRDHUP, 0});
                numbers.push_back(one.number);
            }
        }
        if (::poll(events.data(), events.size(), -1) < 0) {
            if (errno == EINTR) return true;
            fail(userfault::failure("poll"));
            return false;
        }
        if (events[0].revents != 0) {
            std::uint64_t count = 0;
            (void)!::read(wake_.get(), &count, sizeof count);
        }
        if (events[1].revents != 0 && !serve_own(events[1].revents)) return false;
        if (numbers.empty()) return true;
        const std::lock_guard lock(clients_mutex_);
        for (std::size_t i = 0; i < numbers.size(); ++i)
            if (const short faults = events[2 + 2 * i].revents, end = events[3 + 2 * i].revents; faults != 0 || end != 0)
                serve_client(numbers[i], faults, end != 0);
        return true;
    }

    /// False where nothing more can be heard of.
    bool serve_own(short revents) {
        if ((revents & ~POLLIN) != 0) {
            fail(error(errc::io, "userfaultfd ready to read", "poll says " + std::to_string(revents)));
            return false;
        }
        result<void> done = read_faults(placer_.fault().get(), [&](std::uint64_t address, std::uint32_t thread_id, clock::time_point now) {
            const std::optional<ram_address> where = placer_.received().locate(address);
            if (!where) return fail(error(errc::bad_ram, "a fault in guest memory", "one at " + std::to_string(address)));
            const result<void> served = detail::guarded([&]() -> result<void> {
                serve_fault(*where, placer_.has_thread_ids() ? thread_id : 0, now);
                return {};
            });
            if (served) return;
            report(served);
            // It faults again then.
            const auto size = static_cast<std::size_t>(where->block->options.host_page_size);
            static_cast<void>(placer_.fault().wake(where->block->page(host_page(*where), size)));
        });
        if (!done) fail(done.error());
        return static_cast<bool>(done);
    }
    /// Under `clients_mutex_`.
    void serve_client(unsigned number, short revents, bool is_gone) {
        const auto found = std::find_if(
            clients_.begin(), clients_.end(), [&](const numbered_client& one) { return one.number == number; });
        if (found == clients_.end()) return;
        const client& who = found->who;
        result<void> done;
        if ((revents & ~POLLIN) != 0)
            done = error(errc::io, "a client's userfaultfd ready to read", "poll says " + std::to_string(revents));
        else if (revents != 0)
            done = detail::guarded([&] { return read_faults(who, number); });
        if (done && is_gone) done = error(errc::io, "a client that stays", "the end of its connection");
        if (done) return;
        // It would be ready again at once, for ever.
        report(detail::guarded([&]() -> result<void> {
            fail(who, done.error(), true);
            return {};
        }));
        statistics_.remove_client(number, clock::now());
        clients_.erase(found);
    }
    result<void> read_faults(const client& who, unsigned number) {
        if (who.read) return who.read([&](const ram_address& where) { serve_client_fault(where, clock::now(), who, number); });
        return read_faults(who.fd, [&](std::uint64_t address, std::uint32_t, clock::time_point now) {
            if (const std::optional<ram_address> where = who.translate(address)) serve_client_fault(*where, now, who, number);
            else fail(who, error(errc::bad_ram, "a client's fault in guest memory", "one at " + std::to_string(address)));
        });
    }

    /// What is there, a batch at a time; calls `found(address, thread_id, now)` for each fault.
    template <class Found>
    static result<void> read_faults(int fd, Found found) {
        std::array<uffd_msg, 64> messages;
        for (;;) {
            const ssize_t got = read_without_waiting(fd, messages.data(), sizeof messages);
            if (got < 0) {
                if (errno == EINTR) continue;
                if (errno == EAGAIN) return {};
                return userfault::failure("read from userfaultfd");
            }
            const std::size_t count = static_cast<std::size_t>(got) / sizeof(uffd_msg);
            const clock::time_point now = clock::now();
            for (std::size_t i = 0; i < count; ++i)
                if (messages[i].event == UFFD_EVENT_PAGEFAULT)
                    found(messages[i].arg.pagefault.address, messages[i].arg.pagefault.feat.ptid, now);
            if (count < messages.size()) return {};
        }
    }

    /// O_NONBLOCK belongs to what both processes have open: the other one may take it away, and what there was to read, too.
    /// Before Linux 6.10 a userfaultfd knows nothing else.
    static ssize_t read_without_waiting(int fd, void* into, std::size_t size) {
        const iovec part{into, size};
        const ssize_t got = ::preadv2(fd, &part, 1, -1, RWF_NOWAIT);
        return got < 0 && errno == EOPNOTSUPP ? ::read(fd, into, size) : got;
    }

    void serve_fault(const ram_address& where, std::uint32_t thread_id, clock::time_point now) {
        const std::uint64_t offset = host_page(where);
        statistics_.fault(thread_id, *where.block, offset, now);
        serve({where.block, offset}, nullptr);
    }
    void serve_client_fault(const ram_address& where, clock::time_point now, const client& who, unsigned number) {
        const std::uint64_t offset = host_page(where);
        statistics_.client_fault(number, *where.block, offset, now);
        serve({where.block, offset}, &who);
    }
    static std::uint64_t host_page(const ram_address& where) noexcept {
        return where.offset - where.offset % where.block->options.host_page_size;
    }
    void serve(const ram_address& where, const client* who) {
        const result<page_request_outcome> asked = requests_.request(*where.block, where.offset);
        if (!asked) return fail(asked.error());
        if (*asked != page_request_outcome::already_received) return;
        // Placing it woke who was waiting then, in this process. A page that is zero, and that precopy or the guest left
        // without memory, is made now.
        const result<void> settled = placer_.settle(*where.block, where.offset);
        const result<void> woken = settled && who != nullptr ? who->wake(where) : result<void>();
        statistics_.already_received(*where.block, where.offset, clock::now());
        if (!settled) fail(settled.error());
        if (!woken) fail(*who, woken.error());
    }

    /// Without memory even for that, nobody is told.
    void report(const result<void>& of) const {
        if (of) return;
        static_cast<void>(detail::guarded([&]() -> result<void> {
            fail(of.error());
            return {};
        }));
    }
    void fail(const error& why) const {
        if (on_failure_) on_failure_(why);
    }
    void fail(const client& who, const error& why, bool is_over = false) const {
        if (who.failed) who.failed(why, is_over);
        else fail(why);
    }

    page_placer& placer_;
    page_requests& requests_;
    postcopy_statistics& statistics_;
    failure_function on_failure_;
    unique_fd wake_;
    std::thread thread_;

    std::mutex clients_mutex_; // below; held while a client's faults are served
    bool ending_ = false;
    std::vector<numbered_client> clients_; // numbered as in the statistics
};

} // namespace vmstate
