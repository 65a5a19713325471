/* SPDX-License-Identifier: Apache-2.0 */
/* QEMU's options of encryption. */
#include "cli/image/encryption.h"
#include "base/alloc.h"
#include "base/macros.h"
#include "base/number.h"
#include "formats/encrypted.h"

#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* In the order in which the peer prints them. */
static const struct encryption_option {
    const char *name;
    size_t offset; /* in struct encryption */
    const char *help;
} options[] = {
    {"format", offsetof(struct encryption, format), "Encrypt the image: luks"},
    {"key-secret", offsetof(struct encryption, key_secret), "ID of the secret with the password"},
    {"cipher-alg", offsetof(struct encryption, cipher_alg), "aes-128, aes-192, aes-256"},
    {"cipher-mode", offsetof(struct encryption, cipher_mode), "xts, cbc"},
    {"ivgen-alg", offsetof(struct encryption, ivgen_alg), "plain, plain64, essiv"},
    {"ivgen-hash-alg", offsetof(struct encryption, ivgen_hash_alg), "Of essiv: sha256"},
    {"hash-alg", offsetof(struct encryption, hash_alg),
     "sha1, sha224, sha256, sha384, sha512, ripemd160"},
    {"iter-time", offsetof(struct encryption, iter_time),
     "How long checking a password shall take, in milliseconds"},
};

static char **text_of(struct encryption *e, const struct encryption_option *o)
{
    return (char **)(void *)((char *)e + o->offset);
}

static const char *given(const struct encryption *e, const struct encryption_option *o)
{
    return *text_of((struct encryption *)(uintptr_t)e, o);
}

void encryption_release(struct encryption *e)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++)
        free(take(text_of(e, &options[i])));
}

int encryption_set(struct encryption *e, const char *name, const char *text)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        char **at = text_of(e, &options[i]);

        if (strcmp(options[i].name, name) == 0) {
            free(*at);
            *at = xstrdup(text);
            return 0;
        }
    }
    return -ENOENT;
}

/* Of a LUKS volume, whose options have no prefix, the format is said already. */
static bool is_for(const struct encryption_option *o, const char *prefix)
{
    return *prefix || strcmp(o->name, "format") != 0;
}

void encryption_help(const char *prefix)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        if (is_for(&options[i], prefix))
            printf("  %s%s=<str> - %s\n", prefix, options[i].name, options[i].help);
    }
}

void encryption_print(const struct encryption *e, const char *prefix)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        if (given(e, &options[i]))
            printf(" %s%s=%s", prefix, options[i].name, given(e, &options[i]));
    }
}

bool encryption_is_given(const struct encryption *e)
{
    for (size_t i = 0; i < ARRAY_SIZE(options); i++) {
        if (given(e, &options[i]))
            return true;
    }
    return false;
}

static int read_iv(const struct encryption *e, struct luks_format *f, struct error **err)
{
    int r = e->ivgen_alg ? cipher_iv_from_name(e->ivgen_alg, &f->spec.iv, err) : 0;

    if (r < 0 || !e->ivgen_hash_alg)
        return r;
    if (f->spec.iv != CIPHER_IV_ESSIV)
        return error_set(err, EINVAL, "ivgen-hash-alg goes with ivgen-alg=essiv only");
    return strcmp(e->ivgen_hash_alg, "sha256") == 0
               ? 0
               : error_set(err, ENOTSUP, "ivgen-hash-alg '%s' is not supported: it is sha256",
                           e->ivgen_hash_alg);
}

int encryption_read(const struct encryption *e, struct luks_format *ret, struct error **err)
{
    struct luks_format f = LUKS_FORMAT_INIT;
    int r = 0;

    f.detached = e->detached;
    if (e->format && strcmp(e->format, "luks") != 0)
        return error_set(err, ENOTSUP, "encryption format '%s' is not supported: it is luks",
                         e->format);
    if (!e->key_secret)
        return error_set(err, EINVAL, "Parameter 'key-secret' is required for cipher");
    if (e->cipher_alg)
        r = cipher_alg_from_name(e->cipher_alg, &f.spec.alg, err);
    if (r == 0 && e->cipher_mode)
        r = cipher_mode_from_name(e->cipher_mode, &f.spec.mode, err);
    if (r == 0)
        r = read_iv(e, &f, err);
    if (r == 0 && e->hash_alg)
        r = hash_from_name(e->hash_alg, &f.hash, err);
    if (r == 0 && e->iter_time && (number_from_text(e->iter_time, &f.iter_ms) < 0 || !f.iter_ms))
        r = error_set(err, EINVAL, "Parameter 'iter-time' expects a number from 1 on");
    if (r == 0)
        *ret = f;
    return r;
}

int encryption_len(const struct encryption *e, uint64_t *ret, struct error **err)
{
    struct luks_format f;
    int r = encryption_read(e, &f, err);

    return r < 0 ? r : luks_area_len(&f, ret, err);
}

int encryption_co_make(const struct encryption *e, struct graph *g, struct backend *b,
                       uint64_t offset, struct error **err)
{
    struct luks_format f;
    struct secret password;
    int r = encryption_read(e, &f, err);

    if (r == 0)
        r = secrets_get(graph_secrets(g), e->key_secret, &password, err);
    if (r < 0)
        return r;
    r = encrypted_co_format(b, offset, &f, &password, err);
    secret_release(&password);
    return r;
}
