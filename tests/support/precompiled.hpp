// SPDX-License-Identifier: BSL-1.0
// What every program that migrates includes, and takes seconds to read: precompiled once for all of them.
#pragma once

#include <vmstate/describe.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>

#include <support/catch.hpp>
