# settings.sh: names, addresses and folders of the cluster; small functions that all parts use.
unset KUBECONFIG # it would leak into sidecars, which prefer it to their own
HERE=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..
HERE=$(readlink -f "$HERE")
REPO=$(readlink -f "$HERE/../..")
CACHE=${LIFEBOAT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lifeboat}
# All state of one cluster: pki run log nodes pool.img s3
STATE=${LIFEBOAT_CLUSTER_DIR:-target/cluster}
case $STATE in /*) ;; *) STATE=$REPO/$STATE ;; esac
PROGRAMS=$CACHE/programs/current
IMAGES=$CACHE/images
NODES=${LIFEBOAT_CLUSTER_NODES:-"n1 n2 n3"} # n1 carries the control plane too
[ ! -s "$STATE/run/nodes" ] || NODES=$(cat "$STATE/run/nodes") # those of `up --nodes`
API_PORT=${LIFEBOAT_API_PORT:-16443}        # on loopback of the machine
SERVICES=10.215.0.0/16 SERVICE_API=10.215.0.1 SERVICE_DNS=10.215.0.10
CONTROL_PLANE=10.213.0.11
OUTSIDE=10.213.0.1 # the bridge: a place for servers outside the cluster
S3_ADDRESS=$OUTSIDE:9100
DRIVER=csi.test.lifeboat.dev
TREE_DRIVER=tree.csi.test.lifeboat.dev # the same program with volumes that nodes share
# One name a cluster: a kubelet kills what it finds in its cgroups and does not know, so two clusters must never share them.
CGROUP=lifeboat-test-$(printf %s "$STATE" | sha256sum | cut -c1-8)
STARTED=$(date +%s%N)

node_number() { echo "${1#n}"; }
node_ip() { echo "10.213.0.1$(node_number "$1")"; }
node_hardware_address() { printf '02:00:0a:d5:00:%02x\n' "$(node_number "$1")"; }
pod_range() { echo "10.214.$(node_number "$1").0/24"; }
say() { printf '%7.2f s  %s\n' "$(awk -v a="$STARTED" -v b="$(date +%s%N)" 'BEGIN { print (b - a) / 1e9 }')" "$*" >&2; }
die() { printf 'cluster: %s\n' "$*" >&2; exit 1; }
is_alive() { grep -qsE '^State:\s+[^ZX]' "/proc/$1/status"; }
pid_of() { cat "$STATE/run/$1.pid"; }

# What the command line of a process of ours holds. A number in a file says nothing after a restart of the machine.
mark_of() {
  case $1 in
    s3) echo "$STATE/s3/iam" ;;
    forward) echo "127.0.0.1:$API_PORT" ;;
    *) echo "$STATE/run/$1.pid" ;;
  esac
}
is_running() {
  [ -s "$STATE/run/$1.pid" ] && is_alive "$(pid_of "$1")" && grep -qsaF -- "$(mark_of "$1")" "/proc/$(pid_of "$1")/cmdline"
}

# kill_now NAME: ends a process of ours and waits until it is gone
kill_now() {
  local pid
  is_running "$1" || return 0
  pid=$(pid_of "$1")
  kill -9 "$pid"
  for _ in $(seq 400); do is_alive "$pid" || return 0; sleep 0.05; done
  die "$1 (pid $pid) was killed and is still alive"
}
kubectl() { "$PROGRAMS/kubectl" --kubeconfig "$STATE/pki/admin.kubeconfig" "$@"; }

show_end() { [ ! -s "$1" ] || { printf -- '--- the end of %s\n' "$1" >&2; tail -n 25 "$1" >&2; }; }

# wait_for WHAT LOG COMMAND...: until COMMAND succeeds. After PATIENCE seconds it names what died, shows the end of LOG and gives up;
# in a start (STARTING set) already when a component has died, since waiting does not bring it back.
wait_for() {
  local what=$1 log=$2 end=$((SECONDS + ${PATIENCE:-90})) look=$((SECONDS + 4)) dead=
  shift 2
  until "$@" >/dev/null 2>&1; do
    if [ -n "${STARTING:-}" ] && [ "$SECONDS" -ge "$look" ]; then
      dead=$(dead_components)
      look=$((SECONDS + 4))
    fi
    if [ -n "$dead" ] || [ "$SECONDS" -ge "$end" ]; then
      give_up_on "$what" "$log" "${dead:-$(dead_components)}"
    fi
    sleep 0.1
  done
  say "$what"
}

give_up_on() { # WHAT LOG DEAD COMPONENTS
  local component
  printf 'cluster: waited in vain for: %s\n' "$1" >&2
  if [ -n "$3" ]; then
    for component in $3; do
      printf 'cluster: %s has died\n' "$component" >&2
      show_end "$(log_in "${component%%/*}" "${component#*/}")"
    done
  else
    show_end "$2"
  fi
  exit 1
}
