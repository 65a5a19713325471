/* SPDX-License-Identifier: Apache-2.0 */
/* The client library against a daemon that is played by a thread, well and badly. */
#include "base/alloc.h"
#include "base/macros.h"
#include "cairn/client.h"
#include "client/message.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define PATIENCE 20000 /* ms, for what should take none */
#define GREETING "{\"QMP\": {\"version\": {}, \"capabilities\": []}}\r\n"

typedef void script_fn(int fd);

static struct {
    char dir[64];
    char path[96];
    int listener;
    pthread_t thread;
    script_fn *script;
} peer;

static void *peer_main(void *unused)
{
    int fd = accept(peer.listener, NULL, NULL);

    (void)unused;
    if (fd >= 0) {
        peer.script(fd);
        close(fd);
    }
    return NULL;
}

static void peer_start(script_fn *script)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};

    (void)signal(SIGPIPE, SIG_IGN);
    (void)snprintf(peer.dir, sizeof(peer.dir), "/tmp/test-client.XXXXXX");
    assert_non_null(mkdtemp(peer.dir));
    (void)snprintf(peer.path, sizeof(peer.path), "%s/s", peer.dir);
    memcpy(at.sun_path, peer.path, strlen(peer.path));
    peer.listener = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(peer.listener, (struct sockaddr *)(void *)&at, sizeof(at)), 0);
    assert_int_equal(listen(peer.listener, 1), 0);
    peer.script = script;
    assert_int_equal(pthread_create(&peer.thread, NULL, peer_main, NULL), 0);
}

static void peer_stop(void)
{
    pthread_join(peer.thread, NULL);
    close(peer.listener);
    unlink(peer.path);
    rmdir(peer.dir);
}

static void say(int fd, const char *text)
{
    size_t len = strlen(text);

    while (len) {
        ssize_t n = write(fd, text, len);

        if (n <= 0)
            return; /* the client has gone, which is its right */
        text += n;
        len -= (size_t)n;
    }
}

/* A command, and the number that it must be answered with. */
static long hear(int fd, char *buf, size_t size)
{
    const char *id;
    size_t len = 0;

    while (len + 1 < size && read(fd, buf + len, 1) == 1 && buf[len] != '\n')
        len++;
    buf[len] = '\0';
    id = strstr(buf, "\"id\": ");
    if (!id)
        id = strstr(buf, "\"id\":");
    return id ? strtol(strchr(id, ':') + 1, NULL, 10) : -1;
}

static void answer(int fd, const char *format)
{
    char command[4096];
    char text[4096];
    long id = hear(fd, command, sizeof(command));

    (void)snprintf(text, sizeof(text), "%s, \"id\": %ld}\r\n", format, id);
    say(fd, text);
}

static void negotiate(int fd)
{
    say(fd, GREETING);
    answer(fd, "{\"return\": {}");
}

static struct cairn_client *must_open(void)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    struct cairn_client *c = NULL;

    if (cairn_client_open(&c, peer.path, PATIENCE, &err) < 0)
        fail_msg("%s", err.message);
    return c;
}

/* ---- commands ---- */

static void script_commands(int fd)
{
    char command[4096];

    negotiate(fd);
    (void)hear(fd, command, sizeof(command));
    /* The command as it came, as a string within the answer: quotes become what does not end a string. */
    for (char *p = command; *p; p++) {
        if (*p == '"')
            *p = '\'';
    }
    say(fd, "\r\n {\"return\": {\"came\": \"");
    say(fd, command);
    say(fd, "\"}, \"id\": 2}");
    answer(fd, "{\"error\": {\"class\": \"DeviceNotFound\", \"desc\": \"no d\"}");
    (void)hear(fd, command, sizeof(command));
    say(fd, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"what?\"}}\r\n");
    /* Byte by byte, with brackets in strings. */
    (void)hear(fd, command, sizeof(command));
    for (const char *p = "{\"return\": [\"}\\\"]{\", 18446744073709551615], \"id\": 5}\n"; *p; p++)
        say(fd, (char[]){*p, '\0'});
}

