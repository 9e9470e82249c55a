"""Runs the program as Pulumi's language host does.

`child.py MONITOR ENGINE STACK DRY_RUN PARALLEL` runs it once, in the current folder. `child.py serve` imports the
libraries once, which takes seconds, and then forks a process for each request on its standard input: all that a fork
shares with the next one is what was imported before the first.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import sys
from pathlib import Path

import pulumi.runtime
from pulumi.runtime import Settings, configure

import pulumi

REFUSED = 32  # as the language host says it: the program has told what is wrong


def main(monitor: str, engine: str, stack: str, dry_run: str, parallel: str) -> int:
    program = Path.cwd() / "__main__.py"
    sys.path[0] = str(program.parent)  # the folder of this file is the tests' business
    configure(
        Settings(
            project="remotegpu",
            stack=stack,
            monitor=monitor,
            engine=engine,
            parallel=int(parallel),
            dry_run=dry_run == "True",
            organization="organization",
            root_directory=str(program.parent),
        )
    )
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    work = pulumi.runtime.run_in_stack(lambda: runpy.run_path(str(program), run_name="__main__"))
    try:
        loop.run_until_complete(work)
    except pulumi.RunError as refused:
        print(refused, file=sys.stderr, flush=True)
        return REFUSED
    return 0


def serve() -> None:
    import pulumi_alicloud
    import pulumi_aws
    import pulumi_cloudflare
    from tencentcloud_iac_pulumi import dnspod, security

    _ = (
        pulumi_cloudflare.DnsRecordArgs,
        pulumi_aws.ec2.SecurityGroup,
        pulumi_aws.route53.Record,
        pulumi_aws.vpc.SecurityGroupIngressRule,
        pulumi_alicloud.ecs.SecurityGroup,
        pulumi_alicloud.dns.AlidnsRecord,
        dnspod.Record,
        security.GroupRuleSet,
    )  # whatever is loaded at first use is loaded now
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run(request: dict[str, object]) -> None:
    """In the forked process, which ends here."""
    code = 1
    try:
        said = os.open(str(request["told"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        os.environ.update(request["environment"])  # type: ignore[call-overload]
        os.chdir(str(request["folder"]))
        code = main(*request["argv"])  # type: ignore[misc]
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(code)


if sys.argv[1] == "serve":
    serve()
else:
    sys.exit(main(*sys.argv[1:]))
