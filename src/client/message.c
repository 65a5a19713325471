/* SPDX-License-Identifier: Apache-2.0 */
/* Messages are objects; what is within the brackets is judged by who reads the text. */
#include "client/message.h"

#include <errno.h>

static bool is_space(char c)
{
    return c == ' ' || c == '\t' || c == '\r' || c == '\n';
}

static void scan_string(struct message_scan *s, char c)
{
    if (s->escaped)
        s->escaped = false;
    else if (c == '\\')
        s->escaped = true;
    else if (c == '"')
        s->in_string = false;
}

int message_scan(struct message_scan *s, const char *bytes, size_t len)
{
    while (s->at < len) {
        char c = bytes[s->at++];

        if (s->in_string) {
            scan_string(s, c);
        } else if (c == '{' || (c == '[' && s->depth)) {
            if (++s->depth > MESSAGE_DEPTH_MAX)
                return -EBADMSG;
        } else if (!s->depth) {
            if (!is_space(c))
                return -EBADMSG;
        } else if (c == '"') {
            s->in_string = true;
        } else if ((c == '}' || c == ']') && --s->depth == 0) {
            return 1;
        }
    }
    return len > MESSAGE_BYTES_MAX ? -EBADMSG : 0;
}
