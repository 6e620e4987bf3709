# nodes.sh: a node is a set of namespaces with a first process of its own; killing that one takes the node.
# What kubelet changes in the whole kernel is remembered, and put back by `down`.
KERNEL_SETTINGS="vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys kernel/keys/root_maxbytes"

in_node() { "$HERE/node/in-node" "$@"; }

# start_in NODE NAME COMMAND...: a program in a node, as a child of the node's first process; does nothing when it runs
start_in() {
  local node=$1 name=$2
  shift 2
  in_node "$node" /bin/sh -c 'pid=/run/node/$1.pid; log=/var/log/node/$1.log; shift
    [ -s $pid ] && kill -0 $(cat $pid) 2>/dev/null && exit 0
    export PATH=/opt/node/bin:/usr/sbin:/usr/bin:/sbin:/bin
    setsid "$@" >>$log 2>&1 </dev/null & echo $! >$pid' sh "$name" "$@"
}

# signal_in NODE NAME SIGNAL
signal_in() { in_node "$1" /bin/sh -c 'kill -'"$3"' $(cat /run/node/$0.pid)' "$2"; }
log_in() { echo "$STATE/nodes/$1/var/log/node/$2.log"; }

cgroups_of_caller() { awk -F: '{ name = $2; sub(/^name=/, "", name); if ($1 == 0) name = "unified"; print name, $3 }' /proc/self/cgroup; }

# Cgroups of a node, below those of the caller, in every hierarchy; prints their folders.
make_cgroups() {
  local controller path base folder file
  cgroups_of_caller | while read -r controller path; do
    [ -d "/sys/fs/cgroup/$controller" ] || continue
    base=/sys/fs/cgroup/$controller${path%/}
    for folder in "$base/$CGROUP" "$base/$CGROUP/$1"; do
      [ -d "$folder" ] || mkdir "$folder"
      if [ "$controller" = cpuset ]; then
        for file in cpus mems; do [ -n "$(cat "$folder/cpuset.$file")" ] || cat "$folder/../cpuset.$file" >"$folder/cpuset.$file"; done
      fi
    done
    echo "$base/$CGROUP/$1"
  done
}

# Dead cgroups of a killed node must go first: kubelet would ask about each dead container for seconds.
empty_cgroups() {
  local folder
  [ -e "$STATE/run/$1.cgroups" ] || return 0
  while read -r folder; do
    [ ! -d "$folder" ] || find "$folder" -depth -mindepth 1 -type d -exec rmdir {} + 2>/dev/null || say "some cgroups of $1 are busy"
  done <"$STATE/run/$1.cgroups"
}

spawn() { # NAME [SETUP COMMAND]: namespaces with a first process
  local name=$1 setup=${2:-} groups
  is_running "$name" && return
  rm -f "$STATE/run/$name.pid"
  empty_cgroups "$name"
  groups=$(make_cgroups "$name")
  echo "$groups" >"$STATE/run/$name.cgroups"
  # shellcheck disable=SC2086
  setsid nohup bash -c 'init=$1 pid=$2 setup=$3; shift 3
    for group in "$@"; do echo $$ >"$group/cgroup.procs"; done
    exec unshare --mount --net --pid --uts --ipc --cgroup --fork --kill-child "$init" "$pid" $setup' \
    sh "$PROGRAMS/nsinit" "$STATE/run/$name.pid" "$setup" $groups >>"$STATE/log/$name.log" 2>&1 </dev/null &
}

in_switch() { nsenter -t "$(pid_of switch)" -n "$@"; }

# A bridge in a namespace of its own, and a cable from it to each node, made directly in their namespaces.
make_network() {
  local node other
  in_switch sh -c 'ip link set lo up; ip link show br0 >/dev/null 2>&1 || { ip link add br0 type bridge; ip link set br0 up; }'
  for node in $NODES; do
    in_switch ip link show "to-$node" >/dev/null 2>&1 && continue
    in_switch ip link add "to-$node" type veth peer name eth0 netns "$(pid_of "$node")"
    in_switch ip link set "to-$node" master br0 up
    {
      echo "addr add $(node_ip "$node")/24 dev eth0"
      echo "link set eth0 up"
      for other in $NODES; do [ "$other" = "$node" ] || echo "route add $(pod_range "$other") via $(node_ip "$other")"; done
      echo "route add $SERVICES dev eth0"
    } | nsenter -t "$(pid_of "$node")" -n ip -batch -
  done
  in_switch ip addr replace "$OUTSIDE/24" dev br0
  for node in $NODES; do in_switch ip route replace "$(pod_range "$node")" via "$(node_ip "$node")"; done
}

remember_kernel_settings() {
  local setting
  [ -e "$STATE/run/kernel" ] && return
  for setting in $KERNEL_SETTINGS; do echo "$setting $(cat "/proc/sys/$setting")"; done >"$STATE/run/kernel"
}

start_nodes() {
  local node
  mkdir -p "$STATE"/{run,log,nodes} "$IMAGES"
  remember_kernel_settings
  spawn switch
  for node in $NODES; do spawn "$node" "$HERE/node/node-root $node"; done
  for node in switch $NODES; do wait_for "namespaces of $node" "$STATE/log/$node.log" is_running "$node"; done
  make_network
  for node in $NODES; do start_in "$node" containerd containerd -c /etc/containerd/config.toml; done
}
