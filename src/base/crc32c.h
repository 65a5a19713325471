/* SPDX-License-Identifier: Apache-2.0 */
/* CRC-32C (Castagnoli), as disk formats and networks have it: reflected, with all bits set before and inverted after. */
#ifndef CAIRN_BASE_CRC32C_H
#define CAIRN_BASE_CRC32C_H

#include <stddef.h>
#include <stdint.h>

/* `crc`: 0, or what it was for the bytes before these. */
uint32_t crc32c(uint32_t crc, const void *bytes, size_t len);

#endif
