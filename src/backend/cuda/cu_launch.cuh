/* Launching a kernel that begins while the one before it still runs (programmatic dependent launch), and clusters; what
 * has to be known or set once a device before.
 *
 *   device  cu_launch_next()    from here on the next kernel may take what room is left on the chip
 *           cu_wait_previous()  all earlier kernels of the stream are done and their writes are seen
 * A kernel launched `early` reads weights as it likes (they were written before the stream was last waited for), but
 * calls cu_wait_previous in every block, before it reads what an earlier kernel wrote and before it writes anything an
 * earlier kernel may still read; attention of short sequences beside attn_prefill does so in one block alone.
 * Both are harmless in a kernel that was launched without. A kernel that never calls cu_launch_next lets the next begin
 * when it ends. Of CU_PORTABLE none begins early. */
#ifndef ERN_BACKEND_CUDA_CU_LAUNCH_CUH
#define ERN_BACKEND_CUDA_CU_LAUNCH_CUH

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>
#include <utility>

#include "backend/cuda/cu_kernels.h"

static __device__ __forceinline__ void cu_launch_next(void) {
#if !CU_PORTABLE
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
static __device__ __forceinline__ void cu_wait_previous(void) {
#if !CU_PORTABLE
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* The block's number in its cluster. */
static __device__ __forceinline__ uint32_t cu_cluster_rank(void) {
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

enum { CU_DEVICES = 64 }; /* whose numbers a file remembers */

/* Multiprocessors of the device, asked for once. */
static inline cudaError_t cu_core_count(int32_t *n) {
    static int32_t count[CU_DEVICES];
    int device, value = 0;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && device >= CU_DEVICES) e = cudaErrorInvalidDevice;
    if (e == cudaSuccess && !count[device]) {
        e = cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
        count[device] = value;
    }
    *n = e == cudaSuccess ? count[device] : 0;
    return e;
}
/* Let a kernel have so much dynamic shared memory, once a device: bit d of *ready says that device d knows. */
static inline cudaError_t cu_shared_bytes(uint64_t *ready, const void *kernel, int bytes) {
    int device;
    cudaError_t e = cudaGetDevice(&device);
    if (e == cudaSuccess && device >= CU_DEVICES) e = cudaErrorInvalidDevice;
    if (e != cudaSuccess || *ready >> device & 1) return e;
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (e == cudaSuccess) *ready |= 1ull << device;
    return e;
}

/* The same, and all of a multiprocessor's memory is to be shared memory: where a kernel is given only what its own
 * blocks take, those of others find no room beside them. */
static inline cudaError_t cu_shared_whole(uint64_t *ready, const void *kernel, int bytes) {
    const uint64_t before = *ready;
    const cudaError_t e = cu_shared_bytes(ready, kernel, bytes);
    if (e != cudaSuccess || *ready == before) return e;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

/* fn: a __global__ function; args: pointers to its parameters. early: it may begin before the kernel in front of it
 * ends. n_rank: blocks of a cluster along x (grid.x is a multiple of it). */
static inline cudaError_t cu_launch(cudaStream_t s, const void *fn, dim3 grid, unsigned n_thread, size_t shared_bytes,
                                    bool early, unsigned n_rank, void **args) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attr[2] = {};
    config.gridDim = grid;
    config.blockDim = dim3(n_thread, 1, 1);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = s;
    config.attrs = attr;
    if (early && !CU_PORTABLE) {
        attr[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (n_rank > 1) {
        attr[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attr[config.numAttrs].val.clusterDim.x = n_rank;
        attr[config.numAttrs].val.clusterDim.y = 1;
        attr[config.numAttrs++].val.clusterDim.z = 1;
    }
    cudaError_t e = cudaLaunchKernelExC(&config, fn, args);
    return e != cudaSuccess ? e : cudaGetLastError();
}

/* A kernel without clusters, by its parameters. */
template <typename... P, typename... A>
static inline cudaError_t cu_launch_args(cudaStream_t s, void (*fn)(P...), dim3 grid, unsigned n_thread, bool early,
                                         A &&...args) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute attr[1] = {};
    config.gridDim = grid;
    config.blockDim = dim3(n_thread, 1, 1);
    config.stream = s;
    config.attrs = attr;
    config.numAttrs = early && !CU_PORTABLE;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    const cudaError_t e = cudaLaunchKernelEx(&config, fn, std::forward<A>(args)...);
    return e != cudaSuccess ? e : cudaGetLastError();
}

#endif
