// SPDX-License-Identifier: BSL-1.0
//
// What went wrong, where in the machine and where in the stream. Everything reports through this type: the generated
// code, hooks, channels, the machine. Depends on the standard library alone.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

namespace vmstate {

/// The kinds of failure. `message()` of an `error` adds the place and the values.
enum class errc {
    ok = 0,
    truncated,            ///< the stream ends inside a field
    trailing_bytes,       ///< a body was read whole and bytes are left over
    no_space,             ///< the memory to write to is full
    value_mismatch,       ///< an `equal` field holds another value here
    out_of_range,         ///< `between`, `at_most_current`, or a length above its limit
    version_too_new,      ///< the stream's version is above this description's version_id
    version_too_old,      ///< the stream's version is below this description's minimum_version_id
    unknown_subsection,   ///< a subsection of this device that its description does not have
    bad_marker,           ///< a null-pointer or list marker with an impossible value
    null_pointer,         ///< a pointer that has to point to something is null
    validation_failed,    ///< a `validate` predicate said no
    hook_failed,          ///< a pre_load, post_load, pre_save or post_save hook, or a codec of the user's, failed
    not_a_stream,         ///< no "QEVM" at the start, or an obsolete version of the format
    bad_configuration,    ///< the stream comes from a machine configured differently
    unknown_section,      ///< a section that nobody registered
    bad_section,          ///< a section header, type byte or footer that does not fit
    bad_command,          ///< a command unknown, of a wrong length, or not possible here
    bad_ram,              ///< a RAM record that does not fit the machine's blocks
    bad_message,          ///< a vhost-user message that is malformed, or comes where it can't be meant
    bad_description_json, ///< the JSON description is malformed or does not fit the stream
    duplicate,            ///< registered twice
    not_migratable,       ///< a device that forbids migration is registered
    bad_uri,              ///< not a URI that a channel can be made from
    io,                   ///< the operating system refused
    invalid_argument,     ///< called with something that cannot be meant
    unsupported,          ///< known to the format, not to this library
};

/// The name of a code, as it stands in `message()`.
constexpr std::string_view to_string(errc code) noexcept {
    switch (code) {
    case errc::ok: return "no error";
    case errc::truncated: return "stream ends too early";
    case errc::trailing_bytes: return "bytes left over";
    case errc::no_space: return "no space left to write to";
    case errc::value_mismatch: return "value differs from this machine's";
    case errc::out_of_range: return "value out of range";
    case errc::version_too_new: return "version too new";
    case errc::version_too_old: return "version too old";
    case errc::unknown_subsection: return "unknown subsection";
    case errc::bad_marker: return "bad marker byte";
    case errc::null_pointer: return "null pointer";
    case errc::validation_failed: return "validation failed";
    case errc::hook_failed: return "hook failed";
    case errc::not_a_stream: return "not a migration stream";
    case errc::bad_configuration: return "machine configured differently";
    case errc::unknown_section: return "unknown section";
    case errc::bad_section: return "malformed section";
    case errc::bad_command: return "bad command";
    case errc::bad_ram: return "bad RAM record";
    case errc::bad_message: return "bad vhost-user message";
    case errc::bad_description_json: return "bad JSON description";
    case errc::duplicate: return "registered twice";
    case errc::not_migratable: return "device is unmigratable";
    case errc::bad_uri: return "bad URI";
    case errc::io: return "input/output error";
    case errc::invalid_argument: return "invalid argument";
    case errc::unsupported: return "unsupported";
    }
    return "unknown error";
}

/// A failure: code, path of the field (`pc.serial/serial/fifo_timer[3]`), byte offset in the stream, what was expected
/// and what was found. One pointer wide, so that a `result` stays small.
class [[nodiscard]] error {
public:
    /// `offset` of an error that has no place in a stream.
    static constexpr std::uint64_t no_offset = ~std::uint64_t{0};

    error() noexcept = default;
    error(errc code) : record_(new record{code, {}, no_offset, {}, {}}) {}
    error(errc code, std::string expected, std::string found = {})
        : record_(new record{code, {}, no_offset, std::move(expected), std::move(found)}) {}

    error(const error& other) : record_(other.record_ ? new record(*other.record_) : nullptr) {}
    error(error&& other) noexcept : record_(std::exchange(other.record_, nullptr)) {}
    error& operator=(error other) noexcept {
        std::swap(record_, other.record_);
        return *this;
    }
    ~error() { delete record_; }

    /// True when there is a failure.
    explicit operator bool() const noexcept { return record_ != nullptr; }

    errc code() const noexcept { return record_ ? record_->code : errc::ok; }
    /// Section, nested structs and field, joined with '/'; elements as `[i]`. Empty where no field is concerned.
    std::string_view path() const noexcept { return record_ ? std::string_view(record_->path) : std::string_view(); }
    /// Bytes from the start of the stream (or of the memory), `no_offset` where there is none.
    std::uint64_t offset() const noexcept { return record_ ? record_->offset : no_offset; }
    std::string_view expected() const noexcept { return record_ ? std::string_view(record_->expected) : std::string_view(); }
    std::string_view found() const noexcept { return record_ ? std::string_view(record_->found) : std::string_view(); }

    /// Path, kind, expected and found, offset: one line.
    std::string message() const {
        std::string text(path());
        if (!text.empty()) text += ": ";
        text += to_string(code());
        if (!expected().empty()) text.append(": expected ").append(expected());
        if (!found().empty()) text.append(expected().empty() ? ": " : ", found ").append(found());
        if (offset() != no_offset) text += " (offset " + std::to_string(offset()) + ")";
        return text;
    }

    /// Puts `segment` before the path: called on the way out, innermost first.
    error& within(std::string_view segment) {
        if (!record_ || segment.empty()) return *this;
        std::string& path = record_->path;
        if (path.empty()) path = segment;
        else path.insert(0, path.front() == '[' ? std::string(segment) : std::string(segment) + '/');
        return *this;
    }
    /// Puts `[index]` before the path.
    error& at_index(std::uint64_t index) {
        if (!record_) return *this;
        std::string& path = record_->path;
        std::string segment(1, '['); // "[" + ... makes g++ 12 warn of an overlap (-Wrestrict) that isn't there
        segment += std::to_string(index);
        segment += path.empty() || path.front() == '[' ? "]" : "]/";
        path.insert(0, segment);
        return *this;
    }
    /// Sets the offset unless an inner place has set it already.
    error& at_offset(std::uint64_t offset) noexcept {
        if (record_ && record_->offset == no_offset) record_->offset = offset;
        return *this;
    }

    friend bool operator==(const error& a, errc code) noexcept { return a.code() == code; }
    /// The message. Boost.System prints a `result` with it, and so do test frameworks.
    template <class Char, class Traits>
    friend std::basic_ostream<Char, Traits>& operator<<(std::basic_ostream<Char, Traits>& out, const error& failure) {
        return out << failure.message().c_str();
    }

private:
    struct record {
        errc code;
        std::string path;
        std::uint64_t offset;
        std::string expected;
        std::string found;
    };
    record* record_ = nullptr; // owned; not a unique_ptr, whose header would double the cost of this one
};

} // namespace vmstate
