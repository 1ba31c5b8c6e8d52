/* Which tables there are, and which of them this machine can run. */
#include "backend/cpu/cpu_kernels.h"

static bool vnni_here(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512vnni");
#else
    return false;
#endif
}

/* vdpbf16ps, and twice as fast as multiply-adds in f32: so on AMD since Zen 4 (docs/speed.md). On Xeons it is half as
 * fast. The maker decides, not a clock: what is computed must not hang on how busy the machine was at the start. */
static bool dots_here(void) {
#if defined(__x86_64__)
    return vnni_here() && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}
static bool dots_fast(void) {
#if defined(__x86_64__)
    return dots_here() && __builtin_cpu_is("amd");
#else
    return false;
#endif
}

const cpu_kernels *cpu_kernels_for(ern_cpu_level level) {
    switch (level) {
    case ERN_CPU_AMX:
        if (!vnni_here()) break;
        return &cpu_kernels_amx;
    case ERN_CPU_AVX512: return dots_fast() ? &cpu_kernels_bf16 : vnni_here() ? &cpu_kernels_vnni : &cpu_kernels_avx512;
    case ERN_CPU_AVX2: return &cpu_kernels_avx2;
    case ERN_CPU_PORTABLE: break;
    }
    return level == ERN_CPU_AMX ? &cpu_kernels_avx512 : &cpu_kernels_portable;
}

int cpu_kernels_here(const cpu_kernels *out[CPU_TABLES]) {
    const ern_cpu_level here = ern_cpu_level_here();
    int n = 0;
    out[n++] = &cpu_kernels_portable;
    if (here >= ERN_CPU_AVX2) out[n++] = &cpu_kernels_avx2;
    if (here >= ERN_CPU_AVX512) out[n++] = &cpu_kernels_avx512;
    if (here >= ERN_CPU_AVX512 && vnni_here()) out[n++] = &cpu_kernels_vnni;
    if (here >= ERN_CPU_AVX512 && dots_here()) out[n++] = &cpu_kernels_bf16;
    if (here >= ERN_CPU_AMX && cpu_kernels_for(here) == &cpu_kernels_amx) out[n++] = &cpu_kernels_amx;
    return n;
}
