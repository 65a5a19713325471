/* SPDX-License-Identifier: Apache-2.0 */
/* Sectors through ciphers: vectors of IEEE 1619, a plain XTS beside the one in use, IVs, memory in any pieces, other threads. */
#include "base/alloc.h"
#include "base/endian.h"
#include "base/macros.h"
#include "base/prng.h"
#include "crypto/sector-cipher.h"
#include "graph-fixture.h"
#include "seeds.h"

#include <errno.h>
#include <openssl/evp.h>

/* Hexadecimal to bytes; returns how many. */
static size_t unhex(const char *text, uint8_t *ret)
{
    size_t n = strlen(text) / 2;

    for (size_t i = 0; i < n; i++) {
        const char pair[3] = {text[2 * i], text[2 * i + 1], '\0'};

        ret[i] = (uint8_t)strtoul(pair, NULL, 16);
    }
    return n;
}

static struct sector_cipher *make(enum cipher_alg alg, enum cipher_mode mode, enum cipher_iv iv,
                                  const uint8_t *key)
{
    const struct cipher_spec spec = {alg, mode, iv};
    struct sector_cipher *c = NULL;

    assert_int_equal(sector_cipher_new(&c, &spec, key), 0);
    return c;
}

/* IEEE 1619-2007, vector 4: 512 bytes 00 01 02 ..., number 0; and vector 10 for keys of 256 bits, number 0xff. */
static void test_sector_cipher__xts_vectors(void **state)
{
    uint8_t key[SECTOR_CIPHER_KEY_MAX];
    uint8_t data[512];
    uint8_t expected[32];
    struct sector_cipher *c;

    (void)state;
    for (size_t i = 0; i < sizeof(data); i++)
        data[i] = (uint8_t)i;
    unhex("2718281828459045235360287471352631415926535897932384626433832795", key);
    c = make(CIPHER_AES_128, CIPHER_XTS, CIPHER_IV_PLAIN64, key);
    assert_int_equal(sector_cipher_encrypt(c, 0, data, sizeof(data)), 0);
    unhex("27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c", expected);
    assert_memory_equal(data, expected, sizeof(expected));
    assert_int_equal(sector_cipher_decrypt(c, 0, data, sizeof(data)), 0);
    for (size_t i = 0; i < sizeof(data); i++)
        assert_int_equal(data[i], (uint8_t)i);
    (void)sector_cipher_free(c);

    unhex("2718281828459045235360287471352662497757247093699959574966967627"
          "3141592653589793238462643383279502884197169399375105820974944592",
          key);
    c = make(CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_PLAIN64, key);
    assert_int_equal(sector_cipher_encrypt(c, 0xff, data, sizeof(data)), 0);
    unhex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b", expected);
    assert_memory_equal(data, expected, sizeof(expected));
    (void)sector_cipher_free(c);
}

/* ---- a plain XTS, bit by bit ---- */

static void block_ecb(const EVP_CIPHER *cipher, const uint8_t *key, const uint8_t *in, uint8_t *out)
{
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();
    int n = 0;

    assert_int_equal(EVP_EncryptInit_ex(ctx, cipher, NULL, key, NULL), 1);
    (void)EVP_CIPHER_CTX_set_padding(ctx, 0);
    assert_int_equal(EVP_EncryptUpdate(ctx, out, &n, in, 16), 1);
    EVP_CIPHER_CTX_free(ctx);
}

static void slow_xts(const EVP_CIPHER *cipher, const uint8_t *key, size_t half, uint64_t sector,
                     uint8_t *data)
{
    uint8_t tweak[16] = {0};

    store_le64(tweak, sector);
    block_ecb(cipher, key + half, tweak, tweak);
    for (unsigned at = 0; at < 512; at += 16) {
        unsigned carry = 0;

        for (unsigned i = 0; i < 16; i++)
            data[at + i] ^= tweak[i];
        block_ecb(cipher, key, data + at, data + at);
        for (unsigned i = 0; i < 16; i++)
            data[at + i] ^= tweak[i];
        for (unsigned i = 0; i < 16; i++) {
            unsigned next = tweak[i] >> 7;

            tweak[i] = (uint8_t)(tweak[i] << 1 | carry);
            carry = next;
        }
        if (carry)
            tweak[0] ^= 0x87;
    }
}

