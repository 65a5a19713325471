/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The backup job. Several backups, and bitmap actions, may share one change, so that they share one instant:
 *
 *   backup_job_co_new for each; backup_job_add_actions for each; change_co_run; backup_job_start, or backup_job_co_discard
 */
#ifndef CAIRN_JOBS_BACKUP_H
#define CAIRN_JOBS_BACKUP_H

#include "base/context.h"
#include "base/error.h"
#include "graph/change.h"
#include "graph/graph.h"
#include "jobs/job.h"

struct backup_job;
struct blockdev_backup_options; /* generated: what blockdev-backup takes */

/* Makes a job that has not begun. `txn` NULL: one of its own. */
int co_fn control_fn backup_job_co_new(struct backup_job **ret, struct jobs *jobs, struct graph *g,
                                       const struct blockdev_backup_options *o, struct job_txn *txn,
                                       struct error **err);
int control_fn backup_job_add_actions(struct backup_job *b, struct change *c, struct error **err);
/* The change is done. */
void control_fn backup_job_start(struct backup_job *b);
/* It is not, or was undone. */
void co_fn control_fn backup_job_co_discard(struct backup_job *b);

#endif
