/* SPDX-License-Identifier: Apache-2.0 */
/* LUKS volumes: headers that lie, the splitter, passwords, key slots, and power cuts while slots change (LUKS-1 to LUKS-3). */
#include "base/endian.h"
#include "base/macros.h"
#include "crypto/luks-split.h"
#include "crypto/luks.h"
#include "crypto/pbkdf2.h"
#include "graph-fixture.h"
#include "loop/sim/sim.h"
#include "luks-store.h"
#include "seeds.h"

/* ---- the splitter ---- */

static void test_luks__split_and_merge(void **state)
{
    static const size_t lens[] = {16, 20, 32, 48, 64};

    (void)state;
    for (unsigned h = 0; h < HASHES; h++) {
        for (unsigned i = 0; i < ARRAY_SIZE(lens); i++) {
            uint8_t key[64];
            uint8_t back[64];
            uint8_t stripes[64 * 50];

            for (size_t k = 0; k < sizeof(stripes); k++)
                stripes[k] = (uint8_t)(k * 7 + h);
            for (size_t k = 0; k < sizeof(key); k++)
                key[k] = (uint8_t)(k + i);
            assert_int_equal(luks_split((enum hash)h, key, lens[i], stripes, 50), 0);
            assert_int_equal(luks_merge((enum hash)h, stripes, lens[i], 50, back), 0);
            assert_memory_equal(back, key, lens[i]);
            stripes[3] ^= 1; /* all of them are needed */
            assert_int_equal(luks_merge((enum hash)h, stripes, lens[i], 50, back), 0);
            assert_memory_not_equal(back, key, lens[i]);
        }
    }
}

static struct pbkdf2 derivation(enum hash hash, const char *password, uint32_t iterations)
{
    return (struct pbkdf2){
        .hash = hash,
        .password = (const uint8_t *)password,
        .password_len = strlen(password),
        .salt = (const uint8_t *)"salt",
        .salt_len = 4,
        .iterations = iterations,
    };
}

/* RFC 6070 and RFC 7914, 11. */
static void co_fn vectors(void *arg)
{
    static const uint8_t sha1[] = {0x4b, 0x00, 0x79, 0x01, 0xb7, 0x65, 0x48, 0x9a, 0xbe, 0xad,
                                   0x49, 0xd9, 0x26, 0xf7, 0x21, 0xd0, 0x65, 0xa4, 0x29, 0xc1};
    static const uint8_t sha256[] = {0x55, 0xac, 0x04, 0x6e, 0x56, 0xe3, 0x08, 0x9f,
                                     0xec, 0x16, 0x91, 0xc2, 0x25, 0x44, 0xb6, 0x05};
    struct pbkdf2 p = derivation(HASH_SHA1, "password", 4096);
    uint8_t key[64];
    uint64_t ns;

    (void)arg;
    assert_int_equal(pbkdf2_co_derive(&p, key, 20, &ns), 0);
    assert_memory_equal(key, sha1, sizeof(sha1));
    assert_true(ns > 0);
    p = derivation(HASH_SHA256, "passwd", 1);
    assert_int_equal(pbkdf2_co_derive(&p, key, 64, &ns), 0);
    assert_memory_equal(key, sha256, sizeof(sha256));
}

static void test_luks__pbkdf2_vectors(void **state)
{
    (void)state;
    on_both(vectors, NULL);
}

