/* SPDX-License-Identifier: Apache-2.0 */
/* The program called by a link named qemu-io. */
#ifndef CAIRN_CLI_IO_IO_PEER_H
#define CAIRN_CLI_IO_IO_PEER_H

#include <stdbool.h>

bool io_called_as_peer(const char *argv0);
/* The exit status. */
int io_peer_main(int argc, char **argv);

#endif
