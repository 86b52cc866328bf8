// SPDX-License-Identifier: BSL-1.0
//
// `result<T>`: a value or an `error`. Depends on Boost.System (headers only).
#pragma once

#include <boost/assert/source_location.hpp>
#include <boost/config.hpp>
#include <boost/system/result.hpp>

#include <cstdlib>
#include <stdexcept>

#include <vmstate/support/error.hpp>

namespace vmstate {

/// What every operation that can fail returns.
template <class T>
using result = boost::system::result<T, error>;

/// What `result::value()` does with an error: throws `std::runtime_error` with its message, or aborts where exceptions
/// are off. Found by Boost.System through argument-dependent lookup.
[[noreturn]] inline void throw_exception_from_error(const error& failure, const boost::source_location&) {
#ifdef BOOST_NO_EXCEPTIONS
    (void)failure;
    std::abort();
#else
    throw std::runtime_error(failure.message());
#endif
}

} // namespace vmstate
