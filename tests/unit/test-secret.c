/* SPDX-License-Identifier: Apache-2.0 */
/* Secrets: where they come from, how they are encoded and encrypted, what is refused. */
#include "crypto/secret.h"
#include "graph-fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

static void co_fn add(struct secrets *s, const char *id, struct secret_options o, int errnum,
                      const char *text)
{
    struct error *err = NULL;
    int r = secrets_co_add(s, id, &o, &err);

    assert_int_equal(r, -errnum);
    if (errnum)
        must_say(err, text);
    error_free(&err);
}

static void must_be(struct secrets *s, const char *id, const char *text)
{
    struct error *err = NULL;
    struct secret value;

    if (secrets_get(s, id, &value, &err) < 0)
        fail_msg("%s", error_text(err));
    assert_int_equal(value.len, strlen(text));
    assert_memory_equal(value.bytes, text, value.len);
    secret_release(&value);
    assert_null(value.bytes);
}

#define SECRET(...) ((struct secret_options){__VA_ARGS__})

static char text_abc[] = "abc";
static char base64_abc[] = "YWJj";
static char base64_wrong[] = "YW-Jj";
static char base64_cut[] = "YWJ";
/* openssl enc -aes-256-cbc -a with key and iv below, of "letmein" */
static char master[] = "MTIzNDU2Nzg5MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTI=";
static char iv[] = "YWJjZGVmZ2hpamtsbW5vcA==";
static char other_iv[] = "YWJjZGVmZ2hpamtsbW5v";
static char encrypted[] = "sNnMBPrsRjnr5wj2c2f0DA==";
static char m_id[] = "m";
static char abc_id[] = "abc";
static char none_id[] = "none";

static void co_fn all_kinds(void *arg)
{
    struct secrets *s = secrets_new();
    char path[] = "/tmp/cairn-secret-XXXXXX";
    int fd = mkstemp(path);

    (void)arg;
    assert_true(fd >= 0 && write(fd, "with\n", 5) == 5 && close(fd) == 0);
    add(s, "abc", SECRET(.data = text_abc), 0, NULL);
    must_be(s, "abc", "abc");
    add(s, "b64", SECRET(.data = base64_abc, .format = SECRET_FORMAT_BASE64), 0, NULL);
    must_be(s, "b64", "abc");
    add(s, "file", SECRET(.file = path), 0, NULL);
    must_be(s, "file", "with\n");
    add(s, "m", SECRET(.data = master, .format = SECRET_FORMAT_BASE64), 0, NULL);
    add(s, "enc",
        SECRET(.data = encrypted, .format = SECRET_FORMAT_BASE64, .keyid = m_id, .iv = iv), 0,
        NULL);
    must_be(s, "enc", "letmein");

    add(s, "abc", SECRET(.data = text_abc), EEXIST, "there is an object 'abc' already");
    add(s, "x", SECRET(.data = NULL), EINVAL, "give one of 'data' and 'file'");
    add(s, "x", SECRET(.data = text_abc, .file = path), EINVAL, "give one of");
    add(s, "x", SECRET(.data = base64_wrong, .format = SECRET_FORMAT_BASE64), EINVAL,
        "not valid base64");
    add(s, "x", SECRET(.data = base64_cut, .format = SECRET_FORMAT_BASE64), EINVAL,
        "not valid base64");
    add(s, "x", SECRET(.data = text_abc, .iv = iv), EINVAL, "without 'keyid'");
    add(s, "x", SECRET(.data = text_abc, .keyid = m_id), EINVAL, "'iv' is needed");
    add(s, "x", SECRET(.data = text_abc, .keyid = none_id, .iv = iv), ENOENT, "no secret 'none'");
    add(s, "x", SECRET(.data = text_abc, .keyid = abc_id, .iv = iv), EINVAL, "has 3 bytes");
    add(s, "x", SECRET(.data = text_abc, .keyid = m_id, .iv = other_iv), EINVAL, "has 15 bytes");
    add(s, "x", SECRET(.data = text_abc, .keyid = m_id, .iv = iv), EINVAL, "does not decrypt");
    unlink(path);
    add(s, "x", SECRET(.file = path), ENOENT, path);
    (void)secrets_free(s);
}

static void test_secret__all_kinds(void **state)
{
    (void)state;
    on_both(all_kinds, NULL);
}

static void co_fn deletes(void *arg)
{
    struct secrets *s = secrets_new();
    struct error *err = NULL;
    struct secret kept;

    (void)arg;
    add(s, "abc", SECRET(.data = text_abc), 0, NULL);
    assert_int_equal(secrets_get(s, "abc", &kept, &err), 0);
    assert_int_equal(secrets_remove(s, "abc", &err), 0);
    assert_memory_equal(kept.bytes, "abc", 3); /* whoever uses it has a copy */
    secret_release(&kept);
    assert_int_equal(secrets_get(s, "abc", &kept, &err), -ENOENT);
    error_free(&err);
    assert_int_equal(secrets_remove(s, "abc", &err), -ENOENT);
    must_say(err, "there is no object 'abc'");
    error_free(&err);
    add(s, "abc", SECRET(.data = text_abc), 0, NULL);
    (void)secrets_free(s);
}

static void test_secret__can_be_deleted_while_it_is_used(void **state)
{
    (void)state;
    on_engine(LOOP_ENGINE_THREADS, deletes, NULL);
}
