# SPDX-License-Identifier: BSL-1.0
# The guest of live_machine, for RV32IM. It shows whether it is still itself. Forever:
#   - it checks some pages and writes some of them anew: a page holds what was written into it last, or it prints
#     "BAD page ..." and stops;
#   - it prints "tick N", with N one more each time;
#   - it sleeps until the timer says that the next interval begins.
# What it works on is in the parameter page (guest_image.hpp). It runs from the beginning of RAM, with its stack below
# the end of the third page. All in one section without relocations: nothing links it.

        .equ ram, 0x80000000
        .equ parameters, ram + 0x1000
        .equ stack_top, ram + 0x3000
        .equ page_size, 4096
        .equ stride, 64                 # of each page, the first word of every 64 bytes

        # Parameters
        .equ p_hot_begin, 0             # pages in [hot_begin, hot_end) are checked and written,
        .equ p_hot_end, 4               # those in [hot_end, cold_end) are checked
        .equ p_cold_end, 8
        .equ p_pages_per_interval, 12
        .equ p_interval, 16             # microseconds
        .equ p_intervals_per_tick, 20

        # 16550
        .equ uart, 0x10000000
        .equ thr, 0
        .equ dll, 0
        .equ dlm, 1
        .equ fcr, 2
        .equ lcr, 3
        .equ mcr, 4
        .equ lsr, 5
        .equ lsr_received, 0x01
        .equ lsr_sent, 0x60             # transmitter and its FIFO are empty
        .equ lsr_fifo_empty, 0x20

        # Timer
        .equ mtimecmp, 0x02004000
        .equ mtime, 0x0200bff8

        # s0  parameters                s6  next deadline, low word
        # s1  tick                      s7  next deadline, high word
        # s2  intervals until it        s8  first hot page
        # s3  next hot page             s9  end of hot pages, first cold page
        # s4  what the hot ones hold    s10 end of cold pages
        # s5  next cold page            s11 pages left in this interval
        .text
start:  li      sp, stack_top
        li      s0, parameters
        lw      s8, p_hot_begin(s0)
        lw      s9, p_hot_end(s0)
        lw      s10, p_cold_end(s0)
        mv      s3, s8
        mv      s5, s9
        li      s1, 0
        li      s4, 0
        lw      s2, p_intervals_per_tick(s0)

        # 115200 baud, 8 bits, FIFOs on and empty.
        li      t0, uart
        li      t1, 0x80
        sb      t1, lcr(t0)
        li      t1, 1
        sb      t1, dll(t0)
        sb      zero, dlm(t0)
        li      t1, 0x03
        sb      t1, lcr(t0)
        li      t1, 0x07
        sb      t1, fcr(t0)
        # Is it one? In loopback mode it hears what it says.
        li      t1, 0x10
        sb      t1, mcr(t0)
        li      t1, 0x5a
        sb      t1, thr(t0)
1:      lbu     t2, lsr(t0)
        andi    t2, t2, lsr_received
        beqz    t2, 1b
        lbu     t2, thr(t0)
        sb      zero, mcr(t0)
        beq     t1, t2, 2f
        ebreak

2:      mv      a0, s8
        li      a1, 0
3:      beq     a0, s10, 4f
        jal     ra, fill_page
        j       3b
4:      jal     ra, read_time
        mv      s6, a0
        mv      s7, a1

interval:
        lw      s11, p_pages_per_interval(s0)
1:      beqz    s11, 4f
        beq     s8, s9, 2f
        mv      a0, s3
        mv      a1, s4
        jal     ra, check_page
        mv      a0, s3
        addi    a1, s4, 1
        jal     ra, fill_page
        mv      s3, a0
        bne     s3, s9, 2f
        mv      s3, s8
        addi    s4, s4, 1
2:      beq     s9, s10, 3f
        mv      a0, s5
        li      a1, 0
        jal     ra, check_page
        mv      s5, a0
        bne     s5, s10, 3f
        mv      s5, s9
3:      addi    s11, s11, -1
        j       1b

4:      addi    s2, s2, -1
        bnez    s2, 5f
        lw      s2, p_intervals_per_tick(s0)
        addi    s1, s1, 1
        la      a0, tick_text
        jal     ra, append_begin
        mv      a0, s1
        jal     ra, append_decimal
        jal     ra, print_line

        # The next deadline; now, where the work took longer.
