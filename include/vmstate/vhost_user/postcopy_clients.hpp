// SPDX-License-Identifier: BSL-1.0
//
// The vhost-user backends that share a machine's memory while postcopy brings it: each has page faults of its own, for
// which the destination fetches pages as for the guest's, and is woken when they are there. Depends on front_end.hpp,
// shared_memory.hpp and postcopy/.
#pragma once

#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <shared_mutex>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <vmstate/machine/ram_section.hpp>
#include <vmstate/postcopy/observer.hpp>
#include <vmstate/postcopy/statistics.hpp>
#include <vmstate/ram/present_pages.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/front_end.hpp>
#include <vmstate/vhost_user/memory_table.hpp>
#include <vmstate/vhost_user/message.hpp>
#include <vmstate/vhost_user/page_notices.hpp>
#include <vmstate/vhost_user/shared_memory.hpp>

namespace vmstate::vhost_user {

/// Where a backend is.
enum class client_phase {
    connected, ///< knows nothing of postcopy
    advised,   ///< has handed over its userfaultfd
    listening, ///< has its table of memory, and may fault
    ended,     ///< was told of the end, or left
    failed,    ///< has gone, or did what can't be meant, or the migration has failed: it is served no more
};

constexpr std::string_view to_string(client_phase at) noexcept {
    switch (at) {
    case client_phase::connected: return "connected";
    case client_phase::advised: return "advised";
    case client_phase::listening: return "listening";
    case client_phase::ended: return "ended";
    case client_phase::failed: return "failed";
    }
    return "?";
}

struct client_status {
    unsigned number = 0; ///< what `add` said
    std::string name;
    client_phase phase = client_phase::connected;
    std::optional<error> failure; ///< the last one; one that is served still may have one
};

namespace detail {

/// A client's memory from LISTEN on, and the way to its faults. Every thread may call it.
class client_memory {
public:
    client_memory() = default;
    client_memory(const client_memory&) = delete;
    client_memory& operator=(const client_memory&) = delete;
    virtual ~client_memory() = default;

    /// What the fault thread polls.
    virtual int descriptor() const noexcept = 0;
    /// Lets its threads go on that wait in the host page at `offset`, wherever it has it.
    virtual result<void> wake(const ram_block& block, std::uint64_t offset, std::uint64_t size) const = 0;
};

/// By its userfaultfd, which reports and takes its addresses.
class addressed_memory final : public client_memory {
public:
    addressed_memory(unique_fd fault, std::vector<client_region> regions)
        : fault_(std::move(fault)), regions_(std::move(regions)) {}

    int descriptor() const noexcept override { return fault_.get(); }
    std::optional<ram_address> translate(std::uint64_t address) const noexcept {
        for (const client_region& one : regions_)
            if (const std::uint64_t offset = address - one.address; offset < one.size)
                return ram_address{one.block, one.offset + offset};
        return std::nullopt;
    }
    result<void> wake(const ram_block& block, std::uint64_t offset, std::uint64_t size) const override {
        result<void> done;
        for (const client_region& one : regions_) {
            if (one.block != &block || offset < one.offset || offset - one.offset >= one.size) continue;
            uffdio_range range{one.address + (offset - one.offset), size};
            while (::ioctl(fault_.get(), UFFDIO_WAKE, &range) != 0)
                if (errno != EAGAIN && errno != EINTR) {
                    done = userfault::failure("UFFDIO_WAKE");
                    break;
                }
        }
        return done;
    }

private:
    const unique_fd fault_;
    const std::vector<client_region> regions_;
};

/// By notices: only what it asks for it is told of.
class noticed_memory final : public client_memory {
public:
    noticed_memory(unique_fd notices, std::vector<client_region> regions)
        : notices_(std::move(notices)), regions_(std::move(regions)) {}

