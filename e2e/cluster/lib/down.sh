# down.sh: removes the cluster without a trace, also after a failed start; and shows what is left of one.
list_loops() { # losetup fails, without a word, when a device is cleared while it looks
  local list
  for _ in $(seq 10); do
    if list=$(losetup -n -O NAME,BACK-INO,BACK-MAJ:MIN); then
      echo "$list"
      return
    fi
    sleep 0.1
  done
  die "the loop devices cannot be listed"
}

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
  if [ -d "$STATE/nodes" ]; then
    filesystem=$(mountpoint -d "$(stat -c %m "$STATE")")
    list_loops | while read -r device inode number; do
      [ "$number" = "$filesystem" ] || continue
      [ -z "$(find "$STATE/nodes" -xdev -inum "$inode" -print -quit)" ] || losetup -d "$device"
    done
  fi
  for _ in $(seq 100); do [ -n "$(losetup -n -O NAME -j "$STATE/pool.img")" ] || return 0; sleep 0.05; done
  die "the pool is still held: $(losetup -n -O NAME,BACK-FILE -j "$STATE/pool.img")"
}

restore_kernel_settings() {
  local setting value
  [ -e "$STATE/run/kernel" ] || return 0
  while read -r setting value; do [ "$(cat "/proc/sys/$setting")" = "$value" ] || echo "$value" >"/proc/sys/$setting"; done <"$STATE/run/kernel"
}

down() {
  local name
  [ -d "$STATE" ] || return 0
  for name in s3 forward $NODES switch; do kill_now "$name"; done
  # By what was noted before a process was put there: also a node that was still being made when its start was broken off.
  for name in $(find "$STATE" -path '*/run/*.cgroups' -maxdepth 2 -printf '%f\n'); do remove_cgroups "${name%.cgroups}"; done
  detach_loops
  restore_kernel_settings
  rm -rf "$STATE"
  say "the cluster is gone"
}

# What is left of this cluster, one thing a line; fails when there is anything.
traces() {
  local found
  found=$(list_traces)
  if [ -z "$found" ]; then
    say "no trace of a cluster in $STATE"
    return 0
  fi
  echo "$found"
  return 1
}

# Not of this process, whose own name may hold the same words.
list_traces() {
  local process folder file command
  for process in /proc/[0-9]*; do
    if [ "${process#/proc/}" = "$$" ] || ! is_alive "${process#/proc/}"; then continue; fi
    if grep -qs "/$CGROUP/" "$process/cgroup"; then
      echo "process of a node: ${process#/proc/} $(tr '\0' ' ' 2>/dev/null <"$process/cmdline" | cut -c1-100)"
      continue
    fi
    if ! command=$(tr '\0' ' ' 2>/dev/null <"$process/cmdline"); then continue; fi # it has ended
    case $command in
      *"/forward 127.0.0.1:$API_PORT "* | *"$STATE/run/"* | *"$STATE/s3/"*) echo "process: ${process#/proc/} ${command:0:100}" ;;
    esac
  done
  find /sys/fs/cgroup -ignore_readdir_race -type d -name "$CGROUP" -printf 'cgroup: %p\n'
  awk -v state="$STATE/" 'index($0, state) { print "mount: " $5 }' /proc/self/mountinfo
  for file in /sys/block/loop*/loop/backing_file; do
    # Devices of others may be cleared meanwhile.
    if command=$(cat "$file" 2>/dev/null); then case $command in "$STATE"/*) echo "loop device: $file $command" ;; esac; fi
  done
  for folder in /var/lib/kubelet /var/lib/containerd /run/containerd /etc/cni /opt/cni /opt/node; do
    [ ! -e "$folder" ] || echo "folder of a node on the machine: $folder"
  done
  [ ! -e "$STATE" ] || echo "state: $STATE"
}
