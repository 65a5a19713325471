/* SPDX-License-Identifier: Apache-2.0 */
/* The directory of a catalogue: reading it, and adding to it so that a crash leaves nothing that is not true. */
#include "cli/catalogue.h"
#include "base/alloc.h"
#include "base/json-text.h"
#include "base/log.h"
#include "base/macros.h"
#include "formats/qcow2/qcow2-header.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define POINT_FILE_MAX ((size_t)64 << 10)
#define CATALOGUE_FILE "cairn.json"
#define LOCK_FILE      ".cairn.lock"

/* ---- files ---- */

static int fail(struct error **err, const struct catalogue *c, const char *name, const char *what)
{
    int errnum = errno;

    return error_set(err, errnum, "cannot %s '%s/%s': %s", what, c->dir, name, strerror(errnum));
}

/* A regular file of the directory, no link: its descriptor. */
static int open_regular(const struct catalogue *c, const char *name, uint64_t *ret_size,
                        struct error **err)
{
    int fd = openat(c->dir_fd, name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    struct stat st;

    if (fd < 0)
        return fail(err, c, name, "open");
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
        *ret_size = (uint64_t)st.st_size;
        return fd;
    }
    close(fd);
    return error_set(err, EINVAL, "'%s/%s' is no regular file", c->dir, name);
}

/* At most `max` bytes from the start. */
static int read_start(const struct catalogue *c, const char *name, int fd, size_t max, char **ret,
                      size_t *ret_len, struct error **err)
{
    char *bytes = xnew_n(char, max);
    size_t len = 0;
    ssize_t n = 1;

    while (len < max && n > 0) {
        n = pread(fd, bytes + len, max - len, (off_t)len);
        if (n < 0 && errno == EINTR)
            n = 1;
        else if (n > 0)
            len += (size_t)n;
    }
    if (n < 0) {
        free(bytes);
        return fail(err, c, name, "read");
    }
    *ret = bytes;
    *ret_len = len;
    return 0;
}

static int read_small_file(const struct catalogue *c, const char *name, char **ret, size_t *ret_len,
                           struct error **err)
{
    uint64_t size = 0;
    int fd = open_regular(c, name, &size, err);
    int r;

    if (fd < 0)
        return fd;
    r = size > POINT_FILE_MAX ? error_set(err, EINVAL, "'%s/%s' has more than %zu bytes", c->dir,
                                          name, POINT_FILE_MAX)
                              : read_start(c, name, fd, POINT_FILE_MAX, ret, ret_len, err);
    close(fd);
    return r;
}

static int sync_dir(const struct catalogue *c, struct error **err)
{
    return fsync(c->dir_fd) < 0 ? fail(err, c, ".", "sync") : 0;
}

