# selftest.sh: that the launcher does what its README says.
passed=0
check() { # WHAT COMMAND...
  local what=$1
  shift
  "$@" || die "selftest: $what: failed: $*"
  passed=$((passed + 1))
  say "passed: $what"
}

POD='{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "self"}, "spec": {"terminationGracePeriodSeconds": 0,
  "containers": [{"name": "c", "image": "docker.io/lifeboat-e2e/busybox:1", "imagePullPolicy": "Never", "command": ["sleep", "9999"],
    "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
  "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "self"}}]}}'
CLAIM='{"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "self"},
  "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "64Mi"}}}}'

node_is() { [ "$(kubectl get node "$1" -o jsonpath='{.status.conditions[?(@.type=="Ready")].status}')" = "$2" ]; }

selftest() {
  local before after
  down
  before=$(traces)
  check "a cluster comes up" up
  check "up again changes nothing" up
  check "a claim and a pod" kubectl create -f - <<<"$CLAIM$POD"
  check "the pod is ready" kubectl wait --for=condition=Ready pod/self --timeout=60s
  check "the volume is written" kubectl exec self -- sh -c 'echo x > /v/f && sync && cat /v/f'
  check "names are resolved" kubectl exec self -- nslookup kubernetes.default.svc.cluster.local
  check "a server outside is reached" kubectl exec self -- wget -q -O /dev/null "http://$S3_ADDRESS/health"
  check "a node loses its power" power_off n3
  PATIENCE=60 wait_for "n3 is missed" /dev/null node_is n3 Unknown
  check "and comes back" up
  check "n3 is Ready" node_is n3 True
  check "and everything goes" down
  after=$(traces)
  check "without a trace" [ "$before" = "$after" ]
  echo "$passed passed, 0 failed"
}
