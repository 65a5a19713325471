#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the main() of a test program: it finds the cases by name and runs them with cmocka.

    gen-test-main.py tests/unit/test-bitmap.c OUTPUT.c

A case of test-bitmap.c is `static void test_bitmap__what_it_shows(void **state)`. Functions of the names below are
optional, take `void **state` and return int:
    setup, teardown               around each case
    group_setup, group_teardown   around all of them

The main includes the test file, so that everything in it stays static. Its arguments choose cases: a name, a part of
one, or a pattern for fnmatch(3). A choice that matches nothing is an error.
"""
import os
import re
import sys

CASE = re.compile(r"^static\s+void\s+(test_\w+)\s*\(\s*void\s*\*\*\s*\w+\s*\)", re.M)
HOOK = re.compile(
    r"^static\s+int\s+(setup|teardown|group_setup|group_teardown)\s*\(\s*void\s*\*\*\s*\w+\s*\)", re.M
)
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)

MAIN = """\
/* Made by tools/gen-test-main.py from {path}. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <fnmatch.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "seeds.h"

#include "{path}"

{wrappers}
static const struct CMUnitTest all_cases[] = {{
{table}}};

static bool case_is_chosen(const char *name, int argc, char **argv)
{{
    for (int i = 1; i < argc; i++)
        if (strstr(name, argv[i]) || fnmatch(argv[i], name, 0) == 0)
            return true;
    return argc < 2;
}}

int main(int argc, char **argv)
{{
    static struct CMUnitTest chosen[{count}];
    size_t n = 0;

    for (size_t i = 0; i < {count}; i++)
        if (case_is_chosen(all_cases[i].name, argc, argv))
            chosen[n++] = all_cases[i];
    if (n == 0) {{
        fprintf(stderr, "no case of {stem} matches\\n");
        return 99;
    }}
    setvbuf(stdout, NULL, _IOLBF, 0);
    seeds_report_on_death();
    cmocka_set_message_output(CM_OUTPUT_TAP);
    return _cmocka_run_group_tests("{stem}", chosen, n, {group_setup}, {group_teardown}) ? 1 : 0;
}}
"""

WRAPPER = """\
static int enter_{case}(void **state)
{{
    seeds_enter_case("{case}");
    {setup}
}}

"""

LEAVE = """\
static int leave_case(void **state)
{{
    seeds_leave_case();
    {teardown}
}}

"""


def fail(path, message):
    sys.exit(f"{path}: {message}")


def generate(path, text):
    stem = os.path.splitext(os.path.basename(path))[0]
    prefix = stem.replace("-", "_") + "__"
    code = COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
    cases = CASE.findall(code)
    hooks = set(HOOK.findall(code))

    if not cases:
        fail(path, f"no case found: a case is 'static void {prefix}what_it_shows(void **state)'")
    for case in cases:
        if not case.startswith(prefix):
            fail(path, f"{case}: a case of this file starts with {prefix}")
        if cases.count(case) > 1:
            fail(path, f"{case} stands there twice")

    nothing = "(void)state;\n    return 0;"
    setup = "return setup(state);" if "setup" in hooks else nothing
    teardown = "return teardown(state);" if "teardown" in hooks else nothing
    wrappers = "".join(WRAPPER.format(case=c, setup=setup) for c in cases)
    return MAIN.format(
        path=os.path.abspath(path),
        stem=stem,
        count=len(cases),
        wrappers=wrappers + LEAVE.format(teardown=teardown),
        table="".join(
            f"    cmocka_unit_test_setup_teardown({c}, enter_{c}, leave_case),\n" for c in cases
        ),
        group_setup="group_setup" if "group_setup" in hooks else "NULL",
        group_teardown="group_teardown" if "group_teardown" in hooks else "NULL",
    )


def main():
    if len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} TEST.c OUTPUT.c")
    with open(sys.argv[1], encoding="utf-8") as f:
        output = generate(sys.argv[1], f.read())
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        f.write(output)


if __name__ == "__main__":
    main()
