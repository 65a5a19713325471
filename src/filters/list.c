/* SPDX-License-Identifier: Apache-2.0 */
/* A line for each driver of kind filter. */
#include "filters/list.h"
#include "filters/fault/fault.h"

#include <stddef.h>

const struct driver *const filter_drivers[] = {
    &fault_driver,
    NULL,
};
