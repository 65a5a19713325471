/* SPDX-License-Identifier: Apache-2.0 */
/* The drivers of kind filter that users can name; a backup's copy-before-write is not among them. */
#ifndef CAIRN_FILTERS_LIST_H
#define CAIRN_FILTERS_LIST_H

struct driver;

/* Ends with NULL. */
extern const struct driver *const filter_drivers[];

#endif
