/* SPDX-License-Identifier: Apache-2.0 */
/* What commands and transactions share: how each action becomes a part of a change. */
#ifndef CAIRN_CONTROL_TRANSACTION_H
#define CAIRN_CONTROL_TRANSACTION_H

#include "base/error.h"
#include "bitmaps/dirty-bitmap.h"
#include "graph/change.h"
#include "jobs/backup.h"

struct transaction_action; /* generated */

/* The place for what one action needs, until change_end(). Zeroed before. */
struct transaction_part {
    struct dirty_bitmap_action bitmap;
    struct dirty_bitmap_ref *sources; /* of a merge */
    struct change_action abort;
    struct backup_job *backup; /* not started */
};

struct control;

/* Adds what an action does to the change. `txn` is for jobs; NULL: one for each. */
int co_fn control_fn transaction_part_add(struct transaction_part *part, struct control *control,
                                          struct change *c, struct job_txn *txn,
                                          const struct transaction_action *action,
                                          struct error **err);
/* After the change: jobs start if it was done, else they are gone. */
void co_fn control_fn transaction_part_end(struct transaction_part *part, bool done);

#endif
