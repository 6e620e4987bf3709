# faults.sh: what goes wrong, as verbs. COMPONENT is NODE/NAME, NAME one of containerd, kubelet, kube-proxy, driver; or of n1
# etcd, apiserver, controller-manager, scheduler without the node; or s3.
component() { # prints NODE NAME
  case $1 in
    etcd | apiserver | controller-manager | scheduler) echo "n1 $1" ;;
    n[0-9]*/*) echo "${1%%/*} ${1#*/}" ;;
    *) die "unknown component $1; write etcd, apiserver, controller-manager, scheduler, s3 or NODE/kubelet, NODE/containerd, ..." ;;
  esac
}

signal_component() { # COMPONENT SIGNAL
  local node name
  if [ "$1" = s3 ]; then kill "-$2" "$(pid_of s3)"; return; fi
  read -r node name <<<"$(component "$1")"
  signal_in "$node" "$name" "$2"
}

start_component() {
  local node name
  if [ "$1" = s3 ]; then s3_start; return; fi
  read -r node name <<<"$(component "$1")"
  case $name in
    etcd | apiserver) start_apiserver ;;
    controller-manager | scheduler) start_controllers ;;
    containerd) start_in "$node" containerd containerd -c /etc/containerd/config.toml ;;
    kubelet)
      # kubelet exits when containerd does not answer
      wait_for "containerd of $node" "$(log_in "$node" containerd)" in_node "$node" /opt/node/bin/ctr version
      start_kubelet "$node" ;;
    kube-proxy) start_kube_proxy "$node" ;;
    driver) start_driver "$node" ;;
    *) die "unknown component $1" ;;
  esac
}

power_off() { kill -9 "$(pid_of "$1")"; while is_alive "$(pid_of "$1")"; do sleep 0.05; done; }
cut_link() { in_switch ip link set "to-$1" down; }
heal_link() { in_switch ip link set "to-$1" up; }
