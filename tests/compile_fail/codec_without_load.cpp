// EXPECT: a_codec_must_model_wire_codec
// SPDX-License-Identifier: BSL-1.0
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <vmstate/describe.hpp>

struct level_codec {
    static constexpr std::string_view type = "fifo level";
    static vmstate::result<void> save(vmstate::writer& w, const std::uint32_t& level);
#ifdef VMSTATE_POSITIVE
    static vmstate::result<void> load(vmstate::reader& r, std::uint32_t& level);
#endif
    static std::size_t size(const std::uint32_t& level);
};

struct uart { std::uint32_t level; };
inline constexpr auto vmstate_uart = vmstate::describe<uart>({.name = "uart"},
    vmstate::field<&uart::level, vmstate::coded<level_codec>>);
