// SPDX-License-Identifier: BSL-1.0
//
// The stream to inspect, whole: a file is mapped, anything else is read to its end.
#pragma once

#include <vmstate/support/result.hpp>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace inspect {

class input {
public:
    /// `name` is a file, `-` for standard input, or one of QEMU's URIs (`file:path,offset=n`, `exec:command`, `fd:n`).
    static vmstate::result<input> open(const std::string& name);

    input(input&& other) noexcept;
    input& operator=(input&&) = delete;
    ~input();

    std::span<const std::byte> bytes() const noexcept {
        return mapping_ != nullptr ? std::span<const std::byte>(mapping_, size_)
                                   : std::span<const std::byte>(read_);
    }

private:
    input() = default;

    const std::byte* mapping_ = nullptr;
    std::size_t size_ = 0;
    std::vector<std::byte> read_;
};

} // namespace inspect
