/* SPDX-License-Identifier: Apache-2.0 */
/* The list of secrets, and how their options become bytes. */
#include "crypto/secret.h"
#include "base/alloc.h"
#include "base/list.h"
#include "base/macros.h"
#include "loop/co.h"
#include "loop/file.h"
#include "loop/iobuf.h"
#include "schema-types.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

/* Secrets are encrypted with AES-256-CBC. */
#define MASTER_KEY_LEN 32
#define MASTER_IV_LEN  16

struct named_secret {
    struct list link; /* in secrets.list */
    char *id;
    struct secret value;
};

struct secrets {
    struct list list; /* struct named_secret */
};

void secret_release(struct secret *s)
{
    if (s->bytes)
        OPENSSL_cleanse(s->bytes, s->len);
    free(s->bytes);
    *s = (struct secret){.bytes = NULL};
}

struct secrets *secrets_new(void)
{
    struct secrets *s = xnew(struct secrets);

    list_init(&s->list);
    return s;
}

static void forget(struct named_secret *n)
{
    list_remove(&n->link);
    secret_release(&n->value);
    free(n->id);
    free(n);
}

struct secrets *secrets_free(struct secrets *s)
{
    struct named_secret *n;
    struct named_secret *next;

    if (!s)
        return NULL;
    list_for_each_safe (&s->list, n, next, link)
        forget(n);
    free(s);
    return NULL;
}

static struct named_secret *find(const struct secrets *s, const char *id)
{
    struct named_secret *n;

    list_for_each (&s->list, n, link) {
        if (strcmp(n->id, id) == 0)
            return n;
    }
    return NULL;
}

static int make(struct secret *ret, size_t len, struct error **err)
{
    *ret = (struct secret){.bytes = try_alloc(1, MAX(len, (size_t)1)), .len = len};
    return ret->bytes ? 0 : error_set(err, ENOMEM, "no memory for a secret");
}

int secrets_get(const struct secrets *s, const char *id, struct secret *ret, struct error **err)
{
    const struct named_secret *n = find(s, id);
    int r;

    if (!n)
        return error_set(err, ENOENT, "there is no secret '%s'", id);
    r = make(ret, n->value.len, err);
    if (r == 0)
        memcpy(ret->bytes, n->value.bytes, n->value.len);
    return r;
}

int secrets_remove(struct secrets *s, const char *id, struct error **err)
{
    struct named_secret *n = find(s, id);

    if (!n)
        return error_set(err, ENOENT, "there is no object '%s'", id);
    forget(n);
    return 0;
}

/* ---- where they come from ---- */

static int co_fn read_all(struct file *f, struct secret *ret, struct error **err)
{
    struct iobuf *b = iobuf_new(SECRET_LEN_MAX + 1);
    struct iovec iov;
    int64_t n;
    int r;

    if (!b)
        return error_set(err, ENOMEM, "no memory for a secret");
    iov = (struct iovec){b->data, SECRET_LEN_MAX + 1};
    n = file_co_read(f, 0, &iov, 1, b);
    if (n < 0)
        r = error_set(err, (int)-n, "cannot read '%s': %s", file_path(f), strerror((int)-n));
    else if (n > (int64_t)SECRET_LEN_MAX)
        r = error_set(err, EFBIG, "'%s' has more than %zu bytes", file_path(f), SECRET_LEN_MAX);
    else
        r = make(ret, (size_t)n, err);
    if (n >= 0 && r == 0)
        memcpy(ret->bytes, b->data, ret->len);
    if (n > 0)
        OPENSSL_cleanse(b->data, (size_t)n); /* it goes back to a pool */
    iobuf_unref(b);
    return r;
}

static int co_fn read_file(const char *path, struct secret *ret, struct error **err)
{
    struct file *f;
    int r = file_co_open(&f, path, FILE_READ, 0, err);

    if (r < 0)
        return r;
    r = read_all(f, ret, err);
    co_shield_begin();
    (void)file_co_close(f); /* it was only read */
    co_shield_end();
    return r;
}

/* What is given: `data`, or the content of `file`. */
static int co_fn read_given(const struct secret_options *o, struct secret *ret, struct error **err)
{
    int r;

    if (!o->data == !o->file)
        return error_set(err, EINVAL, "give one of 'data' and 'file'");
    if (o->file)
        return read_file(o->file, ret, err);
    r = make(ret, strlen(o->data), err);
    if (r == 0)
        memcpy(ret->bytes, o->data, ret->len);
    return r;
}

/* ---- base64 ---- */

static int refuse_base64(const char *what, struct error **err)
{
    return error_set(err, EINVAL, "%s is not valid base64", what);
}

