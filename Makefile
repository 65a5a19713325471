# SPDX-License-Identifier: Apache-2.0
# Short names for the scripts; the build itself is meson's (meson setup build && ninja -C build).

.PHONY: check demo bench mutants format long

check:
	./check

demo:
	./demo

mutants:
	tests/mutants/run.py

format:
	git ls-files '*.c' '*.h' | xargs clang-format -i

bench:
	tests/bench/run

long:
	./check --long clang asan tsan fuzz mutants
