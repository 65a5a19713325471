/* SPDX-License-Identifier: Apache-2.0 */
/* Lock bytes on image files; the design is in the header. */
#include "protocols/file/file-lock.h"
#include "base/macros.h"

#include <errno.h>
#include <string.h>

#define WANTED_BYTES  100
#define REFUSED_BYTES 200

int image_lock_co_init(struct image_lock *lock, struct file *file, bool needed, struct error **err)
{
    int r = file_co_lock_test(file, WANTED_BYTES, 1, FILE_LOCK_SHARED);

    *lock = (struct image_lock){.file = file, .used = true};
    if (r == 0 || r == -EAGAIN)
        return 0;
    if (needed)
        return error_set(err, -r, "file '%s' cannot be locked: %s; set locking to 'auto' or 'off'",
                         file_path(file), strerror(-r));
    lock->used = false;
    return 0;
}

/* Locks or unlocks the bytes of some bits. When locking fails, those before the failing one stay locked. */
static int co_fn set_bytes(struct image_lock *lock, unsigned first_byte, unsigned bits,
                           enum file_lock kind)
{
    for (unsigned bit = 0; bits >> bit; bit++) {
        int r;

        if (!(bits & 1u << bit))
            continue;
        r = file_co_lock(lock->file, first_byte + bit, 1, kind);
        if (r < 0)
            return r;
    }
    return 0;
}

/* Which of these bits have their byte locked by others; negative errno when that cannot be found out. */
static int co_fn locked_by_others(struct image_lock *lock, unsigned first_byte, unsigned bits)
{
    unsigned found = 0;

    for (unsigned bit = 0; bits >> bit; bit++) {
        int r;

        if (!(bits & 1u << bit))
            continue;
        r = file_co_lock_test(lock->file, first_byte + bit, 1, FILE_LOCK_EXCLUSIVE);
        if (r == -EAGAIN)
            found |= 1u << bit;
        else if (r < 0)
            return r;
    }
    return (int)found;
}

static int failed(struct image_lock *lock, int r, struct error **err)
{
    return error_set(err, -r, "cannot lock file '%s': %s", file_path(lock->file), strerror(-r));
}

/* The looking of LOCK-2. */
static int co_fn check_others(struct image_lock *lock, unsigned wanted, unsigned refused,
                              struct error **err)
{
    char text[ACCESS_TEXT_BYTES];
    int found = locked_by_others(lock, REFUSED_BYTES, wanted);

    if (found > 0)
        return error_set(err, EAGAIN,
                         "cannot get %s access to file '%s': is another process using it?",
                         access_text((unsigned)found, text), file_path(lock->file));
    if (found == 0)
        found = locked_by_others(lock, WANTED_BYTES, refused);
    if (found > 0)
        return error_set(
            err, EAGAIN,
            "cannot keep others from %s access to file '%s': is another process using it?",
            access_text((unsigned)found, text), file_path(lock->file));
    return found < 0 ? failed(lock, found, err) : 0;
}

int image_lock_co_set(struct image_lock *lock, struct access access, struct error **err)
{
    unsigned refused = ACCESS_ALL & ~access.tolerates;
    unsigned new_wanted = access.wants & ~lock->wanted;
    unsigned new_refused = refused & ~lock->refused;
    int r;

    if (!lock->used)
        return 0;
    r = set_bytes(lock, WANTED_BYTES, new_wanted, FILE_LOCK_SHARED);
    if (r == 0)
        r = set_bytes(lock, REFUSED_BYTES, new_refused, FILE_LOCK_SHARED);
    if (r < 0)
        r = failed(lock, r,
                   err); /* LOCK-1 makes no exclusive locks: it is not a user of the image */
    else
        r = check_others(lock, new_wanted, new_refused, err);
    if (r < 0) {
        /* Unlocking what was not locked does nothing. */
        (void)set_bytes(lock, WANTED_BYTES, new_wanted, FILE_LOCK_NONE);
        (void)set_bytes(lock, REFUSED_BYTES, new_refused, FILE_LOCK_NONE);
        return r;
    }
    /* A byte that stays locked by mistake is released when the file is closed (LOCK-3). */
    (void)set_bytes(lock, WANTED_BYTES, lock->wanted & ~access.wants, FILE_LOCK_NONE);
    (void)set_bytes(lock, REFUSED_BYTES, lock->refused & ~refused, FILE_LOCK_NONE);
    lock->wanted = access.wants;
    lock->refused = refused;
    return 0;
}
