// SPDX-License-Identifier: BSL-1.0
// What a device author's first program does, in a project that only knows vmstate by its package.
#include <vmstate/vmstate.hpp>

#include <cstdint>

struct KBDState {
    std::uint8_t write_cmd, status, mode, pending;
};

inline constexpr auto vmstate_kbd = vmstate::describe<KBDState>(
    {.name = "pckbd", .version_id = 3, .minimum_version_id = 3},
    vmstate::field<&KBDState::write_cmd>,
    vmstate::field<&KBDState::status>,
    vmstate::field<&KBDState::mode>,
    vmstate::field<&KBDState::pending>);

int main() {
    KBDState saved{1, 2, 3, 4};
    KBDState loaded{};
    const auto bytes = vmstate::to_bytes<vmstate_kbd>(saved);
    if (!bytes || bytes->size() != 4 || !vmstate::from_bytes<vmstate_kbd>(*bytes, loaded))
        return 1;
    return loaded.pending == 4 && loaded.write_cmd == 1 ? 0 : 1;
}
