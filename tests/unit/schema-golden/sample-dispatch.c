/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
#include "sample-dispatch.h"

static int co_fn control_fn call_qmp_capabilities(struct qmp_session *session, const void *args, void *ret,
    struct error **err)
{
    (void)ret; /* it has none */
    return qmp_qmp_capabilities(session, args, err);
}

static int co_fn control_fn call_query_stones(struct qmp_session *session, const void *args, void *ret,
    struct error **err)
{
    (void)args; /* it has none */
    return qmp_query_stones(session, ret, err);
}

static int co_fn control_fn call_quit(struct qmp_session *session, const void *args, void *ret,
    struct error **err)
{
    (void)args; /* it has none */
    (void)ret; /* it has none */
    return qmp_quit(session, err);
}

static int co_fn control_fn call_stone_add(struct qmp_session *session, const void *args, void *ret,
    struct error **err)
{
    (void)ret; /* it has none */
    return qmp_stone_add(session, args, err);
}

static int co_fn control_fn call_stone_weigh(struct qmp_session *session, const void *args, void *ret,
    struct error **err)
{
    return qmp_stone_weigh(session, args, ret, err);
}

const struct qmp_command sample_dispatch[] = {
    {&sample_commands[0], call_qmp_capabilities},
    {&sample_commands[1], call_query_stones},
    {&sample_commands[2], call_quit},
    {&sample_commands[3], call_stone_add},
    {&sample_commands[4], call_stone_weigh},
};

const size_t sample_dispatch_count = 5;
