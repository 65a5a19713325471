/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Verification: every unit of the region is written with a stamp (its number, a sequence, the run's
 * seed, a checksum over all of it), and each read must bring back the newest stamp that was
 * acknowledged.
 *
 * VERIFY-1 Requests in flight never overlap, so at each read exactly one content is right.
 * VERIFY-2 The sequence of a unit is raised when its write is answered, and no number is used
 *          twice; after an error the unit is unknown (either content is right) until the next write
 *          to it succeeds.
 *
 * Phases: fill all, then a random mix for the given time, then flush, then read all.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#include "load.h"

#define STAMP_MAGIC    0x4361697253746d70ULL
#define MAX_COMPLAINTS 8
#define MAX_TRIES      64 /* to find a range that no request in flight touches */

/* The head of a unit, in the machine's byte order: the same program reads it. */
struct stamp {
    uint64_t magic;
    uint64_t unit;
    uint64_t sequence;
    uint64_t seed;
    uint64_t checksum; /* over the unit with this field 0 */
};

enum verify_phase { VERIFY_FILL, VERIFY_MIX, VERIFY_FLUSH, VERIFY_READ };

struct verify {
    struct verify_options opt;
    struct verify_result result;
    enum verify_phase phase;
    uint64_t units;
    uint64_t next_unit; /* in the sequential phases */
    bool flush_issued;
    uint64_t mix_end_ns;
    uint64_t random;
    uint32_t *sequence; /* per unit: of the last write that was answered; VERIFY-2 */
    bool *unknown;      /* per unit: that answer was an error */
    bool *busy;         /* per unit; VERIFY-1 */
    uint8_t *memory;    /* max_bytes for each slot of each connection */
};

static uint64_t mix64(uint64_t x)
{
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93ULL;
    x ^= x >> 32;
    return x;
}

static uint64_t checksum(const uint8_t *unit, uint32_t len)
{
    uint64_t sum = len;

    for (uint32_t i = 0; i < len; i += 8) {
        uint64_t word;

        memcpy(&word, unit + i, sizeof(word));
        if (i == offsetof(struct stamp, checksum))
            word = 0;
        sum = (sum ^ word) * 0x9fb21c651e98df25ULL;
        sum ^= sum >> 29;
    }
    return mix64(sum);
}

static void unit_stamp(const struct verify *v, uint8_t *p, uint64_t unit, uint32_t sequence)
{
    struct stamp s = {STAMP_MAGIC, unit, sequence, v->opt.seed, 0};
    uint64_t word = mix64(unit ^ (uint64_t)sequence << 40 ^ v->opt.seed) | 1;

    for (uint32_t i = sizeof(s); i < v->opt.unit_bytes; i += 8) {
        word += 0x9e3779b97f4a7c15ULL;
        memcpy(p + i, &word, sizeof(word));
    }
    memcpy(p, &s, sizeof(s));
    s.checksum = checksum(p, v->opt.unit_bytes);
    memcpy(p, &s, sizeof(s));
}

static void unit_check(struct verify *v, const uint8_t *p, uint64_t unit)
{
    uint32_t want = v->sequence[unit];
    struct stamp s;

    memcpy(&s, p, sizeof(s));
    if (v->unknown[unit])
        return;
    v->result.units_checked++;
    if (s.magic == STAMP_MAGIC && s.unit == unit && s.sequence == want && s.seed == v->opt.seed &&
        s.checksum == checksum(p, v->opt.unit_bytes))
        return;
    if (v->result.mismatches++ >= MAX_COMPLAINTS)
        return;
    if (s.magic != STAMP_MAGIC)
        fprintf(stderr,
                "nbd-load: unit %llu (offset %llu): expected sequence %u, found no stamp at all\n",
                (unsigned long long)unit, (unsigned long long)(unit * v->opt.unit_bytes), want);
    else
        fprintf(
            stderr,
            "nbd-load: unit %llu (offset %llu): expected sequence %u, found unit %llu sequence %llu seed %llu, %s\n",
            (unsigned long long)unit, (unsigned long long)(unit * v->opt.unit_bytes), want,
            (unsigned long long)s.unit, (unsigned long long)s.sequence, (unsigned long long)s.seed,
            s.checksum == checksum(p, v->opt.unit_bytes) ? "whole" : "torn");
}

/* Takes [unit, unit + count) for a request; false when one of them is taken (VERIFY-1). */
static bool range_take(struct verify *v, uint64_t unit, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (v->busy[unit + i])
            return false;
    memset(v->busy + unit, true, count);
    return true;
}

static void slot_prepare(struct load *l, struct load_conn *c, struct load_slot *s,
                         enum nbd_command command, uint64_t unit, uint64_t count)
{
    struct verify *v = l->state;
    uint64_t index = (uint64_t)c->index * l->depth + (uint64_t)(s - c->slots);

    s->command = command;
    s->offset = unit * v->opt.unit_bytes;
    s->length = (uint32_t)count * v->opt.unit_bytes;
    s->data = v->memory + index * v->opt.max_bytes;
    if (command != NBD_CMD_WRITE)
        return;
    for (uint64_t i = 0; i < count; i++)
        unit_stamp(v, s->data + i * v->opt.unit_bytes, unit + i, v->sequence[unit + i] + 1);
}

