/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an image is besides its content: its version, the width of its refcounts, whether they may be late. Of an image that nobody
 * else uses; docs/formats/qcow2.md says in which order it is written (AMEND-1 to AMEND-3).
 */
#ifndef CAIRN_FORMATS_QCOW2_AMEND_H
#define CAIRN_FORMATS_QCOW2_AMEND_H

#include "base/context.h"
#include "base/error.h"
#include "formats/qcow2/qcow2-header.h"

#include <stdbool.h>

struct backend;

/* What shall be another one. */
struct qcow2_amendment {
    unsigned version;       /* 2 or 3; 0: as it is */
    unsigned refcount_bits; /* 0: as they are */
    bool change_lazy;
    bool lazy_refcounts;
    const char *data_file; /* another name of the data file that the image has; NULL: as it is */
    bool data_not_raw;     /* the data file need not stay valid as a raw image */
};

/*
 * Can the image, of which this is the header, become one of version 2? -ENOTSUP with a message that names what that version does not
 * have. What only its tables say is not looked at.
 */
int qcow2_check_downgrade(const struct qcow2_header *header, struct error **err);

/*
 * On a backend of the qcow2 node that may write; no request is in flight. To version 3 first, to version 2 last; what has happened
 * before an error stays. 0, or -ENOTSUP for another driver and for what the version does not have, -ERANGE for refcounts that have
 * too few bits, -EINVAL for an image with damage.
 */
int co_fn qcow2_co_amend(struct backend *b, const struct qcow2_amendment *what, struct error **err);

#endif
