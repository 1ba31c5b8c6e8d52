/* What a GPU can do at most, for fractions measured in the same run: gpu_limits.
 *
 * Prints one line a limit: reading memory (16 bytes a thread, several loads in flight, sizes from what the L2 cache
 * holds to far beyond), copying it (bytes read and written), and products: bf16 of m16n8k16 from registers, each the
 * best of ROUNDS; bf16 and fp8 by warpgroups, as long as a prefill takes. All on random data. */
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call)                                                                             \
    do {                                                                                        \
        cudaError_t error = (call);                                                             \
        if (error != cudaSuccess) {                                                             \
            fprintf(stderr, "gpu_limits: %s (line %d)\n", cudaGetErrorString(error), __LINE__); \
            exit(2);                                                                            \
        }                                                                                       \
    } while (0)

enum { ROUNDS = 8, THREADS = 512, UNROLL = 8, PRODUCTS = 4096, WGMMA_BYTES = 65536 };
static const double SUSTAINED = 0.4; /* seconds */

static __global__ void fill(uint4 *x, int64_t n) {
    for (int64_t i = blockIdx.x * (int64_t)blockDim.x + threadIdx.x; i < n; i += (int64_t)gridDim.x * blockDim.x) {
        uint64_t h = (uint64_t)i * 0x9e3779b97f4a7c15ull;
        h ^= h >> 29;
        x[i] = make_uint4((uint32_t)h, (uint32_t)(h >> 32), (uint32_t)(h * 7), (uint32_t)(h >> 13));
    }
}

static __global__ void __launch_bounds__(THREADS) read_all(const uint4 *x, int64_t n, uint32_t *out) {
    uint32_t sum = 0;
    const int64_t step = (int64_t)gridDim.x * THREADS;
    for (int64_t i = blockIdx.x * (int64_t)THREADS + threadIdx.x; i < n; i += step * UNROLL) {
        uint4 v[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; k++) v[k] = i + k * step < n ? __ldcs(x + i + k * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int k = 0; k < UNROLL; k++) sum ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    if (sum == 0x12345678u) *out = sum; /* so that the loads stay */
}

static __global__ void __launch_bounds__(256) multiply(float *out, const uint4 *seed) {
    float acc[8][4] = {};
    uint4 a = seed[threadIdx.x], b = seed[256 + threadIdx.x];
    a.x &= 0x3fff3fffu, a.y &= 0x3fff3fffu, a.z &= 0x3fff3fffu, a.w &= 0x3fff3fffu;
    b.x &= 0xbfffbfffu, b.y &= 0xbfffbfffu;
    for (int i = 0; i < PRODUCTS / 8; i++)
#pragma unroll
        for (int k = 0; k < 8; k++)
            asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                         "{%0,%1,%2,%3};"
                         : "+f"(acc[k][0]), "+f"(acc[k][1]), "+f"(acc[k][2]), "+f"(acc[k][3])
                         : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 8; k++) sum += acc[k][0] + acc[k][1] + acc[k][2] + acc[k][3];
    if (sum == 1.5f) out[threadIdx.x] = sum;
}

/* d[64] += A [64, 32 bytes] B [128, 32 bytes], both from shared memory by descriptors. What lies there is random; where
 * exactly a product finds its numbers does not matter here. */
#define PRODUCT(shape_and_types, transposed)                                                                          \
    asm volatile(                                                                                                     \
        "wgmma.mma_async.sync.aligned." shape_and_types " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, "        \
        "%12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "        \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "        \
        "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, 1, 1, 1" transposed ";\n"             \
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), \
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),      \
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),     \
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), "+f"(d[32]),     \
          "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]),     \
          "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), "+f"(d[48]),     \
          "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), "+f"(d[56]),     \
          "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])                   \
        : "l"(a), "l"(b))
template <bool FP8> static __device__ __forceinline__ void product(float d[64], uint64_t a, uint64_t b) {
    if (FP8)
        PRODUCT("m64n128k32.f32.e4m3.e4m3", "");
    else
        PRODUCT("m64n128k16.f32.bf16.bf16", ", 0, 0");
}

/* Random bits to two bf16, or four e4m3, of either sign between 1/8 and 2: what bits change from product to product
 * costs power, and power the clock, so a rate on zeros or on numbers that vanish in the sum is not one that a model
 * meets. */
template <bool FP8> static __device__ __forceinline__ uint32_t number(uint32_t bits) {
    return FP8 ? (bits & 0x9f9f9f9fu) | 0x20202020u : (bits & 0x81ff81ffu) | 0x3e003e00u;
}

