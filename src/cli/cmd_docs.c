/* ernest docs: what is printed from the option table and from the server's validator. */
#include <stdio.h>
#include <string.h>

#include "cli/command.h"
#include "server/server.h"

int cmd_docs(int argc, char **argv, char **envp) {
    static const struct {
        const char *name;
        void (*print)(ern_buf *out);
    } page[] = {{"api", ern_server_write_docs},
                {"man", option_man_print},
                {"completion", option_completion_print},
                {"flags", option_reference_print}};
    (void)envp;
    for (size_t i = 0; argc == 2 && i < sizeof page / sizeof page[0]; i++) {
        if (strcmp(argv[1], page[i].name) != 0) continue;
        ern_buf b;
        ern_buf_init(&b, 1 << 20);
        page[i].print(&b);
        return command_print(&b);
    }
    (void)fprintf(stderr, "ernest: docs prints one of man, completion, flags or api\n");
    return 2;
}