static void test_sector_cipher__xts_is_the_same_for_all_lengths_of_key(void **state)
{
    static const struct {
        enum cipher_alg alg;
        size_t half;
    } algs[] = {{CIPHER_AES_128, 16}, {CIPHER_AES_192, 24}, {CIPHER_AES_256, 32}};

    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};
        unsigned which = (unsigned)prng_below(&prng, 3);
        uint64_t sector = prng_next(&prng) >> prng_below(&prng, 64);
        uint8_t key[SECTOR_CIPHER_KEY_MAX];
        uint8_t ours[512];
        uint8_t theirs[512];
        uint8_t plain[512];
        struct sector_cipher *c;

        for (size_t i = 0; i < sizeof(key); i++)
            key[i] = (uint8_t)prng_next(&prng);
        for (size_t i = 0; i < sizeof(plain); i++)
            plain[i] = ours[i] = theirs[i] = (uint8_t)prng_next(&prng);
        c = make(algs[which].alg, CIPHER_XTS, CIPHER_IV_PLAIN64, key);
        assert_int_equal(sector_cipher_encrypt(c, sector, ours, 512), 0);
        slow_xts(which == 0   ? EVP_aes_128_ecb()
                 : which == 1 ? EVP_aes_192_ecb()
                              : EVP_aes_256_ecb(),
                 key, algs[which].half, sector, theirs);
        assert_memory_equal(ours, theirs, 512);
        assert_int_equal(sector_cipher_decrypt(c, sector, ours, 512), 0);
        assert_memory_equal(ours, plain, 512);
        (void)sector_cipher_free(c);
    }
}

/* ---- IVs ---- */

/* The IV of CBC is what the first block of zeroes decrypts to, beside what the block cipher makes of it. */
static void iv_of(enum cipher_iv iv, uint64_t sector, uint8_t ret[16])
{
    uint8_t key[32] = {1, 2, 3};
    uint8_t zeroes[512] = {0};
    uint8_t back[512];
    EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new();
    struct sector_cipher *c = make(CIPHER_AES_256, CIPHER_CBC, iv, key);
    int n = 0;

    memcpy(back, zeroes, sizeof(back));
    assert_int_equal(sector_cipher_decrypt(c, sector, back, sizeof(back)), 0);
    assert_int_equal(EVP_DecryptInit_ex(ctx, EVP_aes_256_ecb(), NULL, key, NULL), 1);
    (void)EVP_CIPHER_CTX_set_padding(ctx, 0);
    assert_int_equal(EVP_DecryptUpdate(ctx, ret, &n, zeroes, 16), 1);
    for (unsigned i = 0; i < 16; i++)
        ret[i] ^= back[i];
    EVP_CIPHER_CTX_free(ctx);
    (void)sector_cipher_free(c);
}

static void test_sector_cipher__ivs_are_the_numbers_of_sectors(void **state)
{
    const uint64_t sector = 0x123456789a;
    uint8_t key[32] = {1, 2, 3};
    uint8_t iv[16];
    uint8_t expected[16] = {0x9a, 0x78, 0x56, 0x34, 0x12};
    uint8_t digest[32];

    (void)state;
    iv_of(CIPHER_IV_PLAIN64, sector, iv);
    assert_memory_equal(iv, expected, 16);
    assert_int_equal(EVP_Digest(key, 32, digest, NULL, EVP_sha256(), NULL), 1);
    block_ecb(EVP_aes_256_ecb(), digest, expected, digest);
    iv_of(CIPHER_IV_ESSIV, sector, iv);
    assert_memory_equal(iv, digest, 16);
    expected[4] = 0;
    iv_of(CIPHER_IV_PLAIN, sector, iv);
    assert_memory_equal(iv, expected, 16);
}

static void test_sector_cipher__refuses_xts_with_one_key_twice(void **state)
{
    const struct cipher_spec spec = {CIPHER_AES_128, CIPHER_XTS, CIPHER_IV_PLAIN64};
    uint8_t key[32];
    struct sector_cipher *c;

    (void)state;
    memset(key, 7, sizeof(key));
    assert_int_equal(sector_cipher_new(&c, &spec, key), -EINVAL);
}

static void test_sector_cipher__names_what_there_is(void **state)
{
    struct error *err = NULL;
    enum cipher_alg alg;
    enum cipher_mode mode;
    enum cipher_iv iv;

    (void)state;
    assert_int_equal(cipher_alg_from_name("serpent-256", &alg, &err), -ENOTSUP);
    must_say(err, "'serpent-256' is not supported: it is one of aes-128");
    error_free(&err);
    assert_int_equal(cipher_mode_from_name("ctr", &mode, &err), -ENOTSUP);
    must_say(err, "'ctr'");
    error_free(&err);
    assert_int_equal(cipher_iv_from_name("benbi", &iv, &err), -ENOTSUP);
    must_say(err, "'benbi'");
    error_free(&err);
    assert_int_equal(cipher_alg_from_name("aes-192", &alg, &err), 0);
    assert_int_equal(alg, CIPHER_AES_192);
}

/* ---- memory and threads ---- */

