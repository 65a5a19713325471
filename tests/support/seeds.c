/* SPDX-License-Identifier: Apache-2.0 */
/* Seeds for random tests: takes them from the environment, remembers the one that runs, prints it on failure. */
#include "seeds.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* Provided by the sanitizers; absent in other builds. */
__attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)(void));

static struct {
    const char *name;
    uint64_t first;
    uint64_t current;
    uint64_t left;
    uint64_t finished;
} seeds;

static uint64_t seeds_from_environment(const char *name, uint64_t fallback)
{
    const char *text = getenv(name);
    char *end;
    unsigned long long value;

    if (!text || !*text)
        return fallback;
    errno = 0;
    value = strtoull(text, &end, 0);
    if (errno || *end || text[0] == '-') {
        fprintf(stderr, "%s: '%s' is not a number\n", name, text);
        exit(99); /* meson: an error of the test itself, not a failure */
    }
    return value;
}

uint64_t seeds_begin(void)
{
    seeds.first = seeds_from_environment("CAIRN_SEED", 1);
    seeds.left = seeds_from_environment("CAIRN_SEEDS", 100);
    if (seeds.left == 0) {
        fprintf(stderr, "CAIRN_SEEDS: 0 seeds would prove nothing\n");
        exit(99);
    }
    seeds.current = seeds.first;
    return seeds.current;
}

uint64_t seeds_next(void)
{
    seeds.left--;
    seeds.finished++;
    return ++seeds.current;
}

bool seeds_enough(unsigned count)
{
    return seeds.finished >= count;
}

bool seeds_running(void)
{
    return seeds.left > 0;
}

void seeds_enter_case(const char *name)
{
    seeds.name = name;
    seeds.left = 0;
    seeds.finished = 0;
}

/* Uses nothing but write(2) to get out: signal handlers call it. */
static void seeds_say_unfinished(void)
{
    char line[320];
    int len;

    if (seeds.left == 0)
        return;
    len = snprintf(line, sizeof(line),
                   "# %s: failed at seed %" PRIu64 "; alone: CAIRN_SEED=%" PRIu64
                   " CAIRN_SEEDS=1 <this program> %s\n",
                   seeds.name, seeds.current, seeds.current, seeds.name);
    if (len > (int)sizeof(line) - 1)
        len = (int)sizeof(line) - 1;
    if (write(STDERR_FILENO, line, (size_t)len) < 0)
        return; /* nobody is left to tell */
}

void seeds_leave_case(void)
{
    uint64_t finished = seeds.finished;

    if (finished > 0)
        printf("# %s: %" PRIu64 " seeds passed, from %" PRIu64 "\n", seeds.name, finished,
               seeds.first);
    seeds_say_unfinished();
    seeds_enter_case(NULL);
}

static void seeds_die(int signum)
{
    seeds_say_unfinished();
    raise(signum); /* SA_RESETHAND: now with its default effect */
}

void seeds_report_on_death(void)
{
    struct sigaction action = {.sa_handler = seeds_die, .sa_flags = SA_RESETHAND | SA_NODEFER};

    sigaction(SIGABRT, &action, NULL);
    sigaction(SIGTERM, &action, NULL); /* how meson ends a test that takes too long */
    if (__sanitizer_set_death_callback)
        __sanitizer_set_death_callback(seeds_say_unfinished);
}
