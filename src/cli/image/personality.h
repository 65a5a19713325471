/* SPDX-License-Identifier: Apache-2.0 */
/* The program under the name of the peer's tool for images: its usage, its errors, its exit status. */
#ifndef CAIRN_CLI_IMAGE_PERSONALITY_H
#define CAIRN_CLI_IMAGE_PERSONALITY_H

#include "cli/cli.h"

/* Whose options and output these are. */
#define PEER_VERSION "7.2.0"

/* Is the program called so? */
bool personality_is_qemu_img(const char *argv0);
/* All of the program then: the exit status. */
int personality_qemu_img(int argc, char **argv);

/* The commands that it has; ends with NULL. */
extern const struct cli_command *const image_commands[];

#endif
