#!/usr/bin/env bash
# SPDX-License-Identifier: BSL-1.0
# Sets a Debian 12 or 13 machine up, builds the examples, and shows the main job: a real QEMU is saved to a file while
# it runs, the file is loaded into a vmstate::machine and saved again, and a second QEMU goes on with what we wrote. Then
# a machine of our own migrates live from one process to another, and once more by postcopy.
# The first time most of it is waiting for the compiler.
#
#   --no-install     take the machine as it is
#   --keep           leave the streams and logs behind, and say where
#   -j N             that many compilers at once (default: one per processor)
#
# $VMSTATE_BUILD_ROOT says where the build goes, instead of .build/; $VMSTATE_QEMU which QEMU to run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

install=yes
keep=no
jobs=$(nproc)
while [ $# -gt 0 ]; do
    case $1 in
        --no-install) install=no ;;
        --keep) keep=yes ;;
        -j) jobs=$2; shift ;;
        -h | --help) sed -n '3,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) echo "examples/demo.sh: what is $1? (--help)" >&2; exit 2 ;;
    esac
    shift
done

patience=120 # seconds, the most that any single wait may take
work=$(mktemp -d)
pids=()

cleanup() {
    local status=$?
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    if [ $keep = yes ]; then echo "left behind: $work"; else rm -rf "$work"; fi
    exit $status
}
trap cleanup EXIT
trap 'exit 130' INT TERM

step() { printf '\n== %s\n' "$*"; }
die() {
    echo "demo: $*" >&2
    exit 1
}

# wait_for WHAT command...: until the command succeeds.
wait_for() {
    local what=$1 deadline=$((SECONDS + patience))
    shift
    until "$@"; do
        [ $SECONDS -lt $deadline ] || die "waited $patience seconds for $what"
        sleep 0.1
    done
}
lines_in() { [ -f "$1" ] && wc -l <"$1" || echo 0; }
has_lines() { [ "$(lines_in "$1")" -ge "$2" ]; }

# A QEMU whose monitor is a pipe: what is said to it goes to $work/NAME.in, what it answers is in $work/NAME.log.
start_qemu() {
    local name=$1
    shift
    mkfifo "$work/$name.in"
    "$qemu" -M pc -accel tcg -m 64 -nic none -display none -no-user-config \
        -drive if=floppy,format=raw,readonly=on,file="$guest" -serial file:"$work/$name.serial" \
        -monitor stdio "$@" <"$work/$name.in" >"$work/$name.log" 2>&1 &
    pids+=($!)
    exec {monitor}>"$work/$name.in"
}
tell() { printf '%s\n' "$1" >&"$monitor"; }
alive() { kill -0 "${pids[-1]}" 2>/dev/null || die "QEMU has gone: $(tail -n 3 "$work/$1.log")"; }
counts() {
    alive "$1"
    has_lines "$work/$1.serial" "$2"
}

# ---- build ------------------------------------------------------------------------------------------------------

step "1. What it takes: compilers, Boost, QEMU"
[ $install = no ] || .ci/install-packages
qemu=${VMSTATE_QEMU:-qemu-system-x86_64}
command -v "$qemu" >/dev/null || die "no $qemu"
"$qemu" --version | head -n 1 || die "$qemu does not run"

step "2. Build the examples and the guest program (the first time about a minute, without a word)"
build=${VMSTATE_BUILD_ROOT:-.build}/release
if ! { cmake --preset release -B "$build" &&
    cmake --build "$build" -j "$jobs" --target keyboard hana_print vmstate-inspect vmstate-rewrite vmstate_guests
}  >"$work/build.log" 2>&1; then
    cat "$work/build.log"
    die "the examples do not build"
fi
printf '%s\n' "$build/examples/inspect/vmstate-inspect" "$build/examples/pc_devices/vmstate-rewrite" \
    "$build/examples/keyboard/keyboard" "$build/examples/hana_print/hana_print"
guest=$build/tests/guests/counter.img

# ---- the main job -----------------------------------------------------------------------------------------------

step "3. Start a QEMU: a PC that boots a program which counts on the serial port"
start_qemu source
wait_for "the guest to count" counts source 50
sleep 2
tail -n 3 "$work/source.serial"

step "4. Let it migrate to a file while it counts"
tell "migrate \"exec:cat > $work/first.state\""
migrated() {
    alive source
    tell "info migrate"
    sleep 0.2
    # "Migration status: completed", and without its first word from QEMU 10.1 on.
    ! grep -Eq '[Ss]tatus:[[:space:]]*failed' "$work/source.log" || die "QEMU could not migrate"
    grep -Eq '[Ss]tatus:[[:space:]]*completed' "$work/source.log"
}
wait_for "the migration" migrated
tell quit
wait_for "QEMU to quit" eval "! kill -0 ${pids[-1]} 2>/dev/null"
exec {monitor}>&-
before=$(lines_in "$work/source.serial")
echo "the last that it said:"
head -n "$before" "$work/source.serial" | tail -n 1
stat -c '%s bytes' "$work/first.state"

