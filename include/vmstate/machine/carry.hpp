// SPDX-License-Identifier: BSL-1.0
//
// Loading a stream of which only a part is registered, and writing the rest again as it was. Needs Boost.JSON linked
// (vmstate::json), since the stream's JSON description says where such sections end.
#pragma once

#include <string_view>

#include <vmstate/machine/load.hpp>
#include <vmstate/machine/vmdesc_parse.hpp>

namespace vmstate {

/// For `load`: keep what nobody registered, by the description at the stream's own end.
///
///     vmstate::load(machine, *vmstate::open_input("file:vm.state"), vmstate::carry_unknown());
inline load_options carry_unknown() {
    load_options options;
    options.carry_unknown = true;
    options.parse_description = [](std::string_view json) { return parse_vmdesc(json); };
    return options;
}

} // namespace vmstate
