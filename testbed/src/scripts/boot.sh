# Process 1 of a host: makes the root, moves into it, and becomes the host's init.
# Arguments: host name, base root, directory of the host's disk, kind of init.
# Prints "ready PID" (as the machine numbers processes) when nothing but the init itself can fail any more.
set -eu
name=$1 base=$2 disk=$3 init=$4
root=$disk/root

# /proc is still the machine's, so this is the number that the machine knows this process by.
read -r pid _ < /proc/self/stat

mount -t overlay overlay -o "lowerdir=$base,upperdir=$disk/upper,workdir=$disk/work" "$root"

mount -t proc -o nosuid,nodev,noexec proc "$root/proc"
# The knobs of the machine's kernel are not the host's to turn.
mount -o bind "$root/proc/sys" "$root/proc/sys"
mount -t tmpfs -o mode=755,size=256m run "$root/run"
# Each boot of a host is one of its own, although the machine was booted once.
cat /proc/sys/kernel/random/uuid > "$root/run/boot_id"
mount -o bind "$root/run/boot_id" "$root/proc/sys/kernel/random/boot_id"
mount -o remount,ro,bind "$root/proc/sys"
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs "$root/sys"
mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 "$root/sys/fs/cgroup"

mount -t tmpfs -o mode=755,size=1m dev "$root/dev"
mknod -m 666 "$root/dev/null" c 1 3
mknod -m 666 "$root/dev/zero" c 1 5
mknod -m 666 "$root/dev/full" c 1 7
mknod -m 666 "$root/dev/random" c 1 8
mknod -m 666 "$root/dev/urandom" c 1 9
mknod -m 666 "$root/dev/tty" c 5 0
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777,size=256m shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
ln -s fd/0 "$root/dev/stdin"
ln -s fd/1 "$root/dev/stdout"
ln -s fd/2 "$root/dev/stderr"

mkdir -p "$root/run/sshd" "$root/run/lock"
hostname "$name"

cd "$root"
pivot_root . mnt
cd /
umount -l /mnt

echo "ready $pid"
# From here on all output is the host's console.
exec >&2
path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
case $init in
    systemd) exec env -i PATH=$path LANG=C.UTF-8 container=bed /lib/systemd/systemd --system ;;
    supervisord) exec env -i PATH=$path LANG=C.UTF-8 HOME=/root tini -- supervisord -n -c /etc/supervisor/supervisord.conf ;;
    none) exec env -i PATH=$path LANG=C.UTF-8 HOME=/root tini -- /usr/sbin/sshd -D -e ;;
esac
