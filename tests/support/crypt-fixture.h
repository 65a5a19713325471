/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For tests of encrypted disks: images with LUKS headers on the simulated disk, and nodes over them. Headers are made once for each
 * password: what they hold does not say where they lie.
 */
#ifndef CAIRN_TESTS_CRYPT_FIXTURE_H
#define CAIRN_TESTS_CRYPT_FIXTURE_H

#include "crypto/secret.h"
#include "formats/qcow2/qcow2-create.h"
#include "luks-store.h"
#include "qcow2-fixture.h"

/* Little to compute: small keys, few iterations. */
static inline struct luks_format crypt_format(void)
{
    struct luks_format f = LUKS_FORMAT_INIT;

    f.spec = (struct cipher_spec){CIPHER_AES_128, CIPHER_CBC, CIPHER_IV_PLAIN64};
    f.iter_ms = 1;
    return f;
}

static inline uint64_t crypt_header_len(void)
{
    const struct luks_format f = crypt_format();
    struct error *err = NULL;
    uint64_t len;

    check(luks_area_len(&f, &len, &err) == 0);
    return len;
}

struct crypt_header {
    const char *password;
    struct memory_store store;
};

static inline void crypt_format_now(void *arg)
{
    struct crypt_header *h = arg;
    const struct luks_format f = crypt_format();
    struct luks_store store = memory_store_of(&h->store);
    struct secret s = secret_of(h->password);
    struct error *err = NULL;

    memory_store_init(&h->store);
    check(luks_co_format(&store, &f, &s, &err) == 0);
}

/* The header that this password, "a" or "b", opens. */
static inline const uint8_t *crypt_header(const char *password)
{
    static struct crypt_header headers[2];
    struct crypt_header *h = &headers[password[0] == 'b'];
    struct sim_options o;

    if (!h->password) {
        h->password = password;
        sim_options_init(&o, 1);
        check(sim_run(&o, crypt_format_now, h) == SIM_RETURNED);
    }
    return h->store.now;
}

/* A volume with a disk of so many bytes, of anything. */
static inline void crypt_put_luks(struct sim_disk *disk, const char *path, const char *password,
                                  uint64_t size)
{
    uint64_t first = crypt_header_len();
    uint8_t *bytes = xalloc(1, first + size);

    memcpy(bytes, crypt_header(password), first);
    image_put(disk, path, bytes, first + size);
    free(bytes);
}

/* An empty qcow2 image, encrypted. */
static inline void crypt_put_qcow2(struct sim_disk *disk, const char *path, const char *password,
                                   unsigned version, unsigned cluster_bits, bool subclusters,
                                   uint64_t size)
{
    struct qcow2_create_options o = QCOW2_CREATE_OPTIONS_INIT;
    struct qcow2_layout l;
    struct error *err = NULL;
    uint8_t *bytes;

    o.version = version;
    o.cluster_bits = cluster_bits;
    o.size = size;
    o.extended_l2 = subclusters;
    o.luks_len = crypt_header_len();
    check(qcow2_layout_make(&o, &l, &err) == 0);
    bytes = xalloc(1, l.file_size);
    qcow2_layout_read(&l, 0, bytes, l.file_size);
    memcpy(bytes + l.luks_offset, crypt_header(password), l.luks_len);
    image_put(disk, path, bytes, l.file_size);
    free(bytes);
}

/* The refcounts say that the LUKS header's clusters are free; the image has 16 bits for each. */
static inline void crypt_free_header(struct sim_disk *disk, const char *path)
{
    size_t size;
    uint8_t *bytes = image_load(disk, path, &size);
    unsigned bits = load_be32(bytes + QCOW2_OFFSET_CLUSTER_BITS);
    uint64_t table = load_be64(bytes + QCOW2_OFFSET_REFCOUNT_TABLE_OFFSET);
    uint64_t per_block = (uint64_t)1 << (bits - 1);
    uint64_t at = load_be64(bytes + QCOW2_HEADER_LENGTH_V3 + QCOW2_EXTENSION_HEAD);
    uint64_t end = at + load_be64(bytes + QCOW2_HEADER_LENGTH_V3 + QCOW2_EXTENSION_HEAD + 8);

    for (uint64_t n = at >> bits; n < end >> bits; n++) {
        uint64_t block = load_be64(bytes + table + n / per_block * 8);

        store_be16(bytes + block + n % per_block * 2, 0);
    }
    sim_disk_write(disk, path, 0, bytes, size);
    free(bytes);
}

/* Both passwords, as secrets of their own names. */
static inline void crypt_add_secrets(struct graph *g)
{
    static const char *const names[] = {"a", "b"};
    struct error *err = NULL;

    for (unsigned i = 0; i < ARRAY_SIZE(names); i++) {
        struct secret_options o = {.data = (char *)(uintptr_t)names[i]};

        check(secrets_co_add(graph_secrets(g), names[i], &o, &err) == 0);
    }
}

static inline void crypt_add_qcow2(struct graph *g, const char *name, const char *path,
                                   const char *password, const char *backing, bool read_only)
{
    const char *quote = backing ? "'" : "";

    add_or_die(g,
               "{'driver':'qcow2','node-name':'%s','discard':'unmap','read-only':%s,"
               "'encrypt':{'format':'luks','key-secret':'%s'},"
               "'file':{'driver':'file','filename':'%s'},'backing':%s%s%s}",
               name, read_only ? "true" : "false", password, path, quote,
               backing ? backing : "null", quote);
}

static inline void crypt_add_luks(struct graph *g, const char *name, const char *path,
                                  const char *password)
{
    add_or_die(g,
               "{'driver':'luks','node-name':'%s','key-secret':'%s',"
               "'file':{'driver':'file','filename':'%s'}}",
               name, password, path);
}

#endif
