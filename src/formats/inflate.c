/* SPDX-License-Identifier: Apache-2.0 */
/* zlib's inflate with all of the input at hand. */
#include "formats/inflate.h"

#include <errno.h>

#include <zlib.h>

int64_t inflate_some(enum inflate_kind kind, const uint8_t *in, size_t in_len, uint8_t *out,
                     size_t out_len)
{
    z_stream s = {.next_in = (uint8_t *)(uintptr_t)in, .avail_in = (uInt)in_len};
    int r;

    s.next_out = out;
    s.avail_out = (uInt)out_len;
    /* The largest window reads what any was written with. */
    if (inflateInit2(&s, kind == INFLATE_BARE ? -15 : 15) != Z_OK)
        return -ENOMEM;
    r = inflate(&s, Z_FINISH);
    (void)inflateEnd(&s);
    if (r == Z_STREAM_END || (r == Z_BUF_ERROR && !s.avail_out))
        return (int64_t)(out_len - s.avail_out);
    return -EIO;
}
