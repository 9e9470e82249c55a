"""Cleaning a host after a lease, in order. Each step looks, acts, and looks again; its result is the last look.

All look once before the first of them acts: one step often takes away what another is there for, and the report shall
say what the tenant has left. The order matters: what the loader would put into every program goes before any program is
started; the door closes first; what would start again ends before what runs; connections end with their processes;
mounts go before the folders they hide; the files of accounts are root's again before what the tenant owns is removed;
and the account goes last, for its name and uid tell what is the tenant's.

Closing a lease at its end is elsewhere: here the lease is over, and its data goes for good. `verify.py` looks once
more, with other eyes.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

from remotegpu_agent.baseline import agent_version
from remotegpu_agent.cleaning import (
    access,
    containers,
    data,
    ipc,
    kernel,
    keys,
    network,
    processes,
    restored,
    schedules,
    settings,
)
from remotegpu_agent.cleaning import scope as scopes
from remotegpu_agent.cleaning.scope import Refused
from remotegpu_agent.cleaning.step import Step
from remotegpu_agent.observe import docker
from remotegpu_agent.observe.tools import read_text

__all__ = ["STEPS", "Refused", "clean"]

STEPS: tuple[Step, ...] = (
    Step("loader", restored.look_for_changes("loader"), restored.put_back_and(restored.rebuild_loader_cache)),
    Step("access", access.look_for_door, access.close_door),
    Step("cron", restored.look_for_changes("cron"), restored.put_back),
    Step("at_jobs", restored.look_for_changes("at_jobs"), restored.put_back),
    Step("system_units", restored.look_for_units, restored.put_back_units),
    Step("linger", schedules.look_for_linger, schedules.end_linger),
    Step("tasks", processes.look_for_tasks, processes.end_tasks),
    Step("user_units", schedules.look_for_user_units, schedules.end_user_units),
    Step("containers", containers.look_for("containers", docker.containers), containers.remove_those_of_the_lease),
    Step("processes", processes.look_for_processes, processes.end_processes, acts_anyway=True),
    Step("connections", processes.look_for_connections, processes.end_connections),
    Step("gpu_holders", processes.look_for_gpu_holders, processes.end_nothing),
    Step("volumes", containers.look_for("volumes", docker.volumes), containers.remove_those_of_the_lease),
    Step("images", containers.look_for("images", docker.images), containers.remove_those_of_the_lease),
    Step("networks", containers.look_for("networks", docker.networks), containers.remove_those_of_the_lease),
    Step("mounts", data.look_for_mounts, data.unmount),
    Step("swap", data.look_for_swap, data.end_swap),
    Step("sysv_ipc", ipc.look_for_sysv, ipc.remove_sysv),
    Step("posix_queues", ipc.look_for_queues, ipc.remove_queues),
    Step("kernel_keys", keys.look_for_keys, keys.clear_keyrings, acts_anyway=True),
    Step("temporary_files", data.look_for_temporary_files, data.remove_paths, streams=True),
    Step("runtime_folder", data.look_for_runtime_folder, data.remove_paths),
    Step("home", data.look_for_home, data.remove_paths),
    Step("records", data.look_for_records, data.remove_paths),
    Step("users", restored.look_for_users, restored.put_back_accounts),
    Step("groups", restored.look_for_groups, restored.put_back_accounts),
    Step("special_files", restored.look_for_special_files, restored.disarm_special_files, streams=True),
    Step("owned_files", data.look_for_files, data.remove_files, streams=True),
    Step("ssh_keys", restored.look_for_changes("ssh_keys"), restored.put_back),
    Step("sudoers", restored.look_for_changes("sudoers"), restored.put_back),
    Step("pam", restored.look_for_changes("pam"), restored.put_back),
    Step("shell_profiles", restored.look_for_changes("shell_profiles"), restored.put_back),
    Step("local_programs", restored.look_for_changes("local_programs"), restored.put_back),
    Step("sshd", restored.look_for_changes("sshd"), restored.put_back_and(restored.reload_sshd)),
    Step("hosts", restored.look_for_changes("hosts"), restored.put_back),
    Step("etc", settings.look_for_settings, settings.put_back_settings),
    Step("firewall", network.look_for_rules, network.put_back_rules),
    Step("kernel_modules", kernel.look_for_modules, kernel.put_back_programs),
    Step("listening_ports", network.look_for_ports, processes.end_nothing),
    Step("account", restored.look_for_account, restored.remove_account),
)


def clean(args: dict[str, Any], *, on_step: Callable[[dict[str, Any]], None] = lambda _step: None) -> dict[str, Any]:
    """Clean up after the lease that `clean_args` names, and report it as `clean_result`.

    Steps take seconds; `on_step` hears of each as it ends. May be repeated: what is gone already is no error. Raises
    Refused, with nothing touched, when the order does not fit this host.
    """
    started_at = _now()
    scope = scopes.of(args)
    _ = scope.uids, scope.subordinate_uids  # as they are now: the steps remove the accounts that tell them
    loader, *others = STEPS  # the looks of the others start programs
    steps = [loader.run(scope, loader.first_look(scope))]
    before = {step.id: step.first_look(scope) for step in others}
    for step in others:
        on_step(steps[-1])
        steps.append(step.run(scope, before[step.id]))
    on_step(steps[-1])
    return {
        "schema": 1,
        "passed": all(step["result"] in ("passed", "not_applicable") for step in steps),
        "steps": steps,
        "boot_id": (read_text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "agent_version": agent_version(),
        "started_at": started_at,
        "ended_at": _now(),
    }


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
