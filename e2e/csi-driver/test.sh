#!/usr/bin/env bash
# test.sh [all|quick]: the test CSI driver's own tests. quick needs neither root nor a pool.
# Everything is mounted in a mount namespace of this script's own, which ends with it; the loop
# devices clear themselves.
set -euo pipefail
self=$(readlink -f "$0")
cd "$(dirname "$self")"
what=${1:-all}
case $what in all | quick) ;; *) echo "usage: $0 [all|quick]" >&2; exit 2 ;; esac

export CGO_ENABLED=0 GOFLAGS="-mod=readonly -trimpath -buildvcs=false -gcflags=all=-dwarf=false"
if ! command -v go >/dev/null; then PATH=$PATH:/usr/local/go/bin; fi
command -v go >/dev/null || { echo "go is not on PATH" >&2; exit 1; }

packages() {
  local missing=() pair
  for pair in mkfs.btrfs:btrfs-progs mkfs.xfs:xfsprogs mkfs.ext4:e2fsprogs blkid:util-linux mount:mount; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  [ ${#missing[@]} = 0 ] && return
  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}"
}

if [ "$what" = all ] && [ -z "${LIFEBOAT_CSI_NAMESPACE:-}" ]; then
  [ "$(id -u)" = 0 ] || { echo "the pool needs root; try: $0 quick" >&2; exit 1; }
  packages >&2
  LIFEBOAT_CSI_NAMESPACE=1 exec unshare --mount --propagation private "$self" "$what"
fi

WORK=$(mktemp -d); OUT=$WORK/output; POOL_DEVICE=
passed=0 failed=0 tests=0 specs="not run"
clean() {
  local status=$?
  trap - EXIT INT TERM
  if mountpoint -q "$WORK/pool"; then
    # a volume that a failed test left mounted is in the way: deepest path first
    awk -v w="$WORK/" 'index($5, w) == 1 && $5 != w "pool" {print $5}' /proc/self/mountinfo | sort -r | while read -r m; do umount "$m" || status=1; done
    umount "$WORK/pool" || { umount --lazy "$WORK/pool"; status=1; }
  fi
  rm -rf --one-file-system "$WORK" || status=1
  exit "$status"
}
trap clean EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

stage() { # NAME COMMAND...: a failed stage does not stop the next
  local name=$1 start=$SECONDS; shift
  echo "== $name"
  if "$@" >"$OUT" 2>&1; then
    passed=$((passed + 1)); grep -E '^ +--- |group snapshots are not|^(ok|Ran) |Passed' "$OUT" || echo "ok"
  else
    failed=$((failed + 1)); cat "$OUT"
    [ ! -s "$WORK/driver.log" ] || { echo "-- end of the driver's log"; tail -20 "$WORK/driver.log"; }
    echo "FAILED: $name"
  fi
  tests=$((tests + $(grep -cE '^ *--- PASS' "$OUT" || [ $? = 1 ])))
  echo "   $((SECONDS - start)) s"
}

formatted() { local bad; bad=$(gofmt -l .); [ -z "$bad" ] || { echo "not formatted: $bad"; return 1; }; }
vetted() { go vet ./... && go vet -tags pool ./...; }
build() { go build -ldflags "-s -w" -o "$WORK/lifeboat-test-csi" . && ! ldd "$WORK/lifeboat-test-csi"; }
on_pool() { LIFEBOAT_CSI_WORK=$WORK go test -tags pool -count=1 -v -timeout 300s . "$@"; }
sanity() { # FLAGS: those of the driver
  LIFEBOAT_CSI_FLAGS=$1 on_pool -run '^TestSanity$' -args -ginkgo.no-color && grep -qE '[1-9][0-9]* Passed' "$OUT" || return 1
}
make_pool() {
  mkdir "$WORK/pool" && truncate -s 20G "$WORK/pool.img" && mkfs.btrfs -q "$WORK/pool.img" && mount -o loop,noatime "$WORK/pool.img" "$WORK/pool"
}
passed_specs() { sed -n 's/.*-- \([0-9]* Passed | [0-9]* Failed\).*/\1/p' "$OUT"; }
left_behind() { # nothing of the tests in the pool, and no loop device on it
  local bad=0 device left
  device=$(stat -c '%Hd:%Ld' "$WORK/pool/volumes")
  for d in volumes snapshots trees/volumes trees/snapshots; do
    left=$(ls "$WORK/pool/$d"); [ -z "$left" ] || { echo "left in $d: $left"; bad=1; }
  done
  left=$(find "$WORK/pool" -maxdepth 1 \( -name 'cut-*' -o -name 'freeze-*' \)); [ -z "$left" ] || { echo "left: $left"; bad=1; }
  left=$(awk -v w="$WORK/" 'index($5, w) == 1 && $5 != w "pool" {print $5}' /proc/self/mountinfo); [ -z "$left" ] || { echo "still mounted: $left"; bad=1; }
  left=$(losetup -n -O NAME,BACK-MAJ:MIN | awk -v d="$device" '$2 == d {print $1}'); [ -z "$left" ] || { echo "loop devices: $left"; bad=1; }
  return $bad
}

stage format formatted
stage vet vetted
stage unit go test -count=1 -v .
if [ "$what" = all ]; then
  stage build build
  stage pool make_pool
  stage sanity sanity ""
  specs=$(passed_specs)
  stage "sanity, file trees" sanity "--trees --pool $WORK/pool/trees"
  specs+="; of file trees: $(passed_specs)"
  stage "cuts, volumes, faults" on_pool -skip '^TestSanity$'
  stage "nothing left behind" left_behind
fi
echo "csi-driver: $passed stages passed, $failed failed; $tests tests passed; csi-sanity: $specs"
[ "$failed" = 0 ]
