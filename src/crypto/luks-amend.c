/* SPDX-License-Identifier: Apache-2.0 */
/* Key slots come into use and go out of use: LUKS-1 to LUKS-3. */
#include "crypto/luks-internal.h"
#include "crypto/luks.h"
#include "loop/loop.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <string.h>

#define ITER_MS_DEFAULT 2000

static unsigned count_active(const struct luks_header *h)
{
    unsigned n = 0;

    for (unsigned i = 0; i < LUKS_SLOTS; i++)
        n += h->slots[i].active;
    return n;
}

/* LUKS_SLOTS: none. */
static unsigned find_free(const struct luks_header *h)
{
    unsigned i = 0;

    while (i < LUKS_SLOTS && h->slots[i].active)
        i++;
    return i;
}

/* ---- out of use ---- */

static int co_fn wipe_material(const struct luks_store *store, const struct luks_header *h,
                               unsigned slot)
{
    size_t len = luks_material_len(h->key_len);
    struct iobuf *b = iobuf_new(len);
    int r = b ? 0 : -ENOMEM;

    if (r == 0) {
        loop_random(b->data, len);
        r = store->co_write(store->arg, (uint64_t)h->slots[slot].material_sector * LUKS_SECTOR, b,
                            len);
    }
    if (r == 0)
        r = store->co_sync(store->arg);
    iobuf_unref(b);
    return r;
}

/* LUKS-2 */
static int co_fn erase(struct luks *l, const struct luks_store *store, unsigned slot,
                       struct error **err)
{
    struct luks_header h = l->header;
    int r;

    h.slots[slot].active = false;
    h.slots[slot].iterations = 0;
    memset(h.slots[slot].salt, 0, LUKS_SALT_LEN);
    r = luks_header_co_write(store, &h, false, err);
    if (r < 0)
        return r;
    l->header = h;
    r = wipe_material(store, &h, slot);
    return r < 0 ? error_set(err, -r, "key slot %u is out of use, but cannot be wiped: %s", slot,
                             strerror(-r))
                 : 0;
}

/* ---- into use ---- */

static int co_fn fill(struct luks *l, const struct luks_store *store, unsigned slot,
                      const struct luks_amend *a, struct error **err)
{
    const struct luks_volume v = {store, &l->spec, l->hash};
    struct luks_header h = l->header;
    uint64_t rate;
    int r = luks_co_rate(l->hash, h.key_len, &rate, err);

    if (r == 0)
        r = luks_slot_co_write(&v, &h, slot, a->new_secret, l->key, rate,
                               a->has_iter_ms ? a->iter_ms : ITER_MS_DEFAULT, err);
    if (r == 0)
        r = luks_header_co_write(store, &h, true, err);
    if (r == 0)
        l->header = h;
    return r;
}

/* LUKS-3: what is the only key stands in another slot, too, until the new one is durable. */
static int co_fn overwrite(struct luks *l, const struct luks_store *store, unsigned slot,
                           const struct luks_amend *a, struct error **err)
{
    bool only = count_active(&l->header) == 1;
    unsigned spare = find_free(&l->header);
    int r = only ? fill(l, store, spare, a, err) : 0;

    if (r == 0)
        r = erase(l, store, slot, err);
    if (r == 0)
        r = fill(l, store, slot, a, err);
    if (r == 0 && only)
        r = erase(l, store, spare, err);
    return r;
}

static int co_fn activate(struct luks *l, const struct luks_store *store,
                          const struct luks_amend *a, struct error **err)
{
    unsigned slot = a->has_slot ? a->slot : find_free(&l->header);

    if (!a->new_secret)
        return error_set(err, EINVAL, "'new-secret' is needed to activate a key slot");
    if (a->old_secret)
        return error_set(err, EINVAL, "'old-secret' makes no sense when a key slot is activated");
    if (slot == LUKS_SLOTS)
        return error_set(err, ENOSPC, "all %d key slots are in use: erase one first", LUKS_SLOTS);
    if (!l->header.slots[slot].active)
        return fill(l, store, slot, a, err);
    if (!a->force)
        return error_set(err, EPERM, "key slot %u is in use: erase it first", slot);
    return overwrite(l, store, slot, a, err);
}

/* ---- which ones go ---- */

/* Those that the old secret opens. */
static int co_fn find_matching(struct luks *l, const struct luks_store *store,
                               const struct luks_amend *a, bool *matches, unsigned *ret_count,
                               struct error **err)
{
    const struct luks_volume v = {store, &l->spec, l->hash};
    uint8_t key[LUKS_KEY_MAX];

    *ret_count = 0;
    for (unsigned i = 0; i < LUKS_SLOTS; i++) {
        int r = 0;

        if (l->header.slots[i].active && (!a->has_slot || a->slot == i))
            r = luks_slot_co_try(&v, &l->header, i, a->old_secret, key, err);
        OPENSSL_cleanse(key, sizeof(key));
        if (r < 0)
            return r;
        matches[i] = r == 1;
        *ret_count += r == 1;
    }
    return 0;
}

static int choose(struct luks *l, const struct luks_amend *a, bool *matches, unsigned *ret_count,
                  struct error **err)
{
    if (!a->has_slot)
        return error_set(err, EINVAL, "give 'keyslot' or 'old-secret' to say what is erased");
    if (!l->header.slots[a->slot].active && !a->force)
        return error_set(err, EINVAL, "key slot %u is not in use", a->slot);
    matches[a->slot] = true;
    *ret_count = l->header.slots[a->slot].active;
    return 0;
}

static int co_fn deactivate(struct luks *l, const struct luks_store *store,
                            const struct luks_amend *a, struct error **err)
{
    bool matches[LUKS_SLOTS] = {false};
    unsigned count = 0;
    int r;

    if (a->new_secret)
        return error_set(err, EINVAL, "'new-secret' makes no sense when key slots are erased");
    if (a->has_iter_ms)
        return error_set(err, EINVAL, "'iter-time' makes no sense when key slots are erased");
    r = a->old_secret ? find_matching(l, store, a, matches, &count, err)
                      : choose(l, a, matches, &count, err);
    if (r < 0)
        return r;
    if (a->old_secret && !count)
        return error_set(err, EACCES, "the old secret opens no key slot%s",
                         a->has_slot ? " of this number" : "");
    if (count && count == count_active(&l->header) && !a->force)
        return error_set(
            err, EPERM,
            "no key slot would be left, and the data would be lost for ever: this takes "
            "force");
    for (unsigned i = 0; r == 0 && i < LUKS_SLOTS; i++) {
        if (matches[i])
            r = erase(l, store, i, err);
    }
    return r;
}

int luks_co_amend(struct luks *l, const struct luks_store *store, const struct luks_amend *a,
                  struct error **err)
{
    int r;

    if (a->has_slot && a->slot >= LUKS_SLOTS)
        return error_set(err, EINVAL, "there is no key slot %u: they are 0 to %d", a->slot,
                         LUKS_SLOTS - 1);
    r = co_mutex_lock_until(&l->change, LOOP_FOREVER);
    if (r < 0)
        return error_set(err, -r, "%s", strerror(-r));
    r = a->activate ? activate(l, store, a, err) : deactivate(l, store, a, err);
    co_mutex_unlock(&l->change);
    return r;
}
