# programs.sh: everything that the cluster runs, built from published sources into the cache, one folder a part and version.
PARTS="packages small kube containerd cni coredns runc csi driver s3 helm"
# Raise it when the way of building changes.
RECIPE=1
GO_FLAGS=(-trimpath -buildvcs=false -gcflags=all=-dwarf=false)

needed_tools() {
  local missing=() pair
  for pair in cc:gcc pkg-config:pkg-config openssl:openssl python3:python3 ip:iproute2 losetup:mount nsenter:util-linux \
    mkfs.btrfs:btrfs-progs mkfs.xfs:xfsprogs mkfs.ext4:e2fsprogs column:bsdextrautils sysctl:procps hostname:hostname; do
    command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
  done
  [ -e /usr/include/stdio.h ] || missing+=(libc6-dev)
  [ ${#missing[@]} -eq 0 ] && return
  say "installing ${missing[*]}"
  apt-get -qq update >&2
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2
}

# What a part is made from; another input is another folder.
part_inputs() {
  case $1 in
    packages) echo nftables libnftables1 libnftnl11 busybox-static libseccomp-dev libseccomp2 ;;
    small) cat "$HERE/node/nsinit.c" "$HERE/image/pause.c" "$HERE/node/forward.rs" ;;
    kube | containerd | cni | coredns | runc) cat "$HERE/modules/kube/go.mod" "$HERE"/modules/kube/*/*.go ;;
    driver) cat "$REPO"/e2e/csi-driver/*.go "$REPO/e2e/csi-driver/go.mod" ;;
    csi | s3 | helm) cat "$HERE/modules/$1/go.mod" ;;
    *) die "unknown part $1; there are: $PARTS" ;;
  esac
  echo "recipe $RECIPE"
}

part_folder() { echo "$CACHE/programs/$1-$(part_inputs "$1" | sha256sum | cut -c1-16)"; }

# go_build MODULE OUT PACKAGE...: static programs of a module
go_build() {
  local module=$1 out=$2
  shift 2
  (cd "$module" && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build "${GO_FLAGS[@]}" -ldflags "-s -w ${LINK:-}" -o "$out" "$@")
}

module_version() { (cd "$HERE/modules/kube" && go list -mod=readonly -m -f '{{.Version}}' "$1"); }

kube_link_flags() { # Kubernetes asks its own version at run time
  local version=$1 package minor
  minor=${version#v*.}
  for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
    printf -- '-X %s.gitVersion=%s -X %s.gitMajor=1 -X %s.gitMinor=%s -X %s.gitTreeState=clean -X %s.buildDate=1970-01-01T00:00:00Z ' \
      "$package" "$version" "$package" "$package" "${minor%%.*}" "$package" "$package"
  done
}

build_part() { # PART OUT
  local out=$2 kube=$HERE/modules/kube LINK= module file
  case $1 in
    packages)
      mkdir -p "$out/deb" "$out/download"
      apt-get -qq update >&2 # a fresh machine has no lists
      (cd "$out/download" && apt-get -qq download $(part_inputs packages | head -1))
      for file in "$out"/download/*.deb; do dpkg -x "$file" "$out/deb"; done
      rm -r "$out/download"
      # The library path holds inside a node, where the folder is /opt/node/deb.
      printf '#!/bin/sh\nexport LD_LIBRARY_PATH=/opt/node/deb/usr/lib/x86_64-linux-gnu\nexec /opt/node/deb/usr/sbin/nft "$@"\n' >"$out/nft"
      chmod +x "$out/nft" ;;
    small)
      cc -O2 -static -o "$out/nsinit" "$HERE/node/nsinit.c"
      cc -Os -static -s -o "$out/pause" "$HERE/image/pause.c"
      rustc --edition 2024 -O -C strip=symbols -o "$out/forward" "$HERE/node/forward.rs" ;;
    kube)
      LINK=$(kube_link_flags "$(module_version k8s.io/kubernetes)") go_build "$kube" "$out/kube" ./kube
      for file in etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do ln -s kube "$out/$file"; done ;;
    containerd)
      module=github.com/containerd/containerd/v2
      (cd "$kube" && CGO_ENABLED=0 GOFLAGS=-mod=readonly go build "${GO_FLAGS[@]}" -tags "no_zfs no_devmapper no_aufs" \
        -ldflags "-s -w -X $module/version.Version=$(module_version $module) -X $module/version.Package=$module" \
        -o "$out/" $module/cmd/containerd $module/cmd/containerd-shim-runc-v2 $module/cmd/ctr) ;;
    cni)
      module=github.com/containernetworking/plugins
      mkdir -p "$out/cni"
      LINK="-X $module/pkg/utils/buildversion.BuildVersion=$(module_version $module)" go_build "$kube" "$out/cni/" \
        $module/plugins/ipam/host-local $module/plugins/main/bridge $module/plugins/main/loopback $module/plugins/meta/portmap ;;
    coredns) LINK="-X github.com/coredns/coredns/coremain.GitCommit=0" go_build "$kube" "$out/coredns" ./coredns ;;
    runc)
      file=$(part_folder packages)/deb
      (cd "$kube" && CGO_ENABLED=1 GOFLAGS=-mod=readonly PKG_CONFIG_PATH=$file/usr/lib/x86_64-linux-gnu/pkgconfig PKG_CONFIG_SYSROOT_DIR=$file \
        go build -trimpath -buildvcs=false -tags "netgo osusergo seccomp" -ldflags "-s -w -extldflags -static" -o "$out/runc" github.com/opencontainers/runc) ;;
    csi)
      go_build "$HERE/modules/csi" "$out/" tool
      mkdir -p "$out/crd"
      module=$(cd "$HERE/modules/csi" && go list -mod=readonly -m -f '{{.Dir}}' \
        github.com/kubernetes-csi/external-snapshotter/client/v8 github.com/kubernetes-csi/external-snapshot-metadata/client)
      for file in $module; do install -m 644 "$file"/config/crd/*storage*.yaml "$out/crd/"; done ;;
    driver) go_build "$REPO/e2e/csi-driver" "$out/lifeboat-test-csi" . ;;
    s3 | helm) go_build "$HERE/modules/$1" "$out/" tool ;;
  esac
}

# Builds what is missing, and makes $PROGRAMS a folder of links to all of it.
build() {
  local part folder links lock
  needed_tools
  command -v go >/dev/null || PATH=$PATH:/usr/local/go/bin
  [ $# -gt 0 ] || set -- $PARTS
  mkdir -p "$CACHE/programs"
  exec {lock}>"$CACHE/programs/.lock" # tests start API servers at the same time, and each builds what is missing
  flock "$lock"
  for part in "$@"; do
    folder=$(part_folder "$part")
    if [ -d "$folder" ]; then
      touch "$folder"
      continue
    fi
    say "building $part ..."
    rm -rf "$folder.new"
    mkdir -p "$folder.new"
    build_part "$part" "$folder.new"
    mv "$folder.new" "$folder"
    say "built $part"
  done
  links=$CACHE/programs/links-$(for part in $PARTS; do part_folder "$part"; done | sha256sum | cut -c1-16)
  if [ ! -d "$links" ]; then
    rm -rf "$links.new"
    mkdir -p "$links.new"
    for part in $PARTS; do
      folder=$(part_folder "$part")
      [ ! -d "$folder" ] || cp -rs "$folder/." "$links.new/"
    done
    mv "$links.new" "$links"
  fi
  touch "$links"
  ln -sfn "$links" "$PROGRAMS.new"
  mv -T "$PROGRAMS.new" "$PROGRAMS" # at once: others look programs up meanwhile
  # Nobody asked for it for two weeks, on any branch.
  [ -n "${KEEP:-}" ] || find "$CACHE/programs" -mindepth 1 -maxdepth 1 -type d -mtime +14 -exec rm -rf {} +
  exec {lock}>&-
}
