/* SPDX-License-Identifier: Apache-2.0 */
/* cairn: the tool for people. A file for each subcommand; here is what chooses among them. */
#include "base/log.h"
#include "base/macros.h"
#include "cli/cli.h"
#include "cli/image/personality.h"
#include "cli/io/io-peer.h"
#include "cli/nbd/nbd.h"
#include "config.h"
#include "daemon/process.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>

static const struct cli_command *const commands[] = {
    &serve_command, &backup_command, &backups_command, &restore_command,    &jobs_command,
    &qmp_command,   &nbd_command,    &io_command,      &check_node_command,
};

static void print_help(void)
{
    printf(
        "usage: cairn COMMAND [ARGUMENT]...\n\n"
        "Serves virtual disks, backs them up while they are in use, and looks at what the daemon does.\n\n");
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++)
        printf("  %-10s  %s\n", commands[i]->name, commands[i]->summary);
    printf("\nImages that are not in use:\n\n");
    for (size_t i = 0; image_commands[i]; i++)
        printf("  %-10s  %s\n", image_commands[i]->name, image_commands[i]->summary);
    printf("\n`cairn help COMMAND` says more about one of them.\n"
           "Exit status: 0; 1 after a failure; 2 for arguments that are wrong.\n");
}

static void print_command_help(const struct cli_command *c)
{
    printf("usage: cairn %s %s\n\n%s", c->name, c->arguments, c->help);
}

static const struct cli_command *find(const char *name)
{
    for (size_t i = 0; i < ARRAY_SIZE(commands); i++) {
        if (strcmp(commands[i]->name, name) == 0)
            return commands[i];
    }
    for (size_t i = 0; image_commands[i]; i++) {
        if (strcmp(image_commands[i]->name, name) == 0)
            return image_commands[i];
    }
    return NULL;
}

static int help(int argc, char **argv, struct error **err)
{
    const struct cli_command *c;

    if (argc < 2) {
        print_help();
        return 0;
    }
    c = find(argv[1]);
    if (!c)
        return cli_usage(err, "there is no command '%s'", argv[1]);
    print_command_help(c);
    return 0;
}

static int run(int argc, char **argv, struct error **err)
{
    const struct cli_command *c;
    int r;

    if (argc < 2)
        return cli_usage(err, "which command? `cairn help` lists them");
    if (strcmp(argv[1], "--version") == 0 || strcmp(argv[1], "-V") == 0) {
        printf("cairn version " CAIRN_VERSION "\n");
        return 0;
    }
    if (strcmp(argv[1], "help") == 0 || strcmp(argv[1], "--help") == 0 ||
        strcmp(argv[1], "-h") == 0)
        return help(argc - 1, argv + 1, err);
    c = find(argv[1]);
    if (!c)
        return cli_usage(err, "there is no command '%s': `cairn help` lists them", argv[1]);
    r = c->run(argc - 1, argv + 1, err);
    if (r == CLI_WANTS_HELP)
        print_command_help(c);
    if (r == CLI_WRONG_USAGE && c->is_image_tool)
        r = CLI_FAILED;
    return r == CLI_WANTS_HELP ? 0 : r;
}

static void warn(enum log_level level, const char *line)
{
    (void)level; /* warnings only */
    cli_warn("%s", line);
}

int main(int argc, char **argv)
{
    struct error *err = NULL;
    int r;

    process_hold_standard_streams();
    (void)signal(SIGPIPE, SIG_IGN); /* who writes sees it */
    log_set_hook(warn, LOG_WARNING);
    if (argc > 0 && personality_is_qemu_img(argv[0])) {
        cli_program = "qemu-img";
        return personality_qemu_img(argc, argv);
    }
    if (argc > 0 && nbd_is_qemu_nbd(argv[0])) {
        cli_program = "qemu-nbd";
        return nbd_qemu_nbd(argc, argv);
    }
    if (argc > 0 && io_called_as_peer(argv[0]))
        return io_peer_main(argc, argv);
    r = run(argc, argv, &err);
    if ((fflush(stdout) < 0 || ferror(stdout)) && r == 0) {
        (void)fprintf(stderr, "cairn: cannot write to standard output\n");
        return CLI_FAILED;
    }
    if (err)
        (void)fprintf(stderr, "cairn: %s\n", error_text(err));
    error_free(&err);
    if (cli_exit_status() >= 0)
        return cli_exit_status();
    if (r == 0)
        return 0;
    return r == CLI_WRONG_USAGE ? CLI_USAGE : CLI_FAILED;
}
