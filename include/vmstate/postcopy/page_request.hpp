// SPDX-License-Identifier: BSL-1.0
//
// A destination's requests for pages as the return path carries them: REQ_PAGES_ID with the block's name, REQ_PAGES for
// the block of the request before (QEMU: migrate_send_rp_message_req_pages). Depends on codec/ and machine/.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <vmstate/codec/byte_order.hpp>
#include <vmstate/codec/reader.hpp>
#include <vmstate/machine/ram_block.hpp>
#include <vmstate/machine/ram_section.hpp>
#include <vmstate/machine/wire.hpp>
#include <vmstate/support/result.hpp>

namespace vmstate {

/// Their types on the return path.
enum class page_request_type : std::uint16_t {
    req_pages_id = 3, ///< be64 start, be32 length, counted block name
    req_pages = 4,    ///< be64 start, be32 length
};

/// A message, ready to be sent.
class page_request_message {
public:
    /// `block` empty: the one of the request before.
    page_request_message(std::uint64_t start, std::uint32_t length, std::string_view block) noexcept {
        std::byte* p = detail::store_big(payload_.data(), start);
        p = detail::store_big(p, length);
        if (!block.empty()) {
            type_ = page_request_type::req_pages_id;
            block = block.substr(0, max_name_size);
            *p++ = static_cast<std::byte>(block.size());
            for (const char c : block) *p++ = static_cast<std::byte>(c);
        }
        size_ = static_cast<std::size_t>(p - payload_.data());
    }
    page_request_type type() const noexcept { return type_; }
    std::span<const std::byte> payload() const noexcept { return {payload_.data(), size_}; }

private:
    page_request_type type_ = page_request_type::req_pages;
    std::size_t size_ = 0;
    std::array<std::byte, 12 + 1 + max_name_size> payload_;
};

/// What a source was asked for: whole host pages inside the block.
struct page_request {
    ram_block* block = nullptr;
    std::uint64_t start = 0;
    std::uint64_t length = 0;
};

/// Reads and checks a destination's requests; it remembers the block that REQ_PAGES refers to.
class page_request_decoder {
public:
    /// `ram` has to outlive this.
    explicit page_request_decoder(const ram_section& ram) noexcept : ram_(ram) {}

    /// A new connection: its first request names its block.
    void forget_block() noexcept { last_ = nullptr; }

    /// `errc::bad_command` for a malformed message, `errc::bad_ram` for one that doesn't fit the blocks: a source fails
    /// with it.
    result<page_request> decode(page_request_type type, std::span<const std::byte> payload) {
        const char* const name = type == page_request_type::req_pages_id ? "REQ_PAGES_ID" : "REQ_PAGES";
        result<page_request> read = decode_message(type, payload);
        if (!read) return std::move(read.error().within(name));
        return read;
    }

private:
    result<page_request> decode_message(page_request_type type, std::span<const std::byte> payload) {
        memory_reader in(payload);
        page_request request;
        request.start = in.get_be64();
        request.length = in.get_be32();
        if (type == page_request_type::req_pages_id) {
            const std::string name = in.get_counted_string();
            if (in.failed()) return error(errc::bad_command, in.failure().message());
            last_ = ram_.find(name);
            if (last_ == nullptr) return error(errc::bad_ram, "a block of this machine", '"' + name + '"');
        }
        if (in.failed()) return error(errc::bad_command, in.failure().message());
        if (in.remaining() != 0)
            return error(errc::bad_command, "nothing behind the request", std::to_string(in.remaining()) + " bytes");
        if (last_ == nullptr) return error(errc::bad_command, "a block's name in the first request", "none");
        request.block = last_;
        const auto refuse = [&](std::string expected) {
            return std::move(error(errc::bad_ram, std::move(expected),
                std::to_string(request.start) + "+" + std::to_string(request.length))
                                 .within(last_->name));
        };
        const std::uint64_t unit = last_->options.host_page_size;
        if (request.length == 0) return refuse("a request for something");
        if (request.start % unit != 0 || request.length % unit != 0)
            return refuse("whole pages of " + std::to_string(unit) + " bytes");
        if (request.start > last_->used_length || request.length > last_->used_length - request.start)
            return refuse("a request within " + std::to_string(last_->used_length) + " bytes");
        return request;
    }

    const ram_section& ram_;
    ram_block* last_ = nullptr;
};

} // namespace vmstate