/* The next run of the region, for the phases that go through all of it. */
static bool next_sequential(struct load *l, struct load_conn *c, struct load_slot *s,
                            enum nbd_command command)
{
    struct verify *v = l->state;
    uint64_t count = v->opt.max_bytes / v->opt.unit_bytes;

    if (v->next_unit >= v->units)
        return false;
    if (count > v->units - v->next_unit)
        count = v->units - v->next_unit;
    if (!range_take(v, v->next_unit, count))
        return false;
    slot_prepare(l, c, s, command, v->next_unit, count);
    v->next_unit += count;
    return true;
}

static bool next_mixed(struct load *l, struct load_conn *c, struct load_slot *s)
{
    struct verify *v = l->state;

    for (int i = 0; i < MAX_TRIES; i++) {
        uint64_t count = 1 + random_below(&v->random, v->opt.max_bytes / v->opt.unit_bytes);
        uint64_t unit = random_below(&v->random, v->units);
        bool read = random_below(&v->random, 100) < v->opt.read_percent;

        if (count > v->units - unit)
            count = v->units - unit;
        if (range_take(v, unit, count)) {
            slot_prepare(l, c, s, read ? NBD_CMD_READ : NBD_CMD_WRITE, unit, count);
            return true;
        }
    }
    return false;
}

static bool verify_next(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    struct verify *v = l->state;

    switch (v->phase) {
    case VERIFY_FILL:
        return next_sequential(l, c, s, NBD_CMD_WRITE);
    case VERIFY_MIX:
        return now_ns < v->mix_end_ns && next_mixed(l, c, s);
    case VERIFY_FLUSH:
        if (v->flush_issued || !(l->export.flags & NBD_EXPORT_FLUSH))
            return false;
        v->flush_issued = true;
        slot_prepare(l, c, s, NBD_CMD_FLUSH, 0, 0);
        return true;
    case VERIFY_READ:
        return next_sequential(l, c, s, NBD_CMD_READ);
    }
    return false;
}

static int verify_done(struct load *l, struct load_conn *c, struct load_slot *s, uint64_t now_ns)
{
    struct verify *v = l->state;
    uint64_t unit = s->offset / v->opt.unit_bytes;
    uint64_t count = s->length / v->opt.unit_bytes;

    (void)now_ns;
    if (s->error != 0 && v->result.errors++ < MAX_COMPLAINTS)
        fprintf(
            stderr,
            "nbd-load: connection %u: command %d at %llu, %u bytes: the server answers error %u\n",
            c->index, (int)s->command, (unsigned long long)s->offset, s->length, s->error);
    for (uint64_t i = 0; i < count; i++) {
        v->busy[unit + i] = false;
        if (s->command == NBD_CMD_READ && s->error == 0)
            unit_check(v, s->data + i * v->opt.unit_bytes, unit + i);
        if (s->command == NBD_CMD_WRITE) {
            v->sequence[unit + i]++;
            v->unknown[unit + i] = s->error != 0;
        }
    }
    if (s->command == NBD_CMD_WRITE && s->error == 0)
        v->result.units_written += count;
    return 0;
}

/* A phase ends when it has nothing more to issue and nothing is in flight. */
static int verify_round(struct load *l, uint64_t now_ns, uint64_t *ret_wake_ns)
{
    struct verify *v = l->state;

    if (l->in_flight > 0)
        return 0;
    switch (v->phase) {
    case VERIFY_FILL:
        if (v->next_unit < v->units)
            return 0;
        v->phase = VERIFY_MIX;
        v->mix_end_ns = now_ns + v->opt.duration_ns;
        break;
    case VERIFY_MIX:
        if (now_ns >= v->mix_end_ns)
            v->phase = VERIFY_FLUSH;
        break;
    case VERIFY_FLUSH:
        v->phase = VERIFY_READ;
        v->next_unit = 0;
        break;
    case VERIFY_READ:
        if (v->next_unit >= v->units)
            return 1;
        break;
    }
    *ret_wake_ns = now_ns;
    return 0;
}

static const struct load_workload verify_workload = {
    .next = verify_next,
    .done = verify_done,
    .round = verify_round,
};

int verify_run(struct load *l, const struct verify_options *options,
               struct verify_result *ret_result)
{
    struct verify v = {.opt = *options, .random = mix64(options->seed) | 1};
    int r = -ENOMEM;

    v.units = options->size_bytes / options->unit_bytes;
    v.sequence = calloc(v.units, sizeof(*v.sequence));
    v.unknown = calloc(v.units, sizeof(*v.unknown));
    v.busy = calloc(v.units, sizeof(*v.busy));
    v.memory = calloc((size_t)l->n_conns * l->depth, options->max_bytes);
    l->workload = &verify_workload;
    l->state = &v;
    if (v.sequence != NULL && v.unknown != NULL && v.busy != NULL && v.memory != NULL)
        r = load_run(l);
    else
        fprintf(stderr, "nbd-load: no memory to verify %llu units\n", (unsigned long long)v.units);
    *ret_result = v.result;
    free(v.sequence);
    free(v.unknown);
    free(v.busy);
    free(v.memory);
    return r;
}
