/* What this plugin shows to the program that loads it: one symbol, see backend/plugin.h. */
#include "backend/plugin.h"

#include <cuda_runtime_api.h>
#include <stdio.h>

#include "backend/cuda/cuda.h"

/* The device that the backend opens: the first that CUDA_VISIBLE_DEVICES shows. */
static void cu_device_line(char *out, size_t size) {
    struct cudaDeviceProp p;
    int driver = 0;
    (void)snprintf(out, size, "a GPU");
    if (cudaGetDeviceProperties(&p, 0) != cudaSuccess || cudaDriverGetVersion(&driver) != cudaSuccess) return;
    (void)snprintf(out, size, "%s, %.1f GiB, compute capability %d.%d, a driver for CUDA %d.%d", p.name,
                   (double)p.totalGlobalMem / 1073741824.0, p.major, p.minor, driver / 1000, driver % 1000 / 10);
}

extern const ern_plugin ern_cuda_plugin;
__attribute__((visibility("default"))) const ern_plugin ern_cuda_plugin = {
    .stamp = ERN_PLUGIN_STAMP_HERE,
    .ops = &cuda_backend_ops,
    .missing = cuda_missing,
    .device = cu_device_line,
};
