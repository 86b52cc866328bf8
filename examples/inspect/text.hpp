// SPDX-License-Identifier: BSL-1.0
//
// The report for people: aligned columns, colours where wanted.
#pragma once

#include "report.hpp"

#include <iosfwd>
#include <string>

namespace inspect {

struct text_options {
    std::string title; ///< what the stream is called
    bool colours = false;
    std::size_t width = 110;    ///< columns; long values are wrapped
    bool everything = true;     ///< all parts; else only those that are asked for
    bool summary = false;       ///< sections, but not their fields
    bool ram = false;           ///< the page ranges of each block
    bool whole_buffers = false; ///< no value is shortened
    std::string device;         ///< only devices that are called so; empty for all
};

void write_text(std::ostream& out, const report& stream, const text_options& options);

} // namespace inspect
