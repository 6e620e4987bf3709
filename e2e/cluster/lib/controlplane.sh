# controlplane.sh: etcd, API server, controller manager and scheduler on n1; kubelet and kube-proxy everywhere; CoreDNS.
PKI=/opt/node/pki

start_apiserver() {
  start_in n1 etcd etcd --name=n1 --data-dir=/var/lib/etcd --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379 \
    --listen-peer-urls=http://127.0.0.1:2380 --initial-advertise-peer-urls=http://127.0.0.1:2380 --initial-cluster=n1=http://127.0.0.1:2380 \
    --unsafe-no-fsync --log-level=warn
  start_in n1 apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port=6443 --advertise-address=$CONTROL_PLANE \
    --service-cluster-ip-range=$SERVICES --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
    --default-not-ready-toleration-seconds=30 --default-unreachable-toleration-seconds=30 \
    --client-ca-file=$PKI/ca.crt --tls-cert-file=$PKI/apiserver.crt --tls-private-key-file=$PKI/apiserver.key \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file=$PKI/sa.pub --service-account-signing-key-file=$PKI/sa.key \
    --kubelet-certificate-authority=$PKI/ca.crt --kubelet-client-certificate=$PKI/kubelet-client.crt --kubelet-client-key=$PKI/kubelet-client.key \
    --kubelet-preferred-address-types=InternalIP --requestheader-client-ca-file=$PKI/ca.crt --requestheader-allowed-names=front-proxy-client \
    --requestheader-extra-headers-prefix=X-Remote-Extra- --requestheader-group-headers=X-Remote-Group --requestheader-username-headers=X-Remote-User \
    --proxy-client-cert-file=$PKI/front-proxy-client.crt --proxy-client-key-file=$PKI/front-proxy-client.key \
    --enable-aggregator-routing=true --allow-privileged=true --profiling=false --v=1
}

# The API server on loopback of the machine: listens here, connects inside.
# A forwarder that serves a dead n1 would keep that one's network alive, with the address that the new n1 needs.
stop_stale_forwarder() {
  ! is_running forward || [ "$(readlink "/proc/$(pid_of forward)/ns/net")" = "$(readlink "/proc/$(pid_of n1)/ns/net")" ] || kill_now forward
}

start_forwarder() {
  is_running forward && return
  setsid nohup "$PROGRAMS/forward" "127.0.0.1:$API_PORT" "/proc/$(pid_of n1)/ns/net" "$CONTROL_PLANE:6443" >>"$STATE/log/forward.log" 2>&1 </dev/null &
  echo $! >"$STATE/run/forward.pid"
}

start_controllers() {
  start_in n1 controller-manager kube-controller-manager --kubeconfig=$PKI/controller-manager.kubeconfig --bind-address=127.0.0.1 --leader-elect=false \
    --use-service-account-credentials=true --service-account-private-key-file=$PKI/sa.key --root-ca-file=$PKI/ca.crt \
    --cluster-signing-cert-file=$PKI/ca.crt --cluster-signing-key-file=$PKI/ca.key --allocate-node-cidrs=false \
    --kube-api-qps=300 --kube-api-burst=600 --node-monitor-period=2s --node-monitor-grace-period=16s --profiling=false --v=1
  start_in n1 scheduler kube-scheduler --kubeconfig=$PKI/scheduler.kubeconfig --kube-api-qps=300 --kube-api-burst=600 \
    --bind-address=127.0.0.1 --leader-elect=false --profiling=false --v=1
}

start_kubelet() { # NODE
  start_in "$1" kubelet kubelet --config=/etc/kubernetes/kubelet.yaml --kubeconfig="$PKI/node-$1.kubeconfig" --hostname-override="$1" \
    --node-ip="$(node_ip "$1")" --root-dir=/var/lib/kubelet
}

# Of a service map that is right, the full sync of kube-proxy 1.37.2 leaves nothing, and there is one at its start and one each hour:
# no address of a service can be reached then. So it starts without its tables, and again before an hour is over.
start_kube_proxy() {
  start_in "$1" kube-proxy /bin/bash -c 'while :; do
      for family in ip ip6; do ! nft list table $family kube-proxy >/dev/null 2>&1 || nft delete table $family kube-proxy; done
      timeout --foreground 50m "$@"
      sleep 0.2
    done' sh kube-proxy --config=/etc/kubernetes/kube-proxy.yaml --v=1
}

# Nodes that were Ready before a crash still look so: a heartbeat or a lease must be younger than this start.
nodes_are_ready() {
  local since count
  since=$(date -u -d "@$((STARTED / 1000000000))" +%Y-%m-%dT%H:%M:%S)
  count=$(echo "$NODES" | wc -w)
  [ "$(kubectl get nodes -o jsonpath='{range .items[*]}{.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}' | grep -c True)" = "$count" ] || return 1
  [ "$({
    kubectl get nodes -o jsonpath='{range .items[*]}{.status.conditions[?(@.type=="Ready")].lastHeartbeatTime} {.metadata.name}{"\n"}{end}'
    kubectl -n kube-node-lease get leases -o jsonpath='{range .items[*]}{.spec.renewTime} {.metadata.name}{"\n"}{end}'
  } | awk -v since="$since" '$1 > since && !seen[$2]++ { n++ } END { print n + 0 }')" = "$count" ]
}

start_control_plane() {
  local node imports=() job
  start_apiserver
  start_forwarder
  for node in $NODES; do import_into "$node" & imports+=($!); done
  wait_for "API server" "$(log_in n1 apiserver)" kubectl get --raw=/readyz
  start_controllers
  for job in "${imports[@]}"; do wait "$job" || die "images were not imported; see $STATE/log"; done
  for node in $NODES; do
    start_kubelet "$node"
    start_kube_proxy "$node"
  done
  kubectl apply --server-side --force-conflicts --validate=false -f "$HERE/conf/coredns.yaml" >/dev/null
  wait_for "all nodes are Ready" "$(log_in n1 kubelet)" nodes_are_ready
  kubectl label node n1 node-role.kubernetes.io/control-plane= --overwrite >/dev/null
  wait_for "default service account" "$(log_in n1 controller-manager)" kubectl get serviceaccount default
  wait_for "CoreDNS" "$(log_in n1 kubelet)" kubectl -n kube-system rollout status deployment/coredns --timeout=4s
}
