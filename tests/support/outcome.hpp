// SPDX-License-Identifier: BSL-1.0
// What a result says, for a test's messages. Depends on support/result.hpp.
#pragma once

#include <string>

#include <vmstate/support/result.hpp>

namespace vmstate::tests {

/// Empty where it went well: `REQUIRE(message_of(done) == "")` shows what was wrong.
template <class T>
std::string message_of(const result<T>& outcome) {
    return outcome ? std::string() : outcome.error().message();
}

} // namespace vmstate::tests
