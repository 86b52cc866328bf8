// EXPECT: a_member_must_belong_to_the_described_struct
// SPDX-License-Identifier: BSL-1.0
#include <cstdint>

#include <vmstate/describe.hpp>

struct fdc { std::uint8_t dor; };
struct uart { std::uint8_t divider; };
bool fdc_needed(const fdc& s);
bool uart_needed(const uart& s);

#ifndef VMSTATE_POSITIVE
inline constexpr auto vmstate_extra = vmstate::describe<fdc>({.name = "uart/extra"},
    vmstate::needed<fdc_needed>, vmstate::field<&fdc::dor>);
#else
inline constexpr auto vmstate_extra = vmstate::describe<uart>({.name = "uart/extra"},
    vmstate::needed<uart_needed>, vmstate::field<&uart::divider>);
#endif

inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
#ifndef VMSTATE_POSITIVE
    vmstate::field<&uart::divider>,
#endif
    vmstate::subsection<vmstate_extra>);
