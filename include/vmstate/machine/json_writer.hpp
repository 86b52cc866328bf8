// SPDX-License-Identifier: BSL-1.0
//
// Writes JSON text with QEMU's spacing (one line, ", " and ": "), so that a description can be compared byte by byte.
// Depends on the standard library alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vmstate {

class json_writer {
public:
    void start_object(std::string_view key = {}) { start(key, '{', false); }
    void end_object() { end('}'); }
    void start_array(std::string_view key) { start(key, '[', true); }
    void end_array() { end(']'); }
    void put_string(std::string_view key, std::string_view value) {
        put_key(key);
        put_quoted(value);
    }
    void put_number(std::string_view key, std::int64_t value) {
        put_key(key);
        text_ += std::to_string(value);
    }
    /// Text that is JSON already.
    void put_raw(std::string_view json) {
        put_key({});
        text_ += json;
    }
    const std::string& text() const noexcept { return text_; }
    std::string take() noexcept { return std::exchange(text_, {}); }

private:
    void start(std::string_view key, char bracket, bool is_array) {
        put_key(key);
        text_ += bracket;
        arrays_.push_back(is_array);
        need_comma_ = false;
    }
    void end(char bracket) {
        text_ += bracket;
        arrays_.pop_back();
        need_comma_ = true;
    }
    void put_key(std::string_view key) {
        if (need_comma_) text_ += ", ";
        need_comma_ = true;
        if (arrays_.empty() || arrays_.back()) return;
        put_quoted(key);
        text_ += ": ";
    }
    void put_quoted(std::string_view value) {
        text_ += '"';
        while (!value.empty()) put_code_point(take_code_point(value));
        text_ += '"';
    }
    /// The next character of UTF-8 text; U+FFFD for a byte that is none.
    static char32_t take_code_point(std::string_view& text) {
        const auto first = static_cast<unsigned char>(text.front());
        text.remove_prefix(1);
        if (first < 0x80) return first;
        const std::size_t more = first >= 0xf0 && first < 0xf8   ? 3
                                 : first >= 0xe0 && first < 0xf0 ? 2
                                 : first >= 0xc2 && first < 0xe0 ? 1
                                                                 : 0;
        if (more == 0 || text.size() < more) return 0xfffd;
        char32_t code = first & (0x3fu >> more);
        for (std::size_t i = 0; i < more; ++i) {
            const auto next = static_cast<unsigned char>(text[i]);
            if ((next & 0xc0) != 0x80) return 0xfffd;
            code = code << 6 | (next & 0x3f);
        }
        text.remove_prefix(more);
        const bool valid = code <= 0x10ffff && (code < 0xd800 || code > 0xdfff) &&
                           code >= (more == 3      ? 0x10000u
                                       : more == 2 ? 0x800u
                                                   : 0x80u);
        return valid ? code : 0xfffd;
    }
    void put_code_point(char32_t code) {
        switch (code) {
        case '"':
            text_ += "\\\"";
            return;
        case '\\':
            text_ += "\\\\";
            return;
        case '\b':
            text_ += "\\b";
            return;
        case '\f':
            text_ += "\\f";
            return;
        case '\n':
            text_ += "\\n";
            return;
        case '\r':
            text_ += "\\r";
            return;
        case '\t':
            text_ += "\\t";
            return;
        default:
            break;
        }
        if (code >= 0x20 && code < 0x7f) {
            text_ += static_cast<char>(code);
        } else if (code > 0xffff) {
            put_escape(0xd800 + ((code - 0x10000) >> 10));
            put_escape(0xdc00 + ((code - 0x10000) & 0x3ff));
        } else {
            put_escape(code);
        }
    }
    void put_escape(char32_t unit) {
        constexpr std::string_view digits = "0123456789ABCDEF";
        text_ += "\\u";
        for (int shift = 12; shift >= 0; shift -= 4) text_ += digits[unit >> shift & 15];
    }

    std::string text_;
    std::vector<bool> arrays_; ///< the containers we are in, by whether they are arrays
    bool need_comma_ = false;
};

} // namespace vmstate
