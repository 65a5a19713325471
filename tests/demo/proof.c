/* SPDX-License-Identifier: Apache-2.0 */
/* The content of a block: how it is made, and how it is known again. */
#include "proof.h"

#include <string.h>

#define CRC_POLYNOMIAL 0xedb88320u
#define CRC_AT         (PROOF_BLOCK_BYTES - 4u)
#define PAYLOAD_AT     24u

/* Eight tables, so that eight bytes are one step: tables[k] is the CRC of a byte and k zeroes. */
static uint32_t tables[8][256];

__attribute__((constructor)) static void crc_prepare(void)
{
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;

        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? CRC_POLYNOMIAL : 0);
        tables[0][byte] = crc;
    }
    for (unsigned k = 1; k < 8; k++)
        for (unsigned byte = 0; byte < 256; byte++)
            tables[k][byte] = tables[k - 1][byte] >> 8 ^ tables[0][tables[k - 1][byte] & 255];
}

static uint32_t crc32_of(const uint8_t *p, uint32_t len)
{
    uint32_t crc = ~0u;

    for (; len >= 8; len -= 8, p += 8) {
        crc ^= (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
        crc = tables[7][crc & 255] ^ tables[6][crc >> 8 & 255] ^ tables[5][crc >> 16 & 255] ^
              tables[4][crc >> 24] ^ tables[3][p[4]] ^ tables[2][p[5]] ^ tables[1][p[6]] ^
              tables[0][p[7]];
    }
    for (; len > 0; len--, p++)
        crc = crc >> 8 ^ tables[0][(crc ^ *p) & 255];
    return ~crc;
}

void proof_block_fill(uint8_t *data, uint64_t block, uint64_t sequence)
{
    uint64_t word = (block + 1) * 0x9e3779b97f4a7c15ULL ^ (sequence + 1) * 0xd1342543de82ef95ULL;
    uint32_t crc;

    memcpy(data, PROOF_BLOCK_MAGIC, 8);
    memcpy(data + 8, &block, 8);
    memcpy(data + 16, &sequence, 8);
    for (uint32_t at = PAYLOAD_AT; at < PROOF_BLOCK_BYTES; at += 8) {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        memcpy(data + at, &word, 8);
    }
    crc = crc32_of(data, CRC_AT);
    memcpy(data + CRC_AT, &crc, 4);
}

const char *proof_block_parse(const uint8_t *data, uint64_t *ret_block, uint64_t *ret_sequence)
{
    uint32_t crc;

    if (memcmp(data, PROOF_BLOCK_MAGIC, 8) != 0)
        return "is none of the writer's";
    memcpy(&crc, data + CRC_AT, 4);
    if (crc != crc32_of(data, CRC_AT))
        return "has a wrong checksum: it is torn or damaged";
    memcpy(ret_block, data + 8, 8);
    memcpy(ret_sequence, data + 16, 8);
    return NULL;
}