/* Makes what somebody has written durable. */
static int sync_file(const struct catalogue *c, const char *name, struct error **err)
{
    int fd = openat(c->dir_fd, name, O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    int r = fd < 0 || fsync(fd) < 0 ? fail(err, c, name, "sync") : 0;

    if (fd >= 0)
        close(fd);
    return r;
}

static int write_file(const struct catalogue *c, const char *name, const char *text,
                      struct error **err)
{
    int fd = openat(c->dir_fd, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0666);
    size_t len = strlen(text);
    int r = fd < 0 ? fail(err, c, name, "make") : 0;

    while (r == 0 && len) {
        ssize_t n = write(fd, text, len);

        if (n < 0 && errno != EINTR)
            r = fail(err, c, name, "write");
        text += MAX(n, (ssize_t)0);
        len -= (size_t)MAX(n, (ssize_t)0);
    }
    if (r == 0 && fsync(fd) < 0)
        r = fail(err, c, name, "sync");
    if (fd >= 0)
        close(fd);
    return r;
}

static int write_json(const struct catalogue *c, const char *name, json_t *tree, struct error **err)
{
    AUTO(free_ptr) char *text = json_text_dump(tree, true);
    AUTO(free_ptr) char *line = NULL;

    json_decref(tree);
    if (!text)
        return error_set(err, ENOMEM, "'%s/%s' cannot be written as JSON", c->dir, name);
    line = xasprintf("%s\n", text);
    return write_file(c, name, line, err);
}

static int rename_file(const struct catalogue *c, const char *from, const char *to,
                       struct error **err)
{
    return renameat(c->dir_fd, from, c->dir_fd, to) < 0 ? fail(err, c, from, "rename") : 0;
}

static void remove_file(const struct catalogue *c, const char *name)
{
    if (unlinkat(c->dir_fd, name, 0) < 0 && errno != ENOENT)
        log_warning("cannot remove '%s/%s': %s, ignoring", c->dir, name, strerror(errno));
}

/* ---- names ---- */

/* The id of a file called ID<suffix>, into `ret`; false if it is another one's. */
static bool id_of(const char *name, const char *suffix, char ret[POINT_ID_MAX])
{
    size_t len = strlen(name);
    size_t cut = strlen(suffix);

    if (len <= cut || len - cut >= POINT_ID_MAX || strcmp(name + len - cut, suffix) != 0)
        return false;
    memcpy(ret, name, len - cut);
    ret[len - cut] = '\0';
    return point_id_valid(ret);
}

char *catalogue_part_path(const struct catalogue *c, const char *id)
{
    return xasprintf("%s/%s.qcow2.part", c->dir, id);
}

char *catalogue_image_path(const struct catalogue *c, const char *id)
{
    return xasprintf("%s/%s.qcow2", c->dir, id);
}

void catalogue_new_id(const struct catalogue *c, uint64_t wall_ns, char ret[POINT_ID_MAX])
{
    time_t seconds = (time_t)(wall_ns / NS_PER_S);
    char stamp[20];
    struct tm tm;

    (void)gmtime_r(&seconds, &tm);
    (void)strftime(stamp, sizeof(stamp), "%Y%m%dT%H%M%SZ", &tm);
    (void)snprintf(ret, POINT_ID_MAX, "%s", stamp);
    for (unsigned n = 2; n < 10000; n++) {
        AUTO(free_ptr) char *name = xasprintf("%s.json", ret);
        AUTO(free_ptr) char *image = xasprintf("%s.qcow2", ret);

        if (faccessat(c->dir_fd, name, F_OK, AT_SYMLINK_NOFOLLOW) < 0 &&
            faccessat(c->dir_fd, image, F_OK, AT_SYMLINK_NOFOLLOW) < 0)
            return;
        (void)snprintf(ret, POINT_ID_MAX, "%s-%u", stamp, n);
    }
}

/* ---- reading ---- */

static int check_image_header(const struct catalogue *c, const struct point *p,
                              const struct qcow2_header *h, struct error **err)
{
    AUTO(free_ptr) char *base = p->base ? xasprintf("%s.qcow2", p->base) : NULL;

    if (h->size < p->size || h->size - p->size >= 512)
        return error_set(err, EINVAL, "image '%s/%s' has another size than the point", c->dir,
                         p->image);
    if (!base != !h->backing_file || (base && strcmp(base, h->backing_file) != 0))
        return error_set(err, EINVAL,
                         "image '%s/%s' has another backing file than the point's base", c->dir,
                         p->image);
    return 0;
}

static int check_image(const struct catalogue *c, const struct point *p, struct error **err)
{
    AUTO(free_ptr) char *bytes = NULL;
    struct qcow2_header header;
    uint64_t size = 0;
    size_t len;
    int fd = open_regular(c, p->image, &size, err);
    int r;

    if (fd < 0)
        return fd;
    r = read_start(c, p->image, fd, QCOW2_HEADER_BYTES_MAX, &bytes, &len, err);
    close(fd);
    if (r < 0)
        return r;
    r = qcow2_header_parse_tolerant(&header, bytes, len, size, p->image, err);
    if (r < 0)
        return r;
    r = check_image_header(c, p, &header, err);
    qcow2_header_release(&header);
    return r;
}

static int load_point(struct catalogue *c, const char *name, const char *id, struct error **err)
{
    AUTO(free_ptr) char *text = NULL;
    struct point p;
    size_t len;
    int r = read_small_file(c, name, &text, &len, err);

    if (r == 0)
        r = point_from_text(&p, id, text, len, err);
    if (r < 0)
        return r;
    c->points = realloc(c->points, (c->count + 1) * sizeof(*c->points));
    if (!c->points)
        abort(); /* as all small memory */
    c->points[c->count++] = p;
    return 0;
}

static int by_time(const void *a, const void *b)
{
    const struct point *x = a;
    const struct point *y = b;
    int order = strcmp(x->time, y->time);

    return order ? order : strverscmp(x->id, y->id);
}

/* A listing of its own, from the begin; closedir() ends it. */
static int open_listing(const struct catalogue *c, DIR **ret, struct error **err)
{
    int fd = openat(c->dir_fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int r;

    *ret = fd < 0 ? NULL : fdopendir(fd);
    if (*ret)
        return 0;
    r = fail(err, c, ".", "read");
    if (fd >= 0)
        close(fd);
    return r;
}

static int load_points(struct catalogue *c, struct error **err)
{
    const struct dirent *entry;
    DIR *d = NULL;
    int r = open_listing(c, &d, err);

    if (r < 0)
        return r;
    while ((entry = readdir(d))) {
        AUTO(error_free) struct error *why = NULL;
        char id[POINT_ID_MAX];

        if (id_of(entry->d_name, ".json", id) && load_point(c, entry->d_name, id, &why) < 0)
            log_warning("'%s/%s': %s, ignoring", c->dir, entry->d_name, error_text(why));
    }
    closedir(d);
    if (c->count)
        qsort(c->points, c->count, sizeof(*c->points), by_time);
    return 0;
}

const struct point *catalogue_find(const struct catalogue *c, const char *id)
{
    for (size_t i = 0; i < c->count; i++) {
        if (strcmp(c->points[i].id, id) == 0)
            return &c->points[i];
    }
    return NULL;
}

const struct point *catalogue_find_generation(const struct catalogue *c, const char *bitmap,
                                              const char *generation)
{
    for (size_t i = c->count; i-- > 0;) {
        const struct point *p = &c->points[i];

        if (strcmp(p->bitmap, bitmap) == 0 && strcmp(p->generation, generation) == 0)
            return p;
    }
    return NULL;
}

static void drop_point(struct catalogue *c, size_t i)
{
    point_release(&c->points[i]);
    memmove(&c->points[i], &c->points[i + 1], (--c->count - i) * sizeof(*c->points));
}

/* CAT-2. A chain that leads back to itself has no full point, and goes with the last round. */
static void drop_wrong(struct catalogue *c)
{
    AUTO(free_ptr) bool *good = NULL;
    bool more = true;

    for (size_t i = 0; i < c->count;) {
        AUTO(error_free) struct error *why = NULL;

        if (check_image(c, &c->points[i], &why) == 0) {
            i++;
            continue;
        }
        log_warning("point %s: %s, ignoring", c->points[i].id, error_text(why));
        drop_point(c, i);
    }
    good = xnew_n(bool, MAX(c->count, (size_t)1));
    while (more) {
        more = false;
        for (size_t i = 0; i < c->count; i++) {
            const struct point *p = &c->points[i];
            const struct point *base = p->full ? NULL : catalogue_find(c, p->base);

            if (good[i] || (!p->full && (!base || !good[base - c->points])))
                continue;
            good[i] = more = true;
        }
    }
    for (size_t i = c->count; i-- > 0;) {
        if (good[i])
            continue;
        log_warning("point %s: its base %s is no point, ignoring", c->points[i].id,
                    c->points[i].base);
        drop_point(c, i);
    }
}

static int open_dir(struct catalogue *c, const char *dir, struct error **err)
{
    c->dir = realpath(dir, NULL);
    if (!c->dir)
        return error_set(err, errno, "'%s': %s", dir, strerror(errno));
    c->dir_fd = open(c->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (c->dir_fd < 0)
        return error_set(err, errno, "'%s': %s", dir, strerror(errno));
    return 0;
}

static struct catalogue *catalogue_new(void)
{
    struct catalogue *c = xnew(struct catalogue);

    c->dir_fd = c->lock_fd = -1;
    return c;
}

int catalogue_open(struct catalogue **ret, const char *dir, struct error **err)
{
    struct catalogue *c = catalogue_new();
    int r = open_dir(c, dir, err);

    if (r == 0)
        r = load_points(c, err);
    if (r < 0) {
        (void)catalogue_close(c);
        return r;
    }
    drop_wrong(c);
    *ret = c;
    return 0;
}

struct catalogue *catalogue_close(struct catalogue *c)
{
    if (!c)
        return NULL;
    for (size_t i = 0; i < c->count; i++)
        point_release(&c->points[i]);
    free(c->points);
    if (c->lock_fd >= 0)
        close(c->lock_fd);
    if (c->dir_fd >= 0)
        close(c->dir_fd);
    free(c->dir);
    free(c);
    return NULL;
}

/* ---- adding ---- */

static int take_lock(struct catalogue *c, struct error **err)
{
    c->lock_fd = openat(c->dir_fd, LOCK_FILE, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    if (c->lock_fd < 0)
        return fail(err, c, LOCK_FILE, "open");
    while (flock(c->lock_fd, LOCK_EX | LOCK_NB) < 0) {
        if (errno == EWOULDBLOCK)
            return error_set(err, EBUSY, "another backup to '%s' is under way", c->dir);
        if (errno != EINTR)
            return fail(err, c, LOCK_FILE, "lock");
    }
    return 0;
}

static int read_id(struct catalogue *c, struct error **err)
{
    AUTO(free_ptr) char *text = NULL;
    json_t *tree = NULL;
    const char *id;
    size_t len;
    int r = read_small_file(c, CATALOGUE_FILE, &text, &len, err);

    if (r == 0)
        r = json_text_load(text, len, &tree, err);
    if (r < 0)
        return r;
    id = json_string_value(json_object_get(tree, "id"));
    if (!id || strlen(id) != CATALOGUE_ID_CHARS ||
        strspn(id, "0123456789abcdef") != CATALOGUE_ID_CHARS)
        r = error_set(err, EINVAL,
                      "'%s/" CATALOGUE_FILE "': member 'id' is not %d hexadecimal "
                      "digits",
                      c->dir, CATALOGUE_ID_CHARS);
    else
        memcpy(c->id, id, CATALOGUE_ID_CHARS + 1);
    json_decref(tree);
    return r;
}

/* What bitmap, job and node of this directory are called in a daemon. */
static int make_id(struct catalogue *c, struct error **err)
{
    uint8_t bytes[CATALOGUE_ID_CHARS / 2];
    int r;

    if (getrandom(bytes, sizeof(bytes), 0) != (ssize_t)sizeof(bytes))
        return error_set(err, errno, "no random bytes: %s", strerror(errno));
    for (size_t i = 0; i < sizeof(bytes); i++)
        (void)snprintf(c->id + 2 * i, 3, "%02x", bytes[i]);
    r = write_json(c, CATALOGUE_FILE ".tmp",
                   json_pack("{s:i, s:s}", "cairn-backups", 1, "id", c->id), err);
    if (r == 0)
        r = rename_file(c, CATALOGUE_FILE ".tmp", CATALOGUE_FILE, err);
    return r == 0 ? sync_dir(c, err) : r;
}

/* The image of no point, and the base of none that has a file. */
static bool is_left_over(const struct catalogue *c, const char *id)
{
    AUTO(free_ptr) char *name = xasprintf("%s.json", id);

    for (size_t i = 0; i < c->count; i++) {
        if (c->points[i].base && strcmp(c->points[i].base, id) == 0)
            return false;
    }
    return faccessat(c->dir_fd, name, F_OK, AT_SYMLINK_NOFOLLOW) < 0 && errno == ENOENT;
}

/* CAT-3. Before points that are not right are dropped. */
static int remove_half_made(const struct catalogue *c, struct error **err)
{
    const struct dirent *entry;
    DIR *d = NULL;
    int r = open_listing(c, &d, err);

    if (r < 0)
        return r;
    while ((entry = readdir(d))) {
        char id[POINT_ID_MAX];

        if (id_of(entry->d_name, ".qcow2.part", id) || id_of(entry->d_name, ".json.tmp", id) ||
            (id_of(entry->d_name, ".qcow2", id) && is_left_over(c, id)))
            remove_file(c, entry->d_name);
    }
    closedir(d);
    return 0;
}

int catalogue_open_locked(struct catalogue **ret, const char *dir, struct error **err)
{
    struct catalogue *c = catalogue_new();
    int r = 0;

    if (mkdir(dir, 0777) < 0 && errno != EEXIST)
        r = error_set(err, errno, "cannot make the directory '%s': %s", dir, strerror(errno));
    if (r == 0)
        r = open_dir(c, dir, err);
    if (r == 0)
        r = take_lock(c, err);
    if (r == 0)
        r = load_points(c, err);
    if (r == 0)
        r = faccessat(c->dir_fd, CATALOGUE_FILE, F_OK, AT_SYMLINK_NOFOLLOW) == 0 ? read_id(c, err)
                                                                                 : make_id(c, err);
    if (r == 0)
        r = remove_half_made(c, err);
    if (r < 0) {
        (void)catalogue_close(c);
        return r;
    }
    drop_wrong(c);
    *ret = c;
    return 0;
}

int catalogue_add(struct catalogue *c, struct point *p, struct error **err)
{
    AUTO(free_ptr) char *part = xasprintf("%s.qcow2.part", p->id);
    AUTO(free_ptr) char *temp = xasprintf("%s.json.tmp", p->id);
    AUTO(free_ptr) char *name = xasprintf("%s.json", p->id);
    int r = sync_file(c, part, err);

    if (r == 0)
        r = write_json(c, temp, point_to_json(p), err);
    if (r == 0)
        r = rename_file(c, part, p->image, err);
    if (r == 0)
        r = sync_dir(c, err); /* the image's name is durable before the point says it */
    if (r == 0)
        r = rename_file(c, temp, name, err);
    if (r < 0) {
        remove_file(c, temp);
        remove_file(c, p->image);
        return r;
    }
    c->points = realloc(c->points, (c->count + 1) * sizeof(*c->points));
    if (!c->points)
        abort(); /* as all small memory */
    c->points[c->count++] = *p;
    *p = (struct point){.id = NULL};
    return sync_dir(c, err);
}

int catalogue_part_allocated(const struct catalogue *c, const char *id, uint64_t *ret,
                             struct error **err)
{
    AUTO(free_ptr) char *part = xasprintf("%s.qcow2.part", id);
    struct stat st;

    if (fstatat(c->dir_fd, part, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return error_set(err, errno, "cannot look at '%s/%s': %s", c->dir, part, strerror(errno));
    *ret = (uint64_t)st.st_blocks * 512;
    return 0;
}

void catalogue_discard(struct catalogue *c, const char *id)
{
    AUTO(free_ptr) char *part = xasprintf("%s.qcow2.part", id);

    remove_file(c, part);
}
