/* SPDX-License-Identifier: Apache-2.0 */
/* What the tool says of sizes, rates and formats. */
#include "base/macros.h"
#include "cli/layers.h"
#include "cli/progress.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include <string.h>

static void says_size(uint64_t bytes, const char *text)
{
    char buf[32];

    size_text(buf, sizeof(buf), bytes);
    assert_string_equal(buf, text);
}

static void test_cli__sizes_are_read_easily(void **state)
{
    (void)state;
    says_size(0, "0 B");
    says_size(1023, "1023 B");
    says_size(1024, "1.0 KiB");
    says_size(1536, "1.5 KiB");
    says_size(MIB - 1, "1.0 MiB");
    says_size(GIB, "1.0 GiB");
    says_size(UINT64_MAX, "16.0 EiB");
}

static void test_cli__a_line_fits_its_terminal(void **state)
{
    char line[256];

    (void)state;
    progress_line(line, sizeof(line), 100, "full", GIB, 2 * GIB, (double)(100 * MIB));
    assert_non_null(strstr(line, "full [####"));
    assert_non_null(strstr(line, "] "));
    assert_non_null(strstr(line, " 50 %  1.0 GiB of 2.0 GiB  100.0 MiB/s  10 s left"));
    progress_line(line, sizeof(line), 60, "full", GIB, 2 * GIB, (double)(100 * MIB));
    assert_non_null(strstr(line, "#."));
    assert_non_null(strstr(line, " 50 %  100.0 MiB/s  10 s left"));
    progress_line(line, sizeof(line), 40, "full", GIB, 2 * GIB, (double)(100 * MIB));
    assert_string_equal(line, "full  50 %  100.0 MiB/s  10 s left");
    for (unsigned width = 1; width < 200; width++) {
        progress_line(line, sizeof(line), width, "incremental", 3, 7, 1e15);
        if (strlen(line) > width)
            fail_msg("%zu columns of %u: %s", strlen(line), width, line);
        progress_line(line, sizeof(line), width, "full", 0, 0, 0);
        assert_true(strlen(line) <= width);
    }
    progress_line(line, sizeof(line), 100, "full", 9, 7, 0); /* more than all */
    assert_non_null(strstr(line, "100 %"));
    assert_null(strchr(line, '.'));
}

static void test_cli__a_rate_follows_what_happens(void **state)
{
    struct rate r = {.begun = false};

    (void)state;
    rate_see(&r, 1000, 500);
    assert_true(r.bytes_per_second < 1); /* where it began says nothing */
    rate_see(&r, 2000, 1500);
    assert_true(r.bytes_per_second > 999 && r.bytes_per_second < 1001);
    rate_see(&r, 3000, 1500);
    assert_true(r.bytes_per_second > 799 && r.bytes_per_second < 801);
    rate_see(&r, 4000, 100); /* another one of the same name */
    assert_true(r.bytes_per_second < 1);
}

static void probes(const char *path, const char *bytes, size_t len, const char *format)
{
    assert_string_equal(layers_probe(path, bytes, len), format);
}

static void test_cli__formats_are_probed_by_what_they_begin_with(void **state)
{
    char sector[512] = "";

    (void)state;
    probes("d", "", 0, "raw");
    probes("d", sector, sizeof(sector), "raw");
    probes("d", "QFI\xfb\0\0\0\3", 8, "qcow2");
    probes("d", "QFI\xfb\0\0\0\2", 8, "qcow2");
    probes("d", "QFI\xfb\0\0\0\1", 8, "qcow");
    probes("d", "QFI\xfb\0\0\0", 7, "raw");           /* too short to be one */
    probes("d.qcow2", sector, sizeof(sector), "raw"); /* names say nothing */
    probes("d.raw", "KDMV", 4, "vmdk");
    probes("d", "QED\0", 4, "qed");
    probes("d", "LUKS\xba\xbe\0\1", 8, "luks");
    memcpy(sector + 64, "\x7f\x10\xda\xbe", 4);
    probes("d", sector, sizeof(sector), "vdi");
    probes("d", sector, 67, "raw");
    probes("x.dmg", "", 0, "dmg");
}