/* Also where a derivation falls into pieces, and where passwords are longer than what a hash function works on. */
static void co_fn as_openssl(void *arg)
{
    static const char *const passwords[] = {
        "", "short", "a password of exactly sixty-four bytes, as many as sha256 takes!!",
        ("one that is longer than all of them: it is hashed before it is used, for whichever function that "
         "may be; 128 bytes are not enough of it")};

    static const struct {
        uint32_t iterations;
        size_t len;
    } sizes[] = {{1, 1}, {2, 20}, {3, 64}, {50, 63}, {65535, 1}, {65536, 32}, {65537, 65}};

    uint8_t key[65];
    uint8_t theirs[65];
    uint64_t ns;

    (void)arg;
    for (unsigned h = 0; h < HASHES; h++) {
        for (unsigned i = 0; i < ARRAY_SIZE(sizes); i++) {
            const char *password = passwords[(h + i) % ARRAY_SIZE(passwords)];
            struct pbkdf2 p = derivation((enum hash)h, password, sizes[i].iterations);

            assert_int_equal(pbkdf2_co_derive(&p, key, sizes[i].len, &ns), 0);
            assert_int_equal(PKCS5_PBKDF2_HMAC(password, (int)strlen(password), p.salt, 4,
                                               (int)p.iterations, hash_md(p.hash),
                                               (int)sizes[i].len, theirs),
                             1);
            assert_memory_equal(key, theirs, sizes[i].len);
        }
    }
}

static void test_luks__pbkdf2_is_that_of_openssl(void **state)
{
    (void)state;
    on_engine(LOOP_ENGINE_THREADS, as_openssl, NULL);
}

static void co_fn derive_long(void *arg)
{
    struct pbkdf2 p = derivation(HASH_SHA512, "password", LUKS_ITERATIONS_MAX);
    uint8_t key[64];
    uint64_t ns;

    *(int *)arg = pbkdf2_co_derive(&p, key, sizeof(key), &ns);
}

static void co_fn leave_long(void *arg)
{
    struct co_scope scope;
    int r = 1;

    (void)arg;
    co_scope_init(&scope);
    assert_int_equal(co_scope_start(&scope, derive_long, &r), 0);
    (void)co_sleep_until(loop_now() + 10 * NS_PER_MS);
    assert_int_equal(r, 1);
    co_scope_cancel(&scope);
    co_scope_join(&scope);
    assert_int_equal(r, -ECANCELED);
}

/* P4: a hostile image has as many iterations as it likes. */
static void test_luks__a_long_derivation_can_be_left(void **state)
{
    (void)state;
    on_both(leave_long, NULL);
}

/* ---- headers ---- */

#define AREA ((uint64_t)4 << 20)

static void good_header(uint8_t bytes[LUKS_HEADER_BYTES])
{
    const struct cipher_spec spec = {CIPHER_AES_256, CIPHER_XTS, CIPHER_IV_PLAIN64};
    struct luks_header h = {.digest_iterations = 1000, .uuid = "1234"};
    struct error *err = NULL;

    assert_int_equal(luks_header_lay_out(&h, &spec, HASH_SHA256, &err), 0);
    h.slots[0].active = true;
    h.slots[0].iterations = 1000;
    luks_header_build(&h, bytes);
}

static void must_parse(const uint8_t *bytes)
{
    struct error *err = NULL;
    struct luks_header h;

    if (luks_header_parse(&h, bytes, LUKS_HEADER_BYTES, AREA, &err) < 0)
        fail_msg("%s", error_text(err));
}

static void must_not_parse(const uint8_t *bytes, size_t len, uint64_t area, int errnum,
                           const char *text)
{
    struct error *err = NULL;
    struct luks_header h;

    assert_int_equal(luks_header_parse(&h, bytes, len, area, &err), -errnum);
    must_say(err, text);
    error_free(&err);
}

