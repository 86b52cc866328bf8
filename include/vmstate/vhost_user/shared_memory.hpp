// SPDX-License-Identifier: BSL-1.0
//
// Which parts of a machine's RAM its vhost-user backends map, and how they are told: the VMM's side of SET_MEM_TABLE.
// Depends on memory_table.hpp, machine/ram_section.hpp and Linux.
#pragma once

#include <fcntl.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <vmstate/machine/ram_section.hpp>
#include <vmstate/ram/userfault.hpp>
#include <vmstate/support/result.hpp>
#include <vmstate/support/unique_fd.hpp>
#include <vmstate/vhost_user/memory_table.hpp>
#include <vmstate/vhost_user/message.hpp>

namespace vmstate::vhost_user {

/// A part of a RAM block that backends map: whole host pages. Bytes.
struct shared_region {
    std::string block;
    std::uint64_t offset = 0;
    std::uint64_t size = 0; ///< 0: up to the block's end
    std::uint64_t guest_address = 0;
};

namespace detail {

/// A region of a client's table, and where its memory is.
struct client_region {
    ram_block* block;
    std::uint64_t offset;  ///< in the block
    std::uint64_t size;
    std::uint64_t address; ///< in the client
};

} // namespace detail

/// What is shared, and how it stands in SET_MEM_TABLE.
struct shared_memory {
    std::vector<detail::client_region> regions;
    std::vector<memory_region> table;

    /// Where it lies now: a stream may change a block's length. `wanted` is empty for every block as a whole, at its
    /// `ram_options::guest_address`.
    static result<shared_memory> find(const ram_section& ram, std::span<const shared_region> wanted) {
        shared_memory found;
        if (wanted.empty())
            for (const std::unique_ptr<ram_block>& block : ram.blocks())
                if (block->used_length != 0) found.add(*block, 0, block->used_length, block->options.guest_address);
        for (const shared_region& one : wanted) {
            ram_block* const block = ram.find(one.block);
            if (block == nullptr) return error(errc::invalid_argument, "a RAM block", one.block);
            const std::uint64_t unit = block->options.host_page_size;
            const std::uint64_t rest = one.offset < block->used_length ? block->used_length - one.offset : 0;
            const std::uint64_t size = one.size != 0 ? one.size : rest;
            if (size == 0 || size > rest || one.offset % unit != 0 || size % unit != 0)
                return std::move(error(errc::invalid_argument,
                    "a region of whole host pages within " + std::to_string(block->used_length) + " bytes",
                    std::to_string(one.offset) + "+" + std::to_string(one.size))
                                     .within(one.block));
            found.add(*block, one.offset, size, one.guest_address);
        }
        if (found.table.empty() || found.table.size() > max_descriptors)
            return error(errc::unsupported, "1 to " + std::to_string(max_descriptors) + " regions for backends to map",
                std::to_string(found.table.size()));
        if (const result<memory_table> fits = memory_table::from(found.table, std::nullopt); !fits) return fits.error();
        return found;
    }
    /// SET_MEM_TABLE, with a descriptor for each region.
    result<message> make_table() const {
        std::vector<unique_fd> descriptors;
        for (const detail::client_region& one : regions) {
            if (one.block->options.file.fd < 0)
                return std::move(error(errc::unsupported, "ram_options.file, for a backend to map", "memory whose file is unknown")
                                     .within(one.block->name));
            descriptors.emplace_back(::fcntl(one.block->options.file.fd, F_DUPFD_CLOEXEC, 0));
            if (!descriptors.back()) return userfault::failure("fcntl");
        }
        return make_memory_table(table, std::move(descriptors));
    }
    /// The first guest-physical address behind all of it.
    std::uint64_t guest_end() const noexcept {
        std::uint64_t end = 0;
        for (const memory_region& one : table)
            if (one.guest_address + one.size > end) end = one.guest_address + one.size;
        return end;
    }

private:
    void add(ram_block& block, std::uint64_t offset, std::uint64_t size, std::uint64_t guest_address) {
        regions.push_back({&block, offset, size, 0});
        table.push_back({guest_address, size, reinterpret_cast<std::uintptr_t>(block.memory.data()) + offset,
            block.options.file.offset + offset});
    }
};

} // namespace vmstate::vhost_user
