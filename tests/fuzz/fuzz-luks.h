/* SPDX-License-Identifier: Apache-2.0 */
/* A sound LUKS header for fuzzers to patch: small keys, few iterations, slot 0 opened by the secret of this name. */
#ifndef CAIRN_TESTS_FUZZ_LUKS_H
#define CAIRN_TESTS_FUZZ_LUKS_H

#include "../support/check.h"
#include "../support/luks-store.h"
#include "base/endian.h"
#include "base/macros.h"
#include "crypto/secret.h"
#include "fuzz-sim.h"
#include "graph/graph.h"
#include "schema-types.h"

#define FUZZ_SECRET "secret"
/* The header and the first slot's material. All behind is zeroes. */
#define FUZZ_LUKS_BYTES ((size_t)72 << 10)
/* What a fuzzer has time for; more than the driver allows is left as it is. */
#define FUZZ_LUKS_ITERATIONS 4096u

struct fuzz_luks {
    uint8_t *bytes;
    uint64_t len; /* with the slots that are not in use */
};

static inline void co_fn fuzz_luks_format(void *arg)
{
    struct fuzz_luks *l = arg;
    struct luks_format f = LUKS_FORMAT_INIT;
    struct secret secret = secret_of(FUZZ_SECRET);
    struct memory_store store;
    struct luks_store to = memory_store_of(&store);
    struct error *err = NULL;

    f.spec = (struct cipher_spec){CIPHER_AES_128, CIPHER_CBC, CIPHER_IV_PLAIN64};
    f.iter_ms = 1;
    memory_store_init(&store);
    check(luks_area_len(&f, &l->len, &err) == 0);
    check(luks_co_format(&to, &f, &secret, &err) == 0);
    l->bytes = xalloc(1, FUZZ_LUKS_BYTES);
    memcpy(l->bytes, store.now, FUZZ_LUKS_BYTES);
    memory_store_release(&store);
}

/* Made once, always the same. */
static inline const struct fuzz_luks *fuzz_luks_sound(void)
{
    static struct fuzz_luks sound;

    if (!sound.bytes)
        fuzz_run(sim_disk_new(), fuzz_luks_format, &sound);
    return &sound;
}

static inline void fuzz_luks_tame_one(uint8_t *iterations)
{
    uint32_t n = load_be32(iterations);

    if (n > FUZZ_LUKS_ITERATIONS && n <= LUKS_ITERATIONS_MAX)
        store_be32(iterations, n % FUZZ_LUKS_ITERATIONS);
}

/* A patched header: what it says that opening shall take. A minute is no hang, but too long to wait for. */
static inline void fuzz_luks_tame(uint8_t *header)
{
    fuzz_luks_tame_one(header + 164);
    for (size_t slot = 0; slot < LUKS_SLOTS; slot++)
        fuzz_luks_tame_one(header + 208 + slot * 48 + 4);
}

static inline void co_fn control_fn fuzz_luks_add_secret(struct graph *g)
{
    struct secret_options o = {.data = (char *)(uintptr_t)FUZZ_SECRET};
    struct error *err = NULL;

    check(secrets_co_add(graph_secrets(g), FUZZ_SECRET, &o, &err) == 0);
}

#endif
