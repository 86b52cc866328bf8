// SPDX-License-Identifier: BSL-1.0
#include "shared.hpp"

namespace odr {

std::vector<std::byte> save_elsewhere(const device& state) {
    auto bytes = vmstate::to_bytes<vmstate_device>(state);
    return bytes.has_value() ? *std::move(bytes) : std::vector<std::byte>();
}
bool load_elsewhere(const std::vector<std::byte>& bytes, device& state) {
    return vmstate::from_bytes<vmstate_device>(bytes, state).has_value();
}
const void* description_elsewhere() { return &vmstate_device; }
std::uint64_t fingerprint_elsewhere() { return vmstate::fingerprint_of<vmstate_device>(); }

} // namespace odr
