/* SPDX-License-Identifier: Apache-2.0 */
/* Grants: what references in images may open, with real files and links, and hostile names (Q6). */
#include "graph-fixture.h"
#include "graph/grants.h"
#include "loop/sim/sim.h"
#include "seeds.h"
#include "sim-run.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static const struct driver *const *const no_drivers[] = {NULL};

/*
 * A directory with: img/top, img/base, img/sub/deep; pool/a/base, pool/ab/base; secret. "@" in names of the tests is this
 * directory.
 */
static char root[64];

static char *at_root(const char *name)
{
    char *path = xstrdup("");

    for (;;) {
        size_t len = strcspn(name, "@");
        char *longer = xasprintf("%s%.*s%s", path, (int)len, name, name[len] ? root : "");

        free(path);
        path = longer;
        if (!name[len])
            return path;
        name += len + 1;
    }
}

static void make_file(const char *name)
{
    AUTO(free_ptr) char *path = at_root(name);
    int fd = open(path, O_CREAT | O_WRONLY, 0600);

    assert_true(fd >= 0);
    close(fd);
}

static void make_dir(const char *name)
{
    AUTO(free_ptr) char *path = at_root(name);

    assert_int_equal(mkdir(path, 0700), 0);
}

static void make_link(const char *name, const char *to)
{
    AUTO(free_ptr) char *path = at_root(name);
    AUTO(free_ptr) char *target = at_root(to);

    assert_int_equal(symlink(target, path), 0);
}

static int setup(void **state)
{
    static const char *const dirs[] = {"@/img", "@/img/sub", "@/pool", "@/pool/a", "@/pool/ab"};
    static const char *const files[] = {"@/img/top",     "@/img/base",     "@/img/sub/deep",
                                        "@/pool/a/base", "@/pool/ab/base", "@/secret"};

    (void)state;
    (void)snprintf(root, sizeof(root), "/dev/shm/cairn-test-grants.XXXXXX");
    assert_non_null(mkdtemp(root));
    for (size_t i = 0; i < ARRAY_SIZE(dirs); i++)
        make_dir(dirs[i]);
    for (size_t i = 0; i < ARRAY_SIZE(files); i++)
        make_file(files[i]);
    return 0;
}

static int teardown(void **state)
{
    AUTO(free_ptr) char *command = xasprintf("rm -r %s", root);

    (void)state;
    return system(command);
}

static void must_grant(struct graph *g, const char *name)
{
    AUTO(free_ptr) char *dir = at_root(name);
    struct error *err = NULL;

    if (graph_co_grant(g, dir, &err) < 0)
        fail_msg("%s", error_text(err));
}

/* What the image names is followed, and leads here. */
static void must_follow(struct graph *g, const char *image, const char *reference,
                        const char *expected)
{
    AUTO(free_ptr) char *image_path = at_root(image);
    AUTO(free_ptr) char *name = at_root(reference);
    AUTO(free_ptr) char *expected_path = at_root(expected);
    AUTO(free_ptr) char *path = NULL;
    struct error *err = NULL;

    if (grants_co_check(g, image_path, name, &path, &err) < 0)
        fail_msg("%s", error_text(err));
    assert_string_equal(path, expected_path);
}

/* It is not, and the message has this in it, and names image and reference. */
static void must_stop(struct graph *g, const char *image, const char *reference, int errnum,
                      const char *why)
{
    AUTO(free_ptr) char *image_path = at_root(image);
    AUTO(free_ptr) char *name = at_root(reference);
    AUTO(free_ptr) char *text = at_root(why);
    AUTO(free_ptr) char *both = xasprintf("image '%s' refers to '%s': ", image_path, name);
    struct error *err = NULL;
    char *path = NULL;

    if (grants_co_check(g, image_path, name, &path, &err) != -errnum)
        fail_msg("'%s' in '%s': %s", name, image_path, err ? error_text(err) : "followed");
    assert_null(path);
    must_say(err, text);
    must_say(err, both);
    error_free(&err);
}

static struct graph *new_graph(void)
{
    return graph_new(no_drivers);
}

/* ---- links ---- */

static void links(void *arg)
{
    struct graph *g = new_graph();

    (void)arg;
    must_grant(g, "@/pool/a");
    must_follow(g, "@/img/top", "in", "@/img/base");
    must_follow(g, "@/img/top", "granted", "@/pool/a/base");
    must_stop(g, "@/img/top", "out", EACCES, "'@/secret' lies outside");
    must_stop(g, "@/img/top", "@/pool/a/up/secret", EACCES, "'@/secret' lies outside");
    must_stop(g, "@/img/top", "round", ELOOP, "cannot find file '@/img/round'");
    must_stop(g, "@/img/top", "dangling", ENOENT, "cannot find file '@/img/dangling'");
    /* The image's own name may be a link: references begin where it lies, its directory is where it leads. */
    must_follow(g, "@/link-to-top", "img/base", "@/img/base");
    must_stop(g, "@/link-to-top", "secret", EACCES, "'@/secret' lies outside");
    /* The same of a grant. */
    must_grant(g, "@/link-to-pool");
    must_follow(g, "@/img/top", "../pool/ab/base", "@/pool/ab/base");
    graph_co_free(g);
}

