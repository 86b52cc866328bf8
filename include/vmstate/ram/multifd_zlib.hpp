// SPDX-License-Identifier: BSL-1.0
//
// multifd pages compressed by zlib, as QEMU's multifd-compression=zlib. Depends on multifd_compression.hpp and zlib: link
// vmstate::zlib.
#pragma once

#include <zlib.h>

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <vmstate/ram/multifd_compression.hpp>

namespace vmstate {

namespace detail {

inline error zlib_error(const char* what, int code, const z_stream& stream) {
    return error(errc::bad_ram, {}, std::string(what) + ": " + (stream.msg != nullptr ? stream.msg : ::zError(code)));
}

/// One stream for all packets of the channel, flushed at the end of each.
class zlib_compressor final : public multifd_compressor {
public:
    static result<std::unique_ptr<multifd_compressor>> make(int level) {
        auto made = std::make_unique<zlib_compressor>();
        if (const int code = ::deflateInit(&made->stream_, level); code != Z_OK) return zlib_error("deflateInit", code, made->stream_);
        made->is_open_ = true;
        return std::unique_ptr<multifd_compressor>(std::move(made));
    }
    ~zlib_compressor() override {
        if (is_open_) ::deflateEnd(&stream_);
    }

    result<std::span<const std::byte>> compress(std::span<const std::byte> pages) override {
        stream_.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(pages.data()));
        stream_.avail_in = static_cast<uInt>(pages.size());
        std::size_t size = 0;
        do {
            stream_.next_out = reinterpret_cast<Bytef*>(room_.data() + size);
            stream_.avail_out = static_cast<uInt>(room_.size() - size);
            if (const int code = ::deflate(&stream_, Z_SYNC_FLUSH); code != Z_OK) return zlib_error("deflate", code, stream_);
            size = room_.size() - stream_.avail_out;
            // Room that is left says that all is out.
            if (stream_.avail_out == 0) room_.resize(2 * room_.size());
        } while (stream_.avail_out == 0);
        return std::span<const std::byte>(room_).first(size);
    }

private:
    z_stream stream_{};
    bool is_open_ = false;
    std::vector<std::byte> room_ = std::vector<std::byte>(multifd_packet_memory + multifd_packet_memory / 8);
};

class zlib_decompressor final : public multifd_decompressor {
public:
    static result<std::unique_ptr<multifd_decompressor>> make() {
        auto made = std::make_unique<zlib_decompressor>();
        if (const int code = ::inflateInit(&made->stream_); code != Z_OK) return zlib_error("inflateInit", code, made->stream_);
        made->is_open_ = true;
        return std::unique_ptr<multifd_decompressor>(std::move(made));
    }
    ~zlib_decompressor() override {
        if (is_open_) ::inflateEnd(&stream_);
    }

    result<void> decompress(std::span<const std::byte> packet, std::span<const std::span<std::byte>> pages) override {
        stream_.next_in = const_cast<Bytef*>(reinterpret_cast<const Bytef*>(packet.data()));
        stream_.avail_in = static_cast<uInt>(packet.size());
        for (const std::span<std::byte> part : pages) {
            stream_.next_out = reinterpret_cast<Bytef*>(part.data());
            stream_.avail_out = static_cast<uInt>(part.size());
            while (stream_.avail_out != 0)
                // Z_BUF_ERROR is what there is to say when no byte has moved.
                if (const int code = ::inflate(&stream_, Z_SYNC_FLUSH); code != Z_OK)
                    return code == Z_BUF_ERROR ? error(errc::bad_ram, "compressed data for all pages of the packet", "less")
                                               : zlib_error("inflate", code, stream_);
        }
        // The mark of the flush has no bytes of pages in it; and there may be more in what has been read.
        std::byte more{};
        for (bool left = true; left;) {
            stream_.next_out = reinterpret_cast<Bytef*>(&more);
            stream_.avail_out = 1;
            const int code = ::inflate(&stream_, Z_SYNC_FLUSH);
            left = stream_.avail_in != 0;
            if (stream_.avail_out == 0) return error(errc::bad_ram, "compressed data of the packet's pages", "more");
            if (code != Z_OK && (code != Z_BUF_ERROR || left)) return zlib_error("inflate", code, stream_);
        }
        return {};
    }

private:
    z_stream stream_{};
    bool is_open_ = false;
};

} // namespace detail

/// `level`: 0 (none at all) to 9 (`multifd-zlib-level`, 1 in QEMU, too). The receiver needs no level.
inline multifd_compression multifd_zlib(int level = 1) {
    return {"zlib", multifd_method::zlib, [level] { return detail::zlib_compressor::make(level); },
        [] { return detail::zlib_decompressor::make(); }};
}

} // namespace vmstate
