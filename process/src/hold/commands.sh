# A pair of commands as one that holds: freezes, says so, and thaws at the end of its standard input, also when the
# freeze fails or is given up. $1 freeze and $2 thaw as words of the shell; each may be empty.
freeze=$1 thaw=$2 work='' gone='' code=0
exec 3<&0 </dev/null
{ cat <&3; kill -USR1 $$; } >/dev/null 2>&1 &
watch=$!
exec 3<&-
trap 'gone=1; [ -z "$work" ] || kill "$work" 2>/dev/null' USR1
if [ -n "$freeze" ]; then
  eval "$freeze &"
  work=$!
  [ -z "$gone" ] || kill "$work" 2>/dev/null
  wait "$work"
  code=$?
fi
trap : USR1
if [ "$code" -eq 0 ] && [ -z "$gone" ]; then
  echo frozen
  wait "$watch"
fi
tries=0
until [ -z "$thaw" ] || eval "$thaw"; do
  tries=$((tries + 1))
  [ "$tries" -lt 3 ] || exit 90
  sleep 1
done
exit "$code"
