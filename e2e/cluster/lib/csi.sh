# csi.sh: the test CSI drivers on every node, the published sidecars on n1, snapshot CRDs and classes.
SOCKET=/var/lib/kubelet/plugins/$DRIVER/csi.sock
TREE_SOCKET=/var/lib/kubelet/plugins/$TREE_DRIVER/csi.sock
FAULTS=/run/pool/faults

# One btrfs image on one loop device, mounted in every node's own mount namespace: one file system.
# The device is let go at once, so that it clears itself with the last node's mount.
mount_pool() {
  local device new= node
  [ -e "$STATE/pool.img" ] || { truncate -s "${LIFEBOAT_POOL_SIZE:-16G}" "$STATE/pool.img"; mkfs.btrfs -q "$STATE/pool.img" >/dev/null; }
  device=$(losetup -n -O NAME -j "$STATE/pool.img" | head -1)
  [ -n "$device" ] || { device=$(losetup --show -f "$STATE/pool.img"); new=1; }
  for node in $NODES; do in_node "$node" sh -c "mkdir -p /run/pool; mountpoint -q /run/pool || mount -t btrfs $device /run/pool"; done
  [ -z "$new" ] || losetup -d "$device"
}

# Sidecars exit when they lost their driver, but only at their next call: a loop starts them again.
keep_in() { # NODE NAME COMMAND...
  local node=$1 name=$2
  shift 2
  start_in "$node" "$name" /bin/sh -c 'while :; do "$@"; sleep 0.2; done' sh "$@"
}

start_driver() { # NODE
  start_in "$1" driver lifeboat-test-csi --driver-name "$DRIVER" --endpoint "unix://$SOCKET" --node-id "$1" --pool /run/pool \
    --faults $FAULTS --registration-dir /var/lib/kubelet/plugins_registry
}

start_tree_driver() { # NODE
  start_in "$1" tree-driver lifeboat-test-csi --driver-name "$TREE_DRIVER" --endpoint "unix://$TREE_SOCKET" --node-id "$1" --pool /run/pool/trees \
    --trees --faults $FAULTS --registration-dir /var/lib/kubelet/plugins_registry
}

# keep_sidecars PREFIX SOCKET NAME...: sidecars of one driver
keep_sidecars() {
  local prefix=$1 socket=$2 name arguments
  shift 2
  for name in "$@"; do
    arguments=()
    case $name in provisioner | snapshotter) arguments=(--extra-create-metadata) ;; esac
    # What has a file system of its own says which.
    case $socket:$name in "$SOCKET:provisioner" | "$SOCKET:attacher") arguments+=(--default-fstype=ext4) ;; esac
    keep_in n1 "$prefix-$name" "csi-$name" --csi-address="$socket" "${SIDECARS[@]}" "${arguments[@]}"
  done
}

start_sidecars() {
  local socket
  SIDECARS=(--kubeconfig="$PKI/admin-inside.kubeconfig" --retry-interval-start=200ms --retry-interval-max=5s --kube-api-qps=200 --kube-api-burst=400)
  for socket in $SOCKET $TREE_SOCKET; do
    in_node n1 sh -c "for i in \$(seq 100); do [ -S $socket ] && exit 0; sleep 0.05; done; exit 1" ||
      die "a CSI driver has no socket: $(tail -5 "$(log_in n1 driver)" "$(log_in n1 tree-driver)")"
  done
  keep_sidecars csi "$SOCKET" provisioner attacher resizer snapshotter
  keep_sidecars csi-tree "$TREE_SOCKET" provisioner resizer snapshotter
  keep_in n1 snapshot-controller snapshot-controller "${SIDECARS[@]}"
  keep_in n1 csi-snapshot-metadata env POD_NAMESPACE=default POD_NAME=n1 csi-snapshot-metadata --csi-address=$SOCKET --kubeconfig="$PKI/admin-inside.kubeconfig" \
    --tls-cert="$PKI/snapshot-metadata.crt" --tls-key="$PKI/snapshot-metadata.key" --port=50051 --http-endpoint=127.0.0.1:18081
}

drivers_are_registered() {
  local driver
  for driver in "$DRIVER" "$TREE_DRIVER"; do
    [ "$(kubectl get csinodes -o jsonpath="{range .items[*]}{.spec.drivers[?(@.name=='$driver')].nodeID}{'\n'}{end}" | grep -c .)" = "$(echo "$NODES" | wc -w)" ] || return 1
  done
}

# What goes wrong in the drivers, on purpose: e2e/csi-driver/README.md has the words.
fault() { in_node n1 /opt/node/bin/lifeboat-test-csi fault $FAULTS "$@"; }

start_csi() {
  local node
  mount_pool
  for node in $NODES; do
    start_driver "$node"
    start_tree_driver "$node"
  done
  kubectl apply --server-side --force-conflicts -f "$PROGRAMS/crd" >/dev/null
  kubectl wait --for=condition=Established crd --all --timeout=30s >/dev/null
  sed "s#@DRV@#$DRIVER#g; s#@TREE_DRV@#$TREE_DRIVER#g; s#@ADDR@#$CONTROL_PLANE:50051#; s#@CA@#$(base64 -w0 "$STATE/pki/ca.crt")#" "$HERE/conf/csi.yaml" |
    kubectl apply --server-side --force-conflicts -f - >/dev/null
  start_sidecars
  wait_for "CSI drivers are registered on all nodes" "$(log_in n1 driver)" drivers_are_registered
  # `down` knows the volumes' loop devices by the pool's device number.
  in_node n1 stat -c '%Hd:%Ld' /run/pool >"$STATE/run/pool.device"
}
