/* SPDX-License-Identifier: Apache-2.0 */
/* Lines of standard input. Reading it may take as long as a person thinks: each line is read on a thread of its own. */
#include "base/macros.h"
#include "cli/io/io.h"
#include "loop/co.h"
#include "loop/loop.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct reading {
    struct loop *loop;
    struct loop_message message;
    struct co_wait wait;
    char *line;
};

static void read_line(struct reading *r)
{
    size_t size = 0;
    ssize_t len = getline(&r->line, &size, stdin);

    if (len < 0) {
        free(r->line);
        r->line = NULL;
    } else if (len > 0 && r->line[len - 1] == '\n') {
        r->line[len - 1] = '\0';
    }
}

static void arrived(struct loop_message *m)
{
    co_wait_end(&container_of(m, struct reading, message)->wait, 0);
}

static void *read_elsewhere(void *arg)
{
    struct reading *r = arg;

    read_line(r);
    loop_post(r->loop, &r->message);
    return NULL;
}

char *io_co_line(void)
{
    struct reading r = {.loop = loop_self(), .message.fn = arrived};
    pthread_t thread;

    co_wait_init(&r.wait, NULL);
    if (pthread_create(&thread, NULL, read_elsewhere, &r) != 0) {
        read_line(&r); /* what is under way waits, too */
        return r.line;
    }
    (void)co_wait(&r.wait, LOOP_FOREVER); /* nothing else ends it */
    (void)pthread_join(thread, NULL);
    return r.line;
}
