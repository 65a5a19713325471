/* SPDX-License-Identifier: Apache-2.0 */
/* What a check has found, for people, for programs, and as an exit status. */
#ifndef CAIRN_CLI_IMAGE_CHECK_PRINT_H
#define CAIRN_CLI_IMAGE_CHECK_PRINT_H

#include "formats/qcow2/check/qcow2-check.h"

#include <jansson.h>

/* As the peer's. */
enum check_status {
    CHECK_SOUND = 0,
    CHECK_FAILED = 1,
    CHECK_CORRUPT = 2,
    CHECK_LEAKS = 3,
    CHECK_NOT_SUPPORTED = 63,
};

enum check_status check_status_of(const struct qcow2_check_result *r);
/* Adds to an object what was found, and prints it. Takes it. */
void check_print_json(json_t *o, const struct qcow2_check_result *r);
void check_print_text(const struct qcow2_check_result *r);

#endif
