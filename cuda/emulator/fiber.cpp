#include "fiber.h"

#include <stdint.h>

// Callee-saved registers are stored on the stack that is left; the compiler has saved all others before the call.

#if defined(__x86_64__)  // System V ABI, AMD64, 3.2.1: rbx, rbp, r12 – r15

asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
    endbr64
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulator_switch, .-emulator_switch
)");

void* emulator::prepare_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15));
    *--top = 0;  // where a return address would be: a function finds its stack 8 bytes off a multiple of 16
    *--top = reinterpret_cast<uint64_t>(entry);
    for (int n = 0; n < 6; ++n) *--top = 0;
    return top;
}

#elif defined(__aarch64__)  // Procedure Call Standard for the Arm 64-bit Architecture, 6.1: x19 – x29, the link register, the low halves of v8 – v15

asm(R"(
.text
.hidden emulator_switch
.globl emulator_switch
.type emulator_switch, %function
emulator_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size emulator_switch, .-emulator_switch
)");

void* emulator::prepare_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t(15)) - 20;
    for (int n = 0; n < 20; ++n) top[n] = 0;
    top[11] = reinterpret_cast<uint64_t>(entry);  // x30
    return top;
}

#else  // anywhere else: slower, because it also saves the signal mask, by a system call

#include <ucontext.h>

#include <new>

extern "C" void emulator_switch(void** from, void* to) {
    ucontext_t here;
    *from = &here;
    swapcontext(&here, static_cast<ucontext_t*>(to));
}

void* emulator::prepare_fiber(char* stack, size_t bytes, void (*entry)()) {
    auto* context = new (stack) ucontext_t;
    getcontext(context);
    const size_t kept = (sizeof(ucontext_t) + 63) & ~size_t(63);
    context->uc_stack.ss_sp = stack + kept, context->uc_stack.ss_size = bytes - kept, context->uc_link = nullptr;
    makecontext(context, entry, 0);
    return context;
}

#endif
