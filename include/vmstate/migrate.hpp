// SPDX-License-Identifier: BSL-1.0
//
// What the author of an emulator or VMM includes: descriptions, machines, channels, saving and loading them, and
// migrating them live.
#pragma once

#include <vmstate/describe.hpp>
#include <vmstate/machine/load.hpp>
#include <vmstate/machine/machine.hpp>
#include <vmstate/machine/save.hpp>
#include <vmstate/migration/destination.hpp>
#include <vmstate/migration/source.hpp>
#include <vmstate/ram/marked_log.hpp>
#include <vmstate/stream/memory_channel.hpp>
#include <vmstate/stream/open.hpp>