    int descriptor() const noexcept override { return notices_.get(); }
    /// Reads what there is, up to as many as it may miss, and says where it lies.
    result<void> read(const fault_thread::found_function& found) {
        // Others are served between two rounds, however much one of them has to say.
        for (std::size_t round = 0; round != max_missed_pages; ++round) {
            const result<std::optional<page_notice>> notice = receive_notice(notices_.get());
            if (!notice) return notice.error();
            if (!*notice) return {};
            const page_notice& page = **notice;
            if (page.region >= regions_.size() || page.offset >= regions_[page.region].size ||
                page.offset % regions_[page.region].block->options.host_page_size != 0)
                return error(errc::bad_message, "a notice of a host page of its table",
                    "region " + std::to_string(page.region) + ", offset " + std::to_string(page.offset));
            {
                // Before anybody looks whether the page has come: either it is seen there, or `wake` sees this.
                const std::lock_guard lock(missed_mutex_);
                if (!missed_.insert(page).second)
                    return error(errc::bad_message, "a notice of a page that isn't missed already",
                        "region " + std::to_string(page.region) + ", offset " + std::to_string(page.offset));
                if (missed_.size() > max_missed_pages)
                    return error(errc::bad_message, "at most " + std::to_string(max_missed_pages) + " pages missed at one time", "more");
            }
            const client_region& region = regions_[page.region];
            found({region.block, region.offset + page.offset});
        }
        return {};
    }
    result<void> wake(const ram_block& block, std::uint64_t offset, std::uint64_t) const override {
        result<void> done;
        for (std::uint64_t i = 0; i != regions_.size(); ++i) {
            const client_region& one = regions_[i];
            if (one.block != &block || offset < one.offset || offset - one.offset >= one.size) continue;
            const page_notice page{i, offset - one.offset};
            const std::lock_guard lock(missed_mutex_);
            if (missed_.erase(page) == 0) continue;
            if (result<void> sent = send_notice(notices_.get(), page); !sent) done = sent;
        }
        return done;
    }

private:
    const unique_fd notices_;
    const std::vector<client_region> regions_;
    mutable std::mutex missed_mutex_; ///< below; held while a notice of one is sent
    mutable std::set<page_notice> missed_;
};

/// A descriptor that somebody sent is what it should be: polling and reading another would mean nothing.
inline bool is_userfaultfd(int fd) {
    std::array<char, 64> target{};
    const std::string link = "/proc/self/fd/" + std::to_string(fd);
    const ssize_t size = ::readlink(link.c_str(), target.data(), target.size());
    return size > 0 && std::string_view(target.data(), static_cast<std::size_t>(size)) == "anon_inode:[userfaultfd]";
}
inline bool is_notice_socket(int fd) {
    int type = 0;
    int domain = 0;
    socklen_t size = sizeof type;
    return ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) == 0 && type == SOCK_SEQPACKET &&
           ::getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 && domain == AF_UNIX;
}

} // namespace detail

/// Given to `migration::destination::add_postcopy_observer`. Any thread adds and removes backends, in whatever phase the
/// migration is: one that comes late is told what the others were told before. In each the order is QEMU's: ADVISE, LISTEN,
/// SET_MEM_TABLE with its answer and acknowledgement, END. What fails at ADVISE fails the migration, whose source still has
/// its guest; later it fails that backend alone, whose device is then what is missing.
///
/// Before LISTEN a backend must not have been told of memory (`SET_MEM_TABLE`): those that exist refuse LISTEN then, and
/// what it had touched would be there already. Afterwards it has its table: see `client_phase::listening`.
class postcopy_clients final : public postcopy_observer {
public:
    /// A backend has failed. On any thread; it must not call this object.
    using failure_function = std::function<void(const std::string& name, const error& why)>;

    /// What backends map; empty: every RAM block as a whole, at its `ram_options::guest_address`.
    explicit postcopy_clients(std::vector<shared_region> regions = {}, failure_function on_failure = {})
        : wanted_(std::move(regions)), on_failure_(std::move(on_failure)) {}
    ~postcopy_clients() override { end(false); }

