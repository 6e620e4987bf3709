# api.sh: etcd and an API server alone, on loopback with free ports: for tests of the API, several at once in folders of their own.
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

api_up() { # DIR
  local dir=$1 client peer port program
  mkdir -p "$dir"
  dir=$(readlink -f "$dir")
  client=$(free_port) peer=$(free_port) port=$(free_port)
  (
    cd "$dir"
    umask 077
    make_authority
    certificate apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1"
    certificate admin /O=system:masters/CN=admin
    kubeconfig admin admin "127.0.0.1:$port"
  )
  for program in etcd apiserver; do
    case $program in
      etcd) set -- etcd --data-dir="$dir/etcd" --listen-client-urls="http://127.0.0.1:$client" --advertise-client-urls="http://127.0.0.1:$client" \
        --listen-peer-urls="http://127.0.0.1:$peer" --initial-advertise-peer-urls="http://127.0.0.1:$peer" --initial-cluster="default=http://127.0.0.1:$peer" \
        --unsafe-no-fsync --log-level=warn ;;
      apiserver) set -- kube-apiserver --etcd-servers="http://127.0.0.1:$client" --bind-address=127.0.0.1 --secure-port="$port" \
        --service-cluster-ip-range=10.99.0.0/16 --authorization-mode=RBAC --client-ca-file="$dir/ca.crt" \
        --tls-cert-file="$dir/apiserver.crt" --tls-private-key-file="$dir/apiserver.key" \
        --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$dir/sa.pub" \
        --service-account-signing-key-file="$dir/sa.key" --profiling=false --v=1 ;;
    esac
    (cd "$dir" && exec -a "$1" setsid "$PROGRAMS/$1" "${@:2}" >"$dir/$program.log" 2>&1 </dev/null &
      echo $! >"$dir/$program.pid")
  done
  wait_for "API server alone" "$dir/apiserver.log" "$PROGRAMS/kubectl" --kubeconfig "$dir/admin.kubeconfig" get --raw=/readyz
  echo "KUBECONFIG=$dir/admin.kubeconfig"
}

api_down() { # DIR
  local program pid
  for program in apiserver etcd; do
    [ -s "$1/$program.pid" ] || continue
    pid=$(cat "$1/$program.pid")
    ! is_alive "$pid" || kill -9 "$pid"
  done
  rm -rf "$1"
}