step "5. vmstate-inspect: what is in the file (the beginning, and one device)"
inspect() { timeout "$patience" "$build/examples/inspect/vmstate-inspect" "$work/first.state" "$@"; }
inspect --summary | sed -n '1,20p' || die "vmstate-inspect found something wrong"
echo "..."
inspect --device pckbd || die "vmstate-inspect found something wrong"

step "6. vmstate-rewrite: load it into a vmstate::machine, change nothing, save that"
timeout "$patience" "$build/examples/pc_devices/vmstate-rewrite" "$work/first.state" "$work/second.state" ||
    die "a section is not what it was"

step "7. Start a second QEMU on what we wrote"
start_qemu destination -incoming "exec:cat $work/second.state"
wait_for "the guest to go on" counts destination 50
tell quit
wait_for "QEMU to quit" eval "! kill -0 ${pids[-1]} 2>/dev/null"
exec {monitor}>&-

# The first QEMU may have been stopped in the middle of a line; the second one then writes the rest.
cat "$work/source.serial" "$work/destination.serial" >"$work/both.serial"
echo "the last that the first one said, and the first that the second one says:"
head -n "$before" "$work/both.serial" | tail -n 2 | sed 's/^/    first   /'
tail -n +$((before + 1)) "$work/both.serial" | head -n 3 | sed 's/^/    second  /'

# counter N ticks M: each number is the one before and one more.
head -n "$(lines_in "$work/both.serial")" "$work/both.serial" | awk '
    $1 != "counter" || (NR > 1 && $2 != last + 1) { print "line " NR " is: " $0; exit 1 }
    { last = $2 }' || die "the counter did not go on where it was"

echo
echo "The counter went on. Processor, memory, timer, interrupt controller and serial port are what they were."

# ---- live -------------------------------------------------------------------------------------------------------

step "8. live_machine: a small machine of our own goes to another process while it runs"
live=$build/examples/live_machine/live_machine
if ! cmake --build "$build" -j "$jobs" --target live_machine >"$work/live.log" 2>&1; then
    echo "SKIPPED: it does not build here; its guest takes clang and objcopy: $(tail -n 1 "$work/live.log")"
    exit 0
fi
# came_through HERE THERE: each line is "tick N"; the last one may be cut, where the program ended.
came_through() {
    local before
    before=$(lines_in "$1")
    echo "the last that its guest said here, and the first that it says there:"
    tail -n 2 "$1" | sed 's/^/    here   /'
    head -n 3 "$2" | sed 's/^/    there  /'
    cat "$1" "$2" >"$work/ticks"
    head -n "$(lines_in "$work/ticks")" "$work/ticks" | awk '$0 != "tick " NR { print "line " NR ": " $0; exit 1 }' ||
        die "a tick was lost"
    [ "$(lines_in "$work/ticks")" -gt "$before" ] || die "the guest did not go on"
}
"$live" incoming "unix:$work/live.sock" --serial "$work/there" --for 2 2>"$work/there.log" &
pids+=($!)
wait_for "the destination to listen" test -S "$work/live.sock"
# It says which processor it has: KVM's, where that can be used, and its guest is small enough for a KVM that is emulated.
timeout "$patience" "$live" run --migrate-to "unix:$work/live.sock" --after 2 --max-bandwidth 10M --dirty-rate 500 \
    --work-memory 4M --serial "$work/here" ||
    die "it could not migrate"
wait "${pids[-1]}" || die "the guest did not end well: $(tail -n 3 "$work/there.log")"
came_through "$work/here" "$work/there"
echo
echo "No tick was lost; the guest checks all of its memory and found nothing amiss."

step "9. Postcopy: the guest goes on there at once, and its memory follows it, what it touches first"
"$live" incoming "unix:$work/postcopy.sock" --postcopy-preempt --serial "$work/there.postcopy" --for 1 2>"$work/postcopy.log" &
pids+=($!)
listens_or_has_ended() { [ -S "$work/postcopy.sock" ] || ! kill -0 "${pids[-1]}" 2>/dev/null; }
wait_for "the destination to listen" listens_or_has_ended
if ! kill -0 "${pids[-1]}" 2>/dev/null; then
    echo "SKIPPED: $(tail -n 1 "$work/postcopy.log")"
    exit 0
fi
# Slow enough for a guest to be ahead of its memory.
timeout "$patience" "$live" run --migrate-to "unix:$work/postcopy.sock" --after 1 --postcopy-after 0.2s --postcopy-preempt \
    --max-bandwidth 4M --max-postcopy-bandwidth 4M --dirty-rate 2000 --work-memory 4M --serial "$work/here.postcopy" ||
    die "it could not migrate"
wait "${pids[-1]}" || die "the guest did not end well: $(tail -n 3 "$work/postcopy.log")"
came_through "$work/here.postcopy" "$work/there.postcopy"
echo "what the destination says of the pages that its guest had to wait for:"
sed -n '/^the guest waited/,$s/^/    /p' "$work/postcopy.log"
echo
echo "No tick was lost, and no page: the guest ran without most of its memory, and found all of it."
