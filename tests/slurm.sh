#!/usr/bin/env bash
# A Slurm of one node for the tests, from Debian's packages, as root; not a configuration for real clusters.
#
#   tests/slurm.sh up       install what is missing, start munge, slurmctld and slurmd, wait until the node is idle
#   tests/slurm.sh down     stop what `up` started
#
# SLURM_HOME: where its state stands (default: correctnet-slurm in the temporary folder). It has two partitions, `main`
# and `gpu`, and one GPU that is none: a file that the scheduler counts. There is no accounting; jobs that end are
# written to $SLURM_HOME/log/jobs.txt.
set -euo pipefail

home=${SLURM_HOME:-${TMPDIR:-/tmp}/correctnet-slurm}
# Snakemake's job steps drop every SLURM_ variable, so the configuration has to stand where Slurm looks by itself.
etc=/etc/slurm

running() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

stop() { # the process whose number a file holds, and wait until it is gone
    running "$1" || return 0
    kill "$(cat "$1")"
    for _ in $(seq 100); do
        running "$1" || return 0
        sleep 0.1
    done
    kill -9 "$(cat "$1")"
}

install_slurm() {
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
    # Without this Debian's packages start their services at once, and fail where there is no systemd.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made=yes
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >"$home/apt.log" 2>&1 ||
        { tail -5 "$home/apt.log" >&2; exit 1; }
    [ -z "$made" ] || rm "$policy"
}

configure() {
    local host memory
    host=$(hostname -s)
    memory=$(slurmd -C | sed -n 's/.*RealMemory=\([0-9]*\).*/\1/p')
    mkdir -p "$home"/{log,run,state,spool}
    : >"$home/gpu0"
    cat >"$home/correctnet-slurm.conf" <<CONFIGURATION
ClusterName=correctnet-test
SlurmctldHost=$host
SlurmctldPort=26817
SlurmdPort=26818
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd.log
JobCompType=jobcomp/filetxt
JobCompLoc=$home/log/jobs.txt
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1
# A job over its time limit gets SIGTERM, and SIGKILL this many seconds later.
KillWait=5
# How long squeue remembers a job that has ended.
MinJobAge=3600
ReturnToService=2
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$((memory * 9 / 10)) Gres=gpu:1 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
PartitionName=gpu Nodes=$host MaxTime=INFINITE State=UP
CONFIGURATION
    echo "NodeName=$host Name=gpu File=$home/gpu0" >"$home/correctnet-gres.conf"
    mkdir -p "$etc"
    for file in slurm.conf gres.conf; do
        if { [ -e "$etc/$file" ] || [ -L "$etc/$file" ]; } && [ "$(readlink "$etc/$file")" != "$home/correctnet-$file" ]; then
            echo "$etc/$file is there already: this machine has a Slurm, and it is left alone" >&2
            exit 1
        fi
        ln -sfn "$home/correctnet-$file" "$etc/$file"
    done
}

# What a test run that was killed has left; a configuration that has another name is somebody else's.
clean() {
    local before
    before=$(readlink "$etc/slurm.conf" || true)
    if [ "$(basename "$before")" = correctnet-slurm.conf ]; then
        (home=$(dirname "$before") && down)
    fi
}

up() {
    clean
    mkdir -p "$home"
    install_slurm
    configure
    install -d -o munge -g munge -m 755 /run/munge
    [ -s /etc/munge/munge.key ] || mungekey --create
    chown -R munge:munge /etc/munge /var/lib/munge /var/log/munge
    if ! munge -n </dev/null >/dev/null 2>&1; then
        runuser -u munge -- /usr/sbin/munged --pid-file=/run/munge/munged.pid
        : >"$home/run/munged"
    fi
    running "$home/run/slurmctld.pid" || slurmctld
    running "$home/run/slurmd.pid" || slurmd
    SECONDS=0
    while [ $SECONDS -lt 60 ]; do
        [ "$(timeout 3 sinfo -h -p main -o %t 2>/dev/null || true)" != idle ] || exit 0
        sleep 0.2
    done
    echo "the node is not idle after a minute; $home/log says:" >&2
    tail -q -n 3 "$home"/log/slurm*.log >&2
    exit 1
}

down() {
    stop "$home/run/slurmd.pid"
    stop "$home/run/slurmctld.pid"
    if [ -e "$home/run/munged" ]; then stop /run/munge/munged.pid; fi
    for file in slurm.conf gres.conf; do
        if [ "$(readlink "$etc/$file" 2>/dev/null)" = "$home/correctnet-$file" ]; then rm "$etc/$file"; fi
    done
    rm -rf "$home"
}

case ${1:-} in
    up) up ;;
    down) down ;;
    *) sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
