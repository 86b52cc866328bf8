// SPDX-License-Identifier: BSL-1.0
#include "guest_image.hpp"

#define LIVE_IMAGE(name, file)                                                                                         \
    asm(".pushsection .rodata\n"                                                                                       \
        ".balign 4\n" name "_begin: .incbin \"" file "\"\n" name "_end:\n"                                             \
        ".popsection\n")

LIVE_IMAGE("live_riscv_guest", RISCV_GUEST_IMAGE);
extern "C" const std::byte live_riscv_guest_begin[];
extern "C" const std::byte live_riscv_guest_end[];

std::span<const std::byte> live::riscv_guest_image() noexcept { return {live_riscv_guest_begin, live_riscv_guest_end}; }

#ifdef X86_GUEST_IMAGE
LIVE_IMAGE("live_x86_guest", X86_GUEST_IMAGE);
extern "C" const std::byte live_x86_guest_begin[];
extern "C" const std::byte live_x86_guest_end[];

std::span<const std::byte> live::x86_guest_image() noexcept { return {live_x86_guest_begin, live_x86_guest_end}; }
#endif
