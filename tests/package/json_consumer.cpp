// SPDX-License-Identifier: BSL-1.0
// vmstate::json brings Boost.JSON, ready to link.
#include <boost/json.hpp>

int main() { return boost::json::parse(R"({"page_size": 4096})").at("page_size").as_int64() == 4096 ? 0 : 1; }