5:      lw      t0, p_interval(s0)
        add     s6, s6, t0
        sltu    t0, s6, t0
        add     s7, s7, t0
        jal     ra, read_time
        bltu    s7, a1, 6f
        bne     s7, a1, 7f
        bgeu    s6, a0, 7f
6:      mv      s6, a0
        mv      s7, a1
7:      li      t0, mtimecmp
        li      t1, -1
        sw      t1, 4(t0)               # never, while it is half written
        sw      s6, 0(t0)
        sw      s7, 4(t0)
        wfi
        j       interval

# a1:a0 = microseconds.
read_time:
        li      t0, mtime
1:      lw      a1, 4(t0)
        lw      a0, 0(t0)
        lw      t1, 4(t0)
        bne     a1, t1, 1b
        ret

# What belongs at address a0 of a page that was written for the a1st time: a0 * t4 ^ a1 * t5.
fill_page:
        li      t4, 0x9e3779b1
        li      t5, 0x85ebca6b
        mul     t5, t5, a1
        li      t6, page_size
        add     t6, t6, a0
1:      mul     t0, a0, t4
        xor     t0, t0, t5
        sw      t0, 0(a0)
        addi    a0, a0, stride
        bne     a0, t6, 1b
        ret                             # a0: the next page

check_page:
        li      t4, 0x9e3779b1
        li      t5, 0x85ebca6b
        mul     t5, t5, a1
        li      t6, page_size
        add     t6, t6, a0
1:      mul     t0, a0, t4
        xor     t0, t0, t5
        lw      t1, 0(a0)
        bne     t0, t1, bad_page
        addi    a0, a0, stride
        bne     a0, t6, 1b
        ret

# a0: where, t1: what is there, t0: what belongs there.
bad_page:
        mv      s3, a0
        mv      s4, t1
        mv      s5, t0
        la      a0, bad_text
        jal     ra, append_begin
        mv      a0, s3
        jal     ra, append_hex
        jal     ra, append_space
        mv      a0, s4
        jal     ra, append_hex
        jal     ra, append_space
        mv      a0, s5
        jal     ra, append_hex
        jal     ra, print_line
        li      t0, uart
1:      lbu     t1, lsr(t0)
        andi    t1, t1, lsr_sent
        li      t2, lsr_sent
        bne     t1, t2, 1b
        ebreak

# A line is put together on the stack's page, from its beginning: gp is its end.
append_begin:
        li      gp, stack_top - page_size
1:      lbu     t0, 0(a0)
        beqz    t0, 2f
        sb      t0, 0(gp)
        addi    gp, gp, 1
        addi    a0, a0, 1
        j       1b
2:      ret

append_space:
        li      t0, ' '
        sb      t0, 0(gp)
        addi    gp, gp, 1
        ret

append_hex:
        li      t1, 28
1:      srl     t0, a0, t1
        andi    t0, t0, 15
        sltiu   t2, t0, 10
        bnez    t2, 2f
        addi    t0, t0, 'a' - '0' - 10
2:      addi    t0, t0, '0'
        sb      t0, 0(gp)
        addi    gp, gp, 1
        addi    t1, t1, -4
        bgez    t1, 1b
        ret

append_decimal:
        mv      t3, sp
        li      t1, 10
1:      remu    t0, a0, t1
        divu    a0, a0, t1
        addi    t0, t0, '0'
        addi    sp, sp, -1
        sb      t0, 0(sp)
        bnez    a0, 1b
2:      lbu     t0, 0(sp)
        sb      t0, 0(gp)
        addi    sp, sp, 1
        addi    gp, gp, 1
        bne     sp, t3, 2b
        ret

# Sixteen at a time, as many as the FIFO takes.
print_line:
        li      t0, '\n'
        sb      t0, 0(gp)
        addi    gp, gp, 1
        li      a0, stack_top - page_size
        li      t0, uart
1:      lbu     t1, lsr(t0)
        andi    t1, t1, lsr_fifo_empty
        beqz    t1, 1b
        li      t2, 16
2:      beq     a0, gp, 3f
        lbu     t1, 0(a0)
        sb      t1, thr(t0)
        addi    a0, a0, 1
        addi    t2, t2, -1
        bnez    t2, 2b
        j       1b
3:      ret

tick_text:
        .asciz  "tick "
bad_text:
        .asciz  "BAD page "
