/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a node does with an image file, as locks that other programs see; the bytes are QEMU's, so that its programs and ours
 * refuse each other.
 *
 * LOCK-1 For each access bit n in use a shared lock on byte 100 + n; for each one not tolerated, on byte 200 + n. They are
 *        locks of the open file description, all shared: a file that is open for reading can hold them.
 * LOCK-2 Locks first, looks second: of two that come at once, one sees the other at least. Looking means asking whether the
 *        counterpart (200 + n for a wanted bit, 100 + n for a refused one) could be locked exclusively.
 * LOCK-3 What is given up is unlocked last, when nothing can fail any more.
 */
#ifndef CAIRN_PROTOCOLS_FILE_FILE_LOCK_H
#define CAIRN_PROTOCOLS_FILE_FILE_LOCK_H

#include "base/context.h"
#include "base/error.h"
#include "graph/access.h"
#include "loop/file.h"

#include <stdbool.h>

/* Control thread. */
struct image_lock {
    struct file *file; /* borrowed */
    bool used;
    unsigned wanted;  /* bits whose byte at 100 is locked */
    unsigned refused; /* bits whose byte at 200 is locked */
};

/*
 * `needed`: an error if the file's place has no such locks; otherwise it goes without. Locks nothing yet.
 */
int co_fn control_fn image_lock_co_init(struct image_lock *lock, struct file *file, bool needed,
                                        struct error **err);

/* Exchanges what is held. On failure nothing has changed; -EAGAIN and a message when others stand against it. */
int co_fn control_fn image_lock_co_set(struct image_lock *lock, struct access access,
                                       struct error **err);

#endif
