# SPDX-License-Identifier: BSL-1.0
# The guest of live_machine, for an x86 processor in 32-bit protected mode without paging. It does what guest_riscv.S
# does, and shows besides that its processor is what it was. Forever:
#   - it sleeps until the timer interrupts: the PIT, by the 8259 and the local APIC's LINT0;
#   - it checks some pages and writes some of them anew: a page holds what was written into it last, or it prints
#     "BAD page ..." and stops;
#   - it prints "tick N", with N one more each time, by interrupts of the 16550, which come by the IOAPIC;
#   - it counts its ticks in an x87, an SSE, a debug and a model-specific register, too, and has enabled AVX: where one of
#     them differs, or XCR0 does, it prints "BAD registers" and stops.
# It does with the instructions that KVM can emulate, for hosts where that is all that it does.
# What it works on is in the parameter page (guest_image.hpp). It runs from address 0, where the flat segments begin,
# too. All in one section without relocations: nothing links it; hence all addresses are differences to `start`.

        .equ parameters, 0x1000
        .equ variables, 0x1100
        .equ idt, 0x1800
        .equ line, 0x2000
        .equ stack_top, 0x3000
        .equ page_size, 4096
        .equ stride, 256                # of each page, the first word of every 256 bytes

        # Parameters
        .equ p_hot_begin, parameters    # pages in [hot_begin, hot_end) are checked and written,
        .equ p_hot_end, parameters + 4  # those in [hot_end, cold_end) are checked
        .equ p_cold_end, parameters + 8
        .equ p_pages_per_interval, parameters + 12
        .equ p_interval, parameters + 16 # microseconds
        .equ p_intervals_per_tick, parameters + 20

        .equ tick, variables
        .equ intervals_left, variables + 4
        .equ hot_page, variables + 8    # the next one
        .equ hot_content, variables + 12 # how often they have been written from there on
        .equ cold_page, variables + 16
        .equ pages_left, variables + 20
        .equ is_due, variables + 24     # the timer has interrupted
        .equ line_next, variables + 28  # what the serial port gets next,
        .equ line_end, variables + 32   # up to here
        .equ xsave_size, variables + 36 # by CPUID, which goes by XCR0
        .equ fpu_area, variables + 0x100 # two, of 512 bytes, as FXSAVE has them
        .equ fpu_copy, variables + 0x300
        .equ fpu_st0, 32                # in such an area: eight bytes of mantissa, two of exponent
        .equ fpu_xmm7, 160 + 7 * 16

        # 16550
        .equ thr, 0x3f8
        .equ ier, 0x3f9
        .equ fcr, 0x3fa
        .equ lcr, 0x3fb
        .equ mcr, 0x3fc
        .equ lsr, 0x3fd
        .equ ier_transmitter, 0x02
        .equ lsr_received, 0x01
        .equ lsr_fifo_empty, 0x20
        .equ lsr_sent, 0x40             # and the transmitter is, too

        .equ stop_port, 0xf4            # the machine stops at a write to it

        .equ lapic, 0xfee00000
        .equ ioapic, 0xfec00000
        .equ timer_vector, 0x20
        .equ uart_vector, 0x34
        .equ pic_spurious_vector, 0x27
        .equ spurious_vector, 0xff

        .equ sysenter_esp, 0x175        # a register for the system's own use, of which there is none here

        .text
        .code32
start:  cli
        cld
        movl    $stack_top, %esp
        lgdt    gdt_register - start
        ljmp    $8, $(1f - start)
