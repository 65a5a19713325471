/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The pairing heap behind timers. Insert is constant time; removing the first is logarithmic, amortised. Equal deadlines
 * come in no stated order, but in the same order in each run.
 */
#include "loop/timer.h"

#include <assert.h>
#include <stddef.h>

static struct timer *meld(struct timer *a, struct timer *b)
{
    struct timer *low;

    if (!a)
        return b;
    if (!b)
        return a;
    low = a->deadline_ns <= b->deadline_ns ? a : b;
    b = low == a ? b : a;
    b->next = low->child;
    if (b->next)
        b->next->prev = b;
    b->prev = low;
    low->child = b;
    low->next = NULL;
    low->prev = NULL;
    return low;
}

/* Melds a list of siblings: in pairs from left to right, then the pairs from right to left. */
static struct timer *meld_siblings(struct timer *first)
{
    struct timer *pairs = NULL;
    struct timer *all = NULL;

    while (first) {
        struct timer *a = first;
        struct timer *b = a->next;
        struct timer *pair;

        first = b ? b->next : NULL;
        a->next = a->prev = NULL;
        if (b)
            b->next = b->prev = NULL;
        pair = meld(a, b);
        pair->next = pairs;
        pairs = pair;
    }
    while (pairs) {
        struct timer *pair = pairs;

        pairs = pair->next;
        pair->next = NULL;
        all = meld(all, pair);
    }
    return all;
}

void timer_heap_insert(struct timer_heap *h, struct timer *t)
{
    assert(!t->armed);
    t->armed = true;
    t->child = t->next = t->prev = NULL;
    h->root = meld(h->root, t);
}

void timer_heap_remove(struct timer_heap *h, struct timer *t)
{
    struct timer *children;

    assert(t->armed);
    t->armed = false;
    children = meld_siblings(t->child);
    t->child = NULL;
    if (t == h->root) {
        h->root = children;
        return;
    }
    if (t->prev->child == t)
        t->prev->child = t->next;
    else
        t->prev->next = t->next;
    if (t->next)
        t->next->prev = t->prev;
    h->root = meld(h->root, children);
}