static void test_luks__header_has_its_places(void **state)
{
    uint8_t b[LUKS_HEADER_BYTES];
    struct luks_header h;
    struct luks_names names;
    struct error *err = NULL;

    (void)state;
    good_header(b);
    assert_memory_equal(b, "LUKS\xba\xbe\0\1aes", 11);
    assert_string_equal((char *)b + 40, "xts-plain64");
    assert_string_equal((char *)b + 72, "sha256");
    assert_int_equal(load_be32(b + 104), 4040); /* as QEMU lays it out */
    assert_int_equal(load_be32(b + 108), 64);
    assert_int_equal(load_be32(b + 208), 0x00ac71f3);
    assert_int_equal(load_be32(b + 208 + 40), 8);
    assert_int_equal(load_be32(b + 208 + 44), 4000);
    assert_int_equal(load_be32(b + 256), 0x0000dead);
    assert_int_equal(load_be32(b + 256 + 40), 512);
    assert_int_equal(luks_header_parse(&h, b, sizeof(b), AREA, &err), 0);
    luks_header_names(&h, &names);
    assert_string_equal(names.cipher, "aes-256");
    assert_string_equal(names.mode, "xts");
    assert_string_equal(names.iv, "plain64");
    assert_string_equal(names.iv_hash, "");
    strcpy(h.mode, "cbc-essiv:sha256");
    luks_header_names(&h, &names);
    assert_string_equal(names.cipher, "aes-512");
    assert_string_equal(names.iv_hash, "sha256");
}

static void test_luks__hostile_headers_are_refused(void **state)
{
    static const struct {
        unsigned at;
        uint32_t value;
        int errnum;
        const char *text;
    } lies[] = {
        {0, 0, EINVAL, "does not begin with a LUKS header"},
        {4, 0xbabe0002, ENOTSUP, "version is 2"},
        {8, 0x61ff7300, EINVAL, "its cipher contains the byte 0xff"},
        {104, 4000, EINVAL, "the disk begins at sector 4000"},
        {108, 0, EINVAL, "its key has 0 bytes"},
        {108, 65, EINVAL, "its key has 65 bytes"},
        {108, 0x80000000, EINVAL, "its key has 2147483648 bytes"},
        {164, 0, EINVAL, "its digest has 0 iterations"},
        {164, 0xffffffff, EINVAL, "its digest has 4294967295 iterations"},
        {208, 0x12345678, EINVAL, "key slot 0 has state 0x12345678"},
        {212, 0, EINVAL, "key slot 0 has 0 iterations"},
        {212, 0x7fffffff, EINVAL, "key slot 0 has 2147483647 iterations"},
        {248, 0, EINVAL, "within the header"},
        {248, 1, EINVAL, "within the header"},
        {248, 512, EINVAL, "key slots 0 and 1 overlap"},
        {248, 0xffffffff, EINVAL, "from sector 4294967295"},
        {252, 3999, EINVAL, "key slot 0 has 3999 stripes"},
        {252, 0xffffffff, EINVAL, "4294967295 stripes"},
        {208 + 7 * 48 + 44, 0, EINVAL, "key slot 7 has 0 stripes"},
    };

    uint8_t b[LUKS_HEADER_BYTES];

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(lies); i++) {
        good_header(b);
        must_parse(b);
        store_be32(b + lies[i].at, lies[i].value);
        must_not_parse(b, sizeof(b), AREA, lies[i].errnum, lies[i].text);
    }
    good_header(b);
    memset(b + 40, 'x', 32);
    must_not_parse(b, sizeof(b), AREA, EINVAL, "its cipher mode does not end");
    good_header(b);
    must_not_parse(b, LUKS_HEADER_BYTES - 1, AREA, EINVAL, "does not begin");
    must_not_parse(b, sizeof(b), 8 * 512 + 255999, EINVAL, "there are only");
    store_be32(b + 104, 0); /* the disk lies elsewhere */
    must_parse(b);
}