1:      movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss

        # x87 and SSE; their counters are 0.
        movl    %cr0, %eax
        andl    $~0x0c, %eax            # neither EM nor TS
        orl     $0x22, %eax             # MP, NE
        movl    %eax, %cr0
        movl    %cr4, %eax
        orl     $0x600, %eax            # OSFXSR, OSXMMEXCPT
        movl    %eax, %cr4
        fninit
        # AVX, too, where there is such a thing: all that is seen of XCR0 is how much XSAVE would save.
        movl    $1, %eax
        cpuid
        testl   $(1 << 26), %ecx        # XSAVE
        jz      1f
        movl    %cr4, %eax
        orl     $0x40000, %eax          # OSXSAVE
        movl    %eax, %cr4
        movl    $0xd, %eax
        xorl    %ecx, %ecx
        cpuid                           # eax: what XCR0 may have
        andl    $7, %eax
        xorl    %edx, %edx
        xorl    %ecx, %ecx
        xsetbv
1:      call    read_xsave_size
        movl    %ebx, xsave_size
        fxsave  fpu_area
        xorl    %eax, %eax
        movl    %eax, tick
        call    count_in_registers

        xorl    %eax, %eax
        movl    %eax, hot_content
        movl    %eax, is_due
        movl    %eax, line_next
        movl    %eax, line_end
        movl    p_hot_begin, %eax
        movl    %eax, hot_page
        movl    p_hot_end, %eax
        movl    %eax, cold_page
        movl    p_intervals_per_tick, %eax
        movl    %eax, intervals_left

        # 115200 baud, 8 bits, FIFOs on and empty.
        movl    $lcr, %edx
        movb    $0x80, %al
        outb    %al, %dx
        movl    $thr, %edx              # divisor
        movb    $1, %al
        outb    %al, %dx
        movl    $ier, %edx
        xorl    %eax, %eax
        outb    %al, %dx
        movl    $lcr, %edx
        movb    $0x03, %al
        outb    %al, %dx
        movl    $fcr, %edx
        movb    $0x07, %al
        outb    %al, %dx
        # Is it one? In loopback mode it hears what it says.
        movl    $mcr, %edx
        movb    $0x10, %al
        outb    %al, %dx
        movl    $thr, %edx
        movb    $0x5a, %al
        outb    %al, %dx
        movl    $lsr, %edx
1:      inb     %dx, %al
        testb   $lsr_received, %al
        jz      1b
        movl    $thr, %edx
        inb     %dx, %al
        cmpb    $0x5a, %al
        jne     stop
        movl    $mcr, %edx
        movb    $0x0b, %al              # OUT2: its interrupt is let through
        outb    %al, %dx

        movl    p_hot_begin, %edi
1:      cmpl    p_cold_end, %edi
        je      2f
        xorl    %edx, %edx
        call    fill_page
        jmp     1b

2:      movl    $timer_vector, %ecx
        movl    $(timer_interrupt - start), %eax
        call    set_gate
        movl    $uart_vector, %ecx
        movl    $(uart_interrupt - start), %eax
        call    set_gate
        movl    $pic_spurious_vector, %ecx
        movl    $(spurious_interrupt - start), %eax
        call    set_gate
        movl    $spurious_vector, %ecx
        call    set_gate
        lidt    idt_register - start

        # Both 8259: vectors from 0x20 on, IRQ 0 alone.
        movb    $0x11, %al
        outb    %al, $0x20
        outb    %al, $0xa0
        movb    $0x20, %al
        outb    %al, $0x21
        movb    $0x28, %al
        outb    %al, $0xa1
        movb    $4, %al
        outb    %al, $0x21
        movb    $2, %al
        outb    %al, $0xa1
        movb    $1, %al
        outb    %al, $0x21
        outb    %al, $0xa1
        movb    $0xfe, %al
        outb    %al, $0x21
        movb    $0xff, %al
        outb    %al, $0xa1
        # The local APIC, with the 8259 at its LINT0; IRQ 4 at the IOAPIC: edge, to this processor.
        movl    $0, lapic + 0x80
        movl    $(0x100 | spurious_vector), lapic + 0xf0
        movl    $0x700, lapic + 0x350
        movl    $0x19, ioapic
        movl    $0, ioapic + 0x10
        movl    $0x18, ioapic
        movl    $uart_vector, ioapic + 0x10

        # The PIT's channel 0, mode 2: p_interval * 1193182 / 1000000.
        movb    $0x34, %al
        outb    %al, $0x43
        movl    p_interval, %eax
        movl    $1193182, %ecx
        mull    %ecx
        movl    $1000000, %ecx
        divl    %ecx
        outb    %al, $0x40
        movb    %ah, %al
        outb    %al, $0x40

