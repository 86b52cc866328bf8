# SPDX-License-Identifier: BSL-1.0
# Leaves every plain device of a PC in a state that differs from its reset state in as many fields as possible, half
# done things among them, prints READY and halts. Devices that a machine doesn't have ignore it.
#
# Its last lines decide what a stream of the machine has beyond the plain fields:
#   pckbd      output buffer full, from the controller (extended_state); A20 off in the output port (pckbd_outport)
#   ps2kbd     LEDs on (ledstate), an answer to a command that nobody read (command_reply_queue)
        .include "common.inc"
        .code16
        .text

        .equ kbd_data, 0x60
        .equ kbd_command, 0x64

        begin_program
        # I/O APIC: another id, redirections 3 (edge, masked), 9 (level, low, masked) and 20.
        movw    $ioapic_values, %si
1:      movl    %cs:(%si), %eax
        cmpl    $-1, %eax
        je      2f
        movl    $0xfec00000, %ebx
        movl    %eax, %fs:(%ebx)
        movl    %cs:4(%si), %eax
        movl    %eax, %fs:0x10(%ebx)
        addw    $8, %si
        jmp     1b
2:
        # HPET: counting, timer 0 periodic, timer 1 one-shot, timer 2 with a route and 32 bits.
        movw    $hpet_values, %si
1:      movl    %cs:(%si), %ebx
        cmpl    $-1, %ebx
        je      2f
        addl    $0xfed00000, %ebx
        movl    %cs:4(%si), %eax
        movl    %eax, %fs:(%ebx)
        addw    $8, %si
        jmp     1b
2:
        # 8254. Channel 0 mode 2, channel 1 mode 3 in BCD, channel 2 mode 3 with its gate open.
        outb_to pit+3, 0x34
        outb_to pit+0, 0x34
        outb_to pit+0, 0x12
        outb_to pit+3, 0x77
        outb_to pit+1, 0x21
        outb_to pit+1, 0x43
        outb_to pit+3, 0xb6
        outb_to pit+2, 0xa9
        outb_to pit+2, 0x04
        inb     $0x61, %al              # speaker: gate and data on
        orb     $3, %al
        outb    %al, $0x61
        # Half done: channel 0 latched and only its low byte read; channel 1 with a new count's low byte; channel 2 with
        # count and status latched by a read-back.
        outb_to pit+3, 0x00
        inb     $pit, %al
        outb_to pit+1, 0x55
        outb_to pit+3, 0xc8

        # RTC: NVRAM from 0x40, alarm, 128 periods a second, all three interrupts, square wave, binary, 24 hours.
        movb    $0x40, %cl
1:      movb    %cl, %al
        outb    %al, $0x70
        xorb    $0xa5, %al
        outb    %al, $0x71
        incb    %cl
        cmpb    $0x78, %cl
        jne     1b
        movw    $rtc_values, %si
1:      movb    %cs:(%si), %al
        cmpb    $0xff, %al
        je      2f
        outb    %al, $0x70
        movb    %cs:1(%si), %al
        outb    %al, $0x71
        addw    $2, %si
        jmp     1b
2:      outb_to 0x70, 0xca              # NMI masked; index left at 0x4a

        # 8237s: channel 2 programmed as for a floppy, channel 5 for sound; flip-flop of the first left half way.
        movw    $dma_values, %si
1:      movw    %cs:(%si), %dx
        cmpw    $0xffff, %dx
        je      2f
        movb    %cs:2(%si), %al
        outb    %al, %dx
        addw    $3, %si
        jmp     1b
2:
        # PS/2 mouse: scaling 2:1, resolution 2, rate 40, stream mode, reporting.
        outb_to kbd_command, 0xa8
        movw    $mouse_values, %si
1:      movb    %cs:(%si), %ah
        cmpb    $0xff, %ah
        je      2f
        call    wait_input
        outb_to kbd_command, 0xd4
        call    wait_input
        movb    %ah, %al
        outb    %al, $kbd_data
        call    drain
        incw    %si
        jmp     1b
2:
        # Keyboard: scroll and caps lock lit, then an identification that stays in its queue.
        movw    $keyboard_values, %si
