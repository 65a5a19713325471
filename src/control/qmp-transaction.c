/* SPDX-License-Identifier: Apache-2.0 */
/*
 * transaction, and the commands that are transactions of one action. Another kind of action is a value of
 * transaction-action-kind, a member of struct transaction_part and a case in transaction_part_add().
 */
#include "base/alloc.h"
#include "base/macros.h"
#include "control/control.h"
#include "control/transaction.h"
#include "schema-dispatch.h"

#include <errno.h>
#include <stdlib.h>

static struct dirty_bitmap_ref ref_of(const struct block_dirty_bitmap *b)
{
    return (struct dirty_bitmap_ref){.node = b->node, .name = b->name};
}

static int add_bitmap(struct transaction_part *part, struct change *c,
                      const struct block_dirty_bitmap_add *data, struct error **err)
{
    struct dirty_bitmap_ref ref = {.node = data->node, .name = data->name};
    int r;

    if (data->has_granularity && !data->granularity)
        return error_set(err, EINVAL, "granularity 0 is not a power of two");
    r = dirty_bitmap_action_add(c, &part->bitmap, ref, data->granularity, !data->disabled, err);
    part->bitmap.persistent = data->persistent;
    return r;
}

static int merge_bitmaps(struct transaction_part *part, struct change *c,
                         const struct block_dirty_bitmap_merge *data, struct error **err)
{
    struct dirty_bitmap_ref ref = {.node = data->node, .name = data->target};

    part->sources = try_new_n(struct dirty_bitmap_ref, data->bitmaps.count);
    if (!part->sources)
        return error_set(err, ENOMEM, "no memory for a list of %zu bitmaps", data->bitmaps.count);
    for (size_t i = 0; i < data->bitmaps.count; i++) {
        const struct block_dirty_bitmap_or_str *source = &data->bitmaps.items[i];

        if (source->kind == BLOCK_DIRTY_BITMAP_OR_STR_LOCAL)
            part->sources[i] = (struct dirty_bitmap_ref){data->node, source->local};
        else
            part->sources[i] = ref_of(source->external);
    }
    return dirty_bitmap_action_merge(c, &part->bitmap, ref, part->sources, data->bitmaps.count,
                                     err);
}

static int abort_prepare(struct change_action *a, struct error **err)
{
    (void)a;
    return error_set(err, ECANCELED, "the action 'abort' was asked to fail");
}

static const struct change_action_ops abort_ops = {.co_prepare = abort_prepare};

static int co_fn control_fn add_backup(struct transaction_part *part, struct control *control,
                                       struct change *c, struct job_txn *txn,
                                       const struct blockdev_backup_options *data,
                                       struct error **err)
{
    int r = backup_job_co_new(&part->backup, control->jobs, control->graph, data, txn, err);

    return r < 0 ? r : backup_job_add_actions(part->backup, c, err);
}

int transaction_part_add(struct transaction_part *part, struct control *control, struct change *c,
                         struct job_txn *txn, const struct transaction_action *action,
                         struct error **err)
{
    switch (action->type) {
    case TRANSACTION_ACTION_KIND_ABORT:
        change_add_action(c, &part->abort, &abort_ops);
        return 0;
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ADD:
        return add_bitmap(part, c, &action->u.block_dirty_bitmap_add.data, err);
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_REMOVE:
        return dirty_bitmap_action_remove(c, &part->bitmap,
                                          ref_of(&action->u.block_dirty_bitmap_remove.data), err);
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_CLEAR:
        return dirty_bitmap_action_clear(c, &part->bitmap,
                                         ref_of(&action->u.block_dirty_bitmap_clear.data), err);
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ENABLE:
        return dirty_bitmap_action_enable(
            c, &part->bitmap, ref_of(&action->u.block_dirty_bitmap_enable.data), true, err);
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_DISABLE:
        return dirty_bitmap_action_enable(
            c, &part->bitmap, ref_of(&action->u.block_dirty_bitmap_disable.data), false, err);
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_MERGE:
        return merge_bitmaps(part, c, &action->u.block_dirty_bitmap_merge.data, err);
    case TRANSACTION_ACTION_KIND_BLOCKDEV_BACKUP:
        return add_backup(part, control, c, txn, &action->u.blockdev_backup.data, err);
    }
    return error_set(err, EINVAL, "unknown action");
}

void transaction_part_end(struct transaction_part *part, bool done)
{
    free(part->sources);
    if (part->backup && done)
        backup_job_start(part->backup);
    else if (part->backup)
        backup_job_co_discard(part->backup);
}