    /// A backend with which protocol features were agreed upon, PAGEFAULT among them; a number for `remove`. Where postcopy
    /// is under way already, this tells it all that it has to know, and its failure is none of the migration's.
    result<unsigned> add(std::shared_ptr<front_end> connection) {
        const std::lock_guard lock(phase_mutex_);
        auto one = std::make_shared<client>(++last_number_, std::move(connection));
        result<void> done;
        if (advised_) done = advise(*one);
        if (done && faults_ != nullptr) done = listen(one);
        if (!done) {
            fail(*one, done.error());
            return done.error();
        }
        clients_.push_back(one);
        return one->number;
    }
    /// It leaves, and its descriptors are closed. Where it listens its connection is ended, too: POSTCOPY_END would tell it that
    /// every page is there, and it would make pages of zeros of those that aren't. Harmless for one that is gone.
    void remove(unsigned number) {
        const std::lock_guard lock(phase_mutex_);
        const auto found = std::find_if(
            clients_.begin(), clients_.end(), [&](const std::shared_ptr<client>& one) { return one->number == number; });
        if (found == clients_.end()) return;
        const std::shared_ptr<client> one = *found;
        clients_.erase(found);
        if (one->phase == client_phase::listening) {
            one->is_leaving = true;
            one->connection->shutdown();
            stop_serving(*one);
        } else {
            say_end({&one, 1});
        }
    }
    /// Of those that were added and not removed.
    std::vector<client_status> status() const {
        const std::lock_guard lock(phase_mutex_);
        std::vector<client_status> all;
        for (const std::shared_ptr<client>& one : clients_) {
            const std::lock_guard failure_lock(one->failure_mutex);
            all.push_back({one->number, one->connection->name(), one->is_over ? client_phase::failed : one->phase, one->failure});
        }
        return all;
    }

    // ---- for the destination

    result<void> advise(const ram_section& ram) override {
        const std::lock_guard lock(phase_mutex_);
        ram_ = &ram;
        advised_ = true;
        for (const std::shared_ptr<client>& one : clients_)
            if (result<void> done = advise(*one); !done) {
                fail(*one, done.error());
                return done;
            }
        return {};
    }
    result<void> listen(fault_thread& faults) override {
        const std::lock_guard lock(phase_mutex_);
        faults_ = &faults;
        for (const std::shared_ptr<client>& one : clients_)
            if (one->phase == client_phase::advised)
                if (result<void> done = listen(one); !done) fail(*one, done.error());
        return {};
    }
    void placed(ram_block& block, std::uint64_t offset, std::uint64_t size) noexcept override {
        const std::shared_lock lock(mapped_mutex_);
        // That one of them isn't there any more is seen elsewhere.
        for (const std::shared_ptr<const detail::client_memory>& one : mapped_) static_cast<void>(one->wake(block, offset, size));
    }
    void end(bool complete) noexcept override {
        const std::lock_guard lock(phase_mutex_);
        // What they would take for the guest's memory isn't: that they are told by the end of the connection.
        if (!complete)
            for (const std::shared_ptr<client>& one : clients_)
                if (one->phase == client_phase::listening && !is_over(*one))
                    fail(*one, one->connection->within(request::postcopy_end, error(errc::io, "all of the memory", "a migration that has failed")));
        say_end(clients_);
        faults_ = nullptr;
        ram_ = nullptr;
        advised_ = false;
    }

private:
    struct client {
        client(unsigned its_number, std::shared_ptr<front_end> to) : number(its_number), connection(std::move(to)) {}

        const unsigned number;
        const std::shared_ptr<front_end> connection;
        // Under phase_mutex_.
        client_phase phase = client_phase::connected;
        unique_fd fault;                                     ///< what ADVISE was answered with, up to LISTEN
        std::shared_ptr<const detail::client_memory> memory; ///< from LISTEN on
        std::optional<unsigned> served;                      ///< its number at the fault thread

        std::atomic<bool> is_leaving = false; ///< that it ends what it has for its faults is no failure

        std::mutex failure_mutex; ///< below: the fault thread writes it
        std::optional<error> failure;
        bool is_over = false;
    };

    // ---- all under phase_mutex_

