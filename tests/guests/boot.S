# SPDX-License-Identifier: BSL-1.0
# Boot sector: loads the 16 sectors behind it to 0x7e00 and jumps to them, at 07e0:0000.
        .code16
        .section .boot, "ax"
        .equ sectors, 16
        .equ load_segment, 0x07e0

        cli
        xorw    %ax, %ax
        movw    %ax, %ss
        movw    $0x7c00, %sp
        sti
        movw    $load_segment, %ax
        movw    %ax, %es
        xorw    %bx, %bx                # to es:bx
        movw    $(0x0200 + sectors), %ax # read that many sectors
        movw    $0x0002, %cx            # from cylinder 0, sector 2
        xorb    %dh, %dh                # head 0, of the drive that the firmware booted (dl)
        int     $0x13
        jc      1f
        ljmp    $load_segment, $0
1:      hlt                             # the test sees that nothing is printed
        jmp     1b

        .org    510
        .word   0xaa55
