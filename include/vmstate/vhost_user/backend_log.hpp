// SPDX-License-Identifier: BSL-1.0
//
// What vhost-user backends write to guest memory, as a dirty log: a migration's source asks for it beside the guest's own
// (ram/merged_log.hpp). Depends on front_end.hpp, shared_memory.hpp, dirty_pages.hpp and ram/dirty_log.hpp.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/machine/ram_section.hpp>
#include <vmstate/ram/dirty_log.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/vhost_user/dirty_pages.hpp>
#include <vmstate/vhost_user/front_end.hpp>
#include <vmstate/vhost_user/shared_memory.hpp>

namespace vmstate::vhost_user {

/// All backends mark pages in one bitmap. They are told where it is (SET_LOG_BASE) and that it is time (SET_FEATURES with
/// VHOST_F_LOG_ALL) when the first block's log starts, and that it is over when the last one stops. Any thread calls
/// anything. The used rings are the VMM's to see to: SET_VRING_ADDR says whether, and at which address, they are logged.
class backend_log {
public:
    /// `regions` is what backends map, as for `postcopy_clients`. The RAM and this object outlive the logs of its blocks.
    explicit backend_log(const ram_section& ram, std::vector<shared_region> regions = {})
        : ram_(ram), wanted_(std::move(regions)) {}
    backend_log(const backend_log&) = delete;
    backend_log& operator=(const backend_log&) = delete;

    /// A backend with which features were agreed upon, LOG_SHMFD among them; one that comes during a migration logs at once.
    result<void> add(std::shared_ptr<front_end> backend) {
        const std::lock_guard lock(backends_mutex_);
        if (log_)
            if (result<void> begun = begin(*backend); !begun) return begun;
        backends_.push_back(std::move(backend));
        return {};
    }
    /// It writes no guest memory any more. What it has marked stays marked.
    void remove(const front_end& backend) {
        const std::lock_guard lock(backends_mutex_);
        std::erase_if(backends_, [&](const std::shared_ptr<front_end>& one) { return one.get() == &backend; });
    }

    /// A dirty log (ram/dirty_log.hpp) of one block.
    class block_log {
    public:
        result<void> start() { return all_->start(block_); }
        result<std::uint64_t> collect(page_bitmap& into) { return all_->collect(block_, page_size_, into); }
        result<void> stop() { return all_->stop(block_); }

    private:
        friend backend_log;
        block_log(backend_log& all, std::string block, std::size_t page_size)
            : all_(&all), block_(std::move(block)), page_size_(page_size) {}

        backend_log* all_;
        std::string block_;
        std::size_t page_size_;
    };
    /// `page_size` is the target's.
    block_log of(std::string block, std::size_t page_size = 4096) { return block_log(*this, std::move(block), page_size); }

private:
    result<void> start(const std::string& block) {
        const std::lock_guard lock(backends_mutex_);
        if (started_.contains(block)) return vmstate::detail::log_started();
        if (!log_)
            if (result<void> begun = begin_all(); !begun) {
                static_cast<void>(end_all());
                return begun;
            }
        started_.insert(block);
        return {};
    }
    result<std::uint64_t> collect(const std::string& block, std::size_t page_size, page_bitmap& into) {
        const std::lock_guard lock(backends_mutex_);
        if (!started_.contains(block)) return vmstate::detail::log_not_started();
        const ram_block* const its = ram_.find(block);
        if (its == nullptr) return error(errc::invalid_argument, "a RAM block", block);
        const vmstate::detail::block_pages pages(its->used_length, page_size);
        if (result<void> fits = pages.check(into); !fits) return fits.error();
        std::uint64_t found = 0;
        for (std::size_t i = 0; i != memory_.regions.size(); ++i) {
            const detail::client_region& region = memory_.regions[i];
            if (region.block != its) continue;
            const std::uint64_t begin = memory_.table[i].guest_address;
            log_->log.take(begin, region.size, [&](std::uint64_t address) {
                // The first page of a region may begin before it.
                const std::uint64_t first = std::max(address, begin);
                const std::uint64_t last = std::min(address + dirty_pages::page_size, begin + region.size);
                found += pages.mark(into, region.offset + (first - begin), last - first);
            });
        }
        return found;
    }
    result<void> stop(const std::string& block) {
        const std::lock_guard lock(backends_mutex_);
        if (started_.erase(block) == 0 || !started_.empty()) return {};
        return end_all();
    }

    // ---- all under backends_mutex_

    result<void> begin_all() {
        result<shared_memory> found = shared_memory::find(ram_, wanted_);
        if (!found) return std::move(error(found.error()).within("vhost-user"));
        memory_ = std::move(*found);
        result<dirty_pages::shared> made = dirty_pages::make(memory_.guest_end());
        if (!made) return made.error();
        log_.emplace(std::move(*made));
        for (const std::shared_ptr<front_end>& one : backends_)
            if (result<void> begun = begin(*one); !begun) return begun;
        return {};
    }
    result<void> begin(front_end& backend) {
        if (result<void> told = backend.set_log(log_->log.size(), log_->file); !told) return told;
        return backend.set_logging(true);
    }
    /// One that is gone marks nothing any more.
    result<void> end_all() {
        result<void> done;
        for (const std::shared_ptr<front_end>& one : backends_)
            if ((one->features() & feature::log_all) != 0)
                if (result<void> told = one->set_logging(false); !told && done) done = std::move(told);
        log_.reset();
        return done;
    }

    const ram_section& ram_;
    const std::vector<shared_region> wanted_;

    std::mutex backends_mutex_; ///< all below; held while a backend is told something
    std::vector<std::shared_ptr<front_end>> backends_;
    std::set<std::string> started_; ///< blocks
    std::optional<dirty_pages::shared> log_; ///< while one is
    shared_memory memory_;
};

} // namespace vmstate::vhost_user
