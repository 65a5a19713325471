/* SPDX-License-Identifier: Apache-2.0 */
/*
 * libcairn: a client of Cairn's control protocol (QMP), over a Unix socket.
 *
 * It blocks, has no threads and no event loop of its own. One connection belongs to one thread at a time; any number of
 * connections may be open. JSON values are those of jansson.
 *
 * Units       times are milliseconds; a negative timeout means: without limit
 * Errors      functions that return int return 0 or a negative errno, and with it fill *err (which may be NULL)
 *             -EREMOTEIO   the daemon refused the command: err->class_name and err->message are its words
 *             -ETIMEDOUT   the time is over
 *             -ECONNRESET  the daemon has closed the connection, or has sent what is not the protocol: the connection is of no
 *                          use any more, and each further call fails the same way
 * Strings     UTF-8
 */
#ifndef CAIRN_CLIENT_H
#define CAIRN_CLIENT_H

#include <jansson.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header. The first number changes with what breaks programs, the second with what is added. */
#define CAIRN_CLIENT_API_MAJOR 0
#define CAIRN_CLIENT_API_MINOR 1

/* Of the library that runs: major << 16 | minor. */
unsigned cairn_client_api(void);

/* What went wrong. Begin with CAIRN_ERROR_INIT; end with cairn_error_clear(). */
struct cairn_error {
    int errnum; /* positive errno; 0: nothing went wrong */
    char *
        class_name; /* the daemon's error class, such as "DeviceNotFound"; NULL unless errnum is EREMOTEIO */
    char *message; /* one line */
};

#define CAIRN_ERROR_INIT                                                                           \
    {                                                                                              \
        0, NULL, NULL                                                                              \
    }

/* Frees what it holds, and makes it as it was at first. */
void cairn_error_clear(struct cairn_error *err);

/* A connection. */
struct cairn_client;

/*
 * Connects to the socket at `path`, reads the greeting and asks for the command mode, all within the timeout. *ret is written
 * on success only; end it by cairn_client_close(). Errors of connect(2), and those above.
 */
int cairn_client_open(struct cairn_client **ret, const char *path, int timeout_ms,
                      struct cairn_error *err);
/* Takes NULL. Returns NULL. */
struct cairn_client *cairn_client_close(struct cairn_client *c);

/* The greeting's member "QMP". Borrowed from the connection. */
const json_t *cairn_client_greeting(const struct cairn_client *c);

/*
 * Sends a command and waits for its answer. `arguments` is an object, borrowed, or NULL. The answer's member "return" goes to
 * *ret_value, owned by the caller (json_decref()); ret_value may be NULL. Signals do not interrupt it.
 *
 * After -ETIMEDOUT the command may still be carried out; its answer is dropped when it comes.
 */
int cairn_client_command(struct cairn_client *c, const char *name, json_t *arguments,
                         int timeout_ms, json_t **ret_value, struct cairn_error *err);

/*
 * The oldest event that has not been taken, with this name, or with any if `name` is NULL; waits for one if there is none. Events
 * that come with answers, or before the one that is asked for, are kept. *ret_event is the whole message, owned by the caller.
 * -EINTR when a signal handler has run: then nothing is lost.
 */
int cairn_client_event(struct cairn_client *c, const char *name, int timeout_ms, json_t **ret_event,
                       struct cairn_error *err);

/* At most this many events are kept; then the oldest ones are dropped, and counted. */
#define CAIRN_CLIENT_EVENTS_MAX 4096
unsigned long cairn_client_events_dropped(const struct cairn_client *c);

/* For poll(2): readable when something has come. Borrowed. */
int cairn_client_fd(const struct cairn_client *c);

#ifdef __cplusplus
}
#endif

#endif
