/* SPDX-License-Identifier: Apache-2.0 */
/* What a check has found, printed as `qemu-img check` does. */
#include "cli/image/check-print.h"
#include "cli/cli.h"

#include <inttypes.h>
#include <stdio.h>

enum check_status check_status_of(const struct qcow2_check_result *r)
{
    if (r->check_errors)
        return CHECK_FAILED;
    if (r->corruptions)
        return CHECK_CORRUPT;
    return r->leaks ? CHECK_LEAKS : CHECK_SOUND;
}

static void set_count(json_t *object, const char *key, uint64_t value, bool always)
{
    if (value || always)
        json_object_set_new(object, key, json_integer((json_int_t)value));
}

void check_print_json(json_t *o, const struct qcow2_check_result *r)
{
    set_count(o, "check-errors", r->check_errors, true);
    set_count(o, "image-end-offset", r->image_end_offset, false);
    set_count(o, "corruptions", r->corruptions, false);
    set_count(o, "leaks", r->leaks, false);
    set_count(o, "corruptions-fixed", r->corruptions_fixed, false);
    set_count(o, "leaks-fixed", r->leaks_fixed, false);
    set_count(o, "total-clusters", r->total_clusters, false);
    set_count(o, "allocated-clusters", r->allocated_clusters, false);
    set_count(o, "fragmented-clusters", r->fragmented_clusters, false);
    set_count(o, "compressed-clusters", r->compressed_clusters, false);
    cli_print_json(o, true);
}

static void print_findings(const struct qcow2_check_result *r)
{
    if (!(r->corruptions || r->leaks || r->check_errors)) {
        printf("No errors were found on the image.\n");
        return;
    }
    if (r->corruptions)
        printf("\n%" PRIu64 " errors were found on the image.\n"
               "Data may be corrupted, or further writes to the image may corrupt it.\n",
               r->corruptions);
    if (r->leaks)
        printf("\n%" PRIu64 " leaked clusters were found on the image.\n"
               "This means waste of disk space, but no harm to data.\n",
               r->leaks);
    if (r->check_errors)
        printf("\n%" PRIu64 " internal errors have occurred during the check.\n", r->check_errors);
}

static double percent(uint64_t part, uint64_t whole)
{
    return (double)part * 100.0 / (double)whole;
}

void check_print_text(const struct qcow2_check_result *r)
{
    if (r->corruptions_fixed || r->leaks_fixed)
        printf("The following inconsistencies were found and repaired:\n\n"
               "    %" PRIu64 " leaked clusters\n    %" PRIu64 " corruptions\n\n"
               "Double checking the fixed image now...\n",
               r->leaks_fixed, r->corruptions_fixed);
    print_findings(r);
    if (r->total_clusters && r->allocated_clusters)
        printf("%" PRIu64 "/%" PRIu64 " = %.2f%% allocated, %.2f%% fragmented, %.2f%% compressed "
               "clusters\n",
               r->allocated_clusters, r->total_clusters,
               percent(r->allocated_clusters, r->total_clusters),
               percent(r->fragmented_clusters, r->allocated_clusters),
               percent(r->compressed_clusters, r->allocated_clusters));
    if (r->image_end_offset)
        printf("Image end offset: %" PRIu64 "\n", r->image_end_offset);
}
