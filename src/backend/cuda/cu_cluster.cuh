/* What blocks of a cluster say to one another: the instructions by name. Device code only. A block may be written to
 * once it has arrived; it does not end before all that comes to it is there. */
#ifndef ERN_BACKEND_CUDA_CU_CLUSTER_CUH
#define ERN_BACKEND_CUDA_CU_CLUSTER_CUH

#include <stdint.h>

static __device__ __forceinline__ void cluster_arrive(void) {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
/* Where barriers that were made ready (bar_init_end) are all there is to be seen: waits for nothing. */
static __device__ __forceinline__ void cluster_arrive_relaxed(void) {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
static __device__ __forceinline__ void cluster_meet(void) {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
/* The same place in the shared memory of another block. */
static __device__ __forceinline__ uint32_t at_rank(uint32_t at, uint32_t rank) {
    uint32_t out;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(out) : "r"(at), "r"(rank));
    return out;
}
static __device__ __forceinline__ void send(uint32_t to, float v) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(to), "f"(v) : "memory");
}
/* Counts as four bytes at a barrier of the same block when it is there. */
static __device__ __forceinline__ void send_counted(uint32_t to, float v, uint32_t bar) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                 "r"(__float_as_uint(v)), "r"(bar)
                 : "memory");
}
/* Arrives at a barrier of any block: what this thread sent there before can be read behind hear. */
static __device__ __forceinline__ void tell(uint32_t bar) {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
/* bar_wait for a barrier that other blocks arrive at or send to. */
static __device__ __forceinline__ void hear(uint32_t bar, uint32_t parity) {
    uint32_t done = 0;
    while (!done)
        asm volatile("{.reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
                     "selp.u32 %0, 1, 0, p;}"
                     : "=r"(done)
                     : "r"(bar), "r"(parity)
                     : "memory");
}

#endif
