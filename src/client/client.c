/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The client. All that is received goes through one place, client_receive(): it cuts messages out of a buffer, keeps events, and
 * gives the answer that is waited for.
 */
#include "cairn/client.h"
#include "base/alloc.h"
#include "base/error.h"
#include "base/json-text.h"
#include "base/list.h"
#include "base/macros.h"
#include "client/message.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#define PUBLIC __attribute__((visibility("default")))

/* How much is received at once, at most. */
#define RECEIVE_STEP ((size_t)64 << 10)

struct event {
    struct list link;
    json_t *message;
};

struct cairn_client {
    int fd;
    char *path;
    json_t *greeting; /* the member "QMP" */
    int64_t last_id;
    int broken; /* negative errno: nothing more comes */

    char *in; /* what has come and is not taken apart yet */
    size_t in_len;
    size_t in_size;
    struct message_scan scan;

    struct list events; /* struct event, oldest first */
    unsigned event_count;
    unsigned long events_dropped;
};

PUBLIC unsigned cairn_client_api(void)
{
    return CAIRN_CLIENT_API_MAJOR << 16 | CAIRN_CLIENT_API_MINOR;
}

PUBLIC void cairn_error_clear(struct cairn_error *err)
{
    free(err->class_name);
    free(err->message);
    *err = (struct cairn_error)CAIRN_ERROR_INIT;
}

/* Returns -errnum. */
static int PRINTF_LIKE(3, 4) fail(struct cairn_error *err, int errnum, const char *fmt, ...)
{
    va_list args;

    if (!err)
        return -errnum;
    cairn_error_clear(err);
    err->errnum = errnum;
    va_start(args, fmt);
    err->message = xvasprintf(fmt, args);
    va_end(args);
    return -errnum;
}

/* Milliseconds of a clock that only goes forward; INT64_MAX: never. */
static int64_t now_ms(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t); /* there always is one */
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static int64_t deadline_after(int timeout_ms)
{
    return timeout_ms < 0 ? INT64_MAX : now_ms() + timeout_ms;
}

/* 0, -ETIMEDOUT, or -EINTR, which callers that must not be interrupted ignore. */
static int wait_for(const struct cairn_client *c, short what, int64_t deadline)
{
    struct pollfd p = {.fd = c->fd, .events = what};
    int timeout = -1;
    int n;

    if (deadline != INT64_MAX) {
        int64_t left = deadline - now_ms();

        timeout = left <= 0 ? 0 : (int)MIN(left, (int64_t)INT_MAX);
    }
    n = poll(&p, 1, timeout);
    if (n < 0)
        return -errno;
    return n == 0 ? -ETIMEDOUT : 0;
}

/* The connection cannot be used any more: says so now and later. */
static int break_off(struct cairn_client *c, struct cairn_error *err, const char *why)
{
    c->broken = -ECONNRESET;
    return fail(err, ECONNRESET, "'%s': %s", c->path, why);
}

static int check_whole(struct cairn_client *c, struct cairn_error *err)
{
    return c->broken ? fail(err, -c->broken, "'%s': the connection is broken", c->path) : 0;
}

static void keep_event(struct cairn_client *c, json_t *message)
{
    struct event *e = xnew(struct event);

    e->message = message;
    list_append(&c->events, &e->link);
    if (++c->event_count <= CAIRN_CLIENT_EVENTS_MAX)
        return;
    e = container_of(c->events.next, struct event, link);
    list_remove(&e->link);
    json_decref(e->message);
    free(e);
    c->event_count--;
    c->events_dropped++;
}

/* 1: *ret has a message of the buffer. 0: none is whole. */
static int cut_message(struct cairn_client *c, json_t **ret, struct cairn_error *err)
{
    AUTO(error_free) struct error *why = NULL;
    int r = message_scan(&c->scan, c->in, c->in_len);

    if (r < 0)
        return break_off(c, err, "what the other side sends is not the control protocol");
    if (r == 0)
        return 0;
    if (json_text_load(c->in, c->scan.at, ret, &why) < 0)
        return break_off(c, err, error_text(why));
    c->in_len -= c->scan.at;
    memmove(c->in, c->in + c->scan.at, c->in_len);
    c->scan = (struct message_scan){.at = 0};
    return 1;
}

static int make_room(struct cairn_client *c, struct cairn_error *err)
{
    size_t size = c->in_size ? 2 * c->in_size : RECEIVE_STEP;
    char *more;

    if (c->in_size - c->in_len >= RECEIVE_STEP / 2)
        return 0;
    more = realloc(c->in, size);
    if (!more)
        return fail(err, ENOMEM, "'%s': no memory for a message of more than %zu bytes", c->path,
                    c->in_len);
    c->in = more;
    c->in_size = size;
    return 0;
}

