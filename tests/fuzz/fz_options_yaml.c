/* The --config file: any bytes are read as YAML flags without a fault, and what is accepted passes its own row. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cli/options.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int fd = -1;
    static char path[64];
    if (fd < 0) {
        fd = memfd_create("config", MFD_CLOEXEC);
        (void)snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    }
    if (fd < 0 || ftruncate(fd, 0) != 0 || pwrite(fd, data, size, 0) != (ssize_t)size) abort();
    char word[80], *argv[] = {word};
    (void)snprintf(word, sizeof word, "--config=%s", path);
    options o;
    ern_err err = {.text = ""};
    ern_status s = options_read(&o, CMD_SERVE, 1, argv, NULL, &err);
    if (s != ERN_OK && !err.text[0]) abort(); /* a refusal always says why */
    if (s == ERN_OK) {
        ern_buf b;
        ern_buf_init(&b, 4 << 20);
        options_print_yaml(&o, &b);
        options_print_json(&o, &b);
        (void)options_int(&o, "port");
        (void)options_real(&o, "kv-cache-ratio");
        (void)options_flag(&o, "enable-chunked-prefill");
        if (options_check_built(&o, &err) != ERN_OK && !err.text[0]) abort();
        ern_buf_free(&b);
    }
    options_close(&o);
    return 0;
}
