/* SPDX-License-Identifier: Apache-2.0 */
/* The judge of sectors that tests of races and of power cuts rely on: what it allows, and what it does not. */
#include "sector-log.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#define SECTOR 3u

static int setup(void **state)
{
    static struct sector_log l;

    log_init(&l, 8);
    *state = &l;
    return 0;
}

static int teardown(void **state)
{
    log_release(*state);
    return 0;
}

/* A write from beginning to end. */
static void log_write(struct sector_log *l, uint64_t value, bool durable)
{
    log_end(l, log_begin(l, SECTOR, 1, value, false), durable, false);
}

static bool may_read(struct sector_log *l, uint64_t value, uint64_t since)
{
    return log_allows(l, SECTOR, value, since, false);
}

static bool may_survive(struct sector_log *l, uint64_t value)
{
    return log_allows(l, SECTOR, value, 0, true);
}

static void test_sector_log__content_says_where_it_belongs(void **state)
{
    uint8_t a[LOG_SECTOR], zero[LOG_SECTOR] = {0};

    (void)state;
    log_fill(a, SECTOR, 7);
    assert_int_equal(log_value(a, SECTOR), 7);
    assert_true(log_value(a, SECTOR + 1) == LOG_ALIEN);
    assert_int_equal(log_value(zero, SECTOR), 0);
    a[LOG_SECTOR - 1] ^= 1; /* half of it is another value's */
    assert_true(log_value(a, SECTOR) == LOG_ALIEN);
}

static void test_sector_log__reads_return_the_last_value(void **state)
{
    struct sector_log *l = *state;
    uint64_t before = log_tick(l);

    log_write(l, 1, false);
    assert_true(may_read(l, 0, before)); /* the read began when 0 was there */
    assert_true(may_read(l, 1, before));
    assert_false(may_read(l, 0, log_tick(l)));
    log_write(l, 2, false);
    assert_false(may_read(l, 1, log_tick(l)));
    assert_true(may_read(l, 2, log_tick(l)));
    assert_false(may_read(l, 3, log_tick(l)));
}

static void test_sector_log__writes_at_once_come_in_any_order(void **state)
{
    struct sector_log *l = *state;
    uint32_t a = log_begin(l, SECTOR, 1, 1, false);
    uint32_t b = log_begin(l, SECTOR, 1, 2, false);

    assert_true(may_read(l, 0, log_tick(l)));
    log_end(l, a, false, false);
    log_end(l, b, false, false);
    assert_true(may_read(l, 1, log_tick(l)));
    assert_true(may_read(l, 2, log_tick(l)));
    assert_false(may_read(l, 0, log_tick(l)));
}

static void test_sector_log__discards_may_do_nothing(void **state)
{
    struct sector_log *l = *state;

    log_write(l, 1, false);
    log_end(l, log_begin(l, SECTOR, 1, 0, true), false, false);
    assert_true(may_read(l, 1, log_tick(l)));
    assert_true(may_read(l, 0, log_tick(l)));
    log_write(l, 2, false);
    assert_false(may_read(l, 1, log_tick(l)));
    assert_false(may_read(l, 0, log_tick(l)));
}

static void test_sector_log__only_what_was_flushed_replaces_for_good(void **state)
{
    struct sector_log *l = *state;
    uint64_t start;
    uint32_t late;

    log_write(l, 1, false);
    assert_true(may_survive(l, 0) && may_survive(l, 1));
    late = log_begin(l, SECTOR, 1, 2, false);
    start = log_tick(l);
    log_end(l, late, false, false); /* ends during the flush: not covered */
    log_flushed(l, start);
    assert_false(may_survive(l, 0));
    assert_true(may_survive(l, 1) && may_survive(l, 2));
    log_flushed(l, log_tick(l));
    assert_false(may_survive(l, 1));
    assert_true(may_survive(l, 2));
    log_write(l, 3, true); /* FUA */
    assert_false(may_survive(l, 2));
    assert_true(may_survive(l, 3));
    log_end(l, log_begin(l, SECTOR, 1, 4, false), true, true); /* failed: it may be there or not */
    assert_true(may_survive(l, 3) && may_survive(l, 4));
}
