# Joins a control group and a network namespace, then starts the rest as process 1 of a host.
# Arguments: the group's file of processes, the network namespace, and the command.
set -eu
echo $$ > "$1"
netns=$2
shift 2
exec nsenter --net="$netns" unshare --pid --mount --uts --ipc --cgroup --fork --propagation private -- "$@"
