/* The door of `cli`: the command line. main.c hands over argv and the environment; every sub-command is one file.
 * getenv is called in main.c and here only. */
#ifndef ERN_CLI_CLI_H
#define ERN_CLI_CLI_H

/* Run `ernest ...`; returns the exit code: 0 good, 1 failed while running, 2 wrong usage or file, 3 memory or device.
 */
int ern_cli_main(int argc, char **argv, char **envp);

#endif
