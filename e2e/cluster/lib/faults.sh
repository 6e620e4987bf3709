# faults.sh: what goes wrong, as verbs. COMPONENT is NODE/NAME or NAME/NODE, NAME one of containerd, kubelet, kube-proxy, driver,
# tree-driver;
# or of n1, without the node: etcd, apiserver, controller-manager, scheduler and the CSI sidecars; or s3.
component() { # prints NODE NAME
  case $1 in
    etcd | apiserver | controller-manager | scheduler | csi-* | snapshot-controller) echo "n1 $1" ;;
    n[0-9]*/*) echo "${1%%/*} ${1#*/}" ;;
    */n[0-9]*) echo "${1##*/} ${1%/*}" ;;
    *) die "unknown component $1; write etcd, apiserver, controller-manager, scheduler, csi-provisioner, s3, or NODE/kubelet, NODE/containerd, NODE/driver ..." ;;
  esac
}

known_node() { case " $NODES " in *" $1 "*) ;; *) die "there is no node $1; there are: $NODES" ;; esac; }

signal_component() { # COMPONENT SIGNAL
  local resolved
  if [ "$1" = s3 ]; then
    is_running s3 || die "s3 does not run"
    kill "-$2" "$(pid_of s3)"
    return
  fi
  resolved=$(component "$1")
  signal_in "${resolved% *}" "${resolved#* }" "$2"
}

# Elsewhere the clients of an API server that is away lose their elections, end, and are started again. These have no elections:
# left alone, they ask again after up to a minute.
restart_clients() {
  in_node n1 /bin/bash -c 'for file in /run/node/{controller-manager,scheduler,csi-*,snapshot-controller}.pid; do
      pid=$(cat "$file" 2>/dev/null) && kill -s KILL -- "-$pid" 2>/dev/null || continue
      for i in {1..100}; do kill -0 "$pid" 2>/dev/null || continue 2; sleep 0.05; done
      echo "$file: it does not die" >&2
      exit 1
    done'
  start_controllers
  [ ! -e "$STATE/run/pool.device" ] || start_sidecars
}

restart_apiserver() {
  local dead
  dead=$(dead_components)
  start_apiserver
  case $dead in
    *n1/etcd* | *n1/apiserver*)
      wait_for "API server" "$(log_in n1 apiserver)" kubectl get --raw=/readyz
      restart_clients ;;
  esac
}

start_component() {
  local resolved node name
  if [ "$1" = s3 ]; then s3_start; return; fi
  resolved=$(component "$1")
  node=${resolved% *} name=${resolved#* }
  known_node "$node"
  case $name in
    etcd | apiserver) restart_apiserver ;;
    controller-manager | scheduler) start_controllers ;;
    containerd) start_in "$node" containerd containerd -c /etc/containerd/config.toml ;;
    kubelet)
      # kubelet exits when containerd does not answer
      wait_for "containerd of $node" "$(log_in "$node" containerd)" in_node "$node" /opt/node/bin/ctr version
      start_kubelet "$node" ;;
    kube-proxy) start_kube_proxy "$node" ;;
    driver) start_driver "$node" ;;
    tree-driver) start_tree_driver "$node" ;;
    csi-* | snapshot-controller) start_sidecars ;;
    *) die "unknown component $1" ;;
  esac
}

power_off() {
  known_node "$1"
  is_running "$1" || die "the node $1 does not run"
  [ "$1" != n1 ] || kill_now forward # it lives in n1's network
  kill_now "$1"
}

cut_link() { known_node "$1"; in_switch ip link set "to-$1" down; }
heal_link() { known_node "$1"; in_switch ip link set "to-$1" up; }
