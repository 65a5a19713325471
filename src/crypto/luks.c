/* SPDX-License-Identifier: Apache-2.0 */
/* Opening and making LUKS volumes. What takes long is done on threads of their own. */
#include "crypto/luks.h"
#include "base/alloc.h"
#include "base/checked.h"
#include "base/macros.h"
#include "crypto/luks-internal.h"
#include "crypto/luks-split.h"
#include "crypto/pbkdf2.h"
#include "loop/compute.h"
#include "loop/loop.h"

#include <errno.h>
#include <inttypes.h>
#include <openssl/crypto.h>
#include <stdio.h>
#include <string.h>

/* A digest is checked once for each slot that is tried, and takes this part of the time. */
#define DIGEST_SHARE 8

int luks_io_error(int r, const char *what, struct error **err)
{
    return error_set(err, -r, "cannot %s: %s", what, strerror(-r));
}

/* ---- one slot ---- */

/* The key to a slot's material, from its password. */
static int co_fn derive_key(const struct luks_volume *v, const struct luks_header *h,
                            const struct luks_slot *slot, const struct secret *password,
                            uint8_t *ret)
{
    const struct pbkdf2 p = {
        .hash = v->hash,
        .password = password->bytes,
        .password_len = password->len,
        .salt = slot->salt,
        .salt_len = LUKS_SALT_LEN,
        .iterations = slot->iterations,
    };
    uint64_t ns;

    return pbkdf2_co_derive(&p, ret, h->key_len, &ns);
}

/* The digest by which a volume's key is known to be right. */
static int co_fn derive_digest(const struct luks_volume *v, const struct luks_header *h,
                               const uint8_t *key, uint8_t ret[LUKS_DIGEST_LEN])
{
    const struct pbkdf2 p = {
        .hash = v->hash,
        .password = key,
        .password_len = h->key_len,
        .salt = h->digest_salt,
        .salt_len = LUKS_SALT_LEN,
        .iterations = h->digest_iterations,
    };
    uint64_t ns;

    return pbkdf2_co_derive(&p, ret, LUKS_DIGEST_LEN, &ns);
}

/* Work on a slot's material, beside the loop. */
struct slot_work {
    const struct luks_volume *v;
    uint32_t key_len;
    uint8_t *material;
    size_t len;
    uint8_t material_key[LUKS_KEY_MAX];
    uint8_t key[LUKS_KEY_MAX]; /* the volume's */
    int result;
};

/* Decrypts the material, and puts together what it was split into. */
static void open_material(void *arg)
{
    struct slot_work *w = arg;
    struct sector_cipher *cipher = NULL;
    int r = sector_cipher_new(&cipher, w->v->spec, w->material_key);

    if (r == 0)
        r = sector_cipher_decrypt(cipher, 0, w->material, w->len);
    if (r == 0)
        r = luks_merge(w->v->hash, w->material, w->key_len, LUKS_STRIPES, w->key);
    w->result = r;
    (void)sector_cipher_free(cipher);
}

/* The other way. */
static void fill_material(void *arg)
{
    struct slot_work *w = arg;
    struct sector_cipher *cipher = NULL;
    int r = sector_cipher_new(&cipher, w->v->spec, w->material_key);

    if (r == 0)
        r = luks_split(w->v->hash, w->key, w->key_len, w->material, LUKS_STRIPES);
    if (r == 0)
        r = sector_cipher_encrypt(cipher, 0, w->material, w->len);
    w->result = r;
    (void)sector_cipher_free(cipher);
}

static int co_fn work_on_material(struct slot_work *w, compute_fn *fn)
{
    int r = loop_co_compute(fn, w);

    return r < 0 ? r : w->result;
}

int luks_slot_co_try(const struct luks_volume *v, const struct luks_header *h, unsigned slot,
                     const struct secret *password, uint8_t *ret_key, struct error **err)
{
    const struct luks_slot *s = &h->slots[slot];
    struct slot_work w = {.v = v, .key_len = h->key_len, .len = luks_material_len(h->key_len)};
    struct iobuf *b = iobuf_new(w.len);
    uint8_t digest[LUKS_DIGEST_LEN];
    int r;

    if (!b)
        return luks_io_error(-ENOMEM, "read a key slot", err);
    w.material = b->data;
    r = v->store->co_read(v->store->arg, (uint64_t)s->material_sector * LUKS_SECTOR, b, w.len);
    if (r == 0)
        r = derive_key(v, h, s, password, w.material_key);
    if (r == 0)
        r = work_on_material(&w, open_material);
    if (r == 0)
        r = derive_digest(v, h, w.key, digest);
    if (r == 0)
        r = CRYPTO_memcmp(digest, h->digest, LUKS_DIGEST_LEN) == 0;
    if (r == 1)
        memcpy(ret_key, w.key, h->key_len);
    OPENSSL_cleanse(&w, sizeof(w));
    OPENSSL_cleanse(b->data, luks_material_len(h->key_len));
    iobuf_unref(b);
    if (r >= 0)
        return r;
    return error_set(err, -r, "cannot read key slot %u: %s", slot, strerror(-r));
}

