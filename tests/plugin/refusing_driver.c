/* Stands for libcuda.so.1: a GPU of the compute capability that the environment names ("8.6"), or of 9.0. */
#include <stdio.h>
#include <stdlib.h>

int cuInit(unsigned flags);
int cuDeviceGet(int *device, int nth);
int cuDeviceGetAttribute(int *value, int which, int device);

int cuInit(unsigned flags) { return (int)flags; }

int cuDeviceGet(int *device, int nth) {
    *device = nth;
    return 0;
}

int cuDeviceGetAttribute(int *value, int which, int device) {
    const char *said = getenv("CAPABILITY");
    int major = 9, minor = 0;
    if (said && sscanf(said, "%d.%d", &major, &minor) != 2) return 1;
    *value = which == 75 ? major : minor;
    return device;
}