static void test_client__commands_get_their_answers(void **state)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    struct cairn_client *c;
    json_t *arguments = json_pack("{s:i}", "x", 7);
    json_t *value = NULL;
    const char *came;

    (void)state;
    peer_start(script_commands);
    c = must_open();
    assert_non_null(json_object_get(cairn_client_greeting(c), "version"));
    assert_int_equal(cairn_client_command(c, "do", arguments, PATIENCE, &value, &err), 0);
    json_decref(arguments);
    came = json_string_value(json_object_get(value, "came"));
    assert_non_null(strstr(came, "'execute': 'do'"));
    assert_non_null(strstr(came, "'arguments': {'x': 7}"));
    json_decref(value);

    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, &value, &err), -EREMOTEIO);
    assert_string_equal(err.class_name, "DeviceNotFound");
    assert_string_equal(err.message, "no d");
    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, NULL, &err), -EREMOTEIO);
    assert_string_equal(err.message, "what?");
    cairn_error_clear(&err);
    assert_null(err.message);

    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, &value, &err), 0);
    assert_string_equal(json_string_value(json_array_get(value, 0)), "}\"]{");
    json_decref(value);
    cairn_client_close(c);
    peer_stop();
}

/* ---- events ---- */

static void script_events(int fd)
{
    negotiate(fd);
    say(fd, "{\"event\": \"A\", \"n\": 1} {\"event\": \"B\", \"n\": 2}\r\n");
    answer(fd, "{\"return\": {}");
    say(fd, "{\"event\": \"A\", \"n\": 3}\r\n{\"event\": \"B\", \"n\": 4}\r\n");
}

static void must_get(struct cairn_client *c, const char *name, int n)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    json_t *event = NULL;

    if (cairn_client_event(c, name, PATIENCE, &event, &err) < 0)
        fail_msg("event %s: %s", name ? name : "any", err.message);
    assert_int_equal(json_integer_value(json_object_get(event, "n")), n);
    json_decref(event);
}

static void test_client__events_are_kept_in_their_order(void **state)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    struct cairn_client *c;
    json_t *event = NULL;

    (void)state;
    peer_start(script_events);
    c = must_open();
    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, NULL, NULL), 0);
    must_get(c, "B", 2);
    must_get(c, "B", 4);
    must_get(c, NULL, 1);
    must_get(c, "A", 3);
    assert_int_equal(cairn_client_event(c, NULL, PATIENCE, &event, &err), -ECONNRESET);
    assert_non_null(strstr(err.message, "closed the connection"));
    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, NULL, &err), -ECONNRESET);
    cairn_error_clear(&err);
    cairn_client_close(c);
    peer_stop();
}

static void script_flood(int fd)
{
    negotiate(fd);
    for (int i = 0; i < CAIRN_CLIENT_EVENTS_MAX + 10; i++) {
        char text[64];

        (void)snprintf(text, sizeof(text), "{\"event\": \"A\", \"n\": %d}\r\n", i);
        say(fd, text);
    }
    answer(fd, "{\"return\": {}");
}

static void test_client__a_flood_of_events_drops_the_oldest(void **state)
{
    struct cairn_client *c;

    (void)state;
    peer_start(script_flood);
    c = must_open();
    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, NULL, NULL), 0);
    assert_int_equal(cairn_client_events_dropped(c), 10);
    must_get(c, "A", 10);
    cairn_client_close(c);
    peer_stop();
}

/* ---- time ---- */

static void script_late(int fd)
{
    char command[4096];
    long id;
    char text[128];

    negotiate(fd);
    id = hear(fd, command, sizeof(command)); /* the answer comes after the next command */
    answer(fd, "{\"event\": \"NOT-YET\"");
    (void)snprintf(text, sizeof(text),
                   "{\"return\": \"late\", \"id\": %ld}\r\n{\"return\": \"this\", \"id\": %ld}\r\n",
                   id, id + 1);
    say(fd, text);
}

static void test_client__a_late_answer_answers_nothing_else(void **state)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    struct cairn_client *c;
    json_t *value = NULL;

    (void)state;
    peer_start(script_late);
    c = must_open();
    assert_int_equal(cairn_client_event(c, "A", 0, &value, &err), -ETIMEDOUT);
    assert_int_equal(cairn_client_command(c, "slow", NULL, 20, &value, &err), -ETIMEDOUT);
    assert_non_null(strstr(err.message, "in time"));
    cairn_error_clear(&err);
    assert_int_equal(cairn_client_command(c, "do", NULL, PATIENCE, &value, &err), 0);
    assert_string_equal(json_string_value(value), "this");
    json_decref(value);
    cairn_client_close(c);
    peer_stop();
}

