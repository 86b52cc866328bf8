// EXPECT: every_member_must_be_in_a_field_or_a_subsection_or_transient
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include <vmstate/describe.hpp>

struct nic {
    std::function<void(int)> raise;
    std::uint32_t count;
    std::vector<std::uint8_t> packet;
    std::unique_ptr<int> backend;
    std::uint16_t command;
};

inline constexpr auto vmstate_nic = vmstate::describe<nic>({.name = "nic"},
#ifdef VMSTATE_POSITIVE
    vmstate::field<&nic::command>,
#endif
    vmstate::field<&nic::count>,
    vmstate::field<&nic::packet, vmstate::length<&nic::count>, vmstate::limit<2048>>,
    vmstate::transient<&nic::raise, &nic::backend>);
