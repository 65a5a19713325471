/* SPDX-License-Identifier: Apache-2.0 */
/* Where a message ends: the protocol has no framing but the balance of its brackets. */
#ifndef CAIRN_CLIENT_MESSAGE_H
#define CAIRN_CLIENT_MESSAGE_H

#include <stdbool.h>
#include <stddef.h>

/* What a peer may send in one message, and how deep it may nest. */
#define MESSAGE_BYTES_MAX ((size_t)64 << 20)
#define MESSAGE_DEPTH_MAX 1024

/* A walk over bytes as they come. Zeroed at first, and after each message. */
struct message_scan {
    size_t at; /* bytes of the message that have been looked at */
    unsigned depth;
    bool in_string;
    bool escaped;
};

/*
 * Looks at bytes[scan->at, len). 1: a message ends at scan->at. 0: it goes on beyond len. -EBADMSG: no message begins or goes on
 * like this. White space before a message belongs to it.
 */
int message_scan(struct message_scan *scan, const char *bytes, size_t len);

#endif
