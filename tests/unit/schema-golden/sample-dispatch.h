/* SPDX-License-Identifier: Apache-2.0 */
/* Made by tools/schema.py from the schema's fragments: edit those. */
#ifndef CAIRN_GENERATED_SAMPLE_DISPATCH_H
#define CAIRN_GENERATED_SAMPLE_DISPATCH_H

#include "sample-types.h"

#include "control/qmp-protocol.h"

/*
 * A handler for each command. It may yield. What it puts into *ret, which is zeroed, is freed by the caller, on
 * errors too.
 */
int co_fn control_fn qmp_qmp_capabilities(struct qmp_session *session, const struct qmp_capabilities_args *args, struct error **err);
int co_fn control_fn qmp_query_stones(struct qmp_session *session, struct report *ret, struct error **err);
int co_fn control_fn qmp_quit(struct qmp_session *session, struct error **err);
int co_fn control_fn qmp_stone_add(struct qmp_session *session, const struct stone *args, struct error **err);
int co_fn control_fn qmp_stone_weigh(struct qmp_session *session, const struct stone_weigh_args *args, struct uint_array *ret, struct error **err);

/* By name. */
extern const struct qmp_command sample_dispatch[];
extern const size_t sample_dispatch_count;

/* What query-qmp-schema answers. */
extern const char sample_introspection[];

#endif
