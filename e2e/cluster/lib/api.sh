# api.sh: etcd and an API server alone, on loopback with free ports: for tests of the API, several at once in folders of their own.
free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# start_beside DIR NAME PROGRAM ARGUMENT...: a process of its own session, with NAME.pid and NAME.log in DIR
start_beside() {
  local dir=$1 name=$2
  shift 2
  setsid "$PROGRAMS/$1" "${@:2}" >"$dir/$name.log" 2>&1 </dev/null &
  echo $! >"$dir/$name.pid"
}

api_process_runs() { # DIR NAME
  local pid
  [ -s "$1/$2.pid" ] || return 1
  pid=$(cat "$1/$2.pid")
  is_alive "$pid" && grep -qsaF -- "$1/" "/proc/$pid/cmdline"
}

api_kubectl() { local dir=$1; shift; "$PROGRAMS/kubectl" --kubeconfig "$dir/admin.kubeconfig" "$@"; }

# Ready, or dead: both end the waiting
api_is_decided() { # DIR
  api_kubectl "$1" get --raw=/readyz || ! api_process_runs "$1" etcd || ! api_process_runs "$1" apiserver
}

api_start() { # DIR
  local dir=$1 client peer port
  client=$(free_port) peer=$(free_port) port=$(free_port)
  (cd "$dir" && umask 077 && kubeconfig admin admin "127.0.0.1:$port")
  start_beside "$dir" etcd etcd --data-dir="$dir/etcd" --listen-client-urls="http://127.0.0.1:$client" \
    --advertise-client-urls="http://127.0.0.1:$client" --listen-peer-urls="http://127.0.0.1:$peer" \
    --initial-advertise-peer-urls="http://127.0.0.1:$peer" --initial-cluster="default=http://127.0.0.1:$peer" \
    --unsafe-no-fsync --log-level=warn
  start_beside "$dir" apiserver kube-apiserver --etcd-servers="http://127.0.0.1:$client" --bind-address=127.0.0.1 \
    --secure-port="$port" --service-cluster-ip-range=10.99.0.0/16 --authorization-mode=RBAC --client-ca-file="$dir/ca.crt" \
    --tls-cert-file="$dir/apiserver.crt" --tls-private-key-file="$dir/apiserver.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$dir/sa.pub" \
    --service-account-signing-key-file="$dir/sa.key" --allow-privileged=true --profiling=false --v=1
  sleep 0.2 # until the names of the processes are theirs and no longer the shell's
  wait_for "API server alone" "$dir/apiserver.log" api_is_decided "$dir"
  api_kubectl "$dir" get --raw=/readyz >/dev/null 2>&1
}

api_up() { # DIR
  local dir attempt
  mkdir -p "$1"
  dir=$(readlink -f "$1")
  if api_process_runs "$dir" etcd && api_process_runs "$dir" apiserver; then
    echo "KUBECONFIG=$dir/admin.kubeconfig"
    return
  fi
  api_stop "$dir"
  (
    cd "$dir"
    umask 077
    make_authority
    certificate apiserver /CN=kube-apiserver "DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1"
    certificate admin /O=system:masters/CN=admin
  )
  # A free port may be taken by another test before it is used: then with others.
  for attempt in 1 2 3; do
    if api_start "$dir"; then
      echo "KUBECONFIG=$dir/admin.kubeconfig"
      return
    fi
    say "etcd or the API server ended at once, attempt $attempt"
    api_stop "$dir"
  done
  show_end "$dir/etcd.log"
  show_end "$dir/apiserver.log"
  die "the API server did not start"
}

api_stop() { # DIR
  local name pid
  for name in apiserver etcd; do
    api_process_runs "$1" "$name" || continue
    pid=$(cat "$1/$name.pid")
    kill -9 "$pid"
    while is_alive "$pid"; do sleep 0.05; done
  done
  rm -rf "$1/etcd"
}

api_down() { # DIR
  local dir
  [ -d "$1" ] || return 0
  dir=$(readlink -f "$1")
  [ -e "$dir/apiserver.crt" ] || die "$dir holds no API server"
  api_stop "$dir"
  rm -rf "$dir"
}
