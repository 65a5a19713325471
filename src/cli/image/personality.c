/* SPDX-License-Identifier: Apache-2.0 */
/* Called by a link named qemu-img. */
#include "cli/image/personality.h"
#include "base/macros.h"
#include "cli/image/image.h"
#include "config.h"

#include <stdio.h>
#include <string.h>

const struct cli_command *const image_commands[] = {
    &create_command,  &info_command,    &map_command,     &check_command,
    &convert_command, &compare_command, &measure_command, &resize_command,
    &dd_command,      &rebase_command,  &bench_command,   &snapshot_command,
    &commit_command,  &bitmap_command,  &amend_command,   NULL,
};

bool personality_is_qemu_img(const char *argv0)
{
    const char *slash = strrchr(argv0, '/');

    return strcmp(slash ? slash + 1 : argv0, "qemu-img") == 0;
}

static void print_version(void)
{
    printf("qemu-img version " PEER_VERSION " (cairn " CAIRN_VERSION ")\n");
}

static int print_help(void)
{
    print_version();
    printf("usage: qemu-img [standard options] command [command options]\n"
           "QEMU disk image utility, as cairn " CAIRN_VERSION " has it\n\n"
           "    '-h', '--help'       display this help and exit\n"
           "    '-V', '--version'    output version information and exit\n\n"
           "Command syntax:\n");
    for (size_t i = 0; image_commands[i]; i++)
        printf("  %s %s\n", image_commands[i]->name, image_commands[i]->arguments);
    printf("\n`qemu-img COMMAND --help` says more about one of them.\n\n"
           "Supported formats: file host_device luks null-co qcow2 raw vdi vhdx vmdk vpc\n");
    return 0;
}

static int fail(const char *text)
{
    (void)fflush(stdout);
    (void)fprintf(stderr, "qemu-img: %s\n", text);
    return CLI_FAILED;
}

static int wrong_usage(const char *text)
{
    (void)fail(text);
    (void)fprintf(stderr, "Try 'qemu-img --help' for more information\n");
    return CLI_FAILED;
}

static int run(const struct cli_command *c, int argc, char **argv)
{
    struct error *err = NULL;
    int r = c->run(argc, argv, &err);
    int status;

    if (r == CLI_WANTS_HELP)
        return print_help();
    if ((fflush(stdout) < 0 || ferror(stdout)) && r == 0)
        return fail("cannot write to standard output");
    status = cli_exit_status() >= 0 ? cli_exit_status() : r ? CLI_FAILED : 0;
    if (r == CLI_WRONG_USAGE)
        (void)wrong_usage(error_text(err));
    else if (r < 0)
        (void)fail(error_text(err));
    error_free(&err);
    return status;
}

int personality_qemu_img(int argc, char **argv)
{
    char text[128];

    image_follow_all();
    if (argc < 2)
        return wrong_usage("Not enough arguments");
    if (strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "--help") == 0)
        return print_help();
    if (strcmp(argv[1], "-V") == 0 || strcmp(argv[1], "--version") == 0) {
        print_version();
        return 0;
    }
    for (size_t i = 0; image_commands[i]; i++) {
        if (strcmp(argv[1], image_commands[i]->name) == 0)
            return run(image_commands[i], argc - 1, argv + 1);
    }
    if (argv[1][0] == '-')
        (void)snprintf(text, sizeof(text), "unrecognized option '%.80s'", argv[1]);
    else
        (void)snprintf(text, sizeof(text), "Command not found: %.80s", argv[1]);
    return wrong_usage(text);
}
