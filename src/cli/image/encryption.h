/* SPDX-License-Identifier: Apache-2.0 */
/* How new images are encrypted: the options that say so, and what is made of them. */
#ifndef CAIRN_CLI_IMAGE_ENCRYPTION_H
#define CAIRN_CLI_IMAGE_ENCRYPTION_H

#include "base/context.h"
#include "base/error.h"
#include "crypto/luks.h"
#include "graph/backend.h"

#include <stdbool.h>
#include <stdint.h>

/* As given; NULL: not. All strings belong to it. */
struct encryption {
    char *format; /* of qcow2 */
    char *key_secret;
    char *cipher_alg;
    char *cipher_mode;
    char *ivgen_alg;
    char *ivgen_hash_alg;
    char *hash_alg;
    char *iter_time;
    bool detached; /* of LUKS volumes: the header is the image */
};

void encryption_release(struct encryption *e);

/* The name is that of QEMU's option, without `encrypt.`. 0, or -ENOENT: there is no such option. */
int encryption_set(struct encryption *e, const char *name, const char *text);
/* Lines for `-o help`, and ` key-secret=s ...` as create prints it. */
void encryption_help(const char *prefix);
void encryption_print(const struct encryption *e, const char *prefix);
bool encryption_is_given(const struct encryption *e);
/* What they mean. -EINVAL, -ENOTSUP. */
int encryption_read(const struct encryption *e, struct luks_format *ret, struct error **err);
/* How many bytes header and slots take. */
int encryption_len(const struct encryption *e, uint64_t *ret, struct error **err);

/* Makes the header at `offset` of what the backend leads to, with the secret that the options name. */
int co_fn control_fn encryption_co_make(const struct encryption *e, struct graph *g,
                                        struct backend *b, uint64_t offset, struct error **err);

#endif
