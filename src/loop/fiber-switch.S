/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The stack switch for x86-64 (System V) and aarch64 (AAPCS64): callee-saved registers go on the old stack and come from the
 * new one. The call itself saves all others.
 */
#if defined(__x86_64__)

        .text
        .globl  fiber_switch_stacks
        .hidden fiber_switch_stacks
        .type   fiber_switch_stacks, @function
        .p2align 4
fiber_switch_stacks:
        .cfi_startproc
        pushq   %rbp
        pushq   %rbx
        pushq   %r12
        pushq   %r13
        pushq   %r14
        pushq   %r15
        movq    %rsp, (%rdi)
        movq    %rsi, %rsp
        popq    %r15
        popq    %r14
        popq    %r13
        popq    %r12
        popq    %rbx
        popq    %rbp
        ret
        .cfi_endproc
        .size   fiber_switch_stacks, . - fiber_switch_stacks

        .globl  fiber_begin
        .hidden fiber_begin
        .type   fiber_begin, @function
        .p2align 4
fiber_begin:
        .cfi_startproc
        .cfi_undefined rip
        subq    $8, %rsp
        movq    %rbx, %rdi
        callq   *%r12
        ud2
        .cfi_endproc
        .size   fiber_begin, . - fiber_begin

#elif defined(__aarch64__)

        .text
        .globl  fiber_switch_stacks
        .hidden fiber_switch_stacks
        .type   fiber_switch_stacks, %function
        .p2align 4
fiber_switch_stacks:
        .cfi_startproc
        sub     sp, sp, #160
        stp     x19, x20, [sp, #0]
        stp     x21, x22, [sp, #16]
        stp     x23, x24, [sp, #32]
        stp     x25, x26, [sp, #48]
        stp     x27, x28, [sp, #64]
        stp     x29, x30, [sp, #80]
        stp     d8, d9, [sp, #96]
        stp     d10, d11, [sp, #112]
        stp     d12, d13, [sp, #128]
        stp     d14, d15, [sp, #144]
        mov     x9, sp
        str     x9, [x0]
        mov     sp, x1
        ldp     x19, x20, [sp, #0]
        ldp     x21, x22, [sp, #16]
        ldp     x23, x24, [sp, #32]
        ldp     x25, x26, [sp, #48]
        ldp     x27, x28, [sp, #64]
        ldp     x29, x30, [sp, #80]
        ldp     d8, d9, [sp, #96]
        ldp     d10, d11, [sp, #112]
        ldp     d12, d13, [sp, #128]
        ldp     d14, d15, [sp, #144]
        add     sp, sp, #160
        ret
        .cfi_endproc
        .size   fiber_switch_stacks, . - fiber_switch_stacks

        .globl  fiber_begin
        .hidden fiber_begin
        .type   fiber_begin, %function
        .p2align 4
fiber_begin:
        .cfi_startproc
        .cfi_undefined x30
        mov     x0, x20
        blr     x19
        brk     #1
        .cfi_endproc
        .size   fiber_begin, . - fiber_begin

#endif

        .section .note.GNU-stack, "", %progbits