static void test_grants__links_are_followed_before_they_are_judged(void **state)
{
    (void)state;
    make_link("@/img/in", "base");
    make_link("@/img/granted", "../pool/a/base");
    make_link("@/img/out", "../secret");
    make_link("@/img/round", "round");
    make_link("@/img/dangling", "nothing");
    make_link("@/pool/a/up", "@");
    make_link("@/link-to-top", "img/top");
    make_link("@/link-to-pool", "pool");
    on_both(links, NULL);
}

/* ---- without a grant ---- */

static void own_directory(void *arg)
{
    struct graph *g = new_graph();

    (void)arg;
    must_follow(g, "@/img/top", "base", "@/img/base");
    must_follow(g, "@/img/top", "./sub/../base", "@/img/base");
    must_follow(g, "@/img/top", "../img/base", "@/img/base");
    must_follow(g, "@/img/top", "@/img/base", "@/img/base");
    must_follow(g, "@/img/top", "file:@/img/base", "@/img/base");
    must_follow(g, "@/img/top", "top", "@/img/top"); /* a loop, which the chain refuses */
    must_stop(g, "@/img/top", "sub/deep", EACCES, "'--allow @/img/sub' would grant it");
    must_stop(g, "@/img/top", "../secret", EACCES,
              "'@/secret' lies outside the image's directory and the granted ones; "
              "'--allow @' would grant it");
    must_stop(g, "@/img/top", "@/pool/a/base", EACCES, "'--allow @/pool/a' would grant it");
    must_stop(g, "@/img/sub/deep", "../base", EACCES, "'--allow @/img' would grant it");
    must_stop(g, "@/img/top", "/etc/hostname", EACCES, "'--allow /etc' would grant it");
    graph_co_free(g);
}

static void test_grants__own_directory_of_the_image_is_granted(void **state)
{
    (void)state;
    on_both(own_directory, NULL);
}

/* As QEMU takes it: a relative name behind "file:" begins at the working directory. */
static void file_prefix(void *arg)
{
    struct graph *g = new_graph();
    AUTO(free_ptr) char *old = getcwd(NULL, 0);
    AUTO(free_ptr) char *dir = at_root("@/pool/a");

    (void)arg;
    assert_int_equal(chdir(dir), 0);
    must_stop(g, "@/img/top", "file:base", EACCES, "'@/pool/a/base' lies outside");
    must_grant(g, "@/pool");
    must_follow(g, "@/img/top", "file:base", "@/pool/a/base");
    must_follow(g, "base", "./base", "@/pool/a/base"); /* an image's name may be relative, too */
    must_follow(g, "../ab/base", "base", "@/pool/ab/base");
    assert_int_equal(chdir(old), 0);
    graph_co_free(g);
}

static void test_grants__file_prefix_is_taken_off(void **state)
{
    (void)state;
    on_both(file_prefix, NULL);
}

/* ---- grants ---- */

static void below_grants(void *arg)
{
    struct graph *g = new_graph();
    struct error *err = NULL;

    (void)arg;
    must_grant(g, "@/pool/./a/");
    must_follow(g, "@/img/top", "../pool/a/base", "@/pool/a/base");
    must_stop(g, "@/img/top", "../pool/ab/base", EACCES, "'--allow @/pool/ab' would grant it");
    must_grant(g, "@/img");
    must_follow(g, "@/img/top", "sub/deep", "@/img/sub/deep"); /* at any depth */
    must_stop(g, "@/img/top", "../secret", EACCES, "lies outside");
    must_grant(g, "/");
    must_follow(g, "@/img/top", "../secret", "@/secret");
    assert_int_equal(graph_co_grant(g, "/nowhere", &err), -ENOENT);
    must_say(err, "cannot grant directory '/nowhere': No such file or directory");
    error_free(&err);
    assert_int_equal(graph_co_grant(g, "/dev/null", &err), -ENOTDIR);
    must_say(err, "cannot grant '/dev/null': it is no directory");
    error_free(&err);
    graph_co_free(g);
}

static void test_grants__whole_components_below_a_granted_directory(void **state)
{
    (void)state;
    on_both(below_grants, NULL);
}

/* ---- hostile names ---- */

static void protocols(void *arg)
{
    static const char *const names[] = {
        "json:{\"driver\":\"file\",\"filename\":\"base\"}",
        "json:",
        "nbd://localhost/disk",
        "nbd:unix:/run/sock",
        "host_device:/dev/sda",
        "FILE:base",
        "fat:rw:.",
        ":base",
        "a:b",
        "base:/../base",
    };
    struct graph *g = new_graph();

    (void)arg;
    must_grant(g, "/");
    for (size_t i = 0; i < ARRAY_SIZE(names); i++) {
        AUTO(free_ptr)
        char *why = xasprintf("names with '%.*s' are not followed", (int)strcspn(names[i], ":") + 1,
                              names[i]);

        must_stop(g, "@/img/top", names[i], EACCES, why);
    }
    /* No protocols: a colon behind a slash, or in what follows file:. */
    must_follow(g, "@/img/top", "./a:b", "@/img/a:b");
    must_follow(g, "@/img/top", "file:@/img/a:b", "@/img/a:b");
    must_stop(g, "@/img/top", "file:json:{}", ENOENT, "cannot find file 'json:{}'");
    graph_co_free(g);
}

