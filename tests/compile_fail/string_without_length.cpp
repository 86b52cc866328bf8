// EXPECT: a_vector_string_or_unique_ptr_to_array_must_have_length
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>
#include <string>

#include <vmstate/describe.hpp>

struct board { std::uint32_t size; std::string name; };
inline constexpr auto vmstate_board = vmstate::describe<board>({.name = "board"},
    vmstate::field<&board::size>,
#ifndef VMSTATE_POSITIVE
    vmstate::field<&board::name>);
#else
    vmstate::field<&board::name, vmstate::length<&board::size>>);
#endif
