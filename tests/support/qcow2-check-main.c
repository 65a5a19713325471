/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The judge of qcow2 images as a program, for tests in other languages.
 *
 *     qcow2-check IMAGE            prints what it found; exit status 0: sound, 1: leaks, 2: errors, 3: not judged
 *     qcow2-check --read IMAGE...  writes what a guest reads of the first image, whose backing file is the second, and so on,
 *                                  to standard output; "raw:NAME" is a raw one. Data files are found by their names as they are
 */
#include "qcow2-check.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS_MAX 64

static const char *const kinds[QCOW2_ERRORS] = {
    [QCOW2_ERROR_REFCOUNT_LOW] = "low",      [QCOW2_ERROR_USED_TWICE] = "twice",
    [QCOW2_ERROR_MISALIGNED] = "misaligned", [QCOW2_ERROR_BEYOND_END] = "beyond",
    [QCOW2_ERROR_COPIED] = "copied",         [QCOW2_ERROR_NOWHERE] = "nowhere",
    [QCOW2_ERROR_RESERVED] = "reserved",     [QCOW2_ERROR_ZERO_V2] = "zero_v2",
    [QCOW2_ERROR_DIRTY] = "dirty",           [QCOW2_ERROR_NOT_COPIED] = "not_copied",
    [QCOW2_ERROR_SNAPSHOT] = "snapshot",     [QCOW2_ERROR_SUBCLUSTER] = "subcluster",
    [QCOW2_ERROR_DATA_FILE] = "data_file",   [QCOW2_ERROR_BITMAP] = "bitmap",
};

static int check_image(const char *path)
{
    int fd = open(path, O_RDONLY);
    struct qcow2_file f = qcow2_file_of_fd(&fd);
    struct qcow2_verdict v;
    int r = fd < 0 ? -errno : qcow2_check(&f, &v);

    if (r < 0) {
        printf("not judged: %s\n%s", strerror(-r), fd < 0 ? "" : v.text);
        return 3;
    }
    printf("errors %u leaks %u leaks_beyond %u", v.errors, v.leaks, v.leaks_beyond);
    for (unsigned i = 0; i < QCOW2_ERRORS; i++)
        printf(" %s %u", kinds[i], v.by_kind[i]);
    printf("\n");
    printf("%s", v.text);
    if (v.errors)
        return 2;
    return v.leaks ? 1 : 0;
}

/* What it leaves open goes with the program. */
static void open_data_file(struct qcow2_layer *l, int *fd)
{
    char name[1024];

    if (qcow2_see_data_file(&l->file, name) < 0 || !*name)
        return;
    *fd = open(name, O_RDONLY);
    l->data = qcow2_file_of_fd(fd);
}

static int read_images(char **paths, unsigned count)
{
    static char buf[1 << 20];
    struct qcow2_layer layers[LAYERS_MAX];
    struct qcow2_verdict v;
    int fds[LAYERS_MAX];
    int data[LAYERS_MAX];
    uint64_t size;

    for (unsigned i = 0; i < count; i++) {
        bool raw = strncmp(paths[i], "raw:", 4) == 0;

        fds[i] = open(paths[i] + (raw ? 4 : 0), O_RDONLY);
        layers[i] = (struct qcow2_layer){.file = qcow2_file_of_fd(&fds[i]), .raw = raw};
        if (!raw)
            open_data_file(&layers[i], &data[i]);
    }
    size = layers[0].file.size;
    if (!layers[0].raw) {
        if (qcow2_check(&layers[0].file, &v) < 0)
            return 3;
        size = v.virtual_size;
    }
    for (uint64_t at = 0; at < size; at += sizeof(buf)) {
        size_t n = size - at < sizeof(buf) ? (size_t)(size - at) : sizeof(buf);

        if (qcow2_read_guest(layers, count, at, buf, n) < 0 || fwrite(buf, 1, n, stdout) != n)
            return 3;
    }
    return fflush(stdout) ? 3 : 0;
}

int main(int argc, char **argv)
{
    if (argc == 2)
        return check_image(argv[1]);
    if (argc > 2 && argc <= LAYERS_MAX && strcmp(argv[1], "--read") == 0)
        return read_images(argv + 2, (unsigned)argc - 2);
    fprintf(stderr, "usage: qcow2-check IMAGE | qcow2-check --read IMAGE...\n");
    return 3;
}
