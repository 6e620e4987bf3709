# csi.sh: the test CSI driver on every node, the published sidecars on n1, snapshot CRDs and classes.
SOCKET=/var/lib/kubelet/plugins/$DRIVER/csi.sock

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

start_driver() {
  start_in "$1" driver lifeboat-test-csi --driver-name "$DRIVER" --endpoint "unix://$SOCKET" --node-id "$1" --pool /run/pool \
    --registration-dir /var/lib/kubelet/plugins_registry
}

start_sidecars() {
  local config=$PKI/admin-inside.kubeconfig rate="--kube-api-qps=200 --kube-api-burst=400" retry="--retry-interval-start=200ms" name
  in_node n1 sh -c "for i in \$(seq 100); do [ -S $SOCKET ] && exit 0; sleep 0.05; done; exit 1" || die "the CSI driver has no socket: $(tail -5 "$(log_in n1 driver)")"
  # shellcheck disable=SC2086
  for name in provisioner attacher resizer snapshotter; do
    case $name in
      provisioner) set -- --extra-create-metadata --default-fstype=ext4 ;;
      attacher) set -- --default-fstype=ext4 ;;
      snapshotter) set -- --extra-create-metadata ;;
      *) set -- ;;
    esac
    keep_in n1 "csi-$name" "csi-$name" --csi-address=$SOCKET --kubeconfig=$config $retry $rate "$@"
  done
  # shellcheck disable=SC2086
  keep_in n1 snapshot-controller snapshot-controller --kubeconfig=$config $retry $rate
  keep_in n1 csi-snapshot-metadata env POD_NAMESPACE=default POD_NAME=n1 csi-snapshot-metadata --csi-address=$SOCKET --kubeconfig=$config \
    --tls-cert=$PKI/snapshot-metadata.crt --tls-key=$PKI/snapshot-metadata.key --port=50051 --http-endpoint=127.0.0.1:18081
}

driver_is_registered() {
  [ "$(kubectl get csinodes -o jsonpath="{range .items[*]}{.spec.drivers[?(@.name=='$DRIVER')].nodeID}{'\n'}{end}" | grep -c .)" = "$(echo "$NODES" | wc -w)" ]
}

start_csi() {
  local node
  mount_pool
  for node in $NODES; do start_driver "$node"; done
  kubectl apply --server-side --force-conflicts -f "$PROGRAMS/crd" >/dev/null
  kubectl wait --for=condition=Established crd --all --timeout=30s >/dev/null
  sed "s#@DRV@#$DRIVER#g; s#@ADDR@#$CONTROL_PLANE:50051#; s#@CA@#$(base64 -w0 "$STATE/pki/ca.crt")#" "$HERE/conf/csi.yaml" |
    kubectl apply --server-side --force-conflicts -f - >/dev/null
  start_sidecars
  wait_for "CSI driver is registered on all nodes" "$(log_in n1 driver)" driver_is_registered
  # `down` knows the volumes' loop devices by the pool's device number.
  in_node n1 stat -c '%Hd:%Ld' /run/pool >"$STATE/run/pool.device"
}
