/* The cuda backend's plugin: found, checked, kept. See plugin.h and backend.h.
 *
 * The driver is asked for by name first. Where it is not, nothing of the plugin is loaded, which is why a program that
 * was built with nvcc runs on machines without a GPU as if it had not been. The driver also says what GPU is there, and
 * with it which of two plugins is for it. */
#include "backend/plugin.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PLUGIN_FILE "ernest_cuda.so"     /* for a GPU of compute capability 9.0 */
#define OTHER_FILE "ernest_cuda_sm80.so" /* for any other one from 8.0 on */
#define DRIVER_FILE "libcuda.so.1"

static struct {
    pthread_once_t once;
    const ern_plugin *plugin;
    const char *missing;
    char file[1024];
} cuda = {.once = PTHREAD_ONCE_INIT};

const char *plugin_open(const ern_plugin **out, const char *path) {
    static const ern_plugin_stamp here = ERN_PLUGIN_STAMP_HERE;
    static char why[400];
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const char *said = handle ? NULL : dlerror();
    if (!handle) {
        (void)snprintf(why, sizeof why, "%.120s cannot be loaded: %.250s", path, said ? said : "no reason is given");
        return why;
    }
    const ern_plugin *p = dlsym(handle, "ern_cuda_plugin");
    if (p && memcmp(&p->stamp, &here, sizeof here) == 0) {
        *out = p;
        return NULL;
    }
    if (p)
        (void)snprintf(why, sizeof why, "%.200s is of another build (%.31s) than this program (%s)", path,
                       p->stamp.version, here.version);
    else
        (void)snprintf(why, sizeof why, "%.200s is no plugin of ernest", path);
    (void)dlclose(handle);
    return why;
}

/* Beside the program, as built, else where it is installed. */
static bool find_file(const char *name) {
    static const char *const place[] = {"", "../lib/ernest/"};
    char self[900];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) return false;
    self[n] = 0;
    char *slash = strrchr(self, '/');
    if (!slash) return false;
    slash[1] = 0;
    for (size_t i = 0; i < sizeof place / sizeof *place; i++) {
        (void)snprintf(cuda.file, sizeof cuda.file, "%s%s%s", self, place[i], name);
        if (access(cuda.file, R_OK) == 0) return true;
    }
    return false;
}

/* Threads that the driver may start from here on, until `before` is set again, take no signals: those are for who waits
 * for them. */
static void quiet(sigset_t *before) {
    sigset_t all;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, before);
}

/* The compute capability of the first GPU, ten times; 0: the driver does not tell. */
static int capability_of(void *driver) {
    enum { MAJOR = 75, MINOR = 76 }; /* CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_... of cuda.h */
    int device = 0, major = 0, minor = 0;
    int (*init)(unsigned), (*get)(int *, int), (*attribute)(int *, int, int);
    *(void **)&init = dlsym(driver, "cuInit");
    *(void **)&get = dlsym(driver, "cuDeviceGet");
    *(void **)&attribute = dlsym(driver, "cuDeviceGetAttribute");
    if (!init || !get || !attribute || init(0) != 0 || get(&device, 0) != 0) return 0;
    if (attribute(&major, MAJOR, device) != 0 || attribute(&minor, MINOR, device) != 0) return 0;
    return 10 * major + minor;
}

static void load(void) {
    if (!find_file(PLUGIN_FILE)) {
        cuda.missing = "this build has no cuda backend: " PLUGIN_FILE ", which is made where nvcc is, was not found";
        return;
    }
    void *driver = dlopen(DRIVER_FILE, RTLD_LAZY | RTLD_LOCAL); /* kept open: the plugin's runtime wants it next */
    if (!driver) {
        cuda.missing = "no NVIDIA driver here (" DRIVER_FILE " was not found)";
        return;
    }
    sigset_t before;
    quiet(&before);
    const int capability = capability_of(driver);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (capability >= 80 && capability != 90 && !find_file(OTHER_FILE)) {
        cuda.missing = "this GPU needs " OTHER_FILE ", which was not found beside " PLUGIN_FILE;
        return;
    }
    cuda.missing = plugin_open(&cuda.plugin, cuda.file);
}

const ern_plugin *plugin_cuda(void) {
    (void)pthread_once(&cuda.once, load);
    return cuda.plugin;
}

const char *plugin_cuda_missing(void) {
    const ern_plugin *p = plugin_cuda();
    if (!p) return cuda.missing;
    sigset_t before;
    quiet(&before);
    const char *missing = p->missing();
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return missing;
}

const char *plugin_cuda_file(void) { return plugin_cuda() ? cuda.file : NULL; }
