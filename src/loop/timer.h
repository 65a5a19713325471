/* SPDX-License-Identifier: Apache-2.0 */
/* Timers of one loop: a pairing heap of structs that their owners embed, so that arming never allocates. */
#ifndef CAIRN_LOOP_TIMER_H
#define CAIRN_LOOP_TIMER_H

#include <stdbool.h>
#include <stdint.h>

struct timer;
typedef void timer_fn(struct timer *t);

struct timer {
    uint64_t deadline_ns;
    timer_fn *fn;
    bool armed;
    /* The heap: first child, next sibling, and previous sibling or parent. */
    struct timer *child;
    struct timer *next;
    struct timer *prev;
};

struct timer_heap {
    struct timer *root;
};

void timer_heap_insert(struct timer_heap *h, struct timer *t);
void timer_heap_remove(struct timer_heap *h, struct timer *t);

#endif
