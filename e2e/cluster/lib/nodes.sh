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
    # A client of an API server that lost its power hears nothing: it asks after 5 s, and not after 30 s, whether it is still there.
    export HTTP2_READ_IDLE_TIMEOUT_SECONDS=5 HTTP2_PING_TIMEOUT_SECONDS=3
    setsid "$@" >>$log 2>&1 </dev/null & echo $! >$pid' sh "$name" "$@"
}

# signal_in NODE NAME SIGNAL. A program with a loop around it is signalled together with its loop.
signal_in() {
  local group=
  case $2 in csi-* | snapshot-controller | kube-proxy) group=- ;; esac
  # bash, because dash has no `kill` for process groups
  in_node "$1" /bin/bash -c '[ -s "/run/node/$1.pid" ] || { echo "$1 was never started here" >&2; exit 1; }
    kill -s "$2" -- "$3$(cat "/run/node/$1.pid")"' sh "$2" "$3" "$group"
}

# NODE/NAME of every component that was started and is not alive
dead_components() {
  local node
  for node in $NODES; do
    ! is_running "$node" || in_node "$node" /bin/sh -c 'for file in /run/node/*.pid; do
      [ ! -s "$file" ] || kill -0 "$(cat "$file")" 2>/dev/null || { name=${file##*/}; echo "$1/${name%.pid}"; }
    done' sh "$node"
  done
}
log_in() { echo "$STATE/nodes/$1/var/log/node/$2.log"; }

cgroups_of_caller() { awk -F: '{ name = $2; sub(/^name=/, "", name); if ($1 == 0) name = "unified"; print name, $3 }' /proc/self/cgroup; }

# The folders of a node's cgroups, below those of the caller, in every hierarchy.
cgroup_folders() { # NAME
  local controller path
  cgroups_of_caller | while read -r controller path; do
    [ ! -d "/sys/fs/cgroup/$controller" ] || echo "/sys/fs/cgroup/$controller${path%/}/$CGROUP/$1"
  done
}

# Noted before they are made, so that `down` finds them also after a start that was broken off here.
make_cgroups() { # NAME
  local leaf folder file
  cgroup_folders "$1" >"$STATE/run/$1.cgroups"
  while read -r leaf; do
    for folder in "${leaf%/*}" "$leaf"; do
      [ -d "$folder" ] || mkdir "$folder"
      # A new cpuset has no processors and no memory, and so takes no process.
      for file in cpus mems; do
        [ ! -e "$folder/cpuset.$file" ] || [ -n "$(cat "$folder/cpuset.$file")" ] || cat "$folder/../cpuset.$file" >"$folder/cpuset.$file"
      done
    done
  done <"$STATE/run/$1.cgroups"
}

processes_in() { [ ! -d "$1" ] || find "$1" -name cgroup.procs -exec cat {} + | sort -u; }

# remove_cgroups NAME: ends what is still in a node's cgroups and removes them. The kernel lets a cgroup go only when no process
# is left in it: that they are gone proves that the node is.
#
# Also before a killed node starts again: kubelet would ask about each dead container for seconds, and the new start, from
# another shell, may have its cgroups elsewhere and forget these.
remove_cgroups() {
  local folder parent pid
  [ -e "$STATE/run/$1.cgroups" ] || return 0
  while read -r folder; do
    for pid in $(processes_in "$folder"); do ! is_alive "$pid" || kill -9 "$pid" || ! is_alive "$pid"; done
    for _ in $(seq 200); do
      [ -d "$folder" ] || break
      find "$folder" -depth -type d -exec rmdir {} + 2>/dev/null && break
      sleep 0.05
    done
    [ ! -d "$folder" ] || die "cgroup left: $folder, with the processes $(processes_in "$folder" | tr '\n' ' ')"
    parent=${folder%/*}
    if [ -d "$parent" ] && [ -z "$(find "$parent" -mindepth 1 -maxdepth 1 -type d -print -quit)" ]; then rmdir "$parent"; fi
  done <"$STATE/run/$1.cgroups"
  rm "$STATE/run/$1.cgroups"
}

spawn() { # NAME [SETUP COMMAND]: namespaces with a first process
  local name=$1 setup=${2:-} groups
  is_running "$name" && return
  rm -f "$STATE/run/$name.pid"
  remove_cgroups "$name"
  make_cgroups "$name"
  groups=$(cat "$STATE/run/$name.cgroups")
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
    if ! nsenter -t "$(pid_of "$node")" -n ip link show eth0 >/dev/null 2>&1; then
      # The other end may be left from a node that died while something still held its network.
      ! in_switch ip link show "to-$node" >/dev/null 2>&1 || in_switch ip link delete "to-$node"
      # As a machine does, a node keeps its hardware address: with a new one its neighbours would miss it for 40 s.
      in_switch ip link add "to-$node" type veth peer name eth0 address "$(node_hardware_address "$node")" netns "$(pid_of "$node")"
      in_switch ip link set "to-$node" master br0 up
    fi
    {
      echo "addr replace $(node_ip "$node")/24 dev eth0"
      echo "link set eth0 up"
      for other in $NODES; do [ "$other" = "$node" ] || echo "route replace $(pod_range "$other") via $(node_ip "$other")"; done
      echo "route replace $SERVICES dev eth0"
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
  echo "$NODES" >"$STATE/run/nodes"
  remember_kernel_settings
  spawn switch
  for node in $NODES; do spawn "$node" "$HERE/node/node-root $node"; done
  for node in switch $NODES; do wait_for "namespaces of $node" "$STATE/log/$node.log" is_running "$node"; done
  stop_stale_forwarder
  make_network
  for node in $NODES; do start_in "$node" containerd containerd -c /etc/containerd/config.toml; done
}
