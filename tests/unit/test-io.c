/* SPDX-License-Identifier: Apache-2.0 */
/* `cairn io`: numbers as it prints them, and lines of any content. */
#include "base/macros.h"
#include "base/prng.h"
#include "cli/image/tool.h"
#include "cli/io/io.h"

#include "seeds.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static void says(double bytes, const char *text)
{
    char buf[64];

    io_size_text(buf, sizeof(buf), bytes);
    assert_string_equal(buf, text);
}

static void test_io__sizes_are_said_as_the_peer_says_them(void **state)
{
    (void)state;
    says(0, "0 bytes");
    says(1023, "1023 bytes");
    says(2.733389, "2.733389 bytes");
    says(1024, "1 KiB");
    says(1025, "1.001 KiB");
    says(1536, "1.500 KiB");
    says((double)TIB, "1 TiB");
    says(1.25 * (double)TIB, "1.250 TiB");
    says(9e18, "7.806 EiB");
    says(1e30, "867361737988.404 EiB");
}

/* Nothing that the lines under test print is for whoever reads the results of tests. */
struct silence {
    int out;
    int err;
};

static struct silence silence_begin(void)
{
    struct silence s = {dup(STDOUT_FILENO), dup(STDERR_FILENO)};
    int nowhere = open("/dev/null", O_WRONLY);

    (void)fflush(stdout);
    assert_true(nowhere >= 0 && dup2(nowhere, STDOUT_FILENO) >= 0);
    assert_true(dup2(nowhere, STDERR_FILENO) >= 0);
    close(nowhere);
    return s;
}

static void silence_end(struct silence s)
{
    (void)fflush(stdout);
    (void)dup2(s.out, STDOUT_FILENO);
    (void)dup2(s.err, STDERR_FILENO);
    close(s.out);
    close(s.err);
}

struct script {
    const char *const *lines;
    size_t count;
    struct prng *prng; /* or lines of any content */
    bool failed;
};

/* So many words of these are commands. */
#define COMMANDS 20

static const char *const words[] = {
    "read",
    "readv",
    "write",
    "writev",
    "aio_read",
    "aio_write",
    "aio_flush",
    "discard",
    "flush",
    "alloc",
    "map",
    "info",
    "length",
    "truncate",
    "close",
    "open",
    "reopen",
    "help",
    "?",
    "sleep",
    "-P",
    "-s",
    "-l",
    "-q",
    "-C",
    "-v",
    "-z",
    "-u",
    "-n",
    "-f",
    "-c",
    "-b",
    "-i",
    "-m",
    "-o",
    "-r",
    "-w",
    "-t",
    "-d",
    "-U",
    "--",
    "-",
    "0",
    "1",
    "512",
    "64k",
    "1M",
    "2G",
    "8E",
    "0x10",
    "-1",
    "\xff\xfe",
    "%s%n",
    "a",
    "=",
    ",",
    "1.5k",
    "nowhere",
    "0xffffffffffffffff",
    "99999999999999999999",
    "driver=null-co,size=1M",
    "file.filename=/nowhere",
    "off",
    "unmap",
    "none",
    "writeback",
};

static void random_line(struct prng *prng, char *line, size_t size)
{
    const char *first = words[prng_below(prng, COMMANDS)];
    size_t n = prng_chance(prng, 900) ? (size_t)snprintf(line, size, "%s ", first) : 0;

    line[n] = '\0';
    for (uint64_t left = prng_below(prng, 8); left; left--) {
        const char *word = words[prng_below(prng, ARRAY_SIZE(words))];

        if (prng_below(prng, 20) == 0) {
            line[n++] = (char)(1 + prng_below(prng, 255));
            line[n] = '\0';
        }
        n += (size_t)snprintf(line + n, size - n, "%s%s", word, prng_below(prng, 10) ? " " : "");
    }
    if (strstr(line, "sleep"))
        line[0] = '\0'; /* it may be for long */
}

static int co_fn control_fn run_script(struct graph *g, void *arg, struct error **err)
{
    struct script *s = arg;
    struct io io;

    (void)err;
    io_init(&io, g);
    for (size_t i = 0; i < s->count; i++)
        io_run_line(&io, s->lines[i]);
    for (int i = 0; s->prng && i < 200; i++) {
        char line[512];

        if (!io.is_open)
            io_run_line(&io, "open -o driver=null-co,size=1M,read-zeroes=on");
        random_line(s->prng, line, sizeof(line));
        io_run_line(&io, line);
    }
    io_close_image(&io);
    s->failed = io.failed;
    return 0;
}

static bool fails(const char *const *lines, size_t count, struct prng *prng)
{
    struct script s = {.lines = lines, .count = count, .prng = prng};
    struct error *err = NULL;
    struct silence silence = silence_begin();
    int r = tool_run(run_script, &s, &err);

    silence_end(silence);
    assert_int_equal(r, 0);
    assert_null(err);
    return s.failed;
}

static void test_io__a_failed_command_is_remembered(void **state)
{
    static const char *const good[] = {"open -o driver=null-co,size=1M,read-zeroes=on",
                                       "read -P 0 0 1M", "", "aio_read 2M 1", "length"};
    static const char *const bad[] = {"open -o driver=null-co,size=1M,read-zeroes=on",
                                      "read -P 1 0 1M", "length"};

    (void)state;
    assert_false(fails(good, ARRAY_SIZE(good), NULL));
    assert_true(fails(bad, ARRAY_SIZE(bad), NULL));
    assert_true(fails((const char *[]){"nothing"}, 1, NULL));
    assert_true(fails((const char *[]){"length"}, 1, NULL));
}

static void test_io__a_line_has_a_limit(void **state)
{
    static char line[((size_t)1 << 20) + 2];
    const char *lines[] = {line};

    (void)state;
    memset(line, ' ', sizeof(line) - 1);
    assert_true(fails(lines, 1, NULL));
    line[sizeof(line) - 2] = '\0';
    assert_false(fails(lines, 1, NULL));
}

static void test_io__any_line_is_answered(void **state)
{
    (void)state;
    TEST_SEEDS (seed) {
        struct prng prng = {.state = seed};

        (void)fails(NULL, 0, &prng);
    }
}