#define LONG ((size_t)200 << 10)

/* The same bytes, in random pieces. */
static int cut(uint8_t *data, size_t len, struct prng *prng, struct iovec *iov, int max)
{
    int n = 0;

    while (len) {
        size_t piece = n + 1 == max ? len : 1 + (size_t)prng_below(prng, MIN(len, (size_t)1300));

        iov[n++] = (struct iovec){data, piece};
        data += piece;
        len -= piece;
    }
    return n;
}

static void co_fn in_pieces(void *arg)
{
    struct prng prng = {.state = *(const uint64_t *)arg};
    size_t len = 512 * (1 + (size_t)prng_below(&prng, prng_chance(&prng, 200) ? LONG / 512 : 40));
    uint8_t key[SECTOR_CIPHER_KEY_MAX];
    uint8_t *plain = xalloc(1, len);
    uint8_t *whole = xalloc(1, len);
    uint8_t *pieces = xalloc(1, len);
    struct iovec iov[24];
    struct sector_cipher *c;
    int n;

    for (size_t i = 0; i < sizeof(key); i++)
        key[i] = (uint8_t)prng_next(&prng);
    for (size_t i = 0; i < len; i++)
        plain[i] = whole[i] = (uint8_t)prng_next(&prng);
    c = make((enum cipher_alg)prng_below(&prng, CIPHER_ALGS),
             (enum cipher_mode)prng_below(&prng, CIPHER_MODES),
             (enum cipher_iv)prng_below(&prng, CIPHER_IVS), key);
    assert_int_equal(sector_cipher_encrypt(c, 77, whole, len), 0);
    n = cut(plain, len, &prng, iov, ARRAY_SIZE(iov));
    assert_int_equal(sector_cipher_co_encrypt(c, 77, iov, n, pieces), 0);
    assert_memory_equal(pieces, whole, len);
    n = cut(pieces, len, &prng, iov, ARRAY_SIZE(iov));
    assert_int_equal(sector_cipher_co_decrypt(c, 77, iov, n), 0);
    assert_memory_equal(pieces, plain, len);
    (void)sector_cipher_free(c);
    free(plain);
    free(whole);
    free(pieces);
}

static void test_sector_cipher__memory_may_be_in_any_pieces(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        uint64_t start = seed;

        on_engine(LOOP_ENGINE_THREADS, in_pieces, &start);
    }
}

/* Each loop encrypts at the same time, short and long runs, with the same cipher. */
struct crowd {
    struct sector_cipher *c;
    const uint8_t *expected;
};

struct member {
    struct crowd *crowd;
    struct loop *loop;
};

static void co_fn one_of_crowd(void *arg)
{
    struct crowd *crowd = arg;
    uint8_t *plain = xalloc(1, LONG);
    uint8_t *out = xalloc(1, LONG);

    /* Long enough for all to be at it together. */
    for (unsigned i = 0; i < 3000; i++) {
        size_t len = i % 300 == 2 ? LONG : 4096;
        struct iovec iov = {plain, len};

        assert_int_equal(sector_cipher_co_encrypt(crowd->c, 5, &iov, 1, out), 0);
        assert_memory_equal(out, crowd->expected, len);
    }
    free(plain);
    free(out);
}

static void co_fn send_member(void *arg)
{
    struct member *m = arg;

    assert_int_equal(loop_co_call(m->loop, one_of_crowd, m->crowd), 0);
}

static void co_fn many_loops(void *arg)
{
    struct loop_thread *threads[3];
    struct member members[3];
    struct co_scope scope;
    struct error *err = NULL;

    co_scope_init(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(threads); i++) {
        assert_int_equal(loop_thread_start(&threads[i], "crowd", &err), 0);
        members[i] = (struct member){arg, loop_thread_loop(threads[i])};
        assert_int_equal(co_scope_start(&scope, send_member, &members[i]), 0);
    }
    one_of_crowd(arg);
    co_scope_join(&scope);
    for (unsigned i = 0; i < ARRAY_SIZE(threads); i++)
        (void)loop_thread_stop(threads[i]);
}

static void test_sector_cipher__loops_share_a_cipher(void **state)
{
    uint8_t key[SECTOR_CIPHER_KEY_MAX] = {1, 2, 3, 4};
    uint8_t *expected = xalloc(1, LONG);
    struct crowd crowd = {.c = make(CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_ESSIV, key),
                          .expected = expected};

    (void)state;
    assert_int_equal(sector_cipher_encrypt(crowd.c, 5, expected, LONG), 0);
    on_engine(LOOP_ENGINE_THREADS, many_loops, &crowd);
    (void)sector_cipher_free(crowd.c);
    free(expected);
}
