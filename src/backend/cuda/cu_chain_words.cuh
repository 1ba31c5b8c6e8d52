/* Words that blocks of one kernel hand over to one another through global memory, each its own flag: a place is filled
 * with CHAIN_NONE, bits that no arithmetic here gives (f32: a NaN other than the one that instructions make; pairs of
 * bf16: the same), and who needs it reads the very words until none is CHAIN_NONE. */
#ifndef ERN_BACKEND_CUDA_CU_CHAIN_WORDS_CUH
#define ERN_BACKEND_CUDA_CU_CHAIN_WORDS_CUH

#include "backend/cuda/cu_device.cuh"

static const uint32_t CHAIN_NONE = 0xffffffffu;

static __device__ __forceinline__ uint32_t chain_read(const void *p) {
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
static __device__ __forceinline__ bool chain_none(uint4 v) { return max(max(v.x, v.y), max(v.z, v.w)) == CHAIN_NONE; }
static __device__ __forceinline__ void chain_write(void *p, uint32_t v) {
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
static __device__ __forceinline__ void chain_write2(void *p, float x, float y) {
    asm volatile("st.relaxed.gpu.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(__float_as_uint(x)),
                 "r"(__float_as_uint(y))
                 : "memory");
}
/* One more look that found nothing. After half a minute of them something is broken, and an error better than no end.
 */
static __device__ __forceinline__ void chain_again(int *n) {
    if (++*n > 1 << 26) __trap();
}
/* Until the phase of this parity is over. */
static __device__ __forceinline__ void chain_wait(uint32_t bar, uint32_t parity) {
    uint32_t done = 0;
    int looks = 0;
    while (!done) {
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
        if (!done) chain_again(&looks);
    }
}
/* N vectors of 16 bytes of which a lane has the first `count`; by a whole warp. */
template <int N> static __device__ __forceinline__ void chain_await(uint4 v[N], const void *const p[N], int count) {
    int looks = 0;
    for (;;) {
        bool none = false;
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < count) v[k] = cu_look4(p[k]);
#pragma unroll
        for (int k = 0; k < N; k++)
            if (k < count) none |= chain_none(v[k]);
        if (!__any_sync(0xffffffffu, none)) return;
        chain_again(&looks);
    }
}

#endif