/* Only jobs can be grouped. */
static bool can_be_grouped(enum transaction_action_kind kind)
{
    switch (kind) {
    case TRANSACTION_ACTION_KIND_ABORT:
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ADD:
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_REMOVE:
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_CLEAR:
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ENABLE:
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_DISABLE:
    case TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_MERGE:
        break;
    case TRANSACTION_ACTION_KIND_BLOCKDEV_BACKUP:
        return true;
    }
    return false;
}

static int co_fn control_fn run_actions(struct qmp_session *session,
                                        const struct transaction_action *actions, size_t count,
                                        const char *what, struct job_txn *txn, struct error **err)
{
    struct control *control = control_of(session);
    struct transaction_part *parts = try_new_n(struct transaction_part, count);
    struct change change;
    int r = 0;

    if (!parts)
        return error_set(err, ENOMEM, "no memory for %zu actions", count);
    change_init(&change, control->graph, "%s", what);
    for (size_t i = 0; r == 0 && i < count; i++)
        r = transaction_part_add(&parts[i], control, &change, txn, &actions[i], err);
    if (r == 0)
        r = change_co_run(&change, err);
    change_end(&change);
    for (size_t i = 0; i < count; i++)
        transaction_part_end(&parts[i], r == 0);
    free(parts);
    return r;
}

int qmp_transaction(struct qmp_session *session, const struct transaction_args *args,
                    struct error **err)
{
    struct job_txn *txn = NULL;
    int r;

    if (args->properties && args->properties->completion_mode == ACTION_COMPLETION_MODE_GROUPED) {
        for (size_t i = 0; i < args->actions.count; i++) {
            if (!can_be_grouped(args->actions.items[i].type))
                return error_set(err, EINVAL,
                                 "action '%s' cannot be done with completion-mode=grouped: it is "
                                 "not a job",
                                 transaction_action_kind_name(args->actions.items[i].type));
        }
    }
    if (args->properties && args->properties->completion_mode == ACTION_COMPLETION_MODE_GROUPED)
        txn = job_txn_new();
    r = run_actions(session, args->actions.items, args->actions.count, "transaction", txn, err);
    (void)job_txn_unref(txn);
    return r;
}

int qmp_blockdev_backup(struct qmp_session *session, const struct blockdev_backup_options *args,
                        struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCKDEV_BACKUP,
        .u.blockdev_backup.data = *args,
    };

    return run_actions(session, &action, 1, "blockdev-backup", NULL, err);
}

int qmp_block_dirty_bitmap_add(struct qmp_session *session,
                               const struct block_dirty_bitmap_add *args, struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ADD,
        .u.block_dirty_bitmap_add.data = *args,
    };

    return run_actions(session, &action, 1, "block-dirty-bitmap-add", NULL, err);
}

int qmp_block_dirty_bitmap_remove(struct qmp_session *session,
                                  const struct block_dirty_bitmap *args, struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_REMOVE,
        .u.block_dirty_bitmap_remove.data = *args,
    };

    return run_actions(session, &action, 1, "block-dirty-bitmap-remove", NULL, err);
}

int qmp_block_dirty_bitmap_clear(struct qmp_session *session, const struct block_dirty_bitmap *args,
                                 struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_CLEAR,
        .u.block_dirty_bitmap_clear.data = *args,
    };

    return run_actions(session, &action, 1, "block-dirty-bitmap-clear", NULL, err);
}

int qmp_block_dirty_bitmap_enable(struct qmp_session *session,
                                  const struct block_dirty_bitmap *args, struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_ENABLE,
        .u.block_dirty_bitmap_enable.data = *args,
    };

    return run_actions(session, &action, 1, "block-dirty-bitmap-enable", NULL, err);
}

int qmp_block_dirty_bitmap_disable(struct qmp_session *session,
                                   const struct block_dirty_bitmap *args, struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_DISABLE,
        .u.block_dirty_bitmap_disable.data = *args,
    };

    return run_actions(session, &action, 1, "block-dirty-bitmap-disable", NULL, err);
}

int qmp_block_dirty_bitmap_merge(struct qmp_session *session,
                                 const struct block_dirty_bitmap_merge *args, struct error **err)
{
    const struct transaction_action action = {
        .type = TRANSACTION_ACTION_KIND_BLOCK_DIRTY_BITMAP_MERGE,
        .u.block_dirty_bitmap_merge.data = *args,
    };

    return run_actions(session, &action, 1, "block-dirty-bitmap-merge", NULL, err);
}