    result<void> advise(client& one) {
        front_end& to = *one.connection;
        if (!to.has(protocol_feature::pagefault))
            return to.within(request::postcopy_advise,
                error(errc::unsupported, "a backend with the protocol feature PAGEFAULT, or none during postcopy", "one without it"));
        // Where nobody maps it, it may be what it is.
        if (result<void> fit = check_memory(); !fit) return fit;
        result<message> answer = to.ask(make_request(request::postcopy_advise));
        if (!answer) return answer.error();
        if (result<void> empty = answer->no_payload(); !empty) return to.within(request::postcopy_advise, empty.error());
        const bool notices = to.has(protocol_feature::page_notices);
        if (answer->descriptors.size() != 1)
            return to.within(request::postcopy_advise,
                error(errc::unsupported, "a backend with a userfaultfd for postcopy",
                    std::to_string(answer->descriptors.size()) + " descriptors"));
        const int fd = answer->descriptors.front().get();
        if (!(notices ? detail::is_notice_socket(fd) : detail::is_userfaultfd(fd)))
            return to.within(request::postcopy_advise,
                error(errc::bad_message, notices ? "a socket for page notices" : "a userfaultfd", "another descriptor"));
        one.fault = std::move(answer->descriptors.front());
        one.phase = client_phase::advised;
        return {};
    }
    result<void> listen(const std::shared_ptr<client>& one) {
        front_end& to = *one->connection;
        // Backends that exist answer this whether REPLY_ACK was agreed upon or not.
        const result<message> heard = to.ask(make_request(request::postcopy_listen, message_flag::need_reply));
        if (!heard) return heard.error();
        if (result<void> done = to.check_acknowledgement(*heard); !done) return done;
        result<std::vector<detail::client_region>> regions = send_table(to);
        if (!regions) return regions.error();
        one->is_leaving = false;
        fault_thread::client faults;
        faults.fd = one->fault.get();
        faults.name = to.name();
        faults.failed = [this, one](const error& why, bool is_over) {
            if (is_over && one->is_leaving) return;
            // Nobody serves its faults: it must not wait for that.
            if (is_over) one->connection->shutdown();
            note(*one, why, is_over);
        };
        faults.connection = to.native_handle();
        if (to.has(protocol_feature::page_notices)) {
            const auto memory = std::make_shared<detail::noticed_memory>(std::move(one->fault), std::move(*regions));
            faults.read = [memory](const fault_thread::found_function& found) { return memory->read(found); };
            one->memory = memory;
        } else {
            const auto memory = std::make_shared<detail::addressed_memory>(std::move(one->fault), std::move(*regions));
            faults.translate = [memory](std::uint64_t address) { return memory->translate(address); };
            one->memory = memory;
        }
        faults.wake = [memory = one->memory](const ram_address& where) {
            return memory->wake(*where.block, where.offset, where.block->options.host_page_size);
        };
        {
            const std::lock_guard lock(mapped_mutex_);
            mapped_.push_back(one->memory);
        }
        const result<unsigned> served = faults_->add(std::move(faults));
        if (!served) return served.error();
        one->served = *served;
        one->phase = client_phase::listening;
        to.set_waits_for_pages(true);
        // It registers its mappings when this has come: what it touches from then on is seen here. QEMU's has a value.
        return to.send(make_message(request::set_mem_table, std::uint64_t{0}));
    }
    /// What they are to map must be something that another process can map, and into whose file we can put pages.
    result<void> check_memory() const {
        const result<shared_memory> found = shared_memory::find(*ram_, wanted_);
        if (!found) return std::move(error(found.error()).within("vhost-user"));
        for (const detail::client_region& one : found->regions) {
            const auto refuse = [&](std::string remedy, std::string reason) {
                return std::move(error(errc::unsupported, std::move(remedy), std::move(reason)).within(one.block->name).within("vhost-user"));
            };
            if (vmstate::detail::memory_kind_of(one.block->used()) != vmstate::detail::memory_kind::shared)
                return refuse("memory of a memfd, or of a file in /dev/shm or hugetlbfs, mapped shared; or a list of regions "
                              "without this block",
                    "private memory, which no backend can map");
            if (one.block->options.file.fd < 0)
                return refuse("ram_options.file, for a backend to map", "shared memory whose file is unknown");
        }
        return {};
    }
    /// The regions with their descriptors; where the backend has them.
    result<std::vector<detail::client_region>> send_table(front_end& to) const {
        result<shared_memory> shared = shared_memory::find(*ram_, wanted_);
        if (!shared) return to.within(request::set_mem_table, shared.error());
        for (const detail::client_region& one : shared->regions)
            if (ram_->is_ignored(*one.block))
                return to.within(request::set_mem_table,
                    error(errc::unsupported, "no capability x-ignore-shared with backends in postcopy", one.block->name));
        const result<message> table = shared->make_table();
        if (!table) return to.within(request::set_mem_table, table.error());
        const result<message> answer = to.ask(*table);
        if (!answer) return answer.error();
        if (result<void> fits = take_answer(*answer, *shared, !to.has(protocol_feature::page_notices)); !fits) return to.within(request::set_mem_table, fits.error());
        return std::move(shared->regions);
    }
    /// The same table, with the backend's addresses where they are to be known.
    static result<void> take_answer(const message& answer, shared_memory& shared, bool has_addresses) {
        const result<std::vector<memory_region>> theirs = memory_regions_of(answer);
        if (!theirs) return theirs.error();
        if (const result<memory_table> fits = memory_table::from(*theirs, std::nullopt); !fits) return fits.error();
        if (theirs->size() != shared.table.size())
            return error(errc::bad_message, std::to_string(shared.table.size()) + " regions, as sent", std::to_string(theirs->size()));
        for (std::size_t i = 0; i < theirs->size(); ++i) {
            const memory_region& sent = shared.table[i];
            const memory_region& there = (*theirs)[i];
            if (there.guest_address != sent.guest_address || there.size != sent.size)
                return error(errc::bad_message, "the region " + memory_table::describe(sent), memory_table::describe(there));
            if (!has_addresses) continue;
            const std::uint64_t unit = shared.regions[i].block->options.host_page_size;
            if (there.user_address == 0 || there.user_address % unit != 0)
                return error(errc::bad_message, "an address of whole pages of " + std::to_string(unit) + " bytes",
                    memory_table::describe(there));
            shared.regions[i].address = there.user_address;
        }
        return {};
    }