static int receive_bytes(struct cairn_client *c, int64_t deadline, bool interruptible,
                         struct cairn_error *err)
{
    int r = make_room(c, err);
    ssize_t n;

    if (r < 0)
        return r;
    r = wait_for(c, POLLIN, deadline);
    if (r == -EINTR && !interruptible)
        return 0;
    if (r < 0)
        return fail(err, -r, "'%s': %s", c->path,
                    r == -ETIMEDOUT ? "the daemon does not answer in time" : strerror(-r));
    n = recv(c->fd, c->in + c->in_len, c->in_size - c->in_len, MSG_DONTWAIT);
    if (n == 0)
        return break_off(c, err, "the daemon has closed the connection");
    if (n > 0)
        c->in_len += (size_t)n;
    else if (errno != EAGAIN && errno != EINTR)
        return break_off(c, err, strerror(errno));
    return 0;
}

/* The next message, events too. */
static int client_receive(struct cairn_client *c, int64_t deadline, bool interruptible,
                          json_t **ret, struct cairn_error *err)
{
    for (;;) {
        int r = cut_message(c, ret, err);

        if (r != 0)
            return r < 0 ? r : 0;
        r = receive_bytes(c, deadline, interruptible, err);
        if (r < 0)
            return r;
    }
}

static int send_bytes(struct cairn_client *c, const char *bytes, size_t len, int64_t deadline,
                      struct cairn_error *err)
{
    bool begun = false;

    while (len) {
        ssize_t n = send(c->fd, bytes, len, MSG_DONTWAIT | MSG_NOSIGNAL);
        int r = 0;

        if (n >= 0) {
            bytes += n;
            len -= (size_t)n;
            begun = true;
            continue;
        }
        if (errno == EAGAIN)
            r = wait_for(c, POLLOUT, deadline);
        else if (errno != EINTR)
            return break_off(c, err, strerror(errno));
        if (r == -ETIMEDOUT && begun) /* half a message is in the way of all later ones */
            c->broken = -ECONNRESET;
        if (r < 0 && r != -EINTR)
            return fail(err, -r, "'%s': the daemon takes no command in time", c->path);
    }
    return 0;
}

/* ---- opening ---- */

static int connect_socket(struct cairn_client *c, int64_t deadline, struct cairn_error *err)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    size_t len = strlen(c->path);

    if (len >= sizeof(to.sun_path))
        return fail(err, ENAMETOOLONG, "'%s': the path of a socket has at most %zu bytes, not %zu",
                    c->path, sizeof(to.sun_path) - 1, len);
    memcpy(to.sun_path, c->path, len);
    c->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        return fail(err, errno, "cannot make a socket: %s", strerror(errno));
    while (connect(c->fd, (const struct sockaddr *)(const void *)&to, sizeof(to)) < 0) {
        const struct timespec moment = {.tv_nsec = 5000000L};

        /* A Unix socket whose queue is full says EAGAIN, and poll(2) does not wait for room in it. */
        if (errno != EAGAIN && errno != EINTR)
            return fail(err, errno, "cannot connect to '%s': %s", c->path, strerror(errno));
        if (now_ms() >= deadline)
            return fail(err, ETIMEDOUT, "'%s': the daemon takes no connection in time", c->path);
        (void)nanosleep(&moment, NULL);
    }
    return 0;
}

/* Events may come only after the negotiation; what else comes first is no greeting. */
static int read_greeting(struct cairn_client *c, int64_t deadline, struct cairn_error *err)
{
    json_t *message = NULL;
    int r = client_receive(c, deadline, false, &message, err);

    if (r < 0)
        return r;
    c->greeting = json_incref(json_object_get(message, "QMP"));
    json_decref(message);
    return json_is_object(c->greeting) ? 0 : break_off(c, err, "it does not greet as QMP does");
}

static int remaining(int64_t deadline)
{
    return deadline == INT64_MAX ? -1 : (int)MAX(deadline - now_ms(), (int64_t)0);
}

PUBLIC int cairn_client_open(struct cairn_client **ret, const char *path, int timeout_ms,
                             struct cairn_error *err)
{
    int64_t deadline = deadline_after(timeout_ms);
    struct cairn_client *c = xnew(struct cairn_client);
    int r;

    c->fd = -1;
    c->path = xstrdup(path);
    list_init(&c->events);
    r = connect_socket(c, deadline, err);
    if (r == 0)
        r = read_greeting(c, deadline, err);
    if (r == 0)
        r = cairn_client_command(c, "qmp_capabilities", NULL, remaining(deadline), NULL, err);
    if (r < 0) {
        (void)cairn_client_close(c);
        return r;
    }
    *ret = c;
    return 0;
}

