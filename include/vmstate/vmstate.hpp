// SPDX-License-Identifier: BSL-1.0
//
// Everything that needs headers alone. What reads JSON (machine/carry.hpp, machine/vmdesc_parse.hpp) is included on its
// own, since it needs Boost.JSON linked.
#pragma once

#include <vmstate/describe.hpp>
#include <vmstate/migrate.hpp>
