# SPDX-License-Identifier: BSL-1.0
# Where an x86 processor begins: the last 16 bytes below 1 MiB (and, at first, below 4 GiB).
        .code16
        .section .reset, "ax"
        ljmp    $0xf000, $0
        .org    16
