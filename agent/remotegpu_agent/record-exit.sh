#!/bin/sh
# Called by systemd as root when the main process of a task has ended: ExecStopPost=+/bin/sh record-exit.sh DIRECTORY
# The unit vanishes, the agent may be away, the host may be going down: this file is what remains of the exit code.
set -eu
umask 077
cd "$1"
stopping=false
[ -e stop.json ] || [ "$(systemctl is-system-running 2>/dev/null)" != stopping ] || stopping=true
read -r boot_id </proc/sys/kernel/random/boot_id
printf '{"exit_code":"%s","exit_status":"%s","service_result":"%s","boot_id":"%s","at":"%s","host_stopping":%s}\n' \
    "${EXIT_CODE-}" "${EXIT_STATUS-}" "${SERVICE_RESULT-}" "$boot_id" "$(date -u +%Y-%m-%dT%H:%M:%S.%6NZ)" "$stopping" >exit.tmp
sync exit.tmp
mv -T exit.tmp exit.json
sync .
