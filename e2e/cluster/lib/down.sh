# down.sh: removes the cluster without a trace, also after a failed start.
list_loops() { losetup -n -O NAME,BACK-INO,BACK-MAJ:MIN; }

# Devices of volumes clear themselves with the last mount; what stays is kubelet's own device on top of a raw block volume,
# and devices whose file was in a dead node's mount namespace: known by inode, since the path means nothing any more.
detach_loops() {
  local device inode number loop identity filesystem
  if [ -s "$STATE/run/pool.device" ]; then
    for loop in $(list_loops | awk -v pool="$(cat "$STATE/run/pool.device")" '$3 == pool { print $1 }'); do
      identity=$(stat -c '%i %Hd:%Ld' "$loop")
      list_loops | while read -r device inode number; do [ "$inode $number" != "$identity" ] || losetup -d "$device"; done
    done
  fi
  filesystem=$(mountpoint -d "$(stat -c %m "$STATE")")
  list_loops | while read -r device inode number; do
    [ "$number" = "$filesystem" ] || continue
    [ -z "$(find "$STATE/nodes" -xdev -inum "$inode" -print -quit)" ] || losetup -d "$device"
  done
  for _ in $(seq 60); do [ -n "$(losetup -n -O NAME -j "$STATE/pool.img")" ] || return 0; sleep 0.05; done
  say "the pool is still held: $(losetup -n -O NAME,BACK-FILE)"
}

remove_cgroups() {
  local file folder
  for file in "$STATE"/run/*.cgroups; do
    [ -e "$file" ] || continue
    while read -r folder; do
      for _ in $(seq 100); do
        [ -d "$folder" ] || break
        find "$folder" -depth -type d -exec rmdir {} + 2>/dev/null && break
        sleep 0.05
      done
      [ ! -d "$folder" ] || say "cgroup left: $folder"
      rmdir "${folder%/*}" 2>/dev/null || [ ! -d "${folder%/*}" ] || [ -n "$(find "${folder%/*}" -mindepth 1 -type d -print -quit)" ] || say "cgroup left: ${folder%/*}"
    done <"$file"
  done
}

down() {
  local name pids=() pid setting value
  [ -d "$STATE/run" ] || return 0
  for name in s3 forward $(cd "$STATE/run" && find . -name '*.cgroups' -printf '%f\n' | sed 's/\.cgroups$//'); do
    if is_running "$name"; then
      pids+=("$(pid_of "$name")")
      kill -9 "$(pid_of "$name")"
    fi
  done
  for pid in "${pids[@]}"; do
    for _ in $(seq 400); do is_alive "$pid" || break; sleep 0.05; done
    ! is_alive "$pid" || say "still alive: $pid"
  done
  remove_cgroups
  mkdir -p "$STATE/nodes"
  detach_loops
  if [ -e "$STATE/run/kernel" ]; then
    while read -r setting value; do [ "$(cat "/proc/sys/$setting")" = "$value" ] || echo "$value" >"/proc/sys/$setting"; done <"$STATE/run/kernel"
  fi
  rm -rf "$STATE"
  say "the cluster is gone"
}

# What the machine could show of a cluster: the same before `up` and after `down`.
traces() {
  local setting
  echo "links: $(ip -o link | awk -F': ' '{ print $2 }' | sort | tr '\n' ' ')"
  for kind in net mnt pid cgroup uts ipc; do echo "$kind namespaces: $(lsns -n -t $kind | wc -l)"; done
  echo "mounts: $(awk '{ print $5 }' /proc/self/mountinfo | sort | sha256sum | cut -c1-12)"
  echo "routes: $(ip route | sha256sum | cut -c1-12)"
  echo "loop devices: $(losetup -n -O NAME,BACK-FILE | grep -c lifeboat)"
  echo "cgroups: $(find /sys/fs/cgroup -type d -path "*$CGROUP*" | wc -l)"
  echo "processes: $(pgrep -fc "$CACHE/programs|/opt/node/")"
  echo "folders: $(ls -d /var/lib/kubelet /var/lib/containerd /run/containerd /etc/cni /opt/cni 2>/dev/null | tr '\n' ' ')"
  for setting in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops net/ipv4/ip_forward; do
    echo "$setting: $(cat "/proc/sys/$setting")"
  done
}
