# settings.sh: names, addresses and folders of the cluster; small functions that all parts use.
unset KUBECONFIG # it would leak into sidecars, which prefer it to their own
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
HERE=$(readlink -f "$HERE")
REPO=$(readlink -f "$HERE/../..")
CACHE=${LIFEBOAT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lifeboat}
# All state of one cluster: pki run log nodes pool.img s3
STATE=${LIFEBOAT_CLUSTER_DIR:-$REPO/target/cluster}
PROGRAMS=$CACHE/programs/current
IMAGES=$CACHE/images
NODES=${LIFEBOAT_CLUSTER_NODES:-"n1 n2 n3"} # n1 carries the control plane too
API_PORT=${LIFEBOAT_API_PORT:-16443}        # on loopback of the machine
SERVICES=10.215.0.0/16 SERVICE_API=10.215.0.1 SERVICE_DNS=10.215.0.10
CONTROL_PLANE=10.213.0.11
OUTSIDE=10.213.0.1 # the bridge: a place for servers outside the cluster
S3_ADDRESS=$OUTSIDE:9100
DRIVER=csi.test.lifeboat.dev
CGROUP=lifeboat-test
STARTED=$(date +%s%N)

node_number() { echo "${1#n}"; }
node_ip() { echo "10.213.0.1$(node_number "$1")"; }
pod_range() { echo "10.214.$(node_number "$1").0/24"; }
say() { printf '%7.2f s  %s\n' "$(awk -v a="$STARTED" -v b="$(date +%s%N)" 'BEGIN { print (b - a) / 1e9 }')" "$*" >&2; }
die() { printf 'cluster: %s\n' "$*" >&2; exit 1; }
is_alive() { grep -qsE '^State:\s+[^ZX]' "/proc/$1/status"; }
pid_of() { cat "$STATE/run/$1.pid"; }
is_running() { [ -s "$STATE/run/$1.pid" ] && is_alive "$(pid_of "$1")"; }
kubectl() { "$PROGRAMS/kubectl" --kubeconfig "$STATE/pki/admin.kubeconfig" "$@"; }

# wait_for WHAT LOG COMMAND...: until COMMAND succeeds; after a minute shows the end of LOG and gives up
wait_for() {
  local what=$1 log=$2 end=$((SECONDS + ${PATIENCE:-90}))
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ "$SECONDS" -ge "$end" ]; then
      printf 'cluster: waited in vain for: %s\n' "$what" >&2
      [ ! -s "$log" ] || { printf -- '--- the end of %s\n' "$log" >&2; tail -n 25 "$log" >&2; }
      exit 1
    fi
    sleep 0.1
  done
  say "$what"
}
