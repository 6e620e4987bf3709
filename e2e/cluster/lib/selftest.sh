# selftest.sh: that the launcher does what its README says, on a cluster of its own beside one that may run.
passed=0
check() { # WHAT COMMAND...
  local what=$1 began=$SECONDS
  shift
  printf -- '--- %s: %s\n' "$what" "$*" >>"$report"
  "$@" >>"$report" 2>&1 || { tail -n 60 "$report" >&2; die "selftest: $what: failed: $*"; }
  passed=$((passed + 1))
  printf 'passed: %-50s %3d s\n' "$what" $((SECONDS - began))
}

# A verb as its users call it. As a function inside a condition it would go on after a failed command.
verb() { "$HERE/cluster" "$@"; }

POD='{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "self"}, "spec": {"terminationGracePeriodSeconds": 0,
  "containers": [{"name": "c", "image": "docker.io/lifeboat-e2e/busybox:1", "imagePullPolicy": "Never", "command": ["sleep", "9999"],
    "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
  "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "self"}}]}}'
CLAIM='{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "self"},
  "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}}}'
SNAPSHOT='{"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshot", "metadata": {"name": "self"},
  "spec": {"volumeSnapshotClassName": "cut", "source": {"persistentVolumeClaimName": "self"}}}'

node_is() { [ "$(kubectl get node "$1" -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}')" = "$2" ]; }
pod_is_ready() { kubectl wait --for=condition=Ready pod/self --timeout=90s; }
pod_reads_back() { [ "$(kubectl exec self -- cat /v/f)" = kept ]; }
refuses() { ! "$@"; }

up_again_is_quick() {
  local began=$SECONDS
  verb up
  [ $((SECONDS - began)) -le 15 ]
}

# What is not of one cluster and yet could be changed by one. Counts of namespaces and processes would also show other people's.
machine_state() {
  local setting
  ip -o link | awk -F': ' '{ print $2 }' | sort
  ip route
  # Tests on another cluster mount small file systems below its buckets.
  awk '$5 !~ "/s3/data/" { print $5 }' /proc/self/mountinfo | sort
  LD_LIBRARY_PATH=$PROGRAMS/deb/usr/lib/x86_64-linux-gnu "$PROGRAMS/deb/usr/sbin/nft" list ruleset
  for setting in $KERNEL_SETTINGS net/ipv4/ip_forward; do echo "$setting $(cat "/proc/sys/$setting")"; done
}
machine_is_as_before() { diff "$STATE.before" <(machine_state); }

# Everything below on a state folder, a port and cgroups of its own.
selftest() {
  if [ "${1:-}" != inside ]; then
    build
    LIFEBOAT_API_PORT=$(free_port) LIFEBOAT_CLUSTER_DIR=$STATE-selftest exec "$HERE/cluster" selftest inside
  fi
  report=$STATE.log
  mkdir -p "${STATE%/*}"
  : >"$report"
  down
  trap 'code=$?; "$HERE/cluster" down; rm -f "$STATE.before"; exit $code' EXIT
  machine_state >"$STATE.before"
  check "no trace before" verb traces
  check "a cluster comes up" verb up
  check "it is seen to be there" refuses verb traces
  check "up again is quick" up_again_is_quick
  check "a claim and a pod" kubectl create -f - <<<"$CLAIM$POD"
  check "the pod is ready" pod_is_ready
  check "the volume is written" kubectl exec self -- sh -c 'echo kept > /v/f && sync'
  check "a snapshot is made" kubectl create -f - <<<"$SNAPSHOT"
  check "the snapshot is ready" kubectl wait --for=jsonpath='{.status.readyToUse}'=true volumesnapshot/self --timeout=60s
  check "names are resolved" kubectl exec self -- nslookup kubernetes.default.svc.cluster.local
  check "a server outside is reached" kubectl exec self -- wget -q -O /dev/null "http://$S3_ADDRESS/health"
  check_faults
  check "everything goes" verb down
  check "without a trace" verb traces
  check "the machine is as it was" machine_is_as_before
  rm -f "$report"
  echo "$passed passed, 0 failed"
}

check_faults() {
  check "a fault of the CSI drivers" verb fault CreateVolume fail=1
  check "one that does not exist is refused" refuses verb fault CreateVolume explode=1
  check "faults are cleared" verb fault clear
  check "a component that does not exist is refused" refuses verb kill n1/nothing
  check "a killed sidecar" verb kill csi-provisioner
  check "starts again" verb start csi-provisioner
  check "a killed API server" verb kill apiserver
  check "is missed" refuses kubectl --request-timeout=2s get nodes
  check "starts again" verb start apiserver
  check "and answers" wait_for "API server" "$report" kubectl get --raw=/readyz
  check "a cut link" verb cut-link n3
  check "n3 is missed" wait_for "n3 Unknown" "$report" node_is n3 Unknown
  check "a healed link" verb heal-link n3
  check "n3 is Ready" wait_for "n3 Ready" "$report" node_is n3 True
  check "n2 loses its power" verb power-off n2
  check "n2 is missed" wait_for "n2 Unknown" "$report" node_is n2 Unknown
  check "n2 comes back" verb power-on n2
  check "n2 is Ready" node_is n2 True
  check "n1, with the control plane, loses its power" verb power-off n1
  check "n1 comes back" verb power-on n1
  check "n1 is Ready" node_is n1 True
  check "the pod is ready again" wait_for "pod" "$report" pod_is_ready
  check "its data is there" pod_reads_back
}