1:      movb    %cs:(%si), %ah
        cmpb    $0xff, %ah
        je      2f
        call    wait_input
        movb    %ah, %al
        outb    %al, $kbd_data
        call    drain
        incw    %si
        jmp     1b
2:
        # Controller: interrupts of both ports, no translation; A20 off through the output port; then the keyboard's
        # answer of three bytes, of which nobody reads the first.
        call    wait_input
        outb_to kbd_command, 0x60
        call    wait_input
        outb_to kbd_data, 0x07
        outb_to 0x92, 0x02
        call    wait_input
        outb_to kbd_command, 0xd1
        call    wait_input
        outb_to kbd_data, 0xdd
        call    wait_input
        outb_to kbd_data, 0xf2

        # 8259s: priorities rotated, special mask mode, in-service register chosen; the second stays half initialised.
        outb_to pic1+1, 0xb8
        outb_to pic1, 0xc3
        outb_to pic1, 0x6b
        outb_to pic2+1, 0x5e
        outb_to pic2, 0x11
        outb_to pic2+1, 0x70

        # The serial port comes last, because it prints.
        movw    $text_ready, %si
        call    put_text
        outb_to com1+7, 0x5a            # scratch
        outb_to com1+1, 0x05            # interrupts: received data, line status
        outb_to com1+3, 0x1a            # 7 data bits, even parity
1:      hlt
        jmp     1b

# Until the keyboard controller takes a byte; not for ever, because microvm has none.
wait_input:
        movw    $2000, %cx
1:      inb     $kbd_command, %al
        testb   $2, %al
        loopnz  1b
        ret

# Reads what the keyboard controller has to say, until it has been silent for a while.
drain:
        movw    $2000, %cx
1:      inb     $kbd_command, %al
        testb   $1, %al
        jz      2f
        inb     $kbd_data, %al
2:      loop    1b
        ret

        define_print

ioapic_values:                          # register, value
        .long   0x00, 0x05000000
        .long   0x16, 0x00010031
        .long   0x17, 0x00000000
        .long   0x22, 0x0001a039
        .long   0x23, 0x01000000
        .long   0x38, 0x0001896b
        .long   0x39, 0x02000000
        .long   0x00, 0x05000000
        .long   -1
hpet_values:                            # offset, value
        .long   0x0f0, 0x00123456
        .long   0x100, 0x0000000c
        .long   0x108, 0x00200000
        .long   0x120, 0x00000004
        .long   0x128, 0x7f000000
        .long   0x140, 0x00000504
        .long   0x148, 0x01000000
        .long   0x010, 0x00000001
        .long   -1
rtc_values:                             # register, value
        .byte   0x0a, 0x29
        .byte   0x01, 30
        .byte   0x03, 59
        .byte   0x05, 23
        .byte   0x0b, 0x7e
        .byte   0xff
dma_values:                             # port, value
        .word   0x08
        .byte   0x10
        .word   0x0a
        .byte   0x06
        .word   0x0b
        .byte   0x46
        .word   0x0c
        .byte   0x00
        .word   0x04
        .byte   0x78
        .word   0x04
        .byte   0x56
        .word   0x05
        .byte   0xff
        .word   0x05
        .byte   0x11
        .word   0x81
        .byte   0x23
        .word   0xd4
        .byte   0x05
        .word   0xd6
        .byte   0x59
        .word   0xd8
        .byte   0x00
        .word   0xc4
        .byte   0xcd
        .word   0xc4
        .byte   0xab
        .word   0xc6
        .byte   0x34
        .word   0xc6
        .byte   0x02
        .word   0x8b
        .byte   0x45
        .word   0xd4
        .byte   0x01
        .word   0x0c
        .byte   0x00
        .word   0x00
        .byte   0x99
        .word   0xffff
mouse_values:
        .byte   0xe7, 0xe8, 0x02, 0xf3, 40, 0xea, 0xf4, 0xff
keyboard_values:
        .byte   0xf3, 0x20, 0xed, 0x05, 0xf4, 0xff
text_ready:
        .asciz  "READY\n"
