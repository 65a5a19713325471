/* SPDX-License-Identifier: Apache-2.0 */
/* PBKDF2 by OpenSSL, and how fast it is here. */
#include "crypto/pbkdf2.h"
#include "base/macros.h"
#include "loop/compute.h"

#include <errno.h>
#include <string.h>

/* A measurement shorter than this says little; each one does four times what the one before did. */
#define MEASURE_NS    (40 * NS_PER_MS)
#define MEASURE_FIRST 2048
#define MEASURE_MAX   (1u << 27)

#define KEY_MAX 64

int pbkdf2(const struct pbkdf2 *p, uint8_t *ret, size_t len)
{
    return PKCS5_PBKDF2_HMAC((const char *)p->password, (int)p->password_len, p->salt,
                             (int)p->salt_len, (int)p->iterations, hash_md(p->hash), (int)len,
                             ret) == 1
               ? 0
               : -EINVAL;
}

struct measurement {
    struct pbkdf2 p;
    size_t len;
    int result;
};

static void measure(void *arg)
{
    struct measurement *m = arg;
    uint8_t key[KEY_MAX];

    m->result = pbkdf2(&m->p, key, MIN(m->len, sizeof(key)));
}

int pbkdf2_co_rate(enum hash hash, size_t len, uint64_t *ret)
{
    static const uint8_t nothing[32];
    struct measurement m = {
        .p = {.hash = hash,
              .password = nothing,
              .password_len = sizeof(nothing),
              .salt = nothing,
              .salt_len = sizeof(nothing),
              .iterations = MEASURE_FIRST},
        .len = len,
    };
    uint64_t ns = 0;
    int r;

    for (;;) {
        r = loop_co_compute_long(measure, &m, &ns);
        if (r == 0)
            r = m.result;
        if (r < 0 || ns >= MEASURE_NS || m.p.iterations >= MEASURE_MAX)
            break;
        m.p.iterations *= 4;
    }
    if (r == 0)
        *ret = (uint64_t)m.p.iterations * NS_PER_S / MAX(ns, (uint64_t)1);
    return r;
}