interval:
        cli
1:      cmpl    $0, is_due
        jne     2f
        sti
        hlt
        cli
        jmp     1b
2:      movl    $0, is_due
        sti

        movl    p_pages_per_interval, %eax
        movl    %eax, pages_left
1:      cmpl    $0, pages_left
        je      4f
        movl    p_hot_begin, %eax
        cmpl    p_hot_end, %eax
        je      2f
        movl    hot_page, %edi
        movl    hot_content, %edx
        call    check_page
        movl    hot_page, %edi
        movl    hot_content, %edx
        incl    %edx
        call    fill_page
        cmpl    p_hot_end, %edi
        jne     3f
        movl    p_hot_begin, %edi
        incl    hot_content
3:      movl    %edi, hot_page
2:      movl    p_hot_end, %eax
        cmpl    p_cold_end, %eax
        je      3f
        movl    cold_page, %edi
        xorl    %edx, %edx
        call    check_page
        cmpl    p_cold_end, %edi
        jne     2f
        movl    p_hot_end, %edi
2:      movl    %edi, cold_page
3:      decl    pages_left
        jmp     1b

4:      decl    intervals_left
        jnz     interval
        movl    p_intervals_per_tick, %eax
        movl    %eax, intervals_left
        call    check_registers
        incl    tick
        call    count_in_registers
        movl    $(tick_text - start), %esi
        call    append_begin
        movl    tick, %eax
        call    append_decimal
        call    print_line
        jmp     interval

read_xsave_size:
        movl    $0xd, %eax
        xorl    %ecx, %ecx
        cpuid
        ret

# All of them hold the tick; XCR0 is what it was.
check_registers:
        call    read_xsave_size
        cmpl    %ebx, xsave_size
        jne     bad_registers
        movl    tick, %ebx
        fxsave  fpu_copy
        cmpl    %ebx, fpu_copy + fpu_st0
        jne     bad_registers
        cmpl    %ebx, fpu_copy + fpu_xmm7 + 12
        jne     bad_registers
        movl    %dr0, %eax
        cmpl    %ebx, %eax
        jne     bad_registers
        movl    $sysenter_esp, %ecx
        rdmsr
        cmpl    %ebx, %eax
        jne     bad_registers
        ret
count_in_registers:
        movl    tick, %eax
        movl    %eax, fpu_area + fpu_st0
        movl    %eax, fpu_area + fpu_xmm7 + 12
        fxrstor fpu_area
        movl    %eax, %dr0
        movl    $sysenter_esp, %ecx
        xorl    %edx, %edx
        wrmsr
        ret
bad_registers:
        movl    $(registers_text - start), %esi
        call    append_begin
        jmp     last_line

# What belongs at address edi of a page that was written for the edx-th time: edi * m1 ^ edx * m2.
fill_page:
        imull   $0x85ebca6b, %edx, %edx
        leal    page_size(%edi), %ecx
1:      imull   $0x9e3779b1, %edi, %eax
        xorl    %edx, %eax
        movl    %eax, (%edi)
        addl    $stride, %edi
        cmpl    %ecx, %edi
        jne     1b
        ret                             # edi: the next page

check_page:
        imull   $0x85ebca6b, %edx, %edx
        leal    page_size(%edi), %ecx
1:      imull   $0x9e3779b1, %edi, %eax
        xorl    %edx, %eax
        cmpl    %eax, (%edi)
        jne     bad_page
        addl    $stride, %edi
        cmpl    %ecx, %edi
        jne     1b
        ret

