/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the demo's writer and its checker agree on: the content of a block and the log of writes.
 * Numbers are in the host's byte order; both run on one machine.
 *
 * Block, 4096 bytes:
 *
 *      0  the magic "CAIRNBLK"
 *      8  block: its number in the writer's file, from 0
 *     16  sequence: which write this is; 0 is what was there before the first one
 *     24  words that follow from block and sequence, so that two versions differ all over
 *   4092  CRC-32 of bytes 0 to 4091 (the one of zlib and Ethernet)
 *
 * Log: records of 32 bytes. The first one is the head; the one at place n (from 1) is that of
 * sequence n. A record exists once its submit_ns is not 0, which is stored last; zeroes follow the
 * last one, because the file grows in pieces. A log may be read while it is being written.
 *
 * Times are those of CLOCK_MONOTONIC. submit_ns is taken before the first byte of the write is
 * sent, ack_ns after its answer was received: the write took effect between the two.
 */
#ifndef DEMO_PROOF_H
#define DEMO_PROOF_H

#include <stdbool.h>
#include <stdint.h>

#define PROOF_BLOCK_BYTES 4096u
#define PROOF_BLOCK_MAGIC "CAIRNBLK"
#define PROOF_LOG_MAGIC   "CAIRNLOG"
#define PROOF_LOG_VERSION 1u
#define PROOF_MARK        UINT64_MAX /* in place of a block: no write, it only says that time went on */

struct proof_record {
    uint64_t sequence;
    uint64_t block;
    uint64_t submit_ns;
    uint64_t ack_ns; /* 0: not acknowledged (yet) */
};

struct proof_log_head {
    char magic[8];
    uint32_t version;
    uint32_t record_bytes;
    uint64_t blocks;
    uint64_t unused;
};

_Static_assert(sizeof(struct proof_record) == 32, "the layout of the log");
_Static_assert(sizeof(struct proof_log_head) == sizeof(struct proof_record), "the head's place");

/* data has PROOF_BLOCK_BYTES, and so below. */
void proof_block_fill(uint8_t *data, uint64_t block, uint64_t sequence);

/* Returns NULL if this is a whole block of the writer's, or says in words what is wrong with it. */
const char *proof_block_parse(const uint8_t *data, uint64_t *ret_block, uint64_t *ret_sequence);

#endif
