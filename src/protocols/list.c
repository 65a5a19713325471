/* SPDX-License-Identifier: Apache-2.0 */
/* A line for each driver of kind protocol. */
#include "protocols/list.h"
#include "graph/driver.h"

#include <stddef.h>

extern const struct driver file_driver;
extern const struct driver host_device_driver;
extern const struct driver null_co_driver;

const struct driver *const protocol_drivers[] = {
    &file_driver,
    &host_device_driver,
    &null_co_driver,
    NULL,
};
