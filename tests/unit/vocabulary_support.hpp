// SPDX-License-Identifier: BSL-1.0
//
// What the vocabulary tests share: bytes written as hexadecimal text, and failures written as one line, so that a test
// is the struct, its description and its bytes. Depends on the library's describe.hpp and on Catch2.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <vmstate/describe.hpp>

#include <support/catch.hpp>

namespace vmstate::tests {

/// Hexadecimal digits in pairs; spaces are for the reader; text stands in quotes: "05 0a 'fw_cfg/dma' 00000000".
inline std::vector<std::byte> wire(std::string_view text) {
    const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
    std::vector<std::byte> bytes;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == ' ') continue;
        if (text[i] == '\'') {
            for (++i; text[i] != '\''; ++i) bytes.push_back(static_cast<std::byte>(text[i]));
            continue;
        }
        bytes.push_back(static_cast<std::byte>(digit(text[i]) * 16 + digit(text[i + 1])));
        ++i;
    }
    return bytes;
}

inline std::string hex(std::span<const std::byte> bytes) {
    std::string text;
    for (const std::byte b : bytes) {
        text += "0123456789abcdef"[std::to_integer<unsigned>(b) >> 4];
        text += "0123456789abcdef"[std::to_integer<unsigned>(b) & 15u];
    }
    return text;
}
inline std::string hex(std::string_view text) { return hex(wire(text)); }

/// A failure in one line, or "ok".
inline std::string outcome(const result<void>& r) {
    if (r.has_value()) return "ok";
    const error& e = r.error();
    return std::string(to_string(e.code())) + " | " + std::string(e.path()) + " | " + std::to_string(e.offset());
}
/// The line that `outcome` gives for this failure.
inline std::string failure(errc code, std::string_view path, std::uint64_t offset) {
    return std::string(to_string(code)) + " | " + std::string(path) + " | " + std::to_string(offset);
}

/// A stream that comes byte by byte and whose end nobody knows beforehand: a socket at its worst.
class trickling_reader final : public reader {
public:
    explicit trickling_reader(std::vector<std::byte> bytes) : bytes_(std::move(bytes)) {
        set_window(window_, window_, window_, 0);
    }
    std::size_t unread() const { return window() + bytes_.size() - next_; }

private:
    void refill(std::size_t count) override {
        const std::size_t kept = window();
        const std::uint64_t base = offset();
        std::memmove(window_, cursor(), kept);
        std::size_t have = kept;
        while (have < count && next_ != bytes_.size()) window_[have++] = bytes_[next_++];
        set_window(window_, window_, window_ + have, base);
    }

    std::vector<std::byte> bytes_;
    std::size_t next_ = 0;
    std::byte window_[max_window]{};
};

/// Never has more room than is asked for.
class dripping_writer final : public writer {
public:
    dripping_writer() { set_window(window_, window_, window_, 0); }
    std::vector<std::byte> take() {
        make_room(0);
        return std::move(bytes_);
    }

private:
    void make_room(std::size_t count) override {
        bytes_.insert(bytes_.end(), window_, cursor());
        set_window(window_, window_, window_ + count, bytes_.size());
    }

    std::vector<std::byte> bytes_;
    std::byte window_[max_reserve]{};
};

/// What `state` is on the wire, as hexadecimal text; the measured size agrees with it, and so does what a writer gets that
/// has no room to spare.
template <const auto& Description, class S>
std::string saved(S&& state) {
    const auto bytes = to_bytes<Description>(state);
    if (!bytes.has_value()) return bytes.error().message();
    CHECK(wire_size<Description>(state) == bytes->size());
    dripping_writer w;
    CHECK(outcome(save<Description>(w, state)) == "ok");
    CHECK(w.offset() == bytes->size());
    CHECK(w.take() == *bytes);
    return hex(*bytes);
}
template <const auto& Description, class S>
errc why_not_saved(S&& state) {
    const auto bytes = to_bytes<Description>(state);
    return bytes.has_value() ? errc::ok : bytes.error().code();
}

/// Loads from memory that ends exactly where the bytes end, so that an address sanitizer sees one byte too many.
template <const auto& Description, class S>
result<void> loaded(std::span<const std::byte> bytes, S& state, int version_id = Description.version_id) {
    const std::unique_ptr<std::byte[]> exact(new std::byte[bytes.size()]);
    for (std::size_t i = 0; i != bytes.size(); ++i) exact[i] = bytes[i];
    return from_bytes<Description>(std::span<const std::byte>(exact.get(), bytes.size()), state, version_id);
}
template <const auto& Description, class S>
result<void> loaded(std::string_view text, S& state, int version_id = Description.version_id) {
    return loaded<Description>(wire(text), state, version_id);
}

/// Every strict prefix of `text` is an error that has a path inside the description and an offset inside the prefix.
/// `make` makes the state to load into. Lengths in `complete` are bodies of their own: without a last subsection, say.
template <const auto& Description, class Make>
void check_every_prefix_is_refused(std::string_view text, int version_id, Make make,
                                   const std::vector<std::size_t>& complete = {}) {
    const std::vector<std::byte> bytes = wire(text);
    for (std::size_t size = 0; size != bytes.size(); ++size) {
        auto state = make();
        const auto r = loaded<Description>(std::span(bytes).first(size), state, version_id);
        INFO("the first " << size << " of " << bytes.size() << " bytes: " << outcome(r));
        bool is_complete = false;
        for (const std::size_t whole : complete) is_complete = is_complete || whole == size;
        CHECK(r.has_value() == is_complete);
        if (r.has_value()) continue;
        CHECK((r.error().code() == errc::truncated || r.error().code() == errc::trailing_bytes));
        CHECK(r.error().path().substr(0, Description.name.size()) == Description.name);
        CHECK(r.error().offset() <= size);
        if (r.error().code() == errc::truncated) CHECK(r.error().path().size() > Description.name.size() + 1);

        auto other = make();
        trickling_reader trickle({bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size)});
        const auto trickled = load<Description>(trickle, other, version_id);
        CHECK(trickled.has_value() == (r.error().code() == errc::trailing_bytes));
    }
    auto state = make();
    CHECK(outcome(loaded<Description>(bytes, state, version_id)) == "ok");
    auto other = make();
    trickling_reader trickle(bytes);
    CHECK(outcome(load<Description>(trickle, other, version_id)) == "ok");
    CHECK(trickle.unread() == 0);
    if constexpr (requires { state == other; }) CHECK((state == other));
}

} // namespace vmstate::tests