    /// It can't be gone on with. Where it has memory, it is told so by its connection: nobody serves its faults.
    void fail(client& one, const error& why) {
        if (one.phase != client_phase::connected) one.connection->shutdown();
        stop_serving(one);
        note(one, why, true);
    }
    void stop_serving(client& one) {
        if (one.served && faults_ != nullptr) faults_->remove(*one.served);
        one.served.reset();
        one.connection->set_waits_for_pages(false);
        if (one.memory) {
            const std::lock_guard lock(mapped_mutex_);
            std::erase(mapped_, one.memory);
        }
        one.memory.reset();
        one.fault.reset();
    }
    /// POSTCOPY_END, to all of them first, so that they see to it at the same time. Those that listen are served until they
    /// have answered: one that still waits for a page, and for which its own thread of the messages waits, needs that.
    void say_end(std::span<const std::shared_ptr<client>> leaving) {
        std::vector<std::pair<client*, front_end::pending_answer>> asked;
        for (const std::shared_ptr<client>& one : leaving) {
            // That it goes now is no failure, nor that it closes its end of what its faults come by.
            one->is_leaving = true;
            one->connection->set_waits_for_pages(false);
            if (one->phase != client_phase::advised && one->phase != client_phase::listening) continue;
            result<front_end::pending_answer> answer =
                one->connection->start(make_request(request::postcopy_end, message_flag::need_reply));
            if (answer) asked.emplace_back(one.get(), std::move(*answer));
            else if (!is_over(*one)) note(*one, answer.error(), true);
        }
        for (auto& [one, answer] : asked) {
            const result<message> heard = answer.wait();
            const result<void> done = heard ? one->connection->check_acknowledgement(*heard) : result<void>(heard.error());
            if (!done && !is_over(*one)) note(*one, done.error(), true);
        }
        for (const std::shared_ptr<client>& one : leaving) {
            stop_serving(*one);
            if (one->phase != client_phase::connected) one->phase = client_phase::ended;
        }
    }

    static bool is_over(client& one) {
        const std::lock_guard lock(one.failure_mutex);
        return one.is_over;
    }
    /// Any thread, the fault thread above all.
    void note(client& one, const error& why, bool is_over) {
        {
            const std::lock_guard lock(one.failure_mutex);
            one.failure = why;
            one.is_over |= is_over;
        }
        if (on_failure_) on_failure_(one.connection->name(), why);
    }

    const std::vector<shared_region> wanted_;
    const failure_function on_failure_;

    mutable std::mutex phase_mutex_; ///< all below but mapped_; held while a backend is asked something
    const ram_section* ram_ = nullptr; ///< from ADVISE to the end
    fault_thread* faults_ = nullptr;   ///< from LISTEN to the end
    bool advised_ = false;
    unsigned last_number_ = 0;
    std::vector<std::shared_ptr<client>> clients_;

    std::shared_mutex mapped_mutex_; ///< below; the memory of those that listen
    std::vector<std::shared_ptr<const detail::client_memory>> mapped_;
};

} // namespace vmstate::vhost_user