template <bool FP8> static __global__ void __launch_bounds__(256) multiply_group(float *out, const uint4 *seed) {
    extern __shared__ __align__(1024) uint4 memory[];
    for (int i = threadIdx.x; i < WGMMA_BYTES / 16; i += 256) {
        const uint4 v = seed[(blockIdx.x % 64) * 4096 + i];
        memory[i] = make_uint4(number<FP8>(v.x), number<FP8>(v.y), number<FP8>(v.z), number<FP8>(v.w));
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
    float d[64] = {};
    const uint32_t at = (uint32_t)__cvta_generic_to_shared(memory);
    const uint64_t high = (uint64_t)8 << 16 | (uint64_t)16 << 32; /* strides of core matrices: 128 and 256 bytes */
    for (int i = 0; i < PRODUCTS / 8; i++) {
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 8; k++)
            product<FP8>(d, high | ((at + (threadIdx.x / 128) * 16384 + k * 2048) >> 4),
                         high | ((at + 32768 + k * 4096) >> 4));
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < 64; k++) sum += d[k];
    if (sum == 1.5f) out[threadIdx.x] = sum;
}

static cudaEvent_t from, to;

static double seconds(void) {
    float ms;
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(to, 0));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    return (double)ms * 1e-3;
}

/* As long as a prefill: the clock falls within some milliseconds of full work. */
template <bool FP8> static void sustained(const char *line, int n_core, const uint4 *x, uint4 *y) {
    CHECK(cudaFuncSetAttribute((const void *)multiply_group<FP8>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               WGMMA_BYTES));
    const double each = (double)n_core * 2 * 2 * PRODUCTS * 64.0 * 128 * (FP8 ? 32 : 16) * 2;
    double took[2]; /* half as long, and as long again */
    for (int r = 0; r < 2; r++) {
        const int n = 1 + (int)(SUSTAINED / 2 / (each / (FP8 ? 1600e12 : 900e12)));
        CHECK(cudaEventRecord(from, 0));
        for (int i = 0; i < n; i++) multiply_group<FP8><<<n_core * 2, 256, WGMMA_BYTES>>>((float *)y, x);
        took[r] = seconds() / n;
    }
    printf(line, each / took[1] * 1e-12, SUSTAINED / 2);
}

int main(void) {
    struct cudaDeviceProp p;
    uint4 *x, *y;
    const int64_t most = (int64_t)2 << 30;
    CHECK(cudaGetDeviceProperties(&p, 0));
    CHECK(cudaMalloc((void **)&x, (size_t)most));
    CHECK(cudaMalloc((void **)&y, (size_t)most));
    CHECK(cudaEventCreate(&from));
    CHECK(cudaEventCreate(&to));
    fill<<<p.multiProcessorCount * 4, 256>>>(x, most / 16);
    CHECK(cudaDeviceSynchronize());
    printf("%s, %d multiprocessors, %.1f GiB\n", p.name, p.multiProcessorCount, (double)p.totalGlobalMem / (1 << 30));
    for (int64_t bytes = (int64_t)8 << 20; bytes <= most; bytes *= 4) {
        double best = 1e9;
        const int n_part = (int)(most / bytes); /* another part each round: none finds its own in the cache */
        for (int r = 0; r < ROUNDS; r++) {
            const uint4 *at = x + (int64_t)((r * 7 + 3) % n_part) * (bytes / 16);
            if (n_part > 1) CHECK(cudaMemsetAsync(y, r, (size_t)256 << 20, 0));
            CHECK(cudaEventRecord(from, 0));
            read_all<<<p.multiProcessorCount * 4, THREADS>>>(at, bytes / 16, (uint32_t *)y);
            double s = seconds();
            best = s < best ? s : best;
        }
        printf("read %5lld MiB    %7.3f TB/s\n", (long long)(bytes >> 20), (double)bytes / best * 1e-12);
    }
    double best = 1e9;
    for (int r = 0; r < ROUNDS; r++) {
        CHECK(cudaEventRecord(from, 0));
        CHECK(cudaMemcpyAsync(y, x, (size_t)most, cudaMemcpyDeviceToDevice, 0));
        double s = seconds();
        best = s < best ? s : best;
    }
    printf("copy %5lld MiB    %7.3f TB/s, read and written\n", (long long)(most >> 20),
           2.0 * (double)most / best * 1e-12);
    best = 1e9;
    const int blocks = p.multiProcessorCount * 4;
    for (int r = 0; r < ROUNDS; r++) {
        CHECK(cudaEventRecord(from, 0));
        multiply<<<blocks, 256>>>((float *)y, x);
        double s = seconds();
        best = s < best ? s : best;
    }
    printf("bf16 products     %7.1f TFLOP/s, m16n8k16 from registers\n",
           (double)blocks * 8 * PRODUCTS * 4096.0 / best * 1e-12);
    sustained<false>("bf16 products     %7.1f TFLOP/s, m64n128k16 from shared memory, after %.1f s of it\n",
                     p.multiProcessorCount, x, y);
    sustained<true>("fp8 products      %7.1f TFLOP/s, m64n128k32 from shared memory, after %.1f s of it\n",
                    p.multiProcessorCount, x, y);
    return 0;
}
