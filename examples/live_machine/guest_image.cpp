// SPDX-License-Identifier: BSL-1.0
#include "guest_image.hpp"

asm(".pushsection .rodata\n"
    ".balign 4\n"
    "live_guest_begin: .incbin \"" GUEST_IMAGE "\"\n"
    "live_guest_end:\n"
    ".popsection\n");

extern "C" const std::byte live_guest_begin[];
extern "C" const std::byte live_guest_end[];

std::span<const std::byte> live::guest_image() noexcept { return {live_guest_begin, live_guest_end}; }
