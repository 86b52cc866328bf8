# SPDX-License-Identifier: BSL-1.0
# A guest that writes its memory as fast as it can. Forever:
#   - it adds one to its round, and goes over all memory from 2 MiB on: the first dword of each page must be what the last
#     round left there, and gets this round's value (its own address + round). If one isn't, it prints BAD and its
#     address, and stops.
#   - after each eighth it prints `counter <n> ticks <n>`, one more each time, as counter.S does; it has no clock.
# No migration of it comes to an end while it runs and the channel is slower than it is.
        .include "common.inc"
        .code16
        .text

        .equ variables_segment, 0x1000
        .equ magic, 0x72747277
        .equ first, 0x200000
        .equ most, 0xc0000000
        .equ page, 0x1000
        .equ v_magic, 0
        .equ v_end, 4

        begin_program
        movw    $variables_segment, %ax
        movw    %ax, %ds
        xorl    %eax, %eax
        movl    %eax, v_magic

        # Memory ends where it doesn't keep what is written.
        movl    $first, %ebx
1:      movl    %ebx, %fs:(%ebx)
        cmpl    %ebx, %fs:(%ebx)
        jne     2f
        addl    $0x100000, %ebx
        cmpl    $most, %ebx
        jb      1b
2:      movl    %ebx, v_end

        # Round 0: the first dword of each page is its address.
        movl    $first, %ebx
1:      movl    %ebx, %fs:(%ebx)
        addl    $page, %ebx
        cmpl    v_end, %ebx
        jb      1b
        movl    $magic, v_magic

        # The round is kept in a register: QEMU 7.2's own translation loses writes to a page that stays in its TLB when the
        # log of dirty pages is read, not for us alone but between two QEMUs. Others don't stay there so long.
        xorl    %ebp, %ebp
next_round:
        incl    %ebp
        movl    $first, %ebx
1:      movl    %ebp, %eax
        addl    %ebx, %eax
        leal    -1(%eax), %ecx
        cmpl    %ecx, %fs:(%ebx)
        jne     bad
        movl    %eax, %fs:(%ebx)
        addl    $page, %ebx
        cmpl    v_end, %ebx
        jb      1b

        testl   $7, %ebp
        jnz     next_round
        movw    $text_counter, %si
        call    put_text
        movl    %ebp, %eax
        shrl    $3, %eax
        call    put_number
        movw    $text_ticks, %si
        call    put_text
        movl    %ebp, %eax
        shrl    $3, %eax
        call    put_number
        movb    $'\n', %al
        call    put_character
        jmp     next_round

bad:
        movw    $text_bad, %si
        call    put_text
        movl    %ebx, %eax
        call    put_number
        movb    $'\n', %al
        call    put_character
        cli
1:      hlt
        jmp     1b

        define_print

text_counter:
        .asciz  "counter "
text_ticks:
        .asciz  " ticks "
text_bad:
        .asciz  "BAD "
