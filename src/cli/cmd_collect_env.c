/* ernest collect-env: what a bug report needs. Values of variables that may hold secrets are not shown. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <curl/curl.h>
#include <jansson.h>
#include <microhttpd.h>
#include <xxhash.h>
#include <yaml.h>

#include "backend/backend.h"
#include "base/os.h"
#include "cli/command.h"
#include "cli/console.h"

#ifdef __clang__
#define COMPILER "clang " __clang_version__
#else
#define COMPILER "gcc " __VERSION__
#endif

static void print_os(ern_buf *b) {
    char *text = NULL;
    size_t len = 0;
    ern_err err;
    if (ern_file_read(&text, &len, "/etc/os-release", 65536, &err) != ERN_OK) return;
    const char *name = strstr(text, "PRETTY_NAME=");
    if (name) name += strspn(name + 12, "\"") + 12;
    if (name) (void)ern_buf_print(b, "system:        %.*s\n", (int)strcspn(name, "\"\n"), name);
    free(text);
}

static void print_limit(ern_buf *b, const char *what, int resource) {
    struct rlimit r;
    if (getrlimit((__rlimit_resource_t)resource, &r) != 0) return;
    if (r.rlim_cur == RLIM_INFINITY)
        (void)ern_buf_print(b, "%-14s unlimited\n", what);
    else
        (void)ern_buf_print(b, "%-14s %llu\n", what, (unsigned long long)r.rlim_cur);
}

static void print_gpu(ern_buf *b) {
    char line[200];
    if (ern_backend_device("cuda", line, sizeof line))
        (void)ern_buf_print(b, "gpu:           %s\n", line);
    else
        (void)ern_buf_print(b, "gpu:           none to compute on: %s\n", ern_backend_missing("cuda"));
}

/* A variable of the table or of FastDeploy's: its name, and its value unless it is a key. */
static void print_variables(ern_buf *b, char **envp) {
    for (char **e = envp; e && *e; e++) {
        size_t len = strcspn(*e, "=");
        char word[128];
        (void)snprintf(word, sizeof word, "%.*s", (int)(len < 120 ? len : 120), *e);
        bool shown = strncmp(word, "FD_", 3) == 0 || strncmp(word, "ERNEST_", 7) == 0;
        for (int i = 0; i < option_count && !shown; i++)
            shown = option_table[i].env && strcmp(option_table[i].env, word) == 0;
        bool secret = strstr(word, "KEY") || strstr(word, "TOKEN") || strstr(word, "SECRET") || strstr(word, "PASS");
        if (shown && (*e)[len])
            (void)ern_buf_print(b, "variable:      %s=%.200s\n", word, secret ? "(set)" : *e + len + 1);
    }
}

int cmd_collect_env(int argc, char **argv, char **envp) {
    (void)argv;
    if (argc > 1) return (void)fprintf(stderr, "ernest: collect-env takes no arguments\n"), 2;
    char total[32], available[32];
    struct utsname uts;
    ern_buf b;
    ern_buf_init(&b, 1 << 20);
    (void)ern_buf_print(&b, "ernest:        " ERN_VERSION "\ncompiler:      " COMPILER "\n");
    print_os(&b);
    if (uname(&uts) == 0) (void)ern_buf_print(&b, "kernel:        %s %s %s\n", uts.sysname, uts.release, uts.machine);
    (void)ern_buf_print(
        &b, "processor:     %s\nlevel:         %s\nprocessors:    %d allowed\nmemory:        %s, %s available\n",
        ern_cpu_name(), ern_cpu_level_name(ern_cpu_level_here()), ern_cpu_count(),
        console_bytes(total, ern_memory_total_bytes()), console_bytes(available, ern_memory_available_bytes()));
    print_gpu(&b);
    unsigned xxh = XXH_versionNumber();
    (void)ern_buf_print(
        &b, "libraries:     jansson %s, libcurl %s, libyaml %s, libmicrohttpd %s, sentencepiece %s, xxhash %u.%u.%u\n",
        jansson_version_str(), curl_version_info(CURLVERSION_NOW)->version, yaml_get_version_string(),
        MHD_get_version(), ERN_SENTENCEPIECE, xxh / 10000, xxh / 100 % 100, xxh % 100);
    print_limit(&b, "open files:", RLIMIT_NOFILE);
    print_limit(&b, "locked bytes:", RLIMIT_MEMLOCK);
    print_limit(&b, "core bytes:", RLIMIT_CORE);
    print_variables(&b, envp);
    return command_print(&b);
}
