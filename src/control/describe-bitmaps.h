/* SPDX-License-Identifier: Apache-2.0 */
/* The bitmaps of a node, as the query of nodes shows them. */
#ifndef CAIRN_CONTROL_DESCRIBE_BITMAPS_H
#define CAIRN_CONTROL_DESCRIBE_BITMAPS_H

#include <stdbool.h>

struct block_dirty_info_array; /* generated */
struct node;

/* On the control thread. False: the node has none. */
bool describe_bitmaps(const struct node *node, struct block_dirty_info_array *ret);

#endif
