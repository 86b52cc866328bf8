# SPDX-License-Identifier: BSL-1.0
# A guest that shows whether it is still itself. Forever:
#   - it adds one to `round`, and goes over 256 KiB of memory: each dword must be what the last round left there, and
#     gets this round's value (its own address + round). If one isn't, it prints BAD and its address, and stops.
#   - it prints `counter <round> ticks <ticks>`,
#   - it waits for the next tick of the 8254, 100 a second, which comes as an interrupt through the 8259.
# So it goes on only if processor, memory, serial port, timer and interrupt controller all were carried over.
# tests/support/counter.hpp knows the addresses.
        .include "common.inc"
        .code16
        .text

        .equ variables_segment, 0x1000
        .equ magic, 0x746e6376
        .equ first_segment, 0x2000
        .equ last_segment, 0x6000
        .equ v_magic, 0
        .equ v_round, 4
        .equ v_ticks, 8

        begin_program
        movw    $variables_segment, %ax
        movw    %ax, %ds
        xorl    %eax, %eax
        movl    %eax, v_magic
        movl    %eax, v_round
        movl    %eax, v_ticks

        # Round 0: every dword is its address.
        movw    $first_segment, %bx
1:      movw    %bx, %es
        movzwl  %bx, %eax
        shll    $4, %eax
        xorw    %di, %di
2:      movl    %eax, %es:(%di)
        addl    $4, %eax
        addw    $4, %di
        jnz     2b
        addw    $0x1000, %bx
        cmpw    $last_segment, %bx
        jne     1b
        movl    $magic, v_magic

        # Interrupt 8 is the tick: channel 0 of the timer, mode 2, 1193182 Hz / 11932.
        xorw    %ax, %ax
        movw    %ax, %es
        movw    $tick, %es:8*4
        movw    %cs, %es:8*4+2
        outb_to pit+3, 0x34
        outb_to pit, 0x9c
        outb_to pit, 0x2e
        outb_to pic1+1, 0xfe
        sti

next_round:
        incl    v_round
        movw    $first_segment, %bx
1:      movw    %bx, %es
        movzwl  %bx, %eax
        shll    $4, %eax
        addl    v_round, %eax
        xorw    %di, %di
2:      leal    -1(%eax), %ecx
        cmpl    %ecx, %es:(%di)
        jne     bad
        movl    %eax, %es:(%di)
        addl    $4, %eax
        addw    $4, %di
        jnz     2b
        addw    $0x1000, %bx
        cmpw    $last_segment, %bx
        jne     1b

        movw    $text_counter, %si
        call    put_text
        movl    v_round, %eax
        call    put_number
        movw    $text_ticks, %si
        call    put_text
        movl    v_ticks, %eax
        call    put_number
        movb    $'\n', %al
        call    put_character

        movl    v_ticks, %eax
1:      hlt
        cmpl    v_ticks, %eax
        je      1b
        jmp     next_round

bad:
        movw    $text_bad, %si
        call    put_text
        movw    %es, %ax
        movzwl  %ax, %eax
        shll    $4, %eax
        movzwl  %di, %ebx
        addl    %ebx, %eax
        call    put_number
        movb    $'\n', %al
        call    put_character
        cli
1:      hlt
        jmp     1b

tick:
        pushw   %ax
        pushw   %ds
        movw    $variables_segment, %ax
        movw    %ax, %ds
        incl    v_ticks
        movb    $eoi, %al
        outb    %al, $pic1
        popw    %ds
        popw    %ax
        iret

        define_print

text_counter:
        .asciz  "counter "
text_ticks:
        .asciz  " ticks "
text_bad:
        .asciz  "BAD "