static int iterations_for(uint64_t rate, uint64_t ms, uint32_t *ret, struct error **err)
{
    uint64_t n;

    if (!checked_mul(rate, ms, &n) || n / 1000 > LUKS_ITERATIONS_MAX)
        return error_set(err, EINVAL,
                         "an iter-time of %" PRIu64 " ms takes more than %u iterations here", ms,
                         LUKS_ITERATIONS_MAX);
    *ret = (uint32_t)MAX(n / 1000, (uint64_t)LUKS_ITERATIONS_MIN);
    return 0;
}

int luks_slot_co_write(const struct luks_volume *v, struct luks_header *h, unsigned slot,
                       const struct secret *password, const uint8_t *key, uint64_t rate,
                       uint64_t iter_ms, struct error **err)
{
    struct luks_slot *s = &h->slots[slot];
    struct slot_work w = {.v = v, .key_len = h->key_len, .len = luks_material_len(h->key_len)};
    struct iobuf *b;
    int r = iterations_for(rate, iter_ms, &s->iterations, err);

    if (r < 0)
        return r;
    b = iobuf_new(w.len);
    if (!b)
        return luks_io_error(-ENOMEM, "write a key slot", err);
    loop_random(s->salt, LUKS_SALT_LEN);
    loop_random(b->data, w.len);
    w.material = b->data;
    memcpy(w.key, key, h->key_len);
    r = derive_key(v, h, s, password, w.material_key);
    if (r == 0)
        r = work_on_material(&w, fill_material);
    OPENSSL_cleanse(w.key, sizeof(w.key));
    OPENSSL_cleanse(w.material_key, sizeof(w.material_key));
    if (r == 0)
        r = v->store->co_write(v->store->arg, (uint64_t)s->material_sector * LUKS_SECTOR, b, w.len);
    if (r == 0)
        r = v->store->co_sync(v->store->arg); /* LUKS-1 */
    OPENSSL_cleanse(b->data, w.len);
    iobuf_unref(b);
    s->active = r == 0;
    return r < 0 ? luks_io_error(r, "write a key slot", err) : 0;
}

/* ---- the header ---- */

int luks_header_co_write(const struct luks_store *store, const struct luks_header *h,
                         bool last_first, struct error **err)
{
    struct iobuf *b = iobuf_new(LUKS_SECTOR);
    uint8_t bytes[LUKS_HEADER_BYTES];
    int r = b ? 0 : -ENOMEM;

    luks_header_build(h, bytes);
    for (unsigned i = 0; r == 0 && i < LUKS_HEADER_BYTES / LUKS_SECTOR; i++) {
        unsigned at = (last_first ? LUKS_HEADER_BYTES / LUKS_SECTOR - 1 - i : i) * LUKS_SECTOR;

        memcpy(b->data, bytes + at, LUKS_SECTOR);
        r = store->co_write(store->arg, at, b, LUKS_SECTOR);
        if (r == 0)
            r = store->co_sync(store->arg);
    }
    iobuf_unref(b);
    return r < 0 ? luks_io_error(r, "write the LUKS header", err) : 0;
}

static int co_fn read_header(const struct luks_store *store, struct luks_header *ret,
                             struct error **err)
{
    size_t len = (size_t)MIN((uint64_t)LUKS_HEADER_BYTES, store->len);
    struct iobuf *b = iobuf_new(LUKS_HEADER_BYTES);
    int r = b ? store->co_read(store->arg, 0, b, len) : -ENOMEM;

    if (r < 0)
        r = luks_io_error(r, "read the LUKS header", err);
    else
        r = luks_header_parse(ret, b->data, len, store->len, err);
    iobuf_unref(b);
    return r;
}

/* ---- opening ---- */

