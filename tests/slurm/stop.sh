#!/usr/bin/env bash
# Ends what start.sh FOLDER has started, jobs first.
set -u
folder=${1:?usage: stop.sh FOLDER}
export SLURM_CONF=$folder/slurm.conf
scancel --user="$(id -un)" 2>/dev/null
for _ in $(seq 60); do
  [ -z "$(squeue --noheader 2>/dev/null)" ] && break
  sleep 1
done
for name in slurmd slurmctld munged; do
  [ -f "$folder/$name.pid" ] && kill "$(cat "$folder/$name.pid")" 2>/dev/null
done
for name in slurmd slurmctld munged; do
  for _ in $(seq 30); do
    [ -f "$folder/$name.pid" ] || break
    sleep 1
  done
done
exit 0
