// SPDX-License-Identifier: BSL-1.0
//
// multifd pages compressed by Zstandard, as QEMU's multifd-compression=zstd. Depends on multifd_compression.hpp and
// libzstd: link vmstate::zstd.
#pragma once

#include <zstd.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <vmstate/ram/multifd_compression.hpp>

namespace vmstate {

namespace detail {

inline error zstd_error(const char* what, std::size_t code) {
    return error(errc::bad_ram, {}, std::string(what) + ": " + ::ZSTD_getErrorName(code));
}

/// One frame for all packets of the channel, flushed at the end of each.
class zstd_compressor final : public multifd_compressor {
public:
    static result<std::unique_ptr<multifd_compressor>> make(int level) {
        auto made = std::make_unique<zstd_compressor>();
        if (!made->stream_) return error(errc::io, {}, "ZSTD_createCStream: out of memory");
        if (const std::size_t code = ::ZSTD_initCStream(made->stream_.get(), level); ::ZSTD_isError(code) != 0)
            return zstd_error("ZSTD_initCStream", code);
        return std::unique_ptr<multifd_compressor>(std::move(made));
    }

    result<std::span<const std::byte>> compress(std::span<const std::byte> pages) override {
        ZSTD_inBuffer in{pages.data(), pages.size(), 0};
        std::size_t size = 0;
        for (;;) {
            ZSTD_outBuffer out{room_.data(), room_.size(), size};
            const std::size_t left = ::ZSTD_compressStream2(stream_.get(), &out, &in, ZSTD_e_flush);
            if (::ZSTD_isError(left) != 0) return zstd_error("ZSTD_compressStream2", left);
            size = out.pos;
            if (left == 0) return std::span<const std::byte>(room_).first(size);
            if (size == room_.size()) room_.resize(2 * room_.size());
        }
    }

private:
    struct deleter {
        void operator()(ZSTD_CStream* stream) const noexcept { ::ZSTD_freeCStream(stream); }
    };
    std::unique_ptr<ZSTD_CStream, deleter> stream_{::ZSTD_createCStream()};
    std::vector<std::byte> room_ = std::vector<std::byte>(multifd_packet_memory + multifd_packet_memory / 8);
};

/// A frame may ask for a window of at most 128 MiB, libzstd's own limit; QEMU's levels, up to 20, need no more.
class zstd_decompressor final : public multifd_decompressor {
public:
    static result<std::unique_ptr<multifd_decompressor>> make() {
        auto made = std::make_unique<zstd_decompressor>();
        if (!made->stream_) return error(errc::io, {}, "ZSTD_createDStream: out of memory");
        if (const std::size_t code = ::ZSTD_initDStream(made->stream_.get()); ::ZSTD_isError(code) != 0)
            return zstd_error("ZSTD_initDStream", code);
        return std::unique_ptr<multifd_decompressor>(std::move(made));
    }

    result<void> decompress(std::span<const std::byte> packet, std::span<const std::span<std::byte>> pages) override {
        ZSTD_inBuffer in{packet.data(), packet.size(), 0};
        for (const std::span<std::byte> part : pages) {
            ZSTD_outBuffer out{part.data(), part.size(), 0};
            while (out.pos != out.size) {
                const result<std::size_t> moved = step(out, in);
                if (!moved) return moved.error();
                if (*moved == 0) return error(errc::bad_ram, "compressed data for all pages of the packet", "less");
            }
        }
        // There may be more in what is left, or in what has been read.
        std::byte more{};
        for (bool left = true; left;) {
            ZSTD_outBuffer out{&more, 1, 0};
            const result<std::size_t> moved = step(out, in);
            if (!moved) return moved.error();
            left = in.pos != in.size;
            if (out.pos != 0 || (left && *moved == 0)) return error(errc::bad_ram, "compressed data of the packet's pages", "more");
        }
        return {};
    }

private:
    /// How many bytes have moved, on either side.
    result<std::size_t> step(ZSTD_outBuffer& out, ZSTD_inBuffer& in) {
        const std::size_t before = out.pos, read = in.pos;
        const std::size_t code = ::ZSTD_decompressStream(stream_.get(), &out, &in);
        if (::ZSTD_isError(code) != 0) return zstd_error("ZSTD_decompressStream", code);
        return (out.pos - before) + (in.pos - read);
    }

    struct deleter {
        void operator()(ZSTD_DStream* stream) const noexcept { ::ZSTD_freeDStream(stream); }
    };
    std::unique_ptr<ZSTD_DStream, deleter> stream_{::ZSTD_createDStream()};
};

} // namespace detail

/// `level`: as `zstd`'s, QEMU allows 0 to 20 (`multifd-zstd-level`, 1 in QEMU, too). The receiver needs no level.
inline multifd_compression multifd_zstd(int level = 1) {
    return {"zstd", multifd_method::zstd, [level] { return detail::zstd_compressor::make(level); },
        [] { return detail::zstd_decompressor::make(); }};
}

} // namespace vmstate
