# SPDX-License-Identifier: BSL-1.0
# A guest that reads a byte of every page from 16 MiB on, in an order that looks random, again and again, and notes which
# reads took long: in each pass every page has its turn. At 0x10000 it finds how many pages there are, less one (a power of
# two less one), and how many ticks of its clock are long; behind them it keeps what it has noted.
# benchmarks/postcopy.cpp knows the addresses.
        .include "common.inc"
        .code16
        .text

        .equ variables, 0x10000
        .equ v_last_page, 0
        .equ v_long, 4
        .equ v_touched, 8               # reads so far
        .equ v_noted, 12                # of which so many were noted
        .equ notes, 0x100000            # number of the read, ticks
        .equ first_page, 0x1000000

        begin_program
        movl    $variables, %esi
        xorl    %eax, %eax
        movl    %eax, %fs:v_touched(%esi)
        movl    %eax, %fs:v_noted(%esi)
        movl    %fs:v_long(%esi), %edi
        xorl    %ebx, %ebx

next:   imull   $1664525, %ebx
        addl    $1013904223, %ebx
        andl    %fs:v_last_page(%esi), %ebx
        movl    %ebx, %ebp              # the low bits alone would take turns
        shrl    $9, %ebp
        xorl    %ebx, %ebp
        shll    $12, %ebp
        incl    %fs:v_touched(%esi)
        rdtsc
        movl    %eax, %ecx
        movb    %fs:first_page(%ebp), %al
        rdtsc
        subl    %ecx, %eax
        cmpl    %edi, %eax
        jb      next

        movl    %fs:v_noted(%esi), %edx
        movl    %eax, %fs:notes + 4(,%edx,8)
        movl    %fs:v_touched(%esi), %eax
        movl    %eax, %fs:notes(,%edx,8)
        incl    %fs:v_noted(%esi)
        jmp     next
