/* What a GPU can do at most, for fractions measured in the same run: gpu_limits.
 *
 * Prints one line a limit: reading memory (16 bytes a thread, several loads in flight, sizes from what the L2 cache
 * holds to far beyond), copying it (bytes read and written), and bf16 products of m16n8k16 from registers. Each the
 * best of ROUNDS, on random data. */
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

enum { ROUNDS = 8, THREADS = 512, UNROLL = 8, PRODUCTS = 4096 };

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

static cudaEvent_t from, to;

static double seconds(void) {
    float ms;
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(to, 0));
    CHECK(cudaEventSynchronize(to));
    CHECK(cudaEventElapsedTime(&ms, from, to));
    return (double)ms * 1e-3;
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
    return 0;
}