/* The library would take '-' for the end. */
static bool has_base64_only(const struct secret *text)
{
    static const char valid[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n";

    for (size_t i = 0; i < text->len; i++) {
        if (!text->bytes[i] || !strchr(valid, text->bytes[i]))
            return false;
    }
    return true;
}

/* Replaces a text by what it says. */
static int decode(struct secret *text, const char *what, struct error **err)
{
    EVP_ENCODE_CTX *ctx;
    struct secret plain;
    int len = 0;
    int tail = 0;
    int r;

    if (!has_base64_only(text))
        return refuse_base64(what, err);
    r = make(&plain, text->len, err);
    if (r < 0)
        return r;
    ctx = EVP_ENCODE_CTX_new();
    if (!ctx)
        r = error_set(err, ENOMEM, "no memory for a secret");
    if (ctx) {
        EVP_DecodeInit(ctx);
        if (EVP_DecodeUpdate(ctx, plain.bytes, &len, text->bytes, (int)text->len) < 0 ||
            EVP_DecodeFinal(ctx, plain.bytes + len, &tail) < 0)
            r = refuse_base64(what, err);
    }
    EVP_ENCODE_CTX_free(ctx);
    secret_release(text);
    if (r < 0)
        secret_release(&plain);
    else
        *text = (struct secret){plain.bytes, (size_t)(len + tail)};
    return r;
}

/* ---- encrypted ones ---- */

static int decrypt_with(struct secret *s, const struct secret *key, const struct secret *iv,
                        struct error **err)
{
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();
    struct secret plain;
    int len = 0;
    int tail = 0;
    int r = ctx ? make(&plain, s->len + MASTER_IV_LEN, err)
                : error_set(err, ENOMEM, "no memory for a secret");

    if (r < 0) {
        EVP_CIPHER_CTX_free(ctx);
        return r;
    }
    if (EVP_DecryptInit_ex(ctx, EVP_aes_256_cbc(), NULL, key->bytes, iv->bytes) != 1 ||
        EVP_DecryptUpdate(ctx, plain.bytes, &len, s->bytes, (int)s->len) != 1 ||
        EVP_DecryptFinal_ex(ctx, plain.bytes + len, &tail) != 1)
        r = error_set(err, EINVAL, "it does not decrypt with this key and iv");
    EVP_CIPHER_CTX_free(ctx);
    secret_release(s);
    *s = plain;
    s->len = r < 0 ? plain.len : (size_t)(len + tail);
    return r;
}

static int decrypt(const struct secrets *all, const struct secret_options *o, struct secret *s,
                   struct error **err)
{
    AUTO(secret_release) struct secret key = {.bytes = NULL};
    AUTO(secret_release) struct secret iv = {.bytes = NULL};
    int r;

    if (!o->iv)
        return error_set(err, EINVAL, "'iv' is needed with 'keyid'");
    r = secrets_get(all, o->keyid, &key, err);
    if (r == 0 && key.len != MASTER_KEY_LEN)
        r = error_set(err, EINVAL, "the key '%s' has %zu bytes, expected %d", o->keyid, key.len,
                      MASTER_KEY_LEN);
    if (r == 0)
        r = make(&iv, strlen(o->iv), err);
    if (r == 0) {
        memcpy(iv.bytes, o->iv, iv.len);
        r = decode(&iv, "'iv'", err);
    }
    if (r == 0 && iv.len != MASTER_IV_LEN)
        r = error_set(err, EINVAL, "'iv' has %zu bytes, expected %d", iv.len, MASTER_IV_LEN);
    return r < 0 ? r : decrypt_with(s, &key, &iv, err);
}

static int co_fn read_secret(const struct secrets *all, const struct secret_options *o,
                             struct secret *ret, struct error **err)
{
    int r = read_given(o, ret, err);

    if (r == 0 && o->format == SECRET_FORMAT_BASE64)
        r = decode(ret, "it", err);
    if (r == 0 && o->keyid)
        r = decrypt(all, o, ret, err);
    else if (r == 0 && o->iv)
        r = error_set(err, EINVAL, "'iv' is given without 'keyid'");
    return r;
}

int secrets_co_add(struct secrets *s, const char *id, const struct secret_options *options,
                   struct error **err)
{
    struct secret value = {.bytes = NULL};
    struct named_secret *n;
    int r = read_secret(s, options, &value, err);

    /* Looked at now: another may have come while a file was read. */
    if (r == 0 && find(s, id))
        r = error_set(err, EEXIST, "there is an object '%s' already", id);
    if (r < 0) {
        secret_release(&value);
        return error_wrap(err, r, "secret '%s'", id);
    }
    n = xnew(struct named_secret);
    n->id = xstrdup(id);
    n->value = value;
    list_init(&n->link);
    list_append(&s->list, &n->link);
    return 0;
}
