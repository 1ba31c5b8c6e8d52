/* ernest: serves Baidu's ERNIE-4.5 language models. Everything is in cli/. */
#include "cli/cli.h"

extern char **environ;

int main(int argc, char **argv) { return ern_cli_main(argc, argv, environ); }
