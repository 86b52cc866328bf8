// SPDX-License-Identifier: BSL-1.0
//
// What a device author includes: the vocabulary of descriptions, and what is generated from them. Needs Boost headers
// and no operating system; compiles without exceptions and RTTI.
#pragma once

#include <vmstate/codec/codec.hpp>
#include <vmstate/codec/reader.hpp>
#include <vmstate/codec/writer.hpp>
#include <vmstate/describe/description.hpp>
#include <vmstate/describe/loads.hpp>
#include <vmstate/describe/reflect.hpp>
