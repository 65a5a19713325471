/* SPDX-License-Identifier: Apache-2.0 */
/* All drivers of kind format. */
#ifndef CAIRN_FORMATS_LIST_H
#define CAIRN_FORMATS_LIST_H

struct driver;

/* Ends with NULL. */
extern const struct driver *const format_drivers[];

#endif
