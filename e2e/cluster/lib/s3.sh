# s3.sh: an S3 server (versitygw, a folder a bucket) outside the nodes, in the network of the bridge.
s3_start() {
  local folder=$STATE/s3
  is_running switch || die "the cluster does not run; start it with \`up\`"
  mkdir -p "$folder"/{data,iam,versions}
  if [ ! -e "$folder/credentials" ]; then
    (
      umask 077
      printf 'export REPOSITORY_ENDPOINT=http://%s\nexport AWS_ACCESS_KEY_ID=%s\nexport AWS_SECRET_ACCESS_KEY=%s\n' \
        "$S3_ADDRESS" "test$(openssl rand -hex 6)" "$(openssl rand -hex 20)" >"$folder/credentials"
    )
  fi
  is_running s3 && return
  (
    # shellcheck disable=SC1091
    . "$folder/credentials"
    ROOT_ACCESS_KEY=$AWS_ACCESS_KEY_ID ROOT_SECRET_KEY=$AWS_SECRET_ACCESS_KEY setsid nohup nsenter -t "$(pid_of switch)" -n \
      "$PROGRAMS/versitygw" --port "$S3_ADDRESS" --health /health --quiet --iam-dir "$folder/iam" \
      posix --versioning-dir "$folder/versions" "$folder/data" >>"$STATE/log/s3.log" 2>&1 </dev/null &
    echo $! >"$STATE/run/s3.pid"
  )
  wait_for "S3 server" "$STATE/log/s3.log" in_switch python3 -c "import urllib.request; urllib.request.urlopen('http://$S3_ADDRESS/health', timeout=2)"
}

s3_stop() {
  kill_now s3
  rm -f "$STATE/run/s3.pid"
}

bucket_folder() {
  case $1 in *[!a-z0-9.-]* | "" | .*) die "\`$1\` is no name of a bucket" ;; esac
  echo "$STATE/s3/data/$1"
}

s3() {
  local folder
  case ${1:-} in
    start) s3_start ;;
    stop) s3_stop ;;
    credentials) echo "$STATE/s3/credentials" ;;
    bucket)
      folder=$(bucket_folder "${2:-}")
      mkdir -p "$folder" ;;
    remove-bucket)
      folder=$(bucket_folder "${2:-}")
      # Old versions lie elsewhere; a new bucket of this name must not show them.
      rm -rf "$folder" "$STATE/s3/versions/${2:?}" ;;
    folder) bucket_folder "${2:-}" ;; # where the objects of a bucket lie, to look at or to damage
    *) die "s3 start|stop|credentials|bucket NAME|remove-bucket NAME|folder NAME" ;;
  esac
}
