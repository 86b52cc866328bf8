// SPDX-License-Identifier: BSL-1.0
// Zero pages: every kernel sees a single byte that isn't zero, wherever it is.
#include <support/catch.hpp>

#include <vmstate/support/zero_bytes.hpp>

#include <algorithm>
#include <cstddef>
#include <iostream>
#include <span>
#include <string>
#include <vector>

using namespace vmstate;

namespace {

using kernel = bool (*)(const std::byte*, std::size_t) noexcept;

struct named_kernel {
    const char* name;
    kernel run;
};

std::vector<named_kernel> kernels() {
    std::vector<named_kernel> all{
        {"as chosen", [](const std::byte* p, std::size_t size) noexcept { return are_zero({p, size}); }},
        {"words", detail::are_zero_by_words}};
#if defined(__x86_64__)
    if (detail::zero_bytes_by_avx2) all.push_back({"AVX2", detail::are_zero_avx2});
    else std::cerr << "no AVX2 here: that kernel is not tested\n";
#endif
    return all;
}

} // namespace

TEST_CASE("one byte anywhere in a page is seen by every kernel") {
    for (const named_kernel& one : kernels()) {
        INFO(one.name);
        std::vector<std::byte> page(4096);
        CHECK(one.run(page.data(), page.size()));
        std::size_t missed = 0;
        for (std::size_t i = 0; i < page.size(); ++i) {
            page[i] = std::byte{1};
            missed += one.run(page.data(), page.size()) ? 1U : 0U;
            page[i] = std::byte{0x80};
            missed += one.run(page.data(), page.size()) ? 1U : 0U;
            page[i] = std::byte{0};
        }
        CHECK(missed == 0);
    }
}

TEST_CASE("of any size and at any address nothing beside the bytes matters") {
    for (const named_kernel& one : kernels()) {
        INFO(one.name);
        std::vector<std::byte> memory(1024, std::byte{0xff});
        std::size_t wrong = 0;
        for (std::size_t begin : {0U, 1U, 7U, 8U, 31U, 32U, 33U})
            for (std::size_t size = 0; size < 600; ++size) {
                std::byte* const p = memory.data() + begin;
                std::fill(p, p + size, std::byte{0});
                wrong += one.run(p, size) ? 0U : 1U;
                if (size != 0) {
                    p[size - 1] = std::byte{4};
                    wrong += one.run(p, size) ? 1U : 0U;
                }
                std::fill(p, p + size, std::byte{0xff});
            }
        CHECK(wrong == 0);
    }
}
