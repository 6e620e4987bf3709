# Says `frozen` as soon as hold.sh says that the application is at rest, and hands on to it the word to let go, which is a line
# on standard input. $1 token, $2 until when (as hold.sh has it). Ends when nothing is held any more.
token=$1 end=$2
clock() { read -r up rest </proc/uptime && now=${up%.*}${up#*.}; }
case $end in +*) clock && end=$((now + end)) ;; esac
is() {
  for folder in /dev/shm /tmp /var/tmp /run; do
    state=$folder/.lifeboat-$token
    [ ! -e "$state.$1" ] || return 0
  done
  return 1
}
exec 3<&0 </dev/null
{ read -r word <&3 && is held && : >"$state.release"; } >/dev/null 2>&1 &
ear=$!
exec 3<&-
until is frozen; do
  clock && [ "$now" -lt "$end" ] || { kill "$ear" 2>/dev/null; exit 93; }
  sleep 0.01 2>/dev/null || sleep 1
done
echo frozen
while is held; do sleep 0.05 2>/dev/null || sleep 1; done
kill "$ear" 2>/dev/null
exit 0
