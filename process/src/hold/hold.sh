# Runs a command that holds an application at rest, and lets it go at the earliest of: released, the end, the loss of
# whoever started this. Nothing outside this container is needed for that.
# $1 token, $2 end and $3 grace in hundredths of a second (since boot, or from now with a `+`; after the end), then the
# command: it prints a line `frozen` when the application is at rest, and releases it at the end of its standard input.
token=$1 end=$2 grace=$3
shift 3
# Sets `now` without a process of its own: one may not be had when the application has used up all.
clock() { read -r up rest </proc/uptime && now=${up%.*}${up#*.}; }
case $end in +*) clock && end=$((now + end)) ;; esac
state=
for folder in /dev/shm /tmp /var/tmp /run; do
  if (echo "$end" >"$folder/.lifeboat-$token.held") 2>/dev/null; then
    state=$folder/.lifeboat-$token
    break
  fi
done
[ -n "$state" ] || { echo "none of /dev/shm, /tmp, /var/tmp and /run can be written to"; exit 91; }
pause() { sleep 0.01 2>/dev/null || sleep 1; }
{
  # Who started this is gone when this shell is: the runtime ends it with the connection.
  while [ -e "$state.held" ] && [ ! -e "$state.release" ] && kill -0 $$ 2>/dev/null && clock; do
    [ "$now" -lt "$end" ] || { : >"$state.late"; break; }
    pause
  done
  exec >/dev/null
  clock
  until=$((now + grace))
  while [ -e "$state.held" ] && clock; do
    [ "$now" -lt "$until" ] || { kill -9 "$(cat "$state.pid")" 2>/dev/null; break; }
    pause
  done
} | {
  exec 3<&0
  "$@" <&3 2>&1 &
  echo $! >"$state.pid"
  wait $!
  echo "lifeboat-exit $?"
} | {
  code=92 before='' last=''
  while IFS= read -r line; do
    case $line in
      frozen) : >"$state.frozen" ;;
      "lifeboat-exit "*) code=${line#* }; break ;;
      ?*) before=$last last=$line ;;
    esac
  done
  late=
  [ ! -e "$state.late" ] || late=lifeboat-late
  rm -f "$state.frozen" "$state.release" "$state.late" "$state.pid" "$state.held"
  printf '%s\n' "$late" "$before" "$last"
  [ "$code" -eq 0 ] || printf '%s\n' "$before" "$last" >&2
  exit "$code"
}
