// EXPECT: a_name_must_have_at_most_255_bytes
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct uart { std::uint8_t divider; };

#define SIXTEEN "0123456789abcdef"
#define SIXTY_FOUR SIXTEEN SIXTEEN SIXTEEN SIXTEEN

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_uart = vmstate::describe<uart>(
    {.name = SIXTY_FOUR SIXTY_FOUR SIXTY_FOUR SIXTY_FOUR}, vmstate::field<&uart::divider>);
#else
inline constexpr auto vmstate_uart = vmstate::describe<uart>(
    {.name = SIXTY_FOUR SIXTY_FOUR SIXTY_FOUR SIXTEEN SIXTEEN SIXTEEN "0123456789abcde"}, vmstate::field<&uart::divider>);
#endif
