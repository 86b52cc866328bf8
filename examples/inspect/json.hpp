// SPDX-License-Identifier: BSL-1.0
//
// The report for programs: one JSON object.
#pragma once

#include "report.hpp"

#include <boost/json/value.hpp>

#include <string>

namespace inspect {

struct json_options {
    std::string title;
    bool everything = true; ///< all parts; else only those that are asked for
    bool summary = false;   ///< sections without their fields
    bool ram = false;       ///< the page ranges of each block
    std::string device;     ///< only devices that are called so; empty for all
};

boost::json::value to_json(const report& stream, const json_options& options);

} // namespace inspect
