/* The cuda backend's plugin: found, checked, kept. See plugin.h and backend.h.
 *
 * The driver is asked for by name first. Where it is not, nothing of the plugin is loaded, which is why a program that
 * was built with nvcc runs on machines without a GPU as if it had not been. */
#include "backend/plugin.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PLUGIN_FILE "ernest_cuda.so"
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
static bool find_file(void) {
    static const char *const place[] = {PLUGIN_FILE, "../lib/ernest/" PLUGIN_FILE};
    char self[900];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) return false;
    self[n] = 0;
    char *slash = strrchr(self, '/');
    if (!slash) return false;
    slash[1] = 0;
    for (size_t i = 0; i < sizeof place / sizeof *place; i++) {
        (void)snprintf(cuda.file, sizeof cuda.file, "%s%s", self, place[i]);
        if (access(cuda.file, R_OK) == 0) return true;
    }
    return false;
}

static void load(void) {
    if (!find_file()) {
        cuda.missing = "this build has no cuda backend: " PLUGIN_FILE ", which is made where nvcc is, was not found";
        return;
    }
    if (!dlopen(DRIVER_FILE, RTLD_LAZY | RTLD_LOCAL)) { /* kept open: the plugin's runtime wants it next */
        cuda.missing = "no NVIDIA driver here (" DRIVER_FILE " was not found)";
        return;
    }
    cuda.missing = plugin_open(&cuda.plugin, cuda.file);
}

const ern_plugin *plugin_cuda(void) {
    (void)pthread_once(&cuda.once, load);
    return cuda.plugin;
}

/* Threads that the driver may start on this occasion take no signals: those are for who waits for them. */
const char *plugin_cuda_missing(void) {
    const ern_plugin *p = plugin_cuda();
    if (!p) return cuda.missing;
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    const char *missing = p->missing();
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return missing;
}

const char *plugin_cuda_file(void) { return plugin_cuda() ? cuda.file : NULL; }
