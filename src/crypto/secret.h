/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Secrets: passwords and keys that users hand over by name, as objects of the type `secret`. Whoever uses one takes a copy, so that
 * an object can be deleted at any time. What they hold is wiped when it is given up, and is never put into a message. Control thread
 * only.
 */
#ifndef CAIRN_CRYPTO_SECRET_H
#define CAIRN_CRYPTO_SECRET_H

#include "base/context.h"
#include "base/error.h"

#include <stddef.h>
#include <stdint.h>

/* More is refused. */
#define SECRET_LEN_MAX ((size_t)1 << 20)

struct secrets;
struct secret_options; /* generated */

/* A secret's bytes, for those who use it. */
struct secret {
    uint8_t *bytes;
    size_t len;
};

struct secrets *secrets_new(void);
/* Returns NULL. */
struct secrets *secrets_free(struct secrets *s);

/* Reads and decrypts it. -EEXIST, -EINVAL, and what files give. */
int co_fn control_fn secrets_co_add(struct secrets *s, const char *id,
                                    const struct secret_options *options, struct error **err);
/* -ENOENT. */
int secrets_remove(struct secrets *s, const char *id, struct error **err);
/* A copy, which the caller ends by secret_release(). -ENOENT. */
int secrets_get(const struct secrets *s, const char *id, struct secret *ret, struct error **err);
/* For AUTO(). */
void secret_release(struct secret *s);

#endif
