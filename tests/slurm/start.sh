#!/usr/bin/env bash
# Starts a Slurm of one node, this machine, with all of its state in FOLDER; prints the lines that a
# shell needs to talk to it. Ends with stop.sh FOLDER.
#
#     eval "$(tests/slurm/start.sh /tmp/slurm)"; sinfo; tests/slurm/stop.sh /tmp/slurm
#
# It installs nothing: on Debian, apt-get install slurmctld slurmd slurm-client munge.
set -eu
folder=${1:?usage: start.sh FOLDER}
stop=$(cd "$(dirname "$0")" && pwd)/stop.sh
export PATH=$PATH:/usr/sbin:/sbin
missing=
for tool in slurmctld slurmd sbatch munged; do
  command -v "$tool" >/dev/null || missing="$missing $tool"
done
if [ -n "$missing" ]; then
  echo "start.sh: missing:$missing; install them with: apt-get install slurmctld slurmd slurm-client munge" >&2
  exit 1
fi
mkdir -p "$folder"/{state,spool,munge}
folder=$(cd "$folder" && pwd)
trap '[ $? = 0 ] || "$stop" "$folder"' EXIT
host=$(hostname -s)
user=$(id -un)
read -r port node_port < <(python3 -c '
import socket
sockets = [socket.socket() for _ in range(2)]
for one in sockets:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in sockets))')

# Two partitions of the same node: jobs in `urgent` have those in `normal` requeued. It has two CPUs,
# whatever the machine has.
cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
ReturnToService=2
SlurmctldTimeout=3600
SlurmdTimeout=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2 State=UP
CONF
cat >"$folder/cgroup.conf" <<CONF
CgroupPlugin=cgroup/v1
CgroupAutomount=no
CONF

head -c 1024 /dev/urandom >"$folder/munge/key"
chmod 600 "$folder/munge/key"
munged --force --key-file "$folder/munge/key" --socket "$folder/munge/socket" \
  --pid-file "$folder/munged.pid" --log-file "$folder/munged.log" --seed-file "$folder/munge/seed" >&2
export SLURM_CONF=$folder/slurm.conf
slurmctld -c
slurmd
for _ in $(seq 120); do
  case $(sinfo --noheader --format=%T 2>/dev/null | head -1) in
    idle | mixed | allocated)
      echo "export SLURM_CONF=$SLURM_CONF"
      exit 0
      ;;
  esac
  sleep 1
done
echo "start.sh: the node did not come up; see $folder/slurmctld.log and $folder/slurmd.log" >&2
exit 1
