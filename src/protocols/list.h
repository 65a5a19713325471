/* SPDX-License-Identifier: Apache-2.0 */
/* All drivers of kind protocol. */
#ifndef CAIRN_PROTOCOLS_LIST_H
#define CAIRN_PROTOCOLS_LIST_H

struct driver;

/* Ends with NULL. */
extern const struct driver *const protocol_drivers[];

#endif