struct keying {
    struct luks *l;
    int result;
};

static void make_cipher(void *arg)
{
    struct keying *k = arg;

    k->result = sector_cipher_new(&k->l->cipher, &k->l->spec, k->l->key);
}

static int co_fn find_key(struct luks *l, const struct luks_store *store,
                          const struct secret *password, struct error **err)
{
    const struct luks_volume v = {store, &l->spec, l->hash};

    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        int r = 0;

        if (l->header.slots[i].active)
            r = luks_slot_co_try(&v, &l->header, i, password, l->key, err);
        if (r != 0)
            return r < 0 ? r : 0;
    }
    return error_set(err, EACCES, "the password opens no key slot");
}

int luks_co_open(struct luks *ret, const struct luks_store *store, const struct secret *password,
                 struct error **err)
{
    struct keying k = {.l = ret};
    int r = read_header(store, &ret->header, err);

    co_mutex_init(&ret->change);
    if (r == 0)
        r = luks_header_spec(&ret->header, &ret->spec, &ret->hash, err);
    if (r == 0)
        r = find_key(ret, store, password, err);
    if (r == 0) {
        r = loop_co_compute(make_cipher, &k);
        r = r < 0 ? r : k.result;
        if (r < 0)
            (void)luks_io_error(r, "use the volume's key", err);
    }
    if (r < 0)
        luks_release(ret);
    return r;
}

void luks_release(struct luks *l)
{
    l->cipher = sector_cipher_free(l->cipher);
    OPENSSL_cleanse(l->key, sizeof(l->key));
}

/* ---- making ---- */

int luks_co_rate(enum hash hash, uint32_t key_len, uint64_t *ret, struct error **err)
{
    int r = pbkdf2_co_rate(hash, key_len, ret);

    return r < 0 ? error_set(err, -r, "cannot use hash '%s': %s", hash_name(hash), strerror(-r))
                 : 0;
}

static int co_fn make_digest(const struct luks_volume *v, struct luks_header *h, const uint8_t *key,
                             struct error **err)
{
    int r;

    loop_random(h->digest_salt, LUKS_SALT_LEN);
    r = derive_digest(v, h, key, h->digest);
    return r < 0 ? luks_io_error(r, "make a digest of the key", err) : 0;
}

/* Random, but for what says that it is. */
static void make_uuid(char *ret)
{
    uint8_t u[16];

    loop_random(u, sizeof(u));
    u[6] = (uint8_t)(0x40 | (u[6] & 0x0f));
    u[8] = (uint8_t)(0x80 | (u[8] & 0x3f));
    (void)snprintf(ret, LUKS_UUID_LEN,
                   "%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x", u[0],
                   u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11], u[12], u[13],
                   u[14], u[15]);
}

int luks_area_len(const struct luks_format *o, uint64_t *ret, struct error **err)
{
    struct luks_header h = {.key_len = 0};
    int r = luks_header_lay_out(&h, &o->spec, o->hash, err);

    *ret = (uint64_t)h.payload_sector * LUKS_SECTOR;
    return r;
}

static int co_fn format_with_key(const struct luks_volume *v, struct luks_header *h,
                                 const struct luks_format *o, const struct secret *password,
                                 const uint8_t *key, struct error **err)
{
    uint64_t rate;
    int r = luks_co_rate(o->hash, h->key_len, &rate, err);

    if (r == 0)
        r = iterations_for(rate, o->iter_ms / DIGEST_SHARE, &h->digest_iterations, err);
    if (r == 0)
        r = make_digest(v, h, key, err);
    if (r == 0)
        r = luks_slot_co_write(v, h, 0, password, key, rate, o->iter_ms, err);
    return r < 0 ? r : luks_header_co_write(v->store, h, true, err);
}

int luks_co_format(const struct luks_store *store, const struct luks_format *o,
                   const struct secret *password, struct error **err)
{
    const struct luks_volume v = {store, &o->spec, o->hash};
    struct luks_header h = {.key_len = 0};
    uint8_t key[LUKS_KEY_MAX];
    int r = luks_header_lay_out(&h, &o->spec, o->hash, err);

    if (r < 0)
        return r;
    if (o->detached)
        h.payload_sector = 0;
    make_uuid(h.uuid);
    loop_random(key, sizeof(key));
    r = format_with_key(&v, &h, o, password, key, err);
    OPENSSL_cleanse(key, sizeof(key));
    return r;
}
