// SPDX-License-Identifier: BSL-1.0
// Catch2, of whichever major version the machine has: 2 (Debian 12) or 3 (Debian 13). Every test includes this
// header and no other of Catch2. Depends on Catch2 alone.
#pragma once

#include <cstddef>
#include <string>

#if __has_include(<catch2/catch_all.hpp>)
#    define VMSTATE_CATCH_MAJOR 3
#    include <catch2/catch_approx.hpp>
#    include <catch2/catch_template_test_macros.hpp>
#    include <catch2/catch_test_macros.hpp>
#    include <catch2/catch_tostring.hpp>
#    include <catch2/generators/catch_generators_all.hpp>
#    include <catch2/matchers/catch_matchers_all.hpp>
#else
#    define VMSTATE_CATCH_MAJOR 2
#    include <catch2/catch.hpp>
#endif

namespace vmstate::tests {

using Catch::Approx;

/// Matches a string that has `part` in it: `CHECK_THAT(error.message(), contains("stream offset 12"))`.
inline auto contains(std::string part) {
#if VMSTATE_CATCH_MAJOR == 3
    return Catch::Matchers::ContainsSubstring(std::move(part));
#else
    return Catch::Matchers::Contains(std::move(part));
#endif
}

/// Says on stderr why this test case can't run on this machine; the test case returns next. A program in which
/// nothing failed but something was skipped exits with 77, which CTest reports as "Skipped", not as "Passed".
void skip(const std::string& reason);

} // namespace vmstate::tests
