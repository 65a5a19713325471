/* SPDX-License-Identifier: Apache-2.0 */
/* Copying a point out of its chain, in this process: nodes, backends and the copy engine, on a loop of its own. */
#ifndef CAIRN_CLI_RESTORE_COPY_H
#define CAIRN_CLI_RESTORE_COPY_H

#include "base/error.h"
#include "cli/layers.h"
#include "cli/progress.h"

#include <stdbool.h>
#include <stdint.h>

struct restore_copy {
    const struct layers *source; /* the point and what it is based on */
    const char
        *target_path; /* is there, of the right size or a new image, and holds zeroes only... */
    const char *target_format;
    const char *target_driver;
    bool target_is_zero; /* ...unless this says no */
    uint64_t size;
    struct progress *bar;

    uint64_t copied; /* result: bytes of data */
};

int restore_copy_run(struct restore_copy *c, struct error **err);

#endif
