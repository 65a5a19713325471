/* SPDX-License-Identifier: Apache-2.0 */
/* How far something is: a bar with rate and time left on a terminal, nothing where there is none. */
#ifndef CAIRN_CLI_PROGRESS_H
#define CAIRN_CLI_PROGRESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How fast it goes, of what was seen of it. Zeroed at first. */
struct rate {
    uint64_t at_ms;
    uint64_t done;
    double bytes_per_second; /* smoothed; 0: not known yet */
    bool begun;
};

void rate_see(struct rate *r, uint64_t now_ms, uint64_t done);

/* `1.5 GiB`. */
void size_text(char *buf, size_t size, uint64_t bytes);
/*
 * `label [#####.....]  50 %  1.0 GiB of 2.0 GiB  100 MiB/s  10 s left`, at most `width` columns. Where there is no room the amount
 * is left out first, then the bar; then it is cut.
 */
void progress_line(char *buf, size_t size, unsigned width, const char *label, uint64_t done,
                   uint64_t total, double bytes_per_second);

struct progress {
    const char *label;
    bool shown; /* standard output is a terminal, and JSON was not asked for */
    bool drawn;
    uint64_t last_ms;
    struct rate rate;
};

void progress_begin(struct progress *p, const char *label, bool json);
/* As often as one likes. */
void progress_show(struct progress *p, uint64_t done, uint64_t total);
/* Wipes it out. */
void progress_end(struct progress *p);

/* Of a clock that only goes forward. */
uint64_t progress_now_ms(void);
/* Columns of the terminal on standard output. */
unsigned progress_columns(void);

#endif