# edi: where, eax: what belongs there.
bad_page:
        pushl   %eax
        movl    (%edi), %ebx
        movl    $(bad_text - start), %esi
        movl    %edi, %ebp
        call    append_begin
        movl    %ebp, %eax
        call    append_hex
        call    append_space
        movl    %ebx, %eax
        call    append_hex
        call    append_space
        popl    %eax
        call    append_hex
last_line:
        call    print_line
        movl    $lsr, %edx
1:      inb     %dx, %al
        testb   $lsr_sent, %al
        jz      1b
stop:   outb    %al, $stop_port
        jmp     stop

# A line is put together on the stack's page, from its beginning; edi is its end.
append_begin:                           # esi
        movl    $line, %edi
1:      lodsb
        testb   %al, %al
        jz      2f
        stosb
        jmp     1b
2:      ret

append_space:
        movb    $' ', %al
        stosb
        ret

append_hex:                             # eax
        movl    %eax, %edx
        movl    $8, %ecx
1:      roll    $4, %edx
        movl    %edx, %eax
        andl    $15, %eax
        cmpl    $10, %eax
        jb      2f
        addl    $('a' - '0' - 10), %eax
2:      addl    $'0', %eax
        stosb
        decl    %ecx
        jnz     1b
        ret

append_decimal:                         # eax
        movl    $10, %ecx
        movl    %esp, %esi
1:      xorl    %edx, %edx
        divl    %ecx
        addl    $'0', %edx
        pushl   %edx
        testl   %eax, %eax
        jnz     1b
2:      popl    %eax
        stosb
        cmpl    %esi, %esp
        jne     2b
        ret

# The serial port fetches it by interrupts; waits until the last character is in its FIFO.
print_line:
        movb    $'\n', %al
        stosb
        cli
        movl    $line, line_next
        movl    %edi, line_end
        movl    $ier, %edx
        movb    $ier_transmitter, %al
        outb    %al, %dx
1:      movl    line_next, %eax
        cmpl    line_end, %eax
        je      2f
        sti
        hlt
        cli
        jmp     1b
2:      sti
        ret

# IRET, in steps. Interrupts come where they are enabled; they are again when the last step is done.
        .macro  return_from_interrupt
        pushl   8(%esp)
        andl    $~0x200, (%esp)
        popfl
        sti
        lretl   $4
        .endm

timer_interrupt:
        pushl   %eax
        movl    $1, is_due
        movb    $0x20, %al
        outb    %al, $0x20
        popl    %eax
        return_from_interrupt

# Sixteen at a time, as many as the FIFO takes; where there are no more, it asks no more.
uart_interrupt:
        pushal
        movl    $lsr, %edx
        inb     %dx, %al
        testb   $lsr_fifo_empty, %al
        jz      3f
        movl    line_next, %esi
        movl    $16, %ecx
        cmpl    line_end, %esi
        jne     1f
        movl    $ier, %edx
        xorl    %eax, %eax
        outb    %al, %dx
        jmp     3f
1:      movl    $thr, %edx
        lodsb
        outb    %al, %dx
        cmpl    line_end, %esi
        je      2f
        decl    %ecx
        jnz     1b
2:      movl    %esi, line_next
3:      movl    $0, lapic + 0xb0
        popal
spurious_interrupt:
        return_from_interrupt

# The interrupt gate of vector ecx leads to eax.
set_gate:
        movw    %ax, idt(, %ecx, 8)
        movw    $8, idt + 2(, %ecx, 8)
        movw    $0x8e00, idt + 4(, %ecx, 8)
        movw    $0, idt + 6(, %ecx, 8)
        ret

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 8: code
        .quad   0x00cf93000000ffff      # 16: data
gdt_register:
        .word   23
        .long   gdt - start
idt_register:
        .word   0x7ff
        .long   idt

tick_text:
        .asciz  "tick "
bad_text:
        .asciz  "BAD page "
registers_text:
        .asciz  "BAD registers"
