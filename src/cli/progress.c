/* SPDX-License-Identifier: Apache-2.0 */
/* Progress as people read it. */
#include "cli/progress.h"
#include "base/macros.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define REDRAW_MS 100
#define BAR_MAX   40u
#define BAR_MIN   10u

uint64_t progress_now_ms(void)
{
    struct timespec t;

    (void)clock_gettime(CLOCK_MONOTONIC, &t); /* there always is one */
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

unsigned progress_columns(void)
{
    struct winsize w;

    if (ioctl(STDOUT_FILENO, TIOCGWINSZ, &w) == 0 && w.ws_col >= 20)
        return MIN((unsigned)w.ws_col, 200u);
    return 80;
}

void rate_see(struct rate *r, uint64_t now_ms, uint64_t done)
{
    double now;

    if (!r->begun || done < r->done) {
        *r = (struct rate){.at_ms = now_ms, .done = done, .begun = true};
        return;
    }
    if (now_ms < r->at_ms + REDRAW_MS)
        return;
    now = (double)(done - r->done) * 1000 / (double)(now_ms - r->at_ms);
    r->bytes_per_second = r->bytes_per_second > 0 ? 0.8 * r->bytes_per_second + 0.2 * now : now;
    r->at_ms = now_ms;
    r->done = done;
}

void size_text(char *buf, size_t size, uint64_t bytes)
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    double value = (double)bytes / 1024;
    unsigned unit = 0;

    if (bytes < 1024) {
        (void)snprintf(buf, size, "%" PRIu64 " B", bytes);
        return;
    }
    while (value >= 1023.95 && unit + 1 < ARRAY_SIZE(units)) {
        value /= 1024;
        unit++;
    }
    (void)snprintf(buf, size, "%.1f %s", value, units[unit]);
}

static void time_text(char *buf, size_t size, double seconds)
{
    if (seconds < 100)
        (void)snprintf(buf, size, "%.0f s", seconds);
    else if (seconds < 6000)
        (void)snprintf(buf, size, "%.0f min", seconds / 60);
    else
        (void)snprintf(buf, size, "%.0f h", MIN(seconds / 3600, 9999.0));
}

static void rate_text(char *buf, size_t size, uint64_t left, double rate)
{
    char rate_size[32];
    char time[32];

    buf[0] = '\0';
    if (rate < 1)
        return;
    size_text(rate_size, sizeof(rate_size), (uint64_t)rate);
    time_text(time, sizeof(time), (double)left / rate);
    (void)snprintf(buf, size, "  %s/s  %s left", rate_size, time);
}

static void amount_text(char *buf, size_t size, uint64_t done, uint64_t total)
{
    char done_size[32];
    char total_size[32];

    size_text(done_size, sizeof(done_size), done);
    size_text(total_size, sizeof(total_size), total);
    (void)snprintf(buf, size, "  %s of %s", done_size, total_size);
}

/* `cells` wide; "" for none. */
static void bar_text(char *buf, size_t size, unsigned cells, uint64_t done, uint64_t total)
{
    char bar[BAR_MAX + 1];
    unsigned full = total ? (unsigned)((double)done / (double)total * cells) : cells;

    memset(bar, '#', full);
    memset(bar + full, '.', cells - full);
    bar[cells] = '\0';
    (void)snprintf(buf, size, cells ? " [%s]" : "%s", bar);
}

void progress_line(char *buf, size_t size, unsigned width, const char *label, uint64_t done,
                   uint64_t total, double bytes_per_second)
{
    char bar[BAR_MAX + 8];
    char amount[80];
    char rate[80];
    size_t used =
        strlen(label) + sizeof(" 100 %") + sizeof(" []"); /* without what may be left out */
    unsigned percent;

    done = MIN(done, total);
    percent = total ? (unsigned)((double)done * 100 / (double)total) : 100;
    amount_text(amount, sizeof(amount), done, total);
    rate_text(rate, sizeof(rate), total - done, bytes_per_second);
    used += strlen(rate);
    if (used + BAR_MIN + strlen(amount) > width)
        amount[0] = '\0';
    used += strlen(amount);
    bar_text(bar, sizeof(bar), used + BAR_MIN > width ? 0 : MIN(width - (unsigned)used, BAR_MAX),
             done, total);
    (void)snprintf(buf, MIN(size, (size_t)width + 1), "%s%s %3u %%%s%s", label, bar, percent,
                   amount, rate);
}

void progress_begin(struct progress *p, const char *label, bool json)
{
    *p = (struct progress){.label = label, .shown = !json && isatty(STDOUT_FILENO)};
}

void progress_show(struct progress *p, uint64_t done, uint64_t total)
{
    uint64_t now = progress_now_ms();
    char line[256];

    if (!p->shown || (p->drawn && now < p->last_ms + REDRAW_MS))
        return;
    rate_see(&p->rate, now, done);
    progress_line(line, sizeof(line), progress_columns() - 1, p->label, done, total,
                  p->rate.bytes_per_second);
    printf("\r%s\033[K", line);
    (void)fflush(stdout);
    p->drawn = true;
    p->last_ms = now;
}

void progress_end(struct progress *p)
{
    if (!p->drawn)
        return;
    printf("\r\033[K");
    (void)fflush(stdout);
    p->drawn = false;
}
