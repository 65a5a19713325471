/* SPDX-License-Identifier: Apache-2.0 */
/* The NBD wire format, as far as the load generator and the floor server speak it. */
#ifndef BENCH_NBD_WIRE_H
#define BENCH_NBD_WIRE_H

#include <endian.h>
#include <stdint.h>
#include <string.h>

/* Handshake, fixed newstyle. */
#define NBD_MAGIC          0x4e42444d41474943ULL /* "NBDMAGIC" */
#define NBD_OPTION_MAGIC   0x49484156454f5054ULL /* "IHAVEOPT" */
#define NBD_OPTION_REPLY   0x0003e889045565a9ULL
#define NBD_FIXED_NEWSTYLE 1u /* the same bit in the server's and in the client's flags */
#define NBD_NO_ZEROES      2u

enum nbd_option {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT = 2,
    NBD_OPT_LIST = 3,
    NBD_OPT_INFO = 6,
    NBD_OPT_GO = 7,
    NBD_OPT_STRUCTURED_REPLY = 8,
};

#define NBD_REP_ACK         1u
#define NBD_REP_SERVER      2u
#define NBD_REP_INFO        3u
#define NBD_REP_ERROR_BIT   0x80000000u
#define NBD_REP_ERR_UNSUP   (NBD_REP_ERROR_BIT | 1u)
#define NBD_REP_ERR_INVALID (NBD_REP_ERROR_BIT | 3u)
#define NBD_REP_ERR_TOO_BIG (NBD_REP_ERROR_BIT | 9u)

#define NBD_INFO_EXPORT     0u
#define NBD_INFO_BLOCK_SIZE 3u

/* Flags of an export. */
#define NBD_EXPORT_HAS_FLAGS  0x001u
#define NBD_EXPORT_READ_ONLY  0x002u
#define NBD_EXPORT_FLUSH      0x004u
#define NBD_EXPORT_FUA        0x008u
#define NBD_EXPORT_MULTI_CONN 0x100u

/* Transmission. */
#define NBD_REQUEST_MAGIC          0x25609513u
#define NBD_SIMPLE_REPLY_MAGIC     0x67446698u
#define NBD_STRUCTURED_REPLY_MAGIC 0x668e33efu

/*
 * Sizes of the headers. Request: magic, flags, type, cookie, offset, length. Simple reply: magic,
 * error, cookie. Chunk: magic, flags, type, cookie, length.
 */
#define NBD_REQUEST_BYTES      28u
#define NBD_SIMPLE_REPLY_BYTES 16u
#define NBD_CHUNK_BYTES        20u

enum nbd_command {
    NBD_CMD_READ = 0,
    NBD_CMD_WRITE = 1,
    NBD_CMD_DISC = 2,
    NBD_CMD_FLUSH = 3,
};

#define NBD_CMD_FLAG_FUA 1u

#define NBD_CHUNK_DONE        1u
#define NBD_CHUNK_NONE        0u
#define NBD_CHUNK_OFFSET_DATA 1u
#define NBD_CHUNK_OFFSET_HOLE 2u
#define NBD_CHUNK_ERROR_BIT   0x8000u

#define NBD_EIO     5u
#define NBD_EINVAL  22u
#define NBD_ENOSPC  28u
#define NBD_ENOTSUP 95u

static inline uint16_t get_be16(const uint8_t *p)
{
    uint16_t v;

    memcpy(&v, p, sizeof(v));
    return be16toh(v);
}

static inline uint32_t get_be32(const uint8_t *p)
{
    uint32_t v;

    memcpy(&v, p, sizeof(v));
    return be32toh(v);
}

static inline uint64_t get_be64(const uint8_t *p)
{
    uint64_t v;

    memcpy(&v, p, sizeof(v));
    return be64toh(v);
}

static inline void put_be16(uint8_t *p, uint16_t v)
{
    v = htobe16(v);
    memcpy(p, &v, sizeof(v));
}

static inline void put_be32(uint8_t *p, uint32_t v)
{
    v = htobe32(v);
    memcpy(p, &v, sizeof(v));
}

static inline void put_be64(uint8_t *p, uint64_t v)
{
    v = htobe64(v);
    memcpy(p, &v, sizeof(v));
}

#endif
