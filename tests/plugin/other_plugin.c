/* A plugin that is of another build than any program: test_backend asks the loader to open it. */
#include "backend/plugin.h"

extern const ern_plugin ern_cuda_plugin;
const ern_plugin ern_cuda_plugin = {.stamp = {.version = "0.0.1-other"}};
