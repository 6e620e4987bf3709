# images.sh: container images from files, without a registry, as OCI archives in the cache; and their import.
RUST_OUT=${CARGO_TARGET_DIR:-$REPO/target}
LIFEBOAT_IMAGE=docker.io/lifeboat/lifeboat:${LIFEBOAT_VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' "$REPO/Cargo.toml" | head -1)}

# make_image FILE NAME ENTRYPOINT SOURCE=DESTINATION...: unless FILE is there with the same inputs
make_image() {
  local file=$IMAGES/$1.tar mark
  shift
  mark=$({
    printf '%s\n' "$@"
    cat "$HERE/image/mkimage.py"
    for source in "${@:3}"; do
      source=${source%%=*}
      if [ -f "$source" ]; then sha256sum "$source"; fi
      if [ -d "$source" ]; then find "$source" -printf '%P %s %m %l\n' | sort; fi
    done
  } | sha256sum)
  [ -e "$file" ] && [ "$(cat "$file.inputs")" = "$mark" ] && return
  python3 "$HERE/image/mkimage.py" "$file.new" "$@"
  mv "$file.new" "$file"
  echo "$mark" >"$file.inputs"
  say "image $(basename "$file")"
}

busybox_links() { "$PROGRAMS/deb/bin/busybox" --list | grep -vx busybox | sed 's#.*#->busybox=bin/&#'; }

# The images that the cluster itself and the scenarios need.
make_base_images() {
  local busybox=$PROGRAMS/deb/bin/busybox
  mkdir -p "$IMAGES"
  make_image pause lifeboat.test/pause:1 '["/pause"]' "$PROGRAMS/pause=pause"
  make_image coredns lifeboat.test/coredns:1 '["/coredns"]' "$PROGRAMS/coredns=coredns"
  # shellcheck disable=SC2046
  make_image busybox docker.io/lifeboat-e2e/busybox:1 '[]' "$busybox=bin/busybox" "$HERE/image/passwd=etc/passwd" \
    "$HERE/image/nsswitch.conf=etc/nsswitch.conf" $(busybox_links)
}

# make_debian_image NAME IMAGE USER PACKAGES [SETTING...]: programs from Debian's packages with all that they need, unpacked. USER has id 70.
make_debian_image() {
  local name=$1 image=$2 user=$3 wanted_packages=$4 tree=$CACHE/$1-tree file packages applet wanted
  shift 4
  wanted=$(declare -f make_debian_image; echo "$image" "$user" "$wanted_packages" "$@"; cat "$HERE/image/mkimage.py")
  [ -e "$IMAGES/$name.tar" ] && [ "$(cat "$IMAGES/$name.wanted")" = "$wanted" ] && return
  rm -rf "$tree" "$CACHE/$name-packages"
  mkdir -p "$tree/tmp" "$tree/bin" "$CACHE/$name-packages"
  apt-get -qq update >&2
  # shellcheck disable=SC2086
  packages=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances $wanted_packages |
    grep '^[a-z]' | sort -u | grep -vE '^(perl.*|lib.*-perl|debconf.*|dpkg|cdebconf|ssl-cert|adduser|init-system-helpers|libllvm.*|python.*|netbase|ucf|sysvinit-utils|lsb-base|galera-.*|rsync|psmisc|lsof|socat|iproute2|gawk|mawk|logrotate|cron.*|systemd.*|dbus.*)$')
  # shellcheck disable=SC2086
  (cd "$CACHE/$name-packages" && apt-get -qq download $packages) >&2
  for file in "$CACHE/$name-packages"/*.deb; do dpkg -x "$file" "$tree"; done
  rm -rf "$tree"/usr/share/{doc,man,locale,lintian,info} "$tree/usr/lib/x86_64-linux-gnu/gconv" "$CACHE/$name-packages"
  # Without libllvm, which is as large as all the rest, PostgreSQL must not find that it could compile queries.
  rm -f "$tree"/usr/lib/postgresql/*/lib/llvmjit.so
  printf 'root:x:0:0:root:/:/bin/sh\n%s:x:70:70:%s:/tmp:/bin/sh\n' "$user" "$user" >"$tree/etc/passwd"
  printf 'root:x:0:\n%s:x:70:\n' "$user" >"$tree/etc/group"
  cp "$HERE/image/nsswitch.conf" "$tree/etc/nsswitch.conf"
  for applet in $("$tree/bin/busybox" --list | grep -vx busybox); do [ -e "$tree/bin/$applet" ] || [ -e "$tree/usr/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"; done
  make_image "$name" "$image" '[]' "$tree=/" +USER=70:70 +HOME=/tmp +LANG=C "$@"
  echo "$wanted" >"$IMAGES/$name.wanted"
  rm -rf "$tree"
}

# The databases of the scenarios.
make_database_images() {
  local path=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin
  make_debian_image postgres docker.io/lifeboat-e2e/postgres:15 postgres \
    "postgresql-15 postgresql-client-15 postgresql-common postgresql-client-common busybox-static bash procps" "+PATH=/usr/lib/postgresql/15/bin:$path"
  make_debian_image mariadb docker.io/lifeboat-e2e/mariadb:10.11 mysql "mariadb-server-core mariadb-client-core busybox-static" "+PATH=$path"
  make_debian_image redis docker.io/lifeboat-e2e/redis:7 redis "redis-server redis-tools sqlite3 busybox-static" "+PATH=$path"
  make_debian_image etcd docker.io/lifeboat-e2e/etcd:3.4 etcd "etcd-server etcd-client busybox-static" "+PATH=$path"
}

make_lifeboat_image() {
  local release=$RUST_OUT/x86_64-unknown-linux-gnu/release program
  for program in lifeboat lifeboat-agent lifeboat-controller; do
    [ -x "$release/$program" ] || die "$release/$program is missing; run \`make build\` first"
  done
  make_image lifeboat "$LIFEBOAT_IMAGE" '[]' "$release/lifeboat=lifeboat" "$release/lifeboat-agent=lifeboat-agent" \
    "$release/lifeboat-controller=lifeboat-controller" "$(certificates)=etc/ssl/certs/ca-certificates.crt" +USER=65532:65532
}

# The machine's certificate bundle, for stores that speak HTTPS.
certificates() {
  local bundle=/etc/ssl/certs/ca-certificates.crt
  if [ ! -s $bundle ]; then
    apt-get -qq update >&2
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends ca-certificates >&2
  fi
  echo $bundle
}

make_images() {
  make_base_images
  make_database_images
  make_image versitygw docker.io/lifeboat/versitygw:1 '["/versitygw"]' "$PROGRAMS/versitygw=versitygw" \
    "$PROGRAMS/deb/bin/busybox=bin/busybox" '->busybox=bin/mkdir' "$HERE/image/nsswitch.conf=etc/nsswitch.conf" +USER=65532:65532
  make_lifeboat_image
}

# import_into NODE [FILE...]: names of archives in the cache; none: those that the cluster itself needs
import_into() {
  local node=$1
  shift
  [ $# -gt 0 ] || set -- pause coredns busybox
  in_node "$node" /bin/sh -c 'export PATH=/opt/node/bin:$PATH CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1
    for i in $(seq 200); do [ -S /run/containerd/containerd.sock ] && timeout 2 ctr version >/dev/null 2>&1 && break; sleep 0.05; done
    mkdir -p /var/lib/node-images
    for name in "$@"; do
      mark=/var/lib/node-images/$name
      cmp -s /opt/node/images/$name.tar.inputs $mark && continue
      ctr -n k8s.io images import --local /opt/node/images/$name.tar >/dev/null || exit 1
      cp /opt/node/images/$name.tar.inputs $mark
    done' sh "$@"
}

import_images() {
  local node jobs=() job name names=()
  for name in pause coredns busybox postgres mariadb redis etcd versitygw lifeboat; do
    if [ -e "$IMAGES/$name.tar" ]; then names+=("$name"); else say "the image $name is not made yet and is left out; \`images\` makes it"; fi
  done
  for node in $NODES; do import_into "$node" "${names[@]}" & jobs+=($!); done
  for job in "${jobs[@]}"; do wait "$job" || die "an import failed"; done
  say "images are on all nodes"
}

# An archive from anywhere on the machine
import_file() { # FILE
  local node jobs=() job
  [ -f "$1" ] || die "there is no file $1"
  for node in $NODES; do in_node "$node" env CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 /opt/node/bin/ctr -n k8s.io images import --local - <"$1" >/dev/null & jobs+=($!); done
  for job in "${jobs[@]}"; do wait "$job" || die "an import of $1 failed"; done
}