static void test_luks__unknown_ciphers_are_named(void **state)
{
    static const struct {
        const char *cipher;
        const char *mode;
        const char *hash;
        const char *text;
    } unknown[] = {
        {"serpent", "xts-plain64", "sha256", "cipher 'serpent-256' is not supported"},
        {"twofish", "xts-plain64", "sha256", "cipher 'twofish-256'"},
        {"aes", "lrw-benbi", "sha256", "cipher 'aes-512'"},
        {"aes", "ecb", "sha256", "cipher 'aes-512'"},
        {"aes", "xts-random", "sha256", "IV generator 'random'"},
        {"aes", "xts-essiv:sha1", "sha256", "essiv with hash 'sha1'"},
        {"aes", "xts-plain64", "whirlpool", "hash 'whirlpool'"},
    };

    (void)state;
    for (unsigned i = 0; i < ARRAY_SIZE(unknown); i++) {
        struct luks_header h = {.key_len = 64};
        struct error *err = NULL;
        struct cipher_spec spec;
        enum hash hash;

        strcpy(h.cipher, unknown[i].cipher);
        strcpy(h.mode, unknown[i].mode);
        strcpy(h.hash, unknown[i].hash);
        assert_int_equal(luks_header_spec(&h, &spec, &hash, &err), -ENOTSUP);
        must_say(err, unknown[i].text);
        error_free(&err);
    }
}

static void test_luks__no_slots_for_keys_of_24_bytes(void **state)
{
    struct luks_format f = LUKS_FORMAT_INIT;
    struct error *err = NULL;
    uint64_t len;

    (void)state;
    f.spec = (struct cipher_spec){CIPHER_AES_192, CIPHER_CBC, CIPHER_IV_PLAIN64};
    assert_int_equal(luks_area_len(&f, &len, &err), -ENOTSUP);
    must_say(err, "cipher aes-192 with mode cbc");
    error_free(&err);
}

/* ---- volumes ---- */

static void co_fn format(struct memory_store *m, const struct luks_format *f, const char *password)
{
    struct luks_store store = memory_store_of(m);
    struct secret s = secret_of(password);
    struct error *err = NULL;

    if (luks_co_format(&store, f, &s, &err) < 0)
        fail_msg("%s", error_text(err));
}

static int co_fn try_open(struct memory_store *m, struct luks *l, const char *password)
{
    struct luks_store store = memory_store_of(m);
    struct secret s = secret_of(password);
    struct error *err = NULL;
    int r;

    *l = (struct luks){.cipher = NULL};
    r = luks_co_open(l, &store, &s, &err);
    error_free(&err);
    return r;
}

static bool co_fn opens(struct memory_store *m, const char *password)
{
    struct luks l;
    int r = try_open(m, &l, password);

    if (r == 0)
        luks_release(&l);
    else
        assert_int_equal(r, -EACCES);
    return r == 0;
}

static struct luks_format quick(void)
{
    struct luks_format f = LUKS_FORMAT_INIT;

    f.spec = (struct cipher_spec){CIPHER_AES_128, CIPHER_CBC, CIPHER_IV_PLAIN64};
    f.iter_ms = 1;
    return f;
}

static void run_sim(uint64_t seed, co_entry_fn *body, void *arg)
{
    struct sim_options o;

    sim_options_init(&o, seed);
    assert_int_equal(sim_run(&o, body, arg), SIM_RETURNED);
}

static void co_fn all_kinds(void *arg)
{
    (void)arg;
    for (unsigned i = 0; i < CIPHER_ALGS * CIPHER_MODES * HASHES; i++) {
        struct luks_format f = quick();
        struct memory_store m;
        struct error *err = NULL;
        struct luks l;
        uint64_t len;

        f.spec.alg = (enum cipher_alg)(i % CIPHER_ALGS);
        f.spec.mode = (enum cipher_mode)(i / CIPHER_ALGS % CIPHER_MODES);
        f.spec.iv = (enum cipher_iv)(i % CIPHER_IVS);
        f.hash = (enum hash)(i / CIPHER_ALGS / CIPHER_MODES);
        if (luks_area_len(&f, &len, &err) < 0) {
            error_free(&err);
            continue;
        }
        memory_store_init(&m);
        format(&m, &f, "right");
        assert_false(opens(&m, "wrong"));
        assert_int_equal(try_open(&m, &l, "right"), 0);
        assert_int_equal(l.spec.alg, f.spec.alg);
        assert_int_equal(l.spec.mode, f.spec.mode);
        assert_int_equal(l.spec.iv, f.spec.iv);
        assert_int_equal(l.hash, f.hash);
        assert_int_equal(l.header.payload_sector * 512, len);
        assert_int_equal(strlen(l.header.uuid), 36);
        luks_release(&l);
        for (unsigned k = 0; k < LUKS_KEY_MAX; k++)
            assert_int_equal(l.key[k], 0); /* CIPHER-2 */
        memory_store_release(&m);
    }
}

