// SPDX-License-Identifier: BSL-1.0
// What a thread that somebody waits for asks the scheduler for, and what it leaves as it was.
#include <support/catch.hpp>

#include <vmstate/support/short_slice.hpp>

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>

namespace {

/// The first 32 bytes of the kernel's sched_attr.
struct scheduling {
    std::uint32_t policy = 0;
    std::int32_t nice = 0;
    std::uint64_t slice = 0; ///< ns; 0 where the kernel doesn't tell
};
scheduling of_this_thread() {
    std::array<unsigned char, 48> bytes{};
    scheduling now;
    if (::syscall(SYS_sched_getattr, 0, bytes.data(), bytes.size(), 0) != 0) return now;
    std::memcpy(&now.policy, bytes.data() + 4, sizeof now.policy);
    std::memcpy(&now.nice, bytes.data() + 16, sizeof now.nice);
    std::memcpy(&now.slice, bytes.data() + 24, sizeof now.slice);
    return now;
}
/// Linux 6.12 and later.
bool has_slices() {
    utsname system{};
    int major = 0;
    int minor = 0;
    return ::uname(&system) == 0 && std::sscanf(system.release, "%d.%d", &major, &minor) == 2
        && (major > 6 || (major == 6 && minor >= 12));
}
/// What a thread of that nice value and policy is after it has asked.
scheduling after_asking(int nice, int policy) {
    scheduling seen;
    std::thread([&] {
        const sched_param none{};
        static_cast<void>(::sched_setscheduler(0, policy, &none));
        static_cast<void>(::setpriority(PRIO_PROCESS, static_cast<id_t>(::syscall(SYS_gettid)), nice));
        vmstate::detail::prefer_short_slice();
        seen = of_this_thread();
    }).join();
    return seen;
}

} // namespace

TEST_CASE("a thread that somebody waits for has a slice of 100 us, and its nice value and policy") {
    const scheduling seen = after_asking(3, SCHED_OTHER);
    CHECK(seen.policy == SCHED_OTHER);
    CHECK(seen.nice == 3);
    if (has_slices()) CHECK(seen.slice == 100'000);
    else WARN("no slices of a thread's own before Linux 6.12: skipped");
}

TEST_CASE("a policy that somebody has chosen stays, with its slice") {
    const scheduling seen = after_asking(0, SCHED_BATCH);
    CHECK(seen.policy == SCHED_BATCH);
    CHECK(seen.slice != 100'000);
}
