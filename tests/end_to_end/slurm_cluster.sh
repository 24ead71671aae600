#!/usr/bin/env bash
# A Slurm cluster on one machine: a controller, and nodes that have a network, a name, a scratch folder and shared memory
# of their own. Run as the first process of new network, name, mount and process namespaces; when it ends, so does all.
#
#   slurm_cluster.sh FOLDER NODES CPUS
set -euo pipefail
folder=$1 nodes=$2 cpus=$3
mkdir -p "$folder/state"

ip link set lo up
ip link add bridge type bridge
ip address add 10.77.0.1/24 dev bridge
ip link set bridge up
{
  echo "127.0.0.1 localhost"
  echo "10.77.0.1 controller"
  for ((i = 1; i <= nodes; i++)); do echo "10.77.0.1$i n$i"; done
} >"$folder/hosts"
mount --bind "$folder/hosts" /etc/hosts
hostname controller

(umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --log-file="$folder/munge.log" \
  --pid-file="$folder/munge.pid" --seed-file="$folder/munge.seed"

# Without cgroups Slurm finds a job's processes by their parents alone: none that has left its parent is ended by it.
cat >"$folder/slurm.conf" <<END
ClusterName=test
SlurmctldHost=controller(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n/spool
SlurmctldPidFile=$folder/controller.pid
SlurmdPidFile=$folder/%n/slurmd.pid
SlurmctldLogFile=$folder/controller.log
SlurmdLogFile=$folder/%n/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
KillWait=10
MinJobAge=3600
NodeName=n[1-$nodes] NodeAddr=10.77.0.1[1-$nodes] CPUs=$cpus RealMemory=8000 Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=10
END
echo "NodeName=n[1-$nodes] Name=gpu File=/dev/zero" >"$folder/gres.conf"

slurmctld -f "$folder/slurm.conf" -c -D >"$folder/controller.out" 2>&1 &
for ((i = 1; i <= nodes; i++)); do
  own=$folder/n$i
  mkdir -p "$own/spool" "$own/scratch"
  # shellcheck disable=SC2016 # it is the new shell's to expand
  unshare --net --uts --mount bash -c '
    hostname "n$1"
    mount --bind "$2/scratch" /var/tmp
    mount -t tmpfs memory /dev/shm
    ip link set lo up
    echo "$BASHPID" >"$2/pid"
    until ip address add "10.77.0.1$1/24" dev "inner$1" 2>/dev/null; do sleep 0.05; done
    ip link set "inner$1" up
    exec slurmd -D -N "n$1" -f "$3"' node "$i" "$own" "$folder/slurm.conf" >"$own/slurmd.out" 2>&1 &
  until [ -s "$own/pid" ]; do sleep 0.05; done
  ip link add "outer$i" type veth peer name "inner$i"
  ip link set "inner$i" netns "$(<"$own/pid")"
  ip link set "outer$i" master bridge up
done
wait