static void test_luks__what_is_made_opens(void **state)
{
    (void)state;
    run_sim(1, all_kinds, NULL);
}

static void co_fn two_of_one_password(void *arg)
{
    struct luks_format f = quick();
    struct memory_store m[2];
    struct luks l[2];

    (void)arg;
    for (unsigned i = 0; i < 2; i++) {
        memory_store_init(&m[i]);
        format(&m[i], &f, "same");
        assert_int_equal(try_open(&m[i], &l[i], "same"), 0);
    }
    assert_memory_not_equal(l[0].key, l[1].key, 16);
    assert_memory_not_equal(l[0].header.slots[0].salt, l[1].header.slots[0].salt, 32);
    assert_memory_not_equal(l[0].header.digest_salt, l[1].header.digest_salt, 32);
    assert_string_not_equal(l[0].header.uuid, l[1].header.uuid);
    for (unsigned i = 0; i < 2; i++) {
        luks_release(&l[i]);
        memory_store_release(&m[i]);
    }
}

static void test_luks__keys_and_salts_are_random(void **state)
{
    (void)state;
    run_sim(1, two_of_one_password, NULL);
}

static void co_fn iterations_follow_time(void *arg)
{
    struct luks_format f = quick();
    struct memory_store m;
    struct error *err = NULL;
    struct luks_store store;
    struct secret s = secret_of("x");
    struct luks l;
    uint32_t iterations;

    (void)arg;
    memory_store_init(&m);
    store = memory_store_of(&m);
    f.iter_ms = 100;
    format(&m, &f, "x");
    assert_int_equal(try_open(&m, &l, "x"), 0);
    iterations = l.header.slots[0].iterations;
    assert_true(iterations > 1000); /* under sim: 2048 in 100 ms */
    assert_int_equal(iterations, 2048);
    assert_int_equal(l.header.digest_iterations, 1000);
    luks_release(&l);
    f.iter_ms = UINT64_MAX / 2;
    assert_int_equal(luks_co_format(&store, &f, &s, &err), -EINVAL);
    must_say(err, "iter-time");
    error_free(&err);
    memory_store_release(&m);
}

static void test_luks__iterations_follow_the_time_that_is_asked_for(void **state)
{
    (void)state;
    run_sim(1, iterations_follow_time, NULL);
}

/* ---- slots ---- */

static int co_fn amend(struct memory_store *m, struct luks *l, const struct luks_amend *a,
                       const char *text)
{
    struct luks_store store = memory_store_of(m);
    struct error *err = NULL;
    int r = luks_co_amend(l, &store, a, &err);

    if (r < 0 && text)
        must_say(err, text);
    if (r < 0 && !text && !m->stop_at)
        fail_msg("%s", error_text(err));
    error_free(&err);
    return r;
}

