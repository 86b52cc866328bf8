// SPDX-License-Identifier: BSL-1.0
//
// What is thrown in a migration's threads (no memory, no thread, something of the user's) ends the migration, not the
// process, which has a guest to run. Depends on support/result.hpp.
#pragma once

#include <exception>
#include <type_traits>
#include <utility>

#include <vmstate/support/result.hpp>

namespace vmstate::detail {

/// Calls `work`, which returns a `result`.
template <class Work>
std::invoke_result_t<Work> guarded(Work&& work) try {
    return std::forward<Work>(work)();
} catch (const std::exception& thrown) {
    return error(errc::io, {}, thrown.what());
}

} // namespace vmstate::detail
