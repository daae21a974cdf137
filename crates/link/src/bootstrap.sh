# What runs on a host before the agent does: it finds the cached agent or receives it, becomes root where asked, and starts it.
# Arguments: the BLAKE3 hash of the agent, its size in bytes, and whether it must be root (always or never).
# It speaks lines that begin with GREENLIGHT on its standard output; after READY the output is the agent's.
#
# The account's login shell passes this on to /bin/sh as one word in single quotes, whatever shell that is (csh and fish
# too): so no single quote, no backslash, no exclamation mark before a word, and every line ends so that it can be joined
# to the next by a space. Comments are removed before.
set -f;
umask 077;
hash=$1; size=$2; root=$3;
name=agent-$hash;
user_id=$(id -u);
part=;
say() { echo GREENLIGHT $*; };
forget() { [ -z "$part" ] || rm -f "$part"; };
refuse() { say REFUSED $*; exit 1; };
trap forget EXIT;
trap "exit 1" HUP INT TERM;

# A directory under /tmp is trusted only when it is really a directory, and ours: nobody else can then change what is in it.
is_ours() { [ -d "$1" ] && [ ! -L "$1" ] && [ -O "$1" ]; };
holds() {
  is_ours "$1" && [ -x "$1/$name" ] && [ -O "$1/$name" ] && [ "$(wc -c < "$1/$name")" -eq "$size" ];
};
# Whether an agent could be placed and started there: a probe finds out about read-only, full and noexec file systems.
takes() {
  mkdir -p "$1" 2>/dev/null; is_ours "$1" && chmod 700 "$1" &&
  part="$1/$name.$$.part" &&
  ( echo : > "$part" && chmod 700 "$part" && "$part" ) < /dev/null > /dev/null 2>&1 || { forget; part=; return 1; };
};

home=${XDG_CACHE_HOME:-${HOME:-/nonexistent}/.cache}/greenlight;
shared=/tmp/greenlight-$user_id;
if holds "$home"; then directory=$home;
elif holds "$shared"; then directory=$shared;
else
  if takes "$home"; then directory=$home;
  elif takes "$shared"; then directory=$shared;
  else refuse room "neither $home nor $shared can be written to and executed from"; fi;
  say NEED $(uname -s) $(uname -m);
  problem=$(head -c "$size" 2>&1 > "$part") || refuse room "$directory: $problem";
  [ "$(wc -c < "$part")" -eq "$size" ] || refuse room "$directory: the agent did not arrive whole";
  chmod 700 "$part";
  sync "$part" 2>/dev/null;
  problem=$(mv -f "$part" "$directory/$name" 2>&1) || refuse room "$problem";
  part=;
  find "$directory" -name "agent-*" -type f -mtime +30 -exec rm -f {} + 2>/dev/null;
fi;
agent=$directory/$name;
# The time of last use is what removal goes by.
touch -c "$agent";

if [ "$root" = always ] && [ "$user_id" -ne 0 ]; then
  problem=$(sudo -n true 2>&1 < /dev/null) || problem=$(sudo -n -l -- "$agent" agent 2>&1 < /dev/null) || refuse sudo "$problem";
  say READY;
  exec sudo -n -- "$agent" agent;
fi;
say READY;
exec "$agent" agent;
