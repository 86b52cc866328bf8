#!/usr/bin/env bash
# SPDX-License-Identifier: BSL-1.0
# Sets a Debian 12 or 13 machine up, builds vmstate and runs every test. Ends with CTest's summary of each build;
# exits with 0 only if nothing failed.
#
#   --sanitizers     also with address+undefined, then with thread sanitizer
#   --soak           long: fuzz targets run for ten minutes each; tests that know $VMSTATE_SOAK go on for longer
#   --filter REGEX   only tests whose name matches
#   --preset NAME    this build instead of release; may be given more than once
#   --label REGEX    only tests whose label matches: unit, compile_fail, docs, interop, live, fuzz, package,
#                    hostile
#   --werror         warnings are errors
#   --no-install     take the machine as it is
#   -j N             that many jobs (default: one per processor)
#
# $VMSTATE_BUILD_ROOT says where the builds go, instead of .build/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

presets=()
sanitizers=no
install=yes
jobs=$(nproc)
fuzz_seconds=10
options=(-DVMSTATE_WERROR=OFF)
ctest_options=()
while [ $# -gt 0 ]; do
    case $1 in
        --sanitizers) sanitizers=yes ;;
        --soak) fuzz_seconds=600; export VMSTATE_SOAK=1 ;;
        --filter) ctest_options+=(-R "$2"); shift ;;
        --label) ctest_options+=(-L "$2"); shift ;;
        --preset) presets+=("$2"); shift ;;
        --werror) options=(-DVMSTATE_WERROR=ON) ;;
        --no-install) install=no ;;
        -j) jobs=$2; shift ;;
        -h | --help) sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) echo "tests/run.sh: what is $1? (--help)" >&2; exit 2 ;;
    esac
    shift
done
[ ${#presets[@]} -gt 0 ] || presets=(release)
[ $sanitizers = no ] || presets+=(asan-ubsan tsan)
[ $install = no ] || .ci/install-packages

summaries=()
failed=no
for preset in "${presets[@]}"; do
    build=${VMSTATE_BUILD_ROOT:-.build}/$preset
    # Thread sanitizer wants its shadow where a kernel with much address randomisation may have put something else.
    run=()
    [ "$preset" != tsan ] || run=(setarch -R)
    # What only asks compilers, or builds a project of its own, has nothing to learn from how this build was made.
    some=()
    [ "$preset" = "${presets[0]}" ] && [[ $preset != *san ]] || some=(-LE '^(compile_fail|docs|headers|package)$')

    echo "== $preset: configure and build"
    log=$(mktemp)
    if cmake --preset "$preset" -B "$build" "${options[@]}" -DVMSTATE_FUZZ_SECONDS=$fuzz_seconds >"$log" 2>&1 \
        || { cat "$log"; false; }; then
        grep -A3 -i warning "$log" || true
        if "${run[@]}" cmake --build "$build" -j "$jobs" -- -k 0; then
            echo "== $preset: test"
            "${run[@]}" ctest --test-dir "$build" --output-on-failure --no-tests=error -j "$jobs" \
                "${some[@]}" "${ctest_options[@]}" 2>&1 | tee "$log" || failed=yes
            summaries+=("$preset: $(sed -n '/tests passed/,$p' "$log")")
        else
            failed=yes
            summaries+=("$preset: does not build")
        fi
    else
        failed=yes
        summaries+=("$preset: cannot be configured")
    fi
    rm -f "$log"
done

echo
printf '%s\n' "${summaries[@]}"
[ $failed = no ]