PUBLIC struct cairn_client *cairn_client_close(struct cairn_client *c)
{
    struct event *e;
    struct event *next;

    if (!c)
        return NULL;
    list_for_each_safe (&c->events, e, next, link) {
        json_decref(e->message);
        free(e);
    }
    if (c->fd >= 0)
        close(c->fd);
    json_decref(c->greeting);
    free(c->in);
    free(c->path);
    free(c);
    return NULL;
}

PUBLIC const json_t *cairn_client_greeting(const struct cairn_client *c)
{
    return c->greeting;
}

PUBLIC int cairn_client_fd(const struct cairn_client *c)
{
    return c->fd;
}

PUBLIC unsigned long cairn_client_events_dropped(const struct cairn_client *c)
{
    return c->events_dropped;
}

/* ---- commands ---- */

static int send_command(struct cairn_client *c, const char *name, json_t *arguments,
                        int64_t deadline, struct cairn_error *err)
{
    json_t *message = json_pack("{s:s, s:I}", "execute", name, "id", (json_int_t)++c->last_id);
    char *text = NULL;
    int r;

    if (message && (!arguments || json_object_set(message, "arguments", arguments) == 0))
        text = json_text_dump(message, false);
    json_decref(message);
    if (!text)
        return fail(err, EINVAL, "command '%.100s' cannot be written as JSON", name);
    r = send_bytes(c, text, strlen(text), deadline, err);
    if (r == 0)
        r = send_bytes(c, "\n", 1, deadline, err);
    free(text);
    return r;
}

static int take_refusal(const json_t *error, struct cairn_error *err)
{
    const char *class = json_string_value(json_object_get(error, "class"));
    const char *desc = json_string_value(json_object_get(error, "desc"));

    (void)fail(err, EREMOTEIO, "%s", desc ? desc : "it fails, and the daemon does not say why");
    if (err)
        err->class_name = xstrdup(class ? class : "GenericError");
    return -EREMOTEIO;
}

/* Is it the answer to the last command? An error without an id is: the daemon could not read the command. */
static bool answers(const struct cairn_client *c, const json_t *message)
{
    const json_t *id = json_object_get(message, "id");

    if (!id)
        return json_object_get(message, "error") != NULL;
    return json_is_integer(id) && json_integer_value(id) == c->last_id;
}

static int take_answer(struct cairn_client *c, json_t *message, json_t **ret_value,
                       struct cairn_error *err)
{
    json_t *value = json_object_get(message, "return");
    const json_t *error = json_object_get(message, "error");
    int r = 0;

    if (error)
        r = take_refusal(error, err);
    else if (!value)
        r = break_off(c, err, "an answer says neither 'return' nor 'error'");
    else if (ret_value)
        *ret_value = json_incref(value);
    json_decref(message);
    return r;
}

PUBLIC int cairn_client_command(struct cairn_client *c, const char *name, json_t *arguments,
                                int timeout_ms, json_t **ret_value, struct cairn_error *err)
{
    int64_t deadline = deadline_after(timeout_ms);
    int r = check_whole(c, err);

    if (r == 0)
        r = send_command(c, name, arguments, deadline, err);
    while (r == 0) {
        json_t *message = NULL;

        r = client_receive(c, deadline, false, &message, err);
        if (r == 0 && json_object_get(message, "event"))
            keep_event(c, message);
        else if (r == 0 && answers(c, message))
            return take_answer(c, message, ret_value, err);
        else
            json_decref(message); /* of a command that nobody waits for any more */
    }
    return r;
}

/* ---- events ---- */

static bool is_named(const json_t *event, const char *name)
{
    const char *is = json_string_value(json_object_get(event, "event"));

    return !name || (is && strcmp(is, name) == 0);
}

static json_t *take_kept(struct cairn_client *c, const char *name)
{
    struct event *e;

    list_for_each (&c->events, e, link) {
        json_t *message = e->message;

        if (!is_named(message, name))
            continue;
        list_remove(&e->link);
        free(e);
        c->event_count--;
        return message;
    }
    return NULL;
}

PUBLIC int cairn_client_event(struct cairn_client *c, const char *name, int timeout_ms,
                              json_t **ret_event, struct cairn_error *err)
{
    int64_t deadline = deadline_after(timeout_ms);
    json_t *message = take_kept(c, name);
    int r = message ? 0 : check_whole(c, err);

    while (r == 0 && !message) {
        r = client_receive(c, deadline, true, &message, err);
        if (r < 0)
            return r;
        if (!json_object_get(message, "event")) {
            json_decref(message); /* the late answer of a command that was not waited for */
            message = NULL;
        } else if (!is_named(message, name)) {
            keep_event(c, message);
            message = NULL;
        }
    }
    if (r == 0)
        *ret_event = message;
    return r;
}