static void test_grants__protocols_are_refused_by_name(void **state)
{
    (void)state;
    make_file("@/img/a:b");
    on_both(protocols, NULL);
}

/* None of these is opened; the FIFO would hang. */
static void no_regular_files(void *arg)
{
    struct graph *g = new_graph();

    (void)arg;
    must_grant(g, "/");
    must_stop(g, "@/img/top", "fifo", EACCES, "'@/img/fifo' is no regular file");
    must_stop(g, "@/img/top", ".", EACCES, "'@/img' is no regular file");
    must_stop(g, "@/img/top", "/", EACCES, "'/' is no regular file");
    must_stop(g, "@/img/top", "sub/", EACCES, "'@/img/sub' is no regular file");
    must_stop(g, "@/img/top", "../../../../../../dev/zero", EACCES,
              "'/dev/zero' is no regular file");
    must_stop(g, "@/img/top", "base/", ENOTDIR, "cannot find file");
    must_stop(g, "@/img/top", "base/../base", ENOTDIR, "cannot find file");
    graph_co_free(g);
}

static void test_grants__only_regular_files_are_followed(void **state)
{
    AUTO(free_ptr) char *fifo = at_root("@/img/fifo");

    (void)state;
    assert_int_equal(mkfifo(fifo, 0600), 0);
    on_both(no_regular_files, NULL);
}

static void strange_names(void *arg)
{
    struct graph *g = new_graph();
    AUTO(free_ptr) char *image = at_root("@/img/top");
    struct error *err = NULL;
    char name[1024];
    char *path = NULL;

    (void)arg;
    must_stop(g, "@/img/top", "", EINVAL, "the name is empty");
    must_stop(g, "@/img/top", "file:", EINVAL, "the name is empty");
    must_stop(g, "@/img/top", "nothing", ENOENT, "cannot find file '@/img/nothing'");
    must_stop(g, "@/img/nothing", "base", ENOENT, "cannot find the image '@/img/nothing'");
    /* As long as a qcow2 header can hold: one component, or many. */
    memset(name, 'a', 1023);
    name[1023] = '\0';
    must_stop(g, "@/img/top", name, ENAMETOOLONG, "File name too long");
    for (size_t i = 0; i < 1019; i += 2)
        memcpy(name + i, "./", 2);
    strcpy(name + 1018, "base");
    must_follow(g, "@/img/top", name, "@/img/base");
    /* What it holds stays on one line of the message. */
    assert_int_equal(grants_co_check(g, image, "x\ny\x7f\x1b[31m", &path, &err), -ENOENT);
    must_say(err, "refers to 'x?y??[31m'");
    assert_null(strchr(error_text(err), '\n'));
    error_free(&err);
    /* An image that lies in no file has no directory. */
    assert_int_equal(grants_co_check(g, NULL, image, &path, &err), -EACCES);
    must_say(err, "it lies in no file");
    assert_null(path);
    error_free(&err);
    graph_co_free(g);
}

static void test_grants__strange_names_get_a_clear_error(void **state)
{
    (void)state;
    on_both(strange_names, NULL);
}

/* ---- under sim ---- */

static void simulated(void *arg)
{
    struct graph *g = new_graph();
    struct error *err = NULL;

    (void)arg;
    must_grant(g, "/pool/a");
    must_follow(g, "/img/top", "../img/./base", "/img/base");
    must_follow(g, "/img/top", "/pool/a/deep/base", "/pool/a/deep/base");
    must_stop(g, "/img/top", "/pool/ab/base", EACCES, "'--allow /pool/ab' would grant it");
    must_stop(g, "/img/top", "nothing", ENOENT, "cannot find file '/img/nothing'");
    must_stop(g, "/img/top", "/dev/sda", EACCES, "'/dev/sda' is no regular file");
    must_stop(g, "/img/top", "..", EACCES, "'/' is no regular file");
    must_follow(g, "/top", "base", "/base");
    assert_int_equal(graph_co_grant(g, "/nowhere", &err), -ENOENT);
    error_free(&err);
    graph_co_free(g);
}

static void test_grants__hold_on_the_simulated_disk(void **state)
{
    static const char *const files[] = {"/img/top",      "/img/base", "/pool/a/deep/base",
                                        "/pool/ab/base", "/top",      "/base"};

    (void)state;
    TEST_SEEDS (seed) {
        struct sim_disk *disk = sim_disk_new();

        for (size_t i = 0; i < ARRAY_SIZE(files); i++)
            sim_disk_make(disk, files[i], &(struct sim_file_setup){.size = 512});
        sim_disk_make(disk, "/dev/sda",
                      &(struct sim_file_setup){.type = FILE_TYPE_BLOCK, .size = 512});
        assert_int_equal(run_on(disk, seed, simulated, NULL), SIM_RETURNED);
        sim_disk_free(disk);
    }
}
