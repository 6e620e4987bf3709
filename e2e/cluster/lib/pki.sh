# pki.sh: certificates and kubeconfigs, made once.
certificate() { # NAME SUBJECT [ALTERNATIVE NAMES]
  openssl ecparam -name prime256v1 -genkey -noout -out "$1.key"
  printf 'basicConstraints=CA:FALSE\nkeyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=serverAuth,clientAuth\n' >"$1.ext"
  [ -z "${3:-}" ] || echo "subjectAltName=$3" >>"$1.ext"
  openssl req -new -key "$1.key" -subj "$2" |
    openssl x509 -req -CA ca.crt -CAkey ca.key -set_serial "0x$(openssl rand -hex 8)" -days 3650 -extfile "$1.ext" -out "$1.crt" 2>/dev/null
  rm "$1.ext"
}

kubeconfig() { # NAME CERTIFICATE SERVER
  cat >"$1.kubeconfig" <<X
apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "https://$3", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: u, user: {client-certificate-data: $(base64 -w0 "$2.crt"), client-key-data: $(base64 -w0 "$2.key")}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
X
  chmod 600 "$1.kubeconfig"
}

make_authority() {
  openssl ecparam -name prime256v1 -genkey -noout -out ca.key
  openssl req -x509 -new -key ca.key -subj /CN=lifeboat-test-ca -days 3650 -out ca.crt
  openssl genrsa -out sa.key 2048 2>/dev/null
  openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
}

make_pki() {
  local names job jobs=() n
  if [ -e "$STATE/pki/done" ]; then
    make_node_certificates
    return
  fi
  rm -rf "$STATE/pki"
  mkdir -p "$STATE/pki"
  (
    cd "$STATE/pki"
    umask 077
    make_authority
    names="DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
    certificate apiserver /CN=kube-apiserver "$names,IP:127.0.0.1,IP:$CONTROL_PLANE,IP:$SERVICE_API" & jobs+=($!)
    certificate kubelet-client /O=system:masters/CN=apiserver-kubelet-client & jobs+=($!)
    certificate front-proxy-client /CN=front-proxy-client & jobs+=($!)
    certificate admin /O=system:masters/CN=admin & jobs+=($!)
    certificate controller-manager /CN=system:kube-controller-manager & jobs+=($!)
    certificate scheduler /CN=system:kube-scheduler & jobs+=($!)
    certificate proxy /CN=system:kube-proxy & jobs+=($!)
    certificate snapshot-metadata /CN=snapshot-metadata "IP:$CONTROL_PLANE" & jobs+=($!)
    for job in "${jobs[@]}"; do wait "$job"; done
    kubeconfig admin admin "127.0.0.1:$API_PORT"      # on the machine, through the forwarder
    kubeconfig admin-inside admin "$CONTROL_PLANE:6443" # inside the nodes' network
    for n in controller-manager scheduler proxy; do kubeconfig "$n" "$n" "$CONTROL_PLANE:6443"; done
    touch done
  )
  make_node_certificates
  say "certificates"
}

# Those of the nodes, also of nodes that are added later; the kubeconfig is written last and shows that the rest is there.
make_node_certificates() {
  local node job jobs=()
  for node in $NODES; do
    [ ! -e "$STATE/pki/node-$node.kubeconfig" ] || continue
    (
      cd "$STATE/pki"
      umask 077
      certificate "kubelet-$node" "/CN=$node" "DNS:$node,IP:$(node_ip "$node")"
      certificate "node-$node" "/O=system:nodes/CN=system:node:$node"
      kubeconfig "node-$node" "node-$node" "$CONTROL_PLANE:6443"
    ) & jobs+=($!)
  done
  for job in "${jobs[@]}"; do wait "$job" || die "the certificates of a node were not made"; done
}
