// SPDX-License-Identifier: BSL-1.0
// main() of every test program, compiled once. Exit code: Catch2's own, or 77 when a test case was skipped.
#define CATCH_CONFIG_RUNNER
#include "support/catch.hpp"

#if VMSTATE_CATCH_MAJOR == 3
#    include <catch2/catch_session.hpp>
#endif

#include <atomic>
#include <iostream>

namespace vmstate::tests {

static std::atomic<int> skipped{0};

void skip(const std::string& reason) {
    ++skipped;
    std::cerr << "SKIPPED: " << reason << '\n';
}

} // namespace vmstate::tests

int main(int argc, char** argv) {
    const int result = Catch::Session().run(argc, argv);
    if (result == 0 && vmstate::tests::skipped != 0) {
        std::cerr << "SKIPPED: " << vmstate::tests::skipped << " time(s) in this program; see above\n";
        return 77;
    }
    return result;
}
