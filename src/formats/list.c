/* SPDX-License-Identifier: Apache-2.0 */
/* A line for each driver of kind format. */
#include "formats/list.h"
#include "graph/driver.h"

#include <stddef.h>

extern const struct driver luks_driver;
extern const struct driver qcow2_driver;
extern const struct driver raw_driver;
extern const struct driver vdi_driver;
extern const struct driver vhdx_driver;
extern const struct driver vmdk_driver;
extern const struct driver vpc_driver;

const struct driver *const format_drivers[] = {
    &luks_driver, &qcow2_driver, &raw_driver, &vdi_driver,
    &vhdx_driver, &vmdk_driver,  &vpc_driver, NULL,
};
