/* SPDX-License-Identifier: Apache-2.0 */
/* Numbers as they are read, and results as they are printed: in the form of version 7.2 of the peer, which programs read. */
#include "base/macros.h"
#include "base/number.h"
#include "cli/io/io.h"
#include "loop/timer.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DUMP_COLUMNS 16

int io_read_size(const char *text, uint64_t *ret)
{
    int r = size_from_text(text, ret);

    if (r == -ERANGE || (r == 0 && *ret > INT64_MAX)) {
        printf("Parsing error: argument too large -- %s\n", text);
        return -EINVAL;
    }
    if (r < 0)
        printf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s\n",
               text);
    return r;
}

int io_read_pattern(const char *text, int *ret)
{
    char *end;
    long value = strtol(text, &end, 0);

    if (end == text || *end || value < 0 || value > UINT8_MAX) {
        printf("%s is not a valid pattern byte\n", text);
        return -EINVAL;
    }
    *ret = (int)value;
    return 0;
}

/* Cuts `.000` off. */
static void cut_zeroes(char *text, const char *zeroes)
{
    size_t len = strlen(text);
    size_t cut = strlen(zeroes);

    if (len > cut && strcmp(text + len - cut, zeroes) == 0)
        text[len - cut] = '\0';
}

void io_size_text(char *buf, size_t size, double bytes)
{
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    char number[64];
    unsigned unit = 0;

    while (unit + 1 < ARRAY_SIZE(units) && bytes >= 1024) {
        bytes /= 1024;
        unit++;
    }
    (void)snprintf(number, sizeof(number), unit ? "%.3f" : "%f", bytes);
    cut_zeroes(number, unit ? ".000" : ".000000");
    (void)snprintf(buf, size, "%s %s", number, units[unit]);
}

int io_report_option(struct io_report *r, const char *command, int opt)
{
    switch (opt) {
    case 'C':
        r->machine = true;
        return 0;
    case 'q':
        r->quiet = true;
        return 0;
    case 'p':
        return 0;
    default:
        return io_wrong_usage(command);
    }
}

uint64_t io_now_ns(void)
{
    struct timespec now;

    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static void time_text(char *buf, size_t size, uint64_t ns, bool machine)
{
    uint64_t s = ns / NS_PER_S;
    unsigned hundredths = (unsigned)(ns % NS_PER_S / (NS_PER_S / 100));

    if (machine || s >= 3600)
        (void)snprintf(buf, size, "%" PRIu64 ":%02u:%02u.%02u", s / 3600, (unsigned)(s / 60 % 60),
                       (unsigned)(s % 60), hundredths);
    else if (s >= 60)
        (void)snprintf(buf, size, "%02u:%02u.%02u", (unsigned)(s / 60), (unsigned)(s % 60),
                       hundredths);
    else
        (void)snprintf(buf, size, "%02u.%02u sec", (unsigned)s, hundredths);
}

void io_report_print(const struct io_report *r)
{
    uint64_t ns = MAX(io_now_ns() - r->begun_ns, (uint64_t)1);
    double per_second = (double)NS_PER_S / (double)ns;
    char text[64];
    char when[64];
    char rate[64];

    if (r->quiet)
        return;
    time_text(when, sizeof(when), ns, r->machine);
    if (r->machine) {
        /* bytes, operations, time, bytes per second, operations per second */
        printf("%" PRIu64 ",1,%s,%.3f,%.3f\n", r->len, when, (double)r->len * per_second,
               per_second);
        return;
    }
    io_size_text(text, sizeof(text), (double)r->len);
    io_size_text(rate, sizeof(rate), (double)r->len * per_second);
    printf("%s %" PRIu64 "/%" PRIu64 " bytes at offset %" PRIu64 "\n", r->verb, r->len, r->len,
           r->offset);
    printf("%s, 1 ops; %s (%s/sec and %.4f ops/sec)\n", text, when, rate, per_second);
}

void io_dump(const uint8_t *bytes, uint64_t offset, uint64_t len)
{
    for (uint64_t at = 0; at < len; at += DUMP_COLUMNS) {
        uint64_t n = MIN(len - at, (uint64_t)DUMP_COLUMNS);

        printf("%08" PRIx64 ":  ", offset + at);
        for (uint64_t i = 0; i < n; i++)
            printf("%02x ", bytes[at + i]);
        printf(" ");
        for (uint64_t i = 0; i < n; i++)
            printf("%c", isalnum(bytes[at + i]) ? bytes[at + i] : '.');
        printf("\n");
    }
}