static volatile sig_atomic_t signals;

static void on_signal(int number)
{
    (void)number;
    signals++;
}

static void script_quiet(int fd)
{
    char command[4096];

    negotiate(fd);
    (void)hear(fd, command, sizeof(command)); /* until the client has gone */
}

static void test_client__a_signal_ends_a_wait_for_events(void **state)
{
    struct sigaction action = {.sa_handler = on_signal};
    struct cairn_error err = CAIRN_ERROR_INIT;
    sigset_t alarm_only;
    struct cairn_client *c;
    json_t *event = NULL;

    (void)state;
    /* Only this thread takes it. */
    sigemptyset(&alarm_only);
    sigaddset(&alarm_only, SIGALRM);
    sigaction(SIGALRM, &action, NULL);
    pthread_sigmask(SIG_BLOCK, &alarm_only, NULL);
    peer_start(script_quiet);
    pthread_sigmask(SIG_UNBLOCK, &alarm_only, NULL);
    c = must_open();
    alarm(1);
    assert_int_equal(cairn_client_event(c, NULL, PATIENCE, &event, &err), -EINTR);
    assert_int_equal(signals, 1);
    cairn_error_clear(&err);
    cairn_client_close(c);
    peer_stop();
}

/* ---- hostile ---- */

static const char *bad_greeting;

static void script_bad_greeting(int fd)
{
    char command[4096];

    say(fd, bad_greeting);
    shutdown(fd, SHUT_WR);
    while (hear(fd, command, sizeof(command)) >= 0)
        ; /* whatever it asks for: until it has gone */
}

static void script_deep(int fd)
{
    say(fd, "{\"QMP\": ");
    for (int i = 0; i < MESSAGE_DEPTH_MAX; i++)
        say(fd, "[");
}

static void refuses_to_open(script_fn *script, const char *what)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    struct cairn_client *c = NULL;

    peer_start(script);
    assert_int_equal(cairn_client_open(&c, peer.path, PATIENCE, &err), -ECONNRESET);
    assert_null(c);
    if (!strstr(err.message, what))
        fail_msg("'%s' does not say '%s'", err.message, what);
    cairn_error_clear(&err);
    peer_stop();
}

static void test_client__what_is_not_the_protocol_is_refused(void **state)
{
    static const struct {
        const char *greeting;
        const char *error;
    } cases[] = {
        {"", "closed the connection"},
        {"{\"QMP\": {", "closed the connection"},
        {"HTTP/1.1 400 Bad Request\r\n", "not the control protocol"},
        {"[]", "not the control protocol"},
        {"{]", "'"},
        {"{\"QMP\": 1}", "does not greet"},
        {"{\"event\": \"A\"}", "does not greet"},
        {"{\"QMP\": {}} }", "not the control protocol"},
    };

    (void)state;
    for (size_t i = 0; i < ARRAY_SIZE(cases); i++) {
        bad_greeting = cases[i].greeting;
        refuses_to_open(script_bad_greeting, cases[i].error);
    }
    refuses_to_open(script_deep, "not the control protocol");
}

static void test_client__paths_that_lead_nowhere_are_told(void **state)
{
    struct cairn_error err = CAIRN_ERROR_INIT;
    struct cairn_client *c = NULL;
    char path[200];

    (void)state;
    assert_int_equal(cairn_client_open(&c, "/nonexistent/s", PATIENCE, &err), -ENOENT);
    assert_non_null(strstr(err.message, "/nonexistent/s"));
    memset(path, 'a', sizeof(path) - 1);
    path[sizeof(path) - 1] = '\0';
    assert_int_equal(cairn_client_open(&c, path, PATIENCE, &err), -ENAMETOOLONG);
    cairn_error_clear(&err);
    assert_int_equal(cairn_client_open(&c, path, PATIENCE, NULL), -ENAMETOOLONG);
    assert_null(cairn_client_close(NULL));
    assert_int_equal(cairn_client_api() >> 16, CAIRN_CLIENT_API_MAJOR);
}
