/* Every kernel of the cuda backend against scalar code, on a machine with a GPU: gpu_check [FILTER [SEED
 * [PART/PARTS | briefly]]]. PART/PARTS (1/8 .. 8/8): each case in one of so many processes, which may run side by side.
 * briefly: with few launches a case, for compute-sanitizer. */
#include "check.h"

#include <time.h>

enum { GUARD = 1 << 20, BLOCKS_MAX = 4096 };

uint64_t check_seed;
int check_n_case, check_n_failed;
const char *check_filter;
bool check_briefly;
static uint64_t n_drawn;
static int part = 1, n_part = 1, n_begun;
static struct {
    char *at; /* of the guard before */
    size_t bytes;
} block[BLOCKS_MAX];

bool check_begin(const char *name) {
    return (!check_filter || strstr(name, check_filter)) && n_begun++ % n_part == part - 1;
}

void check_end(const char *name, double worst, const char *what) {
    bool good = worst <= 1.0;
    check_n_case++;
    check_n_failed += !good;
    printf("%s  %-56s %8.4f of the bound%s%s\n", good ? "ok  " : "FAIL", name, worst, good ? "" : ": ",
           good ? "" : what);
}

void check_that(const char *name, bool good, const char *text) {
    check_n_case++;
    check_n_failed += !good;
    printf("%s  %-56s%s%s\n", good ? "ok  " : "FAIL", name, good ? "" : " ", good ? "" : text);
}

void *check_new(const void *host, size_t bytes) {
    for (int i = 0; i < BLOCKS_MAX; i++) {
        if (block[i].at) continue;
        size_t whole = (bytes + 511) / 512 * 512;
        CHECK_CUDA(cudaMalloc((void **)&block[i].at, whole + 2 * GUARD));
        CHECK_CUDA(cudaMemset(block[i].at, 0xff, whole + 2 * GUARD));
        block[i].bytes = whole;
        if (host) CHECK_CUDA(cudaMemcpy(block[i].at + GUARD, host, bytes, cudaMemcpyHostToDevice));
        return block[i].at + GUARD;
    }
    fprintf(stderr, "check_new: more than %d blocks\n", BLOCKS_MAX);
    exit(2);
}

void check_free(void *device) {
    static unsigned char around[GUARD];
    for (int i = 0; device && i < BLOCKS_MAX; i++) {
        if (!block[i].at || block[i].at + GUARD != device) continue;
        bool good = true;
        CHECK_CUDA(cudaDeviceSynchronize());
        for (int side = 0; side < 2; side++) {
            const char *from = side ? block[i].at + GUARD + block[i].bytes : block[i].at;
            CHECK_CUDA(cudaMemcpy(around, from, GUARD, cudaMemcpyDeviceToHost));
            for (size_t k = 0; k < GUARD; k++) good &= around[k] == 0xff;
        }
        if (!good) check_that("memory around a buffer", false, "was written");
        CHECK_CUDA(cudaFree(block[i].at));
        block[i].at = NULL;
        return;
    }
}

void check_get(void *host, const void *device, size_t bytes) {
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}

uint64_t check_random64(void) { return ern_counter64(check_seed, n_drawn++); }

double check_swiglu(double gate, double e_gate, double up, double e_up, double *bound) {
    const double silu = gate / (1.0 + exp(-gate)), h = silu * up;
    /* |silu'| < 1.1; expf (2 ulp), sum, division and product: under 8 * 2^-23 of the result together. Where expf(-gate)
     * is beyond f32, silu is 0 there: that is off by less than 89 * 2^-128. */
    const double f32 =
        1.1 * e_gate * (fabs(up) + e_up) + fabs(silu) * e_up + 0x1p-20 * fabs(h) + 0x1p-121 * (fabs(up) + e_up);
    /* Half an ulp of bf16, at most 2^-8, of the result and of what it may be off; or its least normal number. */
    *bound = f32 + 0x1.01p-8 * (fabs(h) + f32) + 0x1p-126;
    return h;
}

float check_random(void) { return (float)((int32_t)(check_random64() >> 40) - (1 << 23)) * 0x1p-23f; }

int main(int argc, char **argv) {
    check_filter = argc > 1 && *argv[1] ? argv[1] : NULL;
    check_seed = argc > 2 ? strtoull(argv[2], NULL, 10) : (uint64_t)time(NULL);
    check_briefly = argc > 3 && strcmp(argv[3], "briefly") == 0;
    if (argc > 3 && !check_briefly && (sscanf(argv[3], "%d/%d", &part, &n_part) != 2 || part < 1 || part > n_part)) {
        fprintf(stderr, "gpu_check: wants a part such as 1/8, or 'briefly', not '%s'\n", argv[3]);
        return 2;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    struct cudaDeviceProp p;
    CHECK_CUDA(cudaGetDeviceProperties(&p, 0));
    printf("%s, %d multiprocessors; seed %llu\n", p.name, p.multiProcessorCount, (unsigned long long)check_seed);
    check_linears();
    check_large();
#if !CU_PORTABLE
    check_a8();
    check_a8_mid();
    check_a8_few();
    check_half();
#endif
    check_rows();
    check_attention();
#if !CU_PORTABLE
    check_layers();
    check_attn_one();
#endif
    check_sampling();
    printf("gpu_check: %d cases, %d failed\n", check_n_case, check_n_failed);
    return check_n_failed > 0;
}
