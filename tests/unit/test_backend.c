/* Which backends there are, and what is said of one that cannot run. Holds on machines with and without a GPU. */
#include "backend/plugin.h"

#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static void test_names(void **state) {
    (void)state;
    char line[200];
    static const char *const name[] = {"ref", "cpu"};
    for (int i = 0; i < 2; i++) {
        assert_non_null(ern_backend_find(name[i]));
        assert_string_equal(ern_backend_find(name[i])->name, name[i]);
        assert_null(ern_backend_missing(name[i]));
        assert_null(ern_backend_file(name[i]));
        assert_false(ern_backend_device(name[i], line, sizeof line));
    }
    assert_null(ern_backend_find("gpu"));
    assert_null(ern_backend_find(""));
    assert_non_null(ern_backend_missing("gpu"));
    assert_null(ern_backend_file("gpu"));
}

/* Either it is there, whole, or one clause says why not: in the middle of a sentence, so without a full stop. */
static void test_cuda(void **state) {
    (void)state;
    char line[200] = "";
    const char *why = ern_backend_missing("cuda");
    const bool device = ern_backend_device("cuda", line, sizeof line);
    if (!why) {
        assert_true(device && *line);
        assert_string_equal(ern_backend_find("cuda")->name, "cuda");
    } else {
        assert_false(device);
        assert_true(*why && why[strlen(why) - 1] != '.');
        assert_string_equal(ern_backend_missing("cuda"), why); /* asked again, it says the same */
    }
    assert_true(!ern_backend_find("cuda") == !ern_backend_file("cuda"));
    assert_true(why || ern_backend_file("cuda"));
    if (ern_backend_file("cuda")) assert_int_equal(access(ern_backend_file("cuda"), R_OK), 0);
}

static void expect_refused(const char *path, const char *part) {
    const ern_plugin *p = NULL;
    const char *why = plugin_open(&p, path);
    assert_null(p);
    assert_non_null(why);
    if (!strstr(why, part)) fail_msg("'%s' does not hold '%s'", why, part);
    assert_non_null(strstr(why, path));
}

static void test_refusals(void **state) {
    (void)state;
    char path[1024];
    ssize_t n = readlink("/proc/self/exe", path, sizeof path - 32);
    assert_true(n > 0);
    path[n] = 0;
    strcpy(strrchr(path, '/') + 1, "other_plugin.so");
    expect_refused(path, "of another build (0.0.1-other) than this program (" ERN_VERSION ")");
    expect_refused("/nowhere/ernest_cuda.so", "cannot be loaded");
    expect_refused("/proc/self/exe", "cannot be loaded"); /* a program, no library */
    expect_refused("libm.so.6", "is no plugin");
}

int main(void) {
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_names), cmocka_unit_test(test_cuda),
                                       cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