static void co_fn slots_come_and_go(void *arg)
{
    struct secret a = secret_of("a");
    struct secret b = secret_of("b");
    struct secret c = secret_of("c");
    struct luks_format f = quick();
    struct memory_store m;
    struct luks l;

    (void)arg;
    memory_store_init(&m);
    format(&m, &f, "a");
    assert_int_equal(try_open(&m, &l, "a"), 0);
#define AMEND(...) &(struct luks_amend){__VA_ARGS__}
    /* What makes no sense. */
    assert_int_equal(amend(&m, &l, AMEND(.activate = true), "'new-secret' is needed"), -EINVAL);
    assert_int_equal(
        amend(&m, &l, AMEND(.activate = true, .new_secret = &b, .old_secret = &a), "'old-secret'"),
        -EINVAL);
    assert_int_equal(
        amend(&m, &l, AMEND(.activate = true, .new_secret = &b, .has_slot = true, .slot = 8), "8"),
        -EINVAL);
    assert_int_equal(amend(&m, &l, AMEND(.activate = false), "give 'keyslot'"), -EINVAL);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &a, .new_secret = &b), "'new-secret'"),
                     -EINVAL);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &a, .has_iter_ms = true), "'iter-time'"),
                     -EINVAL);
    assert_int_equal(amend(&m, &l, AMEND(.has_slot = true, .slot = 3), "not in use"), -EINVAL);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &b), "opens no key slot"), -EACCES);
    /* What takes force. */
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &a), "no key slot would be left"), -EPERM);
    assert_int_equal(amend(&m, &l, AMEND(.has_slot = true, .slot = 0), "no key slot would be left"),
                     -EPERM);
    assert_int_equal(amend(&m, &l,
                           AMEND(.activate = true, .new_secret = &b, .has_slot = true, .slot = 0),
                           "slot 0 is in use"),
                     -EPERM);
    /* The first free one; one by its number; one more of the same password. */
    assert_int_equal(amend(&m, &l, AMEND(.activate = true, .new_secret = &b), NULL), 0);
    assert_true(l.header.slots[1].active);
    assert_int_equal(
        amend(&m, &l, AMEND(.activate = true, .new_secret = &c, .has_slot = true, .slot = 7), NULL),
        0);
    assert_int_equal(
        amend(&m, &l, AMEND(.activate = true, .new_secret = &b, .has_slot = true, .slot = 6), NULL),
        0);
    assert_true(opens(&m, "a") && opens(&m, "b") && opens(&m, "c"));
    /* All that match go; another slot's password does not count for the one that is named. */
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &b, .has_slot = true, .slot = 7),
                           "no key slot of this number"),
                     -EACCES);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &b), NULL), 0);
    assert_false(opens(&m, "b"));
    assert_int_equal(amend(&m, &l, AMEND(.has_slot = true, .slot = 0), NULL), 0);
    assert_true(!opens(&m, "a") && opens(&m, "c"));
    /* The only one is replaced. */
    assert_int_equal(
        amend(&m, &l,
              AMEND(.activate = true, .new_secret = &a, .has_slot = true, .slot = 7, .force = true),
              NULL),
        0);
    assert_true(opens(&m, "a") && !opens(&m, "c"));
    for (unsigned i = 0; i < 7; i++)
        assert_false(l.header.slots[i].active);
    /* All eight. */
    for (unsigned i = 0; i < 7; i++)
        assert_int_equal(amend(&m, &l, AMEND(.activate = true, .new_secret = &b), NULL), 0);
    assert_int_equal(amend(&m, &l, AMEND(.activate = true, .new_secret = &b), "all 8"), -ENOSPC);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &b), NULL), 0);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &a, .force = true), NULL), 0);
    assert_false(opens(&m, "a"));
    luks_release(&l);
    memory_store_release(&m);
}

static void test_luks__slots_come_and_go(void **state)
{
    (void)state;
    run_sim(1, slots_come_and_go, NULL);
}

static void co_fn wipes(void *arg)
{
    struct secret b = secret_of("b");
    struct luks_format f = quick();
    struct memory_store m;
    uint8_t *before = xalloc(1, STORE_BYTES);
    struct luks l;
    size_t at;
    size_t same = 0;

    (void)arg;
    memory_store_init(&m);
    format(&m, &f, "a");
    assert_int_equal(try_open(&m, &l, "a"), 0);
    assert_int_equal(amend(&m, &l, AMEND(.activate = true, .new_secret = &b), NULL), 0);
    memcpy(before, m.now, STORE_BYTES);
    assert_int_equal(amend(&m, &l, AMEND(.old_secret = &b), NULL), 0);
    at = (size_t)l.header.slots[1].material_sector * 512;
    for (size_t i = 0; i < luks_material_len(16); i += 8)
        same += memcmp(before + at + i, m.now + at + i, 8) == 0;
    assert_int_equal(same, 0);
    for (unsigned i = 0; i < 32; i++)
        assert_int_equal(m.now[208 + 48 + 8 + i], 0); /* the salt */
    luks_release(&l);
    memory_store_release(&m);
    free(before);
}

