/*
 * Loaded into L1's QEMU: mends its emulation of AMD's SVM.
 *
 * When KVM injects an interrupt, helper_vmrun (target/i386/tcg/system/svm_helper.c, seen in
 * 10.0 and 11.1) delivers it and returns with exception_index still set to its vector. VMRUN
 * ends its translation block, so cpu_handle_interrupt (accel/tcg/cpu-exec.c) runs next. If it
 * is asked to leave before anything has reset the index, the vector is delivered once more,
 * whatever the guest's interrupt flag says: at the first instruction of the handler, say, where
 * the guest's kernel has not yet loaded its own GS. Docs: docs/status.md.
 *
 * Leaving through cpu_loop_exit_noexc comes to the same place with the index reset.
 */
#include <stdlib.h>

struct helper {
    void (*func)(void *env, int address_size, int length);
};

extern struct helper helper_info_vmrun;
extern void helper_vmrun(void *env, int address_size, int length);
extern _Noreturn void cpu_loop_exit_noexc(void *cpu);
extern __thread void *current_cpu;

static void vmrun(void *env, int address_size, int length)
{
    helper_vmrun(env, address_size, length);
    cpu_loop_exit_noexc(current_cpu);
}

__attribute__((constructor)) static void mend(void)
{
    /* Another table than the one that was looked at: better no emulator than an unknown one. */
    if (helper_info_vmrun.func != helper_vmrun)
        abort();
    helper_info_vmrun.func = vmrun;
}
