/* SPDX-License-Identifier: Apache-2.0 */
/* What commands and transactions share: how each action becomes a part of a change. */
#ifndef CAIRN_CONTROL_TRANSACTION_H
#define CAIRN_CONTROL_TRANSACTION_H

#include "base/error.h"
#include "bitmaps/dirty-bitmap.h"
#include "graph/change.h"

struct transaction_action; /* generated */

/* The place for what one action needs, until change_end(). Zeroed before. */
struct transaction_part {
    struct dirty_bitmap_action bitmap;
    struct dirty_bitmap_ref *sources; /* of a merge */
    struct change_action abort;
};

/* Adds what an action does to the change. */
int transaction_part_add(struct transaction_part *part, struct change *c,
                         const struct transaction_action *action, struct error **err);
void transaction_part_release(struct transaction_part *part);

#endif