static void test_luks__erased_slots_are_wiped(void **state)
{
    (void)state;
    run_sim(1, wipes, NULL);
}

/* ---- power cuts ---- */

/* What counts as in use is of use (LUKS-1, LUKS-2). */
static void co_fn every_slot_opens(struct memory_store *m)
{
    static const char *const passwords[] = {"a", "b", "c"};
    struct luks_header h;
    struct error *err = NULL;

    assert_int_equal(luks_header_parse(&h, m->now, LUKS_HEADER_BYTES, STORE_BYTES, &err), 0);
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        bool any = !h.slots[i].active;
        uint8_t whole[LUKS_HEADER_BYTES];
        struct luks_header alone = h;

        for (unsigned k = 0; k < LUKS_SLOTS; k++)
            alone.slots[k].active = k == i;
        memcpy(whole, m->now, LUKS_HEADER_BYTES);
        luks_header_build(&alone, m->now);
        for (unsigned p = 0; !any && p < ARRAY_SIZE(passwords); p++)
            any = opens(m, passwords[p]);
        memcpy(m->now, whole, LUKS_HEADER_BYTES);
        assert_true(any);
    }
}

/* One change, cut off at a random operation; then the volume opens, and with the same key. */
static void co_fn cut_off(void *arg)
{
    static const unsigned slots[] = {1, 6, 6, 7}; /* slot 6 lies in both sectors */
    struct prng prng = {.state = *(const uint64_t *)arg};
    struct secret b = secret_of("b");
    struct secret c = secret_of("c");
    struct luks_format f = quick();
    struct luks_amend change = {.activate = true, .new_secret = &c};
    bool two = prng_chance(&prng, 500);
    struct memory_store m;
    uint8_t key[LUKS_KEY_MAX];
    struct luks l;
    bool done;

    memory_store_init(&m);
    format(&m, &f, "a");
    assert_int_equal(try_open(&m, &l, "a"), 0);
    memcpy(key, l.key, sizeof(key));
    if (two)
        assert_int_equal(amend(&m, &l,
                               AMEND(.activate = true, .new_secret = &b, .has_slot = true,
                                     .slot = 5 + (unsigned)prng_below(&prng, 3)),
                               NULL),
                         0);
    switch (prng_below(&prng, 4)) {
    case 0: /* the only one is replaced */
        change.has_slot = true;
        change.force = true;
        break;
    case 1: /* one is erased */
        change = two ? (struct luks_amend){.old_secret = &b} : change;
        break;
    default: /* another password, in a slot that lies in either sector of the header, or in both */
        change.has_slot = true;
        change.slot = slots[prng_below(&prng, ARRAY_SIZE(slots))];
        change.force = true;
        break;
    }
    m.operations = 0;
    m.stop_at = 1 + (unsigned)prng_below(&prng, 14);
    done = amend(&m, &l, &change, NULL) == 0;
    luks_release(&l);
    memory_store_cut(&m, &prng);
    if (done && change.activate)
        assert_int_equal(try_open(&m, &l, "c"), 0);
    else if (try_open(&m, &l, "a") < 0 && (!two || try_open(&m, &l, "b") < 0))
        assert_int_equal(try_open(&m, &l, "c"), 0);
    assert_memory_equal(l.key, key, sizeof(key));
    luks_release(&l);
    every_slot_opens(&m);
    if (done && !change.activate)
        assert_false(opens(&m, "b"));
    memory_store_release(&m);
}

static void test_luks__power_cuts_never_take_the_key(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        uint64_t start = seed;

        run_sim(seed, cut_off, &start);
    }
}
