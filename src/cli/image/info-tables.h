/* SPDX-License-Identifier: Apache-2.0 */
/* What a qcow2 image lists beside its disk: internal snapshots and bitmaps. Hostile input (P6): a bad table is an error, and read within the format's limits. */
#ifndef CAIRN_CLI_IMAGE_INFO_TABLES_H
#define CAIRN_CLI_IMAGE_INFO_TABLES_H

#include "base/context.h"
#include "base/error.h"
#include "cli/image/image.h"

#include <jansson.h>

/* Lists as the peer prints them in JSON; NULL where there are none. */
struct info_tables {
    json_t *snapshots;
    json_t *bitmaps;
    json_t *luks; /* what its encryption's header says */
    json_t *vmdk; /* what is specific to this format */
};

/* Of a qcow2 image: an error where another program may write to it, as what its header says may change (-U: none). */
int co_fn control_fn info_co_refuse_writers(struct graph *g, const struct image_layer *layer,
                                            struct error **err);
int co_fn control_fn info_tables_co_read(struct info_tables *ret, struct graph *g,
                                         const struct image_layer *layer, struct error **err);
void info_tables_release(struct info_tables *t);

/* As people read them; nothing for NULL. */
void info_print_snapshots(const json_t *snapshots);
void info_print_bitmaps(const json_t *bitmaps);
void info_print_vmdk(const json_t *specific);

/* Of an open node of the driver vmdk. */
json_t *info_vmdk_json(const struct node *node, const struct image_layer *layer);

#endif
