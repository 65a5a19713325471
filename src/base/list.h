/* SPDX-License-Identifier: Apache-2.0 */
/* A doubly linked ring of nodes embedded in what they link. A node that is in no list points to itself. */
#ifndef CAIRN_BASE_LIST_H
#define CAIRN_BASE_LIST_H

#include "base/macros.h"

#include <stdbool.h>

struct list {
    struct list *prev;
    struct list *next;
};

#define LIST_INIT(name)                                                                            \
    {                                                                                              \
        &(name), &(name)                                                                           \
    }

static inline void list_init(struct list *l)
{
    l->prev = l;
    l->next = l;
}

static inline bool list_empty(const struct list *l)
{
    return l->next == l;
}

static inline void list_insert_before(struct list *at, struct list *node)
{
    node->prev = at->prev;
    node->next = at;
    at->prev->next = node;
    at->prev = node;
}

static inline void list_append(struct list *l, struct list *node)
{
    list_insert_before(l, node);
}

static inline void list_prepend(struct list *l, struct list *node)
{
    list_insert_before(l->next, node);
}

/* Safe on a node that is in no list. */
static inline void list_remove(struct list *node)
{
    node->prev->next = node->next;
    node->next->prev = node->prev;
    list_init(node);
}

/* Moves all of `from` to the end of `to`; `from` is empty afterwards. */
static inline void list_splice(struct list *to, struct list *from)
{
    if (list_empty(from))
        return;
    from->next->prev = to->prev;
    to->prev->next = from->next;
    from->prev->next = to;
    to->prev = from->prev;
    list_init(from);
}

#define list_entry(node, type, member) container_of(node, type, member)

#define list_first(l, type, member) (list_empty(l) ? NULL : list_entry((l)->next, type, member))
#define list_last(l, type, member)  (list_empty(l) ? NULL : list_entry((l)->prev, type, member))

#define list_for_each(l, pos, member)                                                              \
    for (pos = list_entry((l)->next, __typeof__(*pos), member); &pos->member != (l);               \
         pos = list_entry(pos->member.next, __typeof__(*pos), member))

/* The body may remove `pos`, and only `pos`. */
#define list_for_each_safe(l, pos, tmp, member)                                                    \
    for (pos = list_entry((l)->next, __typeof__(*pos), member),                                    \
        tmp = list_entry(pos->member.next, __typeof__(*pos), member);                              \
         &pos->member != (l);                                                                      \
         pos = tmp, tmp = list_entry(tmp->member.next, __typeof__(*tmp), member))

#endif
